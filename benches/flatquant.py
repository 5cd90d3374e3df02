#!/usr/bin/env python3
"""Times a FlatQuant training step of qrmc against the same step in eager PyTorch, interleaved, on the same cores.

    python benches/flatquant.py --qrmc target/release/qrmc --calib TEXT [--tokenizer FOLDER]

Makes a one-layer checkpoint of SmolLM2-135M's shape with random weights, and has qrmc train it with `affine` twice, with
few and with more epochs; the difference of the times, over the difference of the steps, is the time of a step, without
reading, measuring and writing. The opponent is benches/flatquant_step.py. Needs torch and safetensors.
"""
import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import save_file

here = pathlib.Path(__file__).parent
p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
p.add_argument("--qrmc", required=True)
p.add_argument("--calib", default=str(here / "../tests/data/wikitext-2-train-sample.txt"))
p.add_argument("--tokenizer", default=str(here / "../tests/data/tiny-qwen2-wiki"), help="folder of a tokenizer")
p.add_argument("--repeats", type=int, default=3)
p.add_argument("--threads", type=int, default=2)
a = p.parse_args()

HIDDEN, INTER, HEADS, KV, HEAD, VOCAB = 576, 1536, 9, 3, 64, 4096
EPOCHS, WINDOWS, BATCH = (2, 8), 16, 4


def checkpoint(folder):
    torch.manual_seed(0)
    w = lambda *s: torch.randn(*s) / s[-1] ** 0.5
    t = {"model.embed_tokens.weight": w(VOCAB, HIDDEN), "lm_head.weight": w(VOCAB, HIDDEN),
         "model.norm.weight": torch.ones(HIDDEN)}
    layer = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV * HEAD, HIDDEN),
             "self_attn.v_proj": (KV * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
             "mlp.gate_proj": (INTER, HIDDEN), "mlp.up_proj": (INTER, HIDDEN), "mlp.down_proj": (HIDDEN, INTER)}
    for name, shape in layer.items():
        t[f"model.layers.0.{name}.weight"] = w(*shape)
    for name in ("input_layernorm", "post_attention_layernorm"):
        t[f"model.layers.0.{name}.weight"] = torch.ones(HIDDEN)
    save_file(t, f"{folder}/model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
              "intermediate_size": INTER, "num_attention_heads": HEADS, "num_key_value_heads": KV,
              "num_hidden_layers": 1, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
              "max_position_embeddings": 2048, "tie_word_embeddings": False, "hidden_act": "silu",
              "torch_dtype": "float32"}
    json.dump(config, open(f"{folder}/config.json", "w"))
    for f in pathlib.Path(a.tokenizer).glob("tokenizer*"):
        shutil.copy(f, folder)


def qrmc_step(model, folder):
    seconds = []
    for epochs in EPOCHS:
        out = f"{folder}/out"
        shutil.rmtree(out, ignore_errors=True)
        args = [a.qrmc, "--json", "compile", model, "--pass", f"flatquant{{epochs={epochs}}}", "--calib", a.calib,
                "--nsamples", str(WINDOWS), "--seqlen", "512", "--no-check", "--threads", str(a.threads), "-o", out]
        said = subprocess.run(args, capture_output=True, text=True)
        if said.returncode:
            sys.exit(said.stderr)
        passes = json.loads(said.stdout)["passes"]
        seconds.append(next(x["seconds"] for x in passes if x["pass"].startswith("affine")))
    return 1e3 * (seconds[1] - seconds[0]) / ((EPOCHS[1] - EPOCHS[0]) * WINDOWS // BATCH)


def torch_step():
    args = [sys.executable, str(here / "flatquant_step.py"), "--threads", str(a.threads), "--steps", "10"]
    return json.loads(subprocess.run(args, capture_output=True, check=True, text=True).stdout)["median_ms"]


with tempfile.TemporaryDirectory() as folder:
    model = f"{folder}/model"
    pathlib.Path(model).mkdir()
    checkpoint(model)
    ratios = []
    for i in range(a.repeats):
        t, q = torch_step(), qrmc_step(model, folder)
        ratios.append(q / t)
        print(f"run {i}: torch {t:.0f} ms a step, qrmc {q:.0f} ms, ratio {q / t:.3f}")
    print(f"median ratio qrmc / torch: {statistics.median(ratios):.3f}")
