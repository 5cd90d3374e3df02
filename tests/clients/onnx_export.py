#!/usr/bin/env python3
"""Runs what `qrmc export --format onnx` writes in onnxruntime and compares it with qrmc and with transformers.

    python tests/clients/onnx_export.py --qrmc target/release/qrmc --work DIR [--model MODEL_OR_ARTEFACT]...

Needs numpy, onnx, onnxruntime, onnxruntime-genai, safetensors and tokenizers. Every model is exported in both forms and opened with onnxruntime's defaults on the CPU.

- The fixtures have logits of transformers: prompts at once, prompts in parts with the cache, padded batches.
- The shipped model, as it is and quantized: perplexity and greedy tokens beside those of qrmc, the tokens in
  onnxruntime-genai, too.
- Each quantized product of layer 0 alone: numpy computes it from the artefact's tensors, by docs/artefact.md.

DIR keeps what is compiled and exported. The last line counts the checks.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
from onnx import numpy_helper
from safetensors.numpy import load_file
from tokenizers import Tokenizer

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"
TINY = DATA / "tiny-qwen2-wiki"
TEXT = DATA / "wikitext-2-train-sample.txt"
PROMPT = "The history of the city begins"
CTX, WINDOWS = 256, 2
# Largest difference of logits of the fixtures, which are computed in float32 throughout; the largest are about 6.
FLOAT = 2e-5
# Largest relative difference of perplexities: without rounded activations, and with. An activation that is halfway
# between two codes falls to either side, by the last bit of a sum.
PERPLEXITY = {"weights": 2e-6, "activations": 3e-2}
# What is compiled, and which of these it is.
PIPELINES = [
    ("rtn{bits=4,group=64}", "weights"),
    ("rtn{bits=3,group=32,head=8}", "weights"),
    ("awq{bits=4,group=64,scale=f16}", "weights"),
    ("rtn{bits=8,group=row,sym=true,a=8}", "activations"),
    ("quarot{w=4,a=8,kv=4}", "activations"),
    ("flatquant{w=4,a=4,kv=4,epochs=1}", "activations"),
]
checks = {True: 0, False: 0}


def check(what, good, seen):
    checks[bool(good)] += 1
    print(f"{'ok  ' if good else 'FAIL'} {what}: {seen}", flush=True)


def qrmc(args, *words):
    done = subprocess.run([args.qrmc, *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}\nexit {done.returncode}: {done.stderr}")
    return done.stdout


class Decoder:
    """A session with its cache."""

    def __init__(self, folder):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        path = str(folder / "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i.shape for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.start(1)

    def start(self, batch):
        names = [n for n in self.inputs if n.startswith("past_key_values.")]
        shapes = {n: (batch, self.inputs[n][1], 0, self.inputs[n][3]) for n in names}
        self.past = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
        self.mask = np.zeros((batch, 0), np.int64)

    def run(self, ids, mask=None):
        """Logits of new tokens behind what has run since start()."""
        ids = np.asarray(ids, np.int64)
        mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        self.mask = np.concatenate([self.mask, mask], 1)
        feed = {"input_ids": ids, "attention_mask": self.mask, **self.past}
        if "position_ids" in self.inputs:
            feed["position_ids"] = np.maximum(np.cumsum(self.mask, 1) - 1, 0)[:, -ids.shape[1] :]
        out = dict(zip(self.outputs, self.session.run(None, feed)))
        self.past = {n: out[n.replace("past_key_values", "present")] for n in self.past}
        return out["logits"]

    def at_once(self, ids):
        self.start(len(ids))
        return self.run(ids)

    def in_parts(self, ids, first):
        self.start(len(ids))
        parts = [self.run(ids[:, :first])]
        parts += [self.run(ids[:, i : i + 1]) for i in range(first, ids.shape[1])]
        return np.concatenate(parts, 1)


def export(args, model, name, form):
    out = args.work / f"{name}-{form}"
    qrmc(args, "export", model, "--format", "onnx", "--form", form, "-o", out)
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    if form == "qdq":
        domains = {n.domain for n in graph.graph.node}
        check(f"{name} {form}: standard operators alone", domains == {""}, sorted(domains))
        onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    return out


def fixture(args, folder, form):
    want = load_file(folder / "reference.safetensors")
    ids, logits = want["input_ids"], want["logits"]
    d = Decoder(export(args, folder, folder.name, form))
    name = f"{folder.name} {form}"
    gap = lambda have: float(abs(have - logits).max())
    whole, parts = gap(d.at_once(ids)), gap(d.in_parts(ids, 5))
    check(f"{name}: prompt", whole <= FLOAT, f"logits within {whole:.1e} of transformers")
    check(f"{name}: prompt in parts", parts <= FLOAT, f"logits within {parts:.1e} of transformers")
    # The second sequence is 3 tokens shorter: in standard operators padding may stand anywhere,
    # GroupQueryAttention wants it at the end.
    n, kept = ids.shape[1] - 3, slice(3, None) if form == "qdq" else slice(None, -3)
    batch, mask = ids.copy(), np.ones_like(ids)
    batch[1], mask[1] = 0, 0
    batch[1, kept], mask[1, kept] = ids[1, :n], 1
    d.start(2)
    have = d.run(batch, mask)
    padded = max(float(abs(have[0] - logits[0]).max()), float(abs(have[1, kept] - logits[1, :n]).max()))
    check(f"{name}: padded batch", padded <= FLOAT, f"logits within {padded:.1e} of transformers")


def perplexity(decoder, ids):
    total = 0.0
    for w in range(WINDOWS):
        window = np.array([ids[w * CTX : (w + 1) * CTX]])
        logits = decoder.at_once(window)[0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= logits[np.arange(CTX - 1), window[0, 1:]].sum()
    return math.exp(total / (WINDOWS * (CTX - 1)))


def genai(folder, prompt, count):
    """Greedy tokens of onnxruntime-genai, which reads genai_config.json."""
    model = onnxruntime_genai.Model(str(folder))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(t) for t in generator.get_sequence(0)][len(prompt) :]


def whole_model(args, model, name, kind, form):
    folder = export(args, model, name, form)
    d = Decoder(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8")[:20000], add_special_tokens=False).ids
    ours = json.loads(qrmc(args, "eval", model, "--task", TEXT, "--ctx", CTX, "--windows", WINDOWS, "--json"))
    theirs = perplexity(d, ids)
    gap = abs(theirs - ours["perplexity"]) / ours["perplexity"]
    seen = f"qrmc {ours['perplexity']:.4f}, onnxruntime {theirs:.4f}, relative difference {gap:.1e}"
    check(f"{name} {form}: perplexity", gap <= PERPLEXITY[kind], seen)
    said = json.loads(
        qrmc(args, "generate", model, "--raw", "--greedy", "--max-new", 32, "--json", "-p", PROMPT)
    )
    prompt = tokenizer.encode(PROMPT).ids
    if len(prompt) != said["prompt_tokens"]:
        sys.exit(f"{name}: the prompt has {len(prompt)} tokens, qrmc counts {said['prompt_tokens']}")
    d.start(1)
    logits, tokens = d.run([prompt]), []
    for _ in said["tokens"]:
        tokens.append(int(logits[0, -1].argmax()))
        logits = d.run([tokens[-1:]])
    generated = genai(folder, prompt, len(said["tokens"]))
    same = next((i for i, (a, b) in enumerate(zip(tokens, said["tokens"])) if a != b), len(tokens))
    seen = f"{same} of {len(tokens)} greedy tokens are equal from the start"
    if kind == "weights":
        check(f"{name} {form}: tokens", same == len(tokens), seen)
        together = sum(a == b for a, b in zip(generated, said["tokens"]))
        check(f"{name} {form}: genai", generated == said["tokens"], f"{together} of {len(tokens)} tokens are equal")
    else:
        # One code decides where two tokens are nearly as likely.
        print(f"     {name} {form}: {seen}")
    return folder


def stored_matrix(tensors, manifest, name):
    """A quantized matrix by docs/artefact.md: rows of codes, least significant bit first."""
    kind = manifest["tensors"][f"{name}.codes"]["type"]
    bits, signed = int(kind[1]), kind[0] == "i"
    cols = int(kind.rsplit(",", 1)[1].rstrip("]"))
    rows = np.unpackbits(tensors[f"{name}.codes"], axis=1, bitorder="little")[:, : cols * bits]
    codes = (rows.reshape(len(rows), cols, bits) << np.arange(bits)).sum(-1).astype(np.float32)
    scale = tensors[f"{name}.scale"].astype(np.float32)
    zero = tensors[f"{name}.zero"].astype(np.float32) if f"{name}.zero" in tensors else np.float32(0)
    run = cols // scale.shape[1]
    spread = lambda x: np.repeat(x, run, axis=1) if np.ndim(x) else x
    return spread(scale) * (codes - (2.0 ** (bits - 1) if signed else spread(zero)))


def rounded(x, bits, high, low):
    """Asymmetric, a scale a token; zero is in the range, and its ends have factors."""
    most = np.float32(2**bits - 1)
    top, bottom = np.maximum(x.max(-1, keepdims=True), 0) * high, np.minimum(x.min(-1, keepdims=True), 0) * low
    empty = (top == 0) & (bottom == 0)
    top, bottom = np.where(empty, np.float32(1), top), np.where(empty, np.float32(-1), bottom)
    scale = (top - bottom) / most
    zero = np.clip(np.round(-bottom / scale), 0, most)
    return scale * (np.clip(np.round(x / scale) + zero, 0, most) - zero)


def product(folder, artefact, bits, name, form):
    """The nodes between the input of attention and the query product, alone, on rows of this script's own."""
    model = onnx.load(folder / "model.onnx")
    made = {o: n for n in model.graph.node for o in n.output}
    need, nodes = ["layer0/q_proj"], []
    while need:
        node = made.get(need.pop())
        if node is not None and node not in nodes:
            nodes.append(node)
            need += [i for i in node.input if i != "layer0/attn_in"]
    nodes.sort(key=list(model.graph.node).index)
    used = {i for n in nodes for i in n.input}
    tensors = {p: t for f in artefact.glob("*.safetensors") for p, t in load_file(f).items()}
    manifest = json.loads((artefact / "manifest.json").read_text())
    weight = stored_matrix(tensors, manifest, "model.layers.0.self_attn.q_proj.weight")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "product",
        [info("layer0/attn_in", onnx.TensorProto.FLOAT, ["b", "s", weight.shape[1]])],
        [info("layer0/q_proj", onnx.TensorProto.FLOAT, ["b", "s", weight.shape[0]])],
        [t for t in model.graph.initializer if t.name in used],
    )
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 64, weight.shape[1])).astype(np.float32) * np.exp(rng.standard_normal((1, 64, 1)))
    x = x.astype(np.float32)
    x[0, 0] = 0
    x[0, 1] = np.abs(x[0, 1])
    session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    have = session.run(None, {"layer0/attn_in": x})[0]
    factor = lambda end: tensors.get(f"layer0.attn_in.{end}", clip(folder, nodes))
    seen = rounded(x, bits, factor("hi"), factor("lo")) if bits else x
    want = seen.astype(np.float64) @ weight.astype(np.float64).T
    gap = float((abs(have - want).max(-1) / np.maximum(abs(want).max(-1), 1e-6)).max())
    kinds = sorted({n.op_type for n in nodes} & {"MatMul", "MatMulNBits", "MatMulInteger", "DequantizeLinear"})
    check(f"{name} {form}: product alone", gap <= 1e-5, f"within {gap:.1e} of numpy through {', '.join(kinds)}")


