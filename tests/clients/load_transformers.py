"""transformers with compressed-tensors (and gptqmodel, where it is installed)."""

import importlib.metadata
import os

# Layers that are compiled at the first use would only cost time here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

VERSION = f"transformers {transformers.__version__}"
for package in ("compressed-tensors", "gptqmodel", "optimum"):
    try:
        VERSION += f" + {package} {importlib.metadata.version(package)}"
        # Once here, not in the process of each case.
        importlib.import_module("optimum.gptq" if package == "optimum" else package.replace("-", "_"))
    except importlib.metadata.PackageNotFoundError:
        pass
TARGET = "transformers"
FORK = False


def modes(case):
    """Ways to load: compressed-tensors layers de-quantize at the first use, or while they are loaded."""
    # With the second, inputs are not rounded: with one scale for all tokens that is another model.
    both = case["format"] == "compressed-tensors" and "static" not in case["scheme"]
    return ["", "dequantize"] if both else [""]


class Client:
    """An export on the CPU in the type that its config.json names."""

    def __init__(self, folder, mode):
        more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if mode else {}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu", **more).eval()
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        # compressed-tensors de-quantizes all layers when the model first runs.
        self.top([0], 0)

    def matrix(self, name, unit):
        """A layer's weight, or, where it holds codes, what it multiplies one-hot inputs of this size by."""
        layer = self.model.get_submodule(name)
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            return weight.detach()
        inputs = unit * torch.eye(layer.in_features, dtype=self.model.dtype)
        bias, layer.bias = getattr(layer, "bias", None), None
        with torch.inference_mode():
            out = layer(inputs)
        layer.bias = bias
        return out.T / unit

    def top(self, ids, start, count=20):
        """The likeliest tokens and their log-probabilities from a position on."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([ids])).logits[0, start:]
        values, tokens = logits.float().log_softmax(-1).topk(count)
        return [list(zip(t, v)) for t, v in zip(tokens.tolist(), values.tolist())]

    def generate(self, ids, count):
        """Greedy tokens."""
        tokens = torch.tensor([ids])
        mask = torch.ones_like(tokens)
        with torch.inference_mode():
            out = self.model.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, num_beams=1)
        return out[0, len(ids) :].tolist()
