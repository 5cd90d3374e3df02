"""Independent float64 reference of AWQ's searches on one decoder layer of tiny-qwen2-wiki.

Writes tests/data/awq/layer1.json, which the Rust tests compare against. Written from the method
description alone, it shares no code with qrmc. Needs numpy only, and a few seconds of one core:

    python3 tests/scripts/awq_reference.py    # rewrites the fixture; then see git diff

EVERYTHING IS FLOAT64: the forward pass (bf16 weights widened), the losses and also the quantizer
grid (scale, zero, quotient). The published method rounds all of that to bf16; nothing here does.

THE CLIP SEARCH IS ILL-CONDITIONED. Where both ends of a group are clamped the range is -m .. m,
and the zero point is round(m / (2 m / 15)) = round(7.5) (3.5 for 3 bits): the last bit of the
quotient decides between 7 and 8, so it differs from one float type, or one last bit of the
scaled weight, to the next, and the error of that candidate with it. (Unscaled bf16 weights, as
in o_proj, meet a few other exact half steps.) Therefore every candidate's error is also computed
with all quotients times 1 - 1e-6 and 1 + 1e-6, so that such ties fall down and up; `zero_ties`
and `error_range` say what other roundings may give. The scale search hardly meets such ties.

Layout of the JSON (floats have 9 significant digits):
  token_ids            8 windows of 128 ids: x = (A x + C) mod 2^64 from x = 1, stepped BEFORE
                       each use, id = (x >> 33) mod 4088. Positions restart at 0 in each window.
  layer_input_mean_square, layer_output_mean_square   of the float stream around the layer
  runs[].pairs[]       id a | c | d (b, v_proj -> o_proj, does not exist under GQA)
      losses           20 mean squared errors, for ratios 0, 0.05 .. 0.95
      best             index of the first smallest loss (ratio = best / 20)
      margin           (second smallest - smallest) / smallest
      scale            the chosen per-input-channel scale
  runs[].clips[]       v, o, gate, up, down, searched after all scales were applied
      best             one string per output row, one digit per group: the chosen i in 0..9; the
                       group is then clamped to +-max|w| (1 - i/20), w being the scaled weight
      error_range      [low, high] of the sum over (row, group) of the chosen mean squared error,
                       with all ties falling the good, and the bad, way
      min_margin       smallest (second best - best) / best of all (row, group)
      near_ties        [row, group, i] for every i that was not chosen and whose error is within
                       1e-4 (relative) of the chosen one
      zero_ties        [row, group, i] for every other i that wins (to 1e-4) for some way in which
                       the ties fall. Any i in `best`, `near_ties` or `zero_ties` is
                       a right answer in another precision; all other i are wrong.
"""
import json
import os
import struct
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np  # noqa: E402  (after the thread setting)

DATA = Path(__file__).resolve().parent.parent / "data"
MODEL = DATA / "tiny-qwen2-wiki"
OUT = DATA / "awq" / "layer1.json"

LAYER, BITS, GROUP = 1, (4, 3), 128
RATIOS, CLIPS, NEAR = 20, 10, 1e-4
CLIPPED = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WINDOWS, WINDOW = 8, 128


def read_safetensors(path):
    """All tensors of a bf16 safetensors file, widened exactly to float64."""
    raw = path.read_bytes()
    (head,) = struct.unpack_from("<Q", raw)
    tensors, header = {}, json.loads(raw[8:8 + head])
    header.pop("__metadata__", None)
    for name, info in header.items():
        assert info["dtype"] == "BF16", (name, info["dtype"])
        begin, end = info["data_offsets"]
        bits = np.frombuffer(raw[8 + head + begin:8 + head + end], "<u2").astype(np.uint32) << 16
        tensors[name] = bits.view(np.float32).astype(np.float64).reshape(info["shape"])
    return tensors