def clip(folder, nodes):
    """The factor on both ends of the range where it is a literal of the graph."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    ends = {o for n in nodes if n.op_type == "Max" for o in n.output}
    factors = {i for n in nodes if n.op_type == "Mul" and n.input[0] in ends for i in n.input[1:]}
    found = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name in factors and t.name.startswith("literal")]
    return found[0] if found else np.float32(1)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--qrmc", required=True, help="the qrmc binary")
    p.add_argument("--work", required=True, type=pathlib.Path, help="a folder for what is made")
    p.add_argument("--model", action="append", default=[], type=pathlib.Path, help="another model or artefact")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    versions = [f"{m.__name__} {m.__version__}" for m in (onnxruntime, onnxruntime_genai, onnx)]
    print(", ".join(versions))
    for folder in sorted((DATA / "fixtures").iterdir()):
        for form in ("qdq", "ort"):
            if (folder / "reference.safetensors").exists():
                fixture(args, folder, form)
    cases = [(TINY, "tiny", "weights", None)]
    for pipeline, kind in PIPELINES:
        name = "tiny-" + "-".join("".join(c if c.isalnum() else " " for c in pipeline).split())
        artefact = args.work / name
        if not artefact.exists():
            qrmc(args, "compile", TINY, "--pass", pipeline, "-o", artefact)
        bits = next((int(w[2:]) for w in pipeline.strip("}").replace("{", ",").split(",") if w.startswith("a=")), 0)
        cases.append((artefact, name, kind, bits))
    for model in args.model:
        quantized = (model / "model.qir").exists() and "<token" in (model / "model.qir").read_text()
        cases.append((model, model.name, "activations" if quantized else "weights", None))
    for model, name, kind, bits in cases:
        for form in ("qdq", "ort"):
            folder = whole_model(args, model, name, kind, form)
            if bits is not None:
                product(folder, model, bits, name, form)
    print(f"{checks[True]} passed, {checks[False]} failed")
    sys.exit(1 if checks[False] else 0)


if __name__ == "__main__":
    main()
