#!/usr/bin/env python3
"""Loads what `qrmc compile --emit fake` writes with transformers and compares perplexities.

    python tests/clients/transformers_fake.py --qrmc target/release/qrmc --fake OUT \\
        --task tests/data/wikitext-2-train-sample.txt

OUT is compiled from the shipped model unless it exists. transformers loads the folder in float32 as any
other checkpoint and computes the perplexity of the first windows of the text; `qrmc eval` does the same
on the same tokens. The two figures must agree within --tolerance. The last line counts the checks.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys

# Nothing is fetched, and progress bars do not belong into a log.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--qrmc", required=True, help="the qrmc binary")
    p.add_argument("--fake", required=True, type=pathlib.Path, help="the folder; compiled if it does not exist")
    p.add_argument("--task", required=True, type=pathlib.Path, help="a text file")
    p.add_argument("--pass", dest="pipeline", default="awq", help="what the folder is compiled with")
    p.add_argument("--ctx", type=int, default=512, help="tokens in a window")
    p.add_argument("--windows", type=int, default=4, help="windows from the start of the text")
    p.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference")
    return p.parse_args()


def check_weights(folder):
    """The folder is an ordinary one: bf16 weights under the names of the architecture, all of them used."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        # A tied head is not stored; transformers may or may not count it as missing.
        found = [k for k in info.get(key, []) if not (key == "missing_keys" and k == "lm_head.weight")]
        if found:
            sys.exit(f"transformers reports {key}: {sorted(map(str, found))[:4]}")
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        sys.exit("config.json names a quantization, but the weights are plain")
    return model.eval()


def perplexity(model, ids, ctx, windows):
    """exp of the mean negative log-probability, windows without overlap, each predicting its last ctx - 1 tokens."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for w in range(windows):
            window = torch.tensor([ids[w * ctx : (w + 1) * ctx]])
            logits = model(window).logits[0, :-1].double()
            nll = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
            total, count = total + nll.item(), count + ctx - 1
    return math.exp(total / count), count


def main():
    a = arguments()
    logging.disable_progress_bar()
    if not a.fake.exists():
        command = [a.qrmc, "compile", "--pass", a.pipeline, "--emit", "fake", "-o", str(a.fake)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\nexit {done.returncode}: {done.stderr}")
    model = check_weights(a.fake)
    # The tokenizers library reads tokenizer.json as it is; some transformers classes rebuild parts of it.
    tokenizer = Tokenizer.from_file(str(a.fake / "tokenizer.json"))
    ids = tokenizer.encode(a.task.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if len(ids) < a.ctx * a.windows:
        sys.exit(f"{a.task} has {len(ids)} tokens, fewer than {a.windows} windows of {a.ctx}")
    theirs, count = perplexity(model, ids, a.ctx, a.windows)
    command = [a.qrmc, "eval", str(a.fake), "--task", str(a.task), "--json"]
    command += ["--ctx", str(a.ctx), "--windows", str(a.windows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nexit {done.returncode}: {done.stderr}")
    ours = json.loads(done.stdout)
    if ours["tokens"] != count:
        sys.exit(f"qrmc scored {ours['tokens']} tokens, transformers {count}")
    gap = abs(ours["perplexity"] - theirs) / theirs
    print(f"perplexity: transformers {theirs:.5f}, qrmc {ours['perplexity']:.5f}, relative difference {gap:.1e}")
    if not gap <= a.tolerance:
        sys.exit(f"the figures differ by more than {a.tolerance:.1e}")
    print("2 passed, 0 failed")


if __name__ == "__main__":
    main()