class Model:
    """Qwen2 in float64. Streams are [windows, positions, channels]; linear weights [out, in]."""

    def __init__(self, folder):
        self.cfg = json.loads((folder / "config.json").read_text())
        assert self.cfg["tie_word_embeddings"] and self.cfg["hidden_act"] == "silu"
        self.t = read_safetensors(folder / "model.safetensors")

    def layer(self, i):
        """The tensors of one block under short names: q_proj.weight, input_layernorm.weight .."""
        prefix = f"model.layers.{i}."
        return {k[len(prefix):].replace("self_attn.", "").replace("mlp.", ""): v
                for k, v in self.t.items() if k.startswith(prefix)}

    def norm(self, x, weight):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self.cfg["rms_norm_eps"]) * weight

    def rope(self, x):
        """Rotate-half RoPE on [windows, heads, positions, dim]."""
        dim = x.shape[-1]
        freq = self.cfg["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
        angle = np.arange(x.shape[2])[:, None] * freq
        cos, sin = np.cos(np.tile(angle, 2)), np.sin(np.tile(angle, 2))
        half = np.concatenate([-x[..., dim // 2:], x[..., :dim // 2]], -1)
        return x * cos + half * sin

    def heads(self, x, w):
        """Attention up to, not including, o_proj: the input of o_proj."""
        nq, nkv = self.cfg["num_attention_heads"], self.cfg["num_key_value_heads"]
        n, t, _ = x.shape

        def project(p, count):
            y = x @ w[p + ".weight"].T + w[p + ".bias"]
            return y.reshape(n, t, count, -1).transpose(0, 2, 1, 3)

        q, k, v = project("q_proj", nq), project("k_proj", nkv), project("v_proj", nkv)
        q, k = self.rope(q), self.rope(k)
        k, v = np.repeat(k, nq // nkv, 1), np.repeat(v, nq // nkv, 1)  # KV head h // (nq / nkv)
        score = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
        score = np.where(np.tri(t, dtype=bool), score, -np.inf)
        prob = np.exp(score - score.max(-1, keepdims=True))
        prob /= prob.sum(-1, keepdims=True)
        return (prob @ v).transpose(0, 2, 1, 3).reshape(n, t, -1)

    def attention(self, x, w):  # the whole module, with o_proj
        return self.heads(x, w) @ w["o_proj.weight"].T

    @staticmethod
    def gated(x, w):  # the input of down_proj
        gate = x @ w["gate_proj.weight"].T
        return gate / (1 + np.exp(-gate)) * (x @ w["up_proj.weight"].T)

    def mlp(self, x, w):
        return self.gated(x, w) @ w["down_proj.weight"].T

    def block(self, h, w):
        h = h + self.attention(self.norm(h, w["input_layernorm.weight"]), w)
        return h + self.mlp(self.norm(h, w["post_attention_layernorm.weight"]), w)

    def stream(self, ids, layers):
        """The residual stream after that many blocks."""
        h = self.t["model.embed_tokens.weight"][ids]
        for i in range(layers):
            h = self.block(h, self.layer(i))
        return h

    def logits(self, ids):
        h = self.stream(np.array([ids]), self.cfg["num_hidden_layers"])
        return self.norm(h[0], self.t["model.norm.weight"]) @ self.t["model.embed_tokens.weight"].T


def quantize(w, bits, nudge=1.0):
    """AWQ's quantizer; a nudge of 1 -+ 1e-6 decides how half steps fall (see the top)."""
    g = w.reshape(-1, min(GROUP, w.shape[-1]))
    lo, hi, top = g.min(1, keepdims=True), g.max(1, keepdims=True), 2 ** bits - 1
    scale = np.maximum(hi - lo, 1e-5) / top  # the range need not contain zero
    zero = np.clip(-np.round(lo / scale * nudge), 0, top)  # np.round is half to even
    code = np.clip(np.round(g / scale * nudge) + zero, 0, top)
    return ((code - zero) * scale).reshape(w.shape)


def scale_for(x_mean, ratio):
    s = np.maximum(x_mean ** ratio, 1e-4)
    return s / np.sqrt(s.max() * s.min())


def search_scale(x, w, linears, module, bits):
    """Losses of the 20 ratios for the linears that share the input x, and the best scale."""
    x_mean = np.abs(x).reshape(-1, x.shape[-1]).mean(0)
    want, losses = module(x, w), []
    for i in range(RATIOS):
        s = scale_for(x_mean, i / RATIOS)
        trial = dict(w)
        for name in linears:
            trial[name + ".weight"] = quantize(w[name + ".weight"] * s, bits) / s
        losses.append(np.mean((want - module(x, trial)) ** 2))
    best = int(np.argmin(losses))  # the first minimum, as "strictly smaller" keeps
    return losses, best, scale_for(x_mean, best / RATIOS)


def search_clip(x, weight, bits):
    """Errors [as computed | ties down | ties up, CLIPS, rows, groups]."""
    x = x.reshape(-1, x.shape[-1])
    x = x[::len(x) // 512]
    rows, cols = weight.shape
    errors = np.empty((3, CLIPS, rows, cols // GROUP))
    for g in range(cols // GROUP):
        w, xg = (m[:, g * GROUP:(g + 1) * GROUP] for m in (weight, x))
        peak = np.abs(w).max(1, keepdims=True)
        for i in range(CLIPS):
            m = peak * (1 - i / RATIOS)
            for k, nudge in enumerate((1.0, 1 - 1e-6, 1 + 1e-6)):
                diff = quantize(np.clip(w, -m, m), bits, nudge) - w
                errors[k, i, :, g] = np.mean((xg @ diff.T) ** 2, 0)
    return errors


def clip_entry(linear, errors):
    found = errors[0]
    best, order = found.argmin(0), np.sort(found, 0)
    assert 0 < order[0].min() and order[0].max() < 1e9
    low, high = errors.min(0), errors.max(0)
    # Candidate i can win if its low error beats the high errors of all others.
    others = np.stack([np.delete(high, i, 0).min(0) for i in range(CLIPS)])
    chosen = np.arange(CLIPS)[:, None, None] == best
    near = (found - order[0] < NEAR * order[0]) & ~chosen
    can_win = (low <= others * (1 + NEAR)) & ~chosen & ~near
    near, can_win = (np.argwhere(m.transpose(1, 2, 0)).tolist() for m in (near, can_win))
    return {"linear": linear, "best": ["".join(map(str, row)) for row in best],
            "error_range": [nine(low.min(0).sum()), nine(high.min(0).sum())],
            "min_margin": nine(((order[1] - order[0]) / order[0]).min()),
            "near_ties": near, "zero_ties": can_win}


def run(model, hidden, layer, bits):
    """Scale search on the unscaled block, apply, clip search on the scaled block."""
    w = dict(layer)
    x = {"q_proj": model.norm(hidden, w["input_layernorm.weight"])}
    x["o_proj"] = model.heads(x["q_proj"], w)
    middle = hidden + model.attention(x["q_proj"], w)
    x["gate_proj"] = model.norm(middle, w["post_attention_layernorm.weight"])
    x["down_proj"] = model.gated(x["gate_proj"], w)
    x["k_proj"] = x["v_proj"] = x["q_proj"]
    x["up_proj"] = x["gate_proj"]

    plan = [  # id, previous op, scaled linears, module whose output is compared
        ("a", "input_layernorm", ["q_proj", "k_proj", "v_proj"], model.attention),
        ("c", "post_attention_layernorm", ["gate_proj", "up_proj"], model.mlp),
        ("d", "up_proj", ["down_proj"], lambda y, p: y @ p["down_proj.weight"].T),
    ]
    found = [search_scale(x[p[2][0]], w, p[2], p[3], bits) for p in plan]
    pairs = []
    for (key, previous, linears, _), (losses, best, s) in zip(plan, found):
        name = previous + ".weight"
        w[name] = w[name] / (s if w[name].ndim == 1 else s[:, None])  # a gain, or output rows
        for lin in linears:
            w[lin + ".weight"] = w[lin + ".weight"] * s
            x[lin] = x[lin] / s
        low, second = np.sort(losses)[:2]
        pairs.append({"id": key, "previous": previous, "linears": linears, "best": best,
                      "margin": nine((second - low) / low),
                      "losses": [nine(v) for v in losses], "scale": [nine(v) for v in s]})
    # The scaled float block must compute the same function.
    before, after = model.block(hidden, layer), model.block(hidden, w)
    assert np.abs(after - before).max() < 1e-9 * np.abs(before).max()

    clips = [clip_entry(n, search_clip(x[n], w[n + ".weight"], bits)) for n in CLIPPED]
    return {"bits": bits, "pairs": pairs, "clips": clips}


def nine(v):
    return float(f"{v:.9g}")


def self_check(model):
    """The forward pass against torch's float32 logits; the formulas against golden values."""
    for ref in json.loads((MODEL / "reference_logits.json").read_text()):
        last = model.logits(ref["input_ids"])[-1]
        top = np.argsort(-last, kind="stable")[:8]
        assert top.tolist() == ref["last_logits_top8_ids"], (top, ref["last_logits_top8_ids"])
        worst = np.abs(last[top] - ref["last_logits_top8"]).max()
        assert worst < 2e-5, worst
        print(f"logits: top 8 ids equal, largest difference {worst:.1e}")
    row = np.array([[0.3, 0.2, 0.1, 0.05, 0.02, 0.15, 0.27, 0.6]])
    step = (0.6 - 0.02) / 15
    assert np.allclose(quantize(row, 4), np.array([8, 5, 3, 1, 1, 4, 7, 15]) * step, atol=1e-12)
    s = scale_for(np.array([0.5, 2, 8, 0.01]), 0.95)
    assert np.allclose(s, [1.71812106, 6.41225452, 23.93138005, 0.04178614], rtol=2e-7)


def token_ids():
    x, ids = 1, []
    for _ in range(WINDOWS * WINDOW):
        x = (6364136223846793005 * x + 1442695040888963407) % 2 ** 64
        ids.append((x >> 33) % 4088)
    return np.array(ids).reshape(WINDOWS, WINDOW)


def main():
    model, ids = Model(MODEL), token_ids()
    self_check(model)
    hidden, layer = model.stream(ids, LAYER), model.layer(LAYER)
    doc = {
        "made_by": "tests/scripts/awq_reference.py (numpy float64)", "model": MODEL.name,
        "layer": LAYER, "group": GROUP, "token_ids": ids.tolist(),
        "layer_input_mean_square": nine(np.mean(hidden ** 2)),
        "layer_output_mean_square": nine(np.mean(model.block(hidden, layer) ** 2)),
        "runs": [run(model, hidden, layer, bits) for bits in BITS],
    }
    for r in doc["runs"]:
        for p in r["pairs"]:
            print(f"W{r['bits']} {p['id']}: ratio {p['best']}/20, loss {p['losses'][0]:.6g} -> "
                  f"{p['losses'][p['best']]:.6g}, margin {p['margin']:.3g}")
        for c in r["clips"]:
            print(f"W{r['bits']} {c['linear']}: {len(c['near_ties'])} near ties, "
                  f"{len(c['zero_ties'])} zero ties, smallest margin {c['min_margin']:.3g}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    # One object a line, for a readable diff.
    OUT.write_text(json.dumps(doc).replace(' {"', '\n{"').replace('[{"', '[\n{"') + "\n")
    print("wrote", OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
