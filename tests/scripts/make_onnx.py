#!/usr/bin/env python3
"""Writes tests/data/onnx: small decoders as torch and onnxruntime-genai export them, with logits of onnxruntime.

    python3 -m venv VENV && VENV/bin/pip install torch transformers onnx onnxscript onnxruntime onnxruntime-genai safetensors
    VENV/bin/python tests/scripts/make_onnx.py --tokenizer tests/data/tiny-qwen2-wiki

Weights are random, from seed 0. Each folder has model.onnx and reference.safetensors: `input_ids` and `logits`, or
`hidden_states` and `last_hidden_state` of a block, the latter computed by onnxruntime on the CPU.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors.numpy import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, dict(rope_theta=500000.0, tie_word_embeddings=False)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, dict(rope_theta=1000000.0, tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(rope_theta=1000000.0, tie_word_embeddings=True, head_dim=16)),
}


def model(family, attention, **more):
    cls, config, options = FAMILIES[family]
    torch.manual_seed(0)
    m = cls._from_config(config(**{**SIZES, **options, **more}), attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in m.named_parameters():
            # So that gains and biases are seen.
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif p.ndim == 1:
                p.copy_(0.2 * torch.randn_like(p))
            else:
                p.copy_(0.15 * torch.randn_like(p))
    return m


class Plain(torch.nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, input_ids, attention_mask):
        return self.m(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class Cached(Plain):
    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.m(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return (out.logits, *(t for l in out.past_key_values.layers for t in (l.keys, l.values)))


def plain(path, m, dynamo):
    ids = torch.arange(10).reshape(2, 5)
    args, names = (ids, torch.ones_like(ids)), ["input_ids", "attention_mask"]
    with torch.no_grad():
        if dynamo:
            sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
            torch.onnx.export(Plain(m), args, path, input_names=names, output_names=["logits"], dynamic_shapes=(sizes, sizes), dynamo=True, external_data=False)
        else:
            sizes = {0: "batch", 1: "sequence"}
            torch.onnx.export(Plain(m), args, path, input_names=names, output_names=["logits"], dynamic_axes={n: sizes for n in names}, dynamo=False, opset_version=17)


def cached(path, m):
    c = m.config
    d = c.hidden_size // c.num_attention_heads
    layers = range(c.num_hidden_layers)
    past = [torch.randn(2, c.num_key_value_heads, 3, d) for _ in layers for _ in "kv"]
    ids = torch.arange(10).reshape(2, 5)
    args = (ids, torch.ones(2, 8, dtype=torch.int64), torch.arange(3, 8).repeat(2, 1), *past)
    names = [f"past_key_values.{l}.{k}" for l in layers for k in ("key", "value")]
    outs = [n.replace("past_key_values", "present") for n in names]
    axes = {"input_ids": {0: "batch", 1: "new"}, "attention_mask": {0: "batch", 1: "all"}, "position_ids": {0: "batch", 1: "new"}}
    axes |= {n: {0: "batch", 2: "past"} for n in names} | {n: {0: "batch", 2: "all"} for n in outs}
    with torch.no_grad():
        torch.onnx.export(Cached(m), args, path, input_names=["input_ids", "attention_mask", "position_ids", *names], output_names=["logits", *outs], dynamic_axes=axes, dynamo=False, opset_version=17)


def genai(folder, m, tokenizer, precision, options):
    with tempfile.TemporaryDirectory() as work:
        m.save_pretrained(f"{work}/model")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, f"{work}/model")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", f"{work}/model", "-o", f"{work}/out", "-p", precision, "-e", "cpu", "-c", f"{work}/cache"]
        subprocess.run([*command, "--extra_options", *options], check=True, stdout=subprocess.DEVNULL)
        onnx.save(onnx.load(f"{work}/out/model.onnx"), folder / "model.onnx")
        shutil.copy(f"{work}/out/genai_config.json", folder)


class Layers(torch.nn.Module):
    """Decoder layers with the positions of their rotary embedding."""

    def __init__(self, m):
        super().__init__()
        self.layers, self.rotary = m.model.layers, m.model.rotary_emb

    def forward(self, hidden_states, position_ids):
        angles = self.rotary(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=angles)
        return hidden_states


class Layer(torch.nn.Module):
    """One decoder layer as transformers calls it, with its cache."""

    def __init__(self, m):
        super().__init__()
        self.layer = m.model.layers[0]

    def forward(self, hidden_states, attention_mask, cos, sin, key, value):
        cache = DynamicCache()
        cache.update(key, value, 0)
        y = self.layer(hidden_states, attention_mask=attention_mask, past_key_values=cache, use_cache=True, position_embeddings=(cos, sin))
        return y, cache.layers[0].keys, cache.layers[0].values


def layers(path, m):
    x = torch.randn(2, 5, m.config.hidden_size)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    args, names = (x, torch.arange(5).repeat(2, 1)), ["hidden_states", "position_ids"]
    with torch.no_grad():
        torch.onnx.export(Layers(m), args, path, input_names=names, output_names=["last_hidden_state"], dynamic_shapes=(sizes, sizes), dynamo=True, external_data=False)


def layer(path, m):
    c = m.config
    d = c.hidden_size // c.num_attention_heads
    x, past = torch.randn(2, 5, c.hidden_size), [torch.randn(2, c.num_key_value_heads, 3, d) for _ in "kv"]
    cos, sin = m.model.rotary_emb(x, torch.arange(3, 8)[None])
    mask = torch.full((5, 8), torch.finfo(torch.float32).min).triu(4)[None, None].repeat(2, 1, 1, 1)
    names = ["hidden_states", "attention_mask", "cos", "sin", "past_key_values.0.key", "past_key_values.0.value"]
    outs = ["last_hidden_state", "present.0.key", "present.0.value"]
    axes = {"hidden_states": {0: "batch", 1: "new"}, "attention_mask": {0: "batch", 2: "new", 3: "all"}, "cos": {1: "new"}, "sin": {1: "new"}}
    axes |= {n: {0: "batch", 2: "past"} for n in names[4:]} | {"last_hidden_state": {0: "batch", 1: "new"}} | {n: {0: "batch", 2: "all"} for n in outs[1:]}
    with torch.no_grad():
        torch.onnx.export(Layer(m), (x, mask, cos, sin, *past), path, input_names=names, output_names=outs, dynamic_axes=axes, dynamo=False, opset_version=17)
    c.save_pretrained(path.parent)


def bare(path, m):
    """A decoder layer itself, with the names that the exporter gives."""
    x = torch.randn(2, 5, m.config.hidden_size)
    batch, new = torch.export.Dim("batch"), torch.export.Dim("sequence")
    args = dict(hidden_states=x, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(), position_embeddings=m.model.rotary_emb(x, torch.arange(5)[None]))
    sizes = dict(hidden_states={0: batch, 1: new}, attention_mask={2: new, 3: new}, position_embeddings=({1: new}, {1: new}))
    with torch.no_grad():
        torch.onnx.export(m.model.layers[0], (), path, kwargs=args, dynamic_shapes=sizes, dynamo=True, external_data=False)
    m.config.save_pretrained(path.parent)


def block_reference(folder, m):
    session = small(folder)
    x = np.random.default_rng(0).standard_normal((2, 9, m.config.hidden_size)).astype(np.float32)
    cos, sin = m.model.rotary_emb(torch.from_numpy(x), torch.arange(9)[None])
    none = np.zeros((2, m.config.num_key_value_heads, 0, cos.shape[-1]), np.float32)
    after = np.triu(np.full((2, 1, 9, 9), np.finfo(np.float32).min), 1)
    seen = np.tril(np.ones((1, 1, 9, 9), bool))
    feed = {}
    for i in session.get_inputs():
        feed[i.name] = {
            "hidden_states": x, "position_ids": np.broadcast_to(np.arange(9), (2, 9)).copy(), "attention_mask": seen if i.type == "tensor(bool)" else after,
            "cos": cos.numpy(), "sin": sin.numpy(), "position_embeddings_0": cos.numpy(), "position_embeddings_1": sin.numpy(),
            "past_key_values.0.key": none, "past_key_values.0.value": none,
        }[i.name]
    y = session.run([session.get_outputs()[0].name], feed)[0]
    save_file({"hidden_states": x, "last_hidden_state": y}, folder / "reference.safetensors")


def small(folder):
    m = onnx.load(folder / "model.onnx")
    # Where a node comes from is no part of what it computes.
    del m.graph.value_info[:]
    for n in m.graph.node:
        n.doc_string = ""
        del n.metadata_props[:]
    del m.metadata_props[:], m.graph.metadata_props[:]
    onnx.save(m, folder / "model.onnx")
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def widened(folder, rope_theta, head_dim):
    """The same graph in f32, with tables of angles that are not rounded."""
    m = onnx.load(folder / "model.onnx")
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT

    def wide(t):
        if t.data_type == half:
            t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(t).astype(np.float32), t.name))

    for t in m.graph.initializer:
        wide(t)
        if t.name in ("cos_cache", "sin_cache"):
            angles = np.outer(np.arange(t.dims[0]), rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
            t.CopyFrom(onnx.numpy_helper.from_array(np.cos(angles) if t.name[0] == "c" else np.sin(angles), t.name))
    for n in m.graph.node:
        for a in n.attribute:
            wide(a.t)
            if n.op_type == "Cast" and a.i == half:
                a.i = single
    for v in [*m.graph.input, *m.graph.output]:
        if v.type.tensor_type.elem_type == half:
            v.type.tensor_type.elem_type = single
    return onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])


def reference(folder, head_dim, rope_theta=None):
    session = small(folder)
    if rope_theta:
        # Half floats are computed with as f32 by qrmc.
        session = widened(folder, rope_theta, head_dim)
    ids = np.random.default_rng(0).integers(0, 64, (2, 9))
    feed = {}
    for i in session.get_inputs():
        if i.name == "input_ids":
            feed[i.name] = ids
        elif i.name == "attention_mask":
            feed[i.name] = np.ones_like(ids)
        elif i.name == "position_ids":
            feed[i.name] = np.broadcast_to(np.arange(9), ids.shape).copy()
        else:
            feed[i.name] = np.zeros((2, i.shape[1], 0, head_dim), np.float32)
    logits = session.run(["logits"], feed)[0]
    save_file({"input_ids": ids.astype(np.int64), "logits": logits.astype(np.float32)}, folder / "reference.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True)
    args = parser.parse_args()
    out = pathlib.Path(__file__).parents[1] / "data/onnx"
    shutil.rmtree(out, ignore_errors=True)

    def folder(name):
        (out / name).mkdir(parents=True)
        return out / name

    for family, attention, dynamo in [("llama", "sdpa", True), ("qwen2", "eager", True), ("qwen3", "sdpa", False)]:
        at = folder(f"torch-{'dynamo' if dynamo else 'script'}-{family}-{attention}")
        plain(at / "model.onnx", model(family, attention), dynamo)
        reference(at, 8)
    at = folder("torch-script-llama-cache")
    cached(at / "model.onnx", model("llama", "sdpa"))
    reference(at, 8)
    at, m = folder("block-dynamo-llama"), model("llama", "sdpa")
    layers(at / "model.onnx", m)
    block_reference(at, m)
    at, m = folder("block-script-qwen2"), model("qwen2", "eager")
    layer(at / "model.onnx", m)
    block_reference(at, m)
    at, m = folder("block-dynamo-qwen3"), model("qwen3", "sdpa", num_hidden_layers=1)
    bare(at / "model.onnx", m)
    block_reference(at, m)
    # Not a matrix of another size may have as many rows as there are tokens: the builder would take it for the head.
    wide = dict(hidden_size=64, intermediate_size=96, vocab_size=112)
    for name, family, precision, options in [
        ("genai-qwen2-int4", "qwen2", "int4", ["accuracy_level=1"]),
        ("genai-llama-int4-zero", "llama", "int4", ["accuracy_level=1", "is_symmetric=false", "block_size=16"]),
        ("genai-qwen3-fp32", "qwen3", "fp32", ["exclude_embeds=false"]),
        ("genai-qwen2-fp16", "qwen2", "fp16", ["exclude_embeds=false"]),
        ("genai-llama-fp16", "llama", "fp16", ["exclude_embeds=false"]),
    ]:
        if precision.startswith("fp"):
            wide["num_hidden_layers"] = 1
        if precision == "fp16":
            # With as many key heads as query heads, the attention's operator has the caches.
            wide["num_key_value_heads"] = 4 if family == "llama" else 2
        at = folder(name)
        m = model(family, "sdpa", **wide)
        genai(at, m, args.tokenizer, precision, options)
        reference(at, 16, m.config.rope_parameters["rope_theta"] if precision == "fp16" else None)
    subprocess.run(["du", "-ab", str(out)], check=True)


main()
