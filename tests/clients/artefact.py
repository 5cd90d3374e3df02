"""Artefacts as docs/artefact.md describes them, and what they compute in f32: read here without any code of qrmc's."""

import json
import pathlib
import re

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

# The linear layers that read a value of a layer.
READERS = {
    "attn_in": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o_in": ["self_attn.o_proj"],
    "mlp_in": ["mlp.gate_proj", "mlp.up_proj"],
    "down_in": ["mlp.down_proj"],
}
# How far below the likeliest of f32 qrmc's token may be. Two ways of adding up differ by little, but where inputs are rounded
# a value in the middle between two codes falls on either, and every layer adds to what comes of it.
NEAR, NEAR_ROUNDED = 1e-3, 1.0


def unpack(rows, bits, cols):
    """Codes `[rows, cols]` of dense little-endian bit streams, a row each."""
    stream = np.unpackbits(rows.numpy(), axis=1, bitorder="little")[:, : bits * cols]
    weights = (1 << np.arange(bits)).astype(np.uint16)
    return torch.from_numpy((stream.reshape(len(rows), cols, bits) * weights).sum(2, dtype=np.int32))


class Artefact:
    """`floats`: tensors without codes; `matrices`: f32 `scale * (code - zero)`, by module name; `bits`: the fewest of them;
    `inputs`: calibrated scales of inputs and zero points, if there are any, by module name."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        listed, files = self.manifest["tensors"], {}
        for file in {t["file"] for t in listed.values()}:
            with safe_open(self.folder / file, "pt") as f:
                files |= {k: f.get_tensor(k) for k in f.keys()}
        self.floats, self.matrices, self.inputs, self.bits = {}, {}, {}, 8
        for name, tensor in listed.items():
            if calibrated := re.fullmatch(r"layer(\d+)\.(\w+)\.scale", name):
                zero = files.get(name.replace(".scale", ".zero"))
                for reader in READERS[calibrated[2]]:
                    self.inputs[f"model.layers.{calibrated[1]}.{reader}"] = files[name].float(), zero
            if re.search(r"\.(scale|zero)$", name):
                continue
            if not name.endswith(".codes"):
                self.floats[name] = files[name]
                continue
            sign, bits, rows, cols = re.match(r"([iu])(\d+)<.*>\[(\d+), (\d+)\]", tensor["type"]).groups()
            bits, rows, cols, base = int(bits), int(rows), int(cols), name.removesuffix(".codes")
            self.bits = min(self.bits, bits)
            # A head that shares the embedding in the source has a matrix of its own here.
            module = "lm_head" if base == "model.embed_tokens.weight.head" else base.removesuffix(".weight")
            codes = unpack(files[name], bits, cols)
            scale = files[f"{base}.scale"].float().reshape(rows, -1)
            zero = files.get(f"{base}.zero")
            middle = 1 << (bits - 1) if sign == "i" else 0
            zero = torch.full(scale.shape, middle) if zero is None else zero.int().reshape(rows, -1)
            groups = (codes.reshape(rows, scale.shape[1], -1) - zero[:, :, None]).float() * scale[:, :, None]
            self.matrices[module] = groups.reshape(rows, cols)

    def rounding(self):
        """How the input of a linear layer of this name is rounded to 8 bits; None where none is."""
        said = re.search(r"\ba=8,a_sym=(true|false)", " ".join(self.manifest["pipeline"]))
        if self.inputs:
            return lambda name, x: whole(x, *self.inputs[name])
        return said and (lambda _, x: rounded(x, said[1] == "true"))

    def unit(self, name):
        """An input that a calibrated scale leaves as it is: 64 steps of it. Rounding for each token leaves a single 1."""
        return 64 * self.inputs[name][0].item() if name in self.inputs else 1.0

    def near(self):
        """The largest difference of two log-probabilities that are a tie for qrmc and for f32."""
        return NEAR if self.rounding() is None else NEAR_ROUNDED

    def prompts(self):
        """Prompt tokens and the tokens that qrmc continued with."""
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        for run in json.loads(self.folder.with_suffix(".json").read_text()):
            ids = tokenizer.encode(run["prompt"]).ids
            assert len(ids) == run["prompt_tokens"], f"{run['prompt']!r}: {ids}, qrmc has {run['prompt_tokens']} tokens"
            yield ids, run["tokens"]

    def model(self):
        """The artefact in f32, as transformers computes it, with inputs rounded as the artefact says."""
        config = AutoConfig.from_pretrained(self.folder)
        config.tie_word_embeddings &= "lm_head" not in self.matrices
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        state = {k: v.float() for k, v in self.floats.items()} | {f"{k}.weight": v for k, v in self.matrices.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        rounding = self.rounding()
        if rounding is not None:
            for name in self.matrices.keys() - {"lm_head"}:
                model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: (rounding(name, x[0]),))
        return model

    def reference(self):
        """Log-probabilities `[tokens, vocabulary]` in f32 of what follows each prompt, each with qrmc's tokens before it."""
        kept = self.folder.with_suffix(".npz")
        if kept.exists():
            return [torch.from_numpy(x) for x in np.load(kept).values()]
        model, out = self.model(), []
        with torch.inference_mode():
            for ids, tokens in self.prompts():
                logits = model(torch.tensor([ids + tokens[:-1]])).logits[0, len(ids) - 1 :]
                out.append(logits.log_softmax(-1))
        # qrmc's tokens are the likeliest of f32, but for near-ties.
        for step, token in ((x[i], t) for x, (_, ts) in zip(out, self.prompts()) for i, t in enumerate(ts)):
            gap = (step.max() - step[token]).item()
            assert gap <= self.near(), f"{self.folder}: qrmc's token {token} is {gap:.1e} below the likeliest of f32"
        np.savez(kept, *[x.numpy() for x in out])
        return out


def whole(x, scale, zero):
    """All tokens rounded to 8 bits by one scale in f32, from -128 on, or from 0 on where there is a zero point."""
    if zero is None:
        return (x / scale).round().clamp(-128, 127) * scale
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def rounded(x, symmetric):
    """Tokens rounded to 8 bits in f32, zero in the range (methods.md §1.1)."""
    high, low = x.amax(-1, keepdim=True).clamp(min=0), x.amin(-1, keepdim=True).clamp(max=0)
    if symmetric:
        scale = torch.maximum(high, -low) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        return (x / scale).round().clamp(-128, 127) * scale
    empty = (high == 0) & (low == 0)
    high, low = torch.where(empty, 1.0, high), torch.where(empty, -1.0, low)
    scale = (high - low) / 255
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale
