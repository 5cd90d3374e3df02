#!/usr/bin/env python3
"""Times qrmc's perplexity against PyTorch's, interleaved, on the same tokens and cores.

    python benches/perplexity.py --qrmc target/release/qrmc --hf FOLDER --model MODEL --data TEXT_OR_FOLDER

FOLDER is the model as transformers loads it, MODEL the same for qrmc (a GGUF file, say); needs torch, transformers and
tokenizers. Prints seconds a window of both, their perplexities, and the median ratio of the pairs.
"""
import argparse
import json
import statistics
import subprocess
import time

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
p.add_argument("--qrmc", required=True)
p.add_argument("--hf", required=True)
p.add_argument("--model", required=True)
p.add_argument("--data", required=True, help="what `qrmc eval --data` takes")
p.add_argument("--text", required=True, help="the same text, joined, as a file")
p.add_argument("--windows", type=int, default=2)
p.add_argument("--ctx", type=int, default=2048)
p.add_argument("--repeats", type=int, default=3)
p.add_argument("--threads", type=int, default=2)
a = p.parse_args()

torch.set_num_threads(a.threads)
ids = Tokenizer.from_file(f"{a.hf}/tokenizer.json").encode(open(a.text, newline="").read(), add_special_tokens=False).ids
model = AutoModelForCausalLM.from_pretrained(a.hf, dtype=torch.float32).eval()


def torch_run():
    start, total, count = time.perf_counter(), 0.0, 0
    with torch.inference_mode():
        for w in range(a.windows):
            x = torch.tensor([ids[w * a.ctx : (w + 1) * a.ctx]])
            logp = model(x).logits[0, :-1].log_softmax(-1)
            total -= logp.gather(-1, x[0, 1:, None]).double().sum().item()
            count += a.ctx - 1
    return (time.perf_counter() - start) / a.windows, float(torch.tensor(total / count).exp())


def qrmc_run():
    args = [a.qrmc, "eval", a.model, "--data", a.data, "--ctx", str(a.ctx), "--windows", str(a.windows)]
    out = subprocess.run(args + ["--threads", str(a.threads), "--json"], capture_output=True, check=True, text=True)
    v = json.loads(out.stdout)
    return v["seconds"] / a.windows, v["perplexity"]


ratios = []
for i in range(a.repeats):
    (t, tp), (q, qp) = torch_run(), qrmc_run()
    ratios.append(q / t)
    print(f"run {i}: torch {t:.2f} s/window (perplexity {tp:.4f}), qrmc {q:.2f} s/window ({qp:.4f}), ratio {q / t:.3f}")
print(f"median ratio qrmc / torch: {statistics.median(ratios):.3f}")
