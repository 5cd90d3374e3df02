#!/usr/bin/env python3
"""Time one FlatQuant W4A4KV4 training step of one decoder layer in eager PyTorch, f32, on the CPU.

The layer has the shape of SmolLM2-135M (hidden 576, intermediate 1536, 9 query and 3 KV heads of 64) and
random weights; a step is forward, backward and AdamW on a batch of 4 x 512 tokens. Every step transforms,
clips and fake-quantizes all seven weights, as training needs: the inverses are taken in fp64 with gradient
(once a step for each matrix), rounding is straight-through, and the attention is the eager one with a full
mask. The target (the float layer's output) is computed beforehand and not timed.

    python flatquant_step.py [--threads N] [--steps N] [--warmup N]

prints {"median_ms": .., "min_ms": .., "threads": ..}.
"""
import argparse
import json
import math
import os
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM = 576, 1536, 9, 3, 64
BATCH, SEQ = 4, 512
W_BITS, A_BITS, KV_BITS = 4, 4, 4
THETA, EPS = 1e5, 1e-5
SHAPES = {
    "q": (HIDDEN, HIDDEN), "k": (KV_HEADS * HEAD_DIM, HIDDEN), "v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HIDDEN), "gate": (INTER, HIDDEN), "up": (INTER, HIDDEN), "down": (HIDDEN, INTER),
}


def factor(n):
    """left * right = n, as close to square as possible."""
    left = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
    return left, n // left


def kron(x, left, right):
    """x (left (x) right) on the last axis, without forming the product."""
    y = x.reshape(-1, left.shape[0], right.shape[0])
    return (left.t() @ (y @ right)).reshape(x.shape)


def inverse_t(p):
    return torch.linalg.inv(p.double()).t().float()


def round_ste(x):
    return (x.round() - x).detach() + x


def quant_weight(w):
    """Symmetric, one scale a row."""
    top = 2 ** (W_BITS - 1) - 1
    scale = w.abs().amax(1, keepdim=True).clamp(min=1e-5) / top
    return scale * round_ste(w / scale).clamp(-top - 1, top)


def quant_act(x, clip_max, clip_min, bits):
    """Asymmetric, one scale a row (token, or token and head), zero in the range, learned clip."""
    xmax = x.amax(-1, keepdim=True).clamp(min=0) * torch.sigmoid(clip_max)
    xmin = x.amin(-1, keepdim=True).clamp(max=0) * torch.sigmoid(clip_min)
    empty = (xmax == 0) & (xmin == 0)
    xmax, xmin = xmax.masked_fill(empty, 1.0), xmin.masked_fill(empty, -1.0)
    scale = (xmax - xmin) / (2 ** bits - 1)
    zero = torch.round(-xmin / scale)
    return scale * ((round_ste(x / scale) + zero).clamp(0, 2 ** bits - 1) - zero)


def rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def rope_tables():
    inv = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    angle = torch.arange(SEQ).float()[:, None] * inv
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos(), angle.sin()


def rope(x, tables):
    half = HEAD_DIM // 2
    return x * tables[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * tables[1]


def attention(q, k, v, mask):
    q = q.transpose(1, 2)
    k, v = (t.transpose(1, 2).repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * HEAD_DIM ** -0.5 + mask
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def heads(x):
    return x.view(BATCH, SEQ, -1, HEAD_DIM)


def float_layer(x, w, tables, mask):
    y = rms_norm(x)
    q, k, v = (heads(F.linear(y, w[n])) for n in "qkv")
    x = x + F.linear(attention(rope(q, tables), rope(k, tables), v, mask).reshape(x.shape), w["o"])
    y = rms_norm(x)
    return x + F.linear(F.silu(F.linear(y, w["gate"])) * F.linear(y, w["up"]), w["down"])


class FlatLayer(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.w = weights
        sizes = {"o": HEADS, "k": HEAD_DIM, "v": HEAD_DIM}
        for name, n in (("ln", HIDDEN), ("ug", HIDDEN), ("dn", INTER)):
            sizes[name + "_l"], sizes[name + "_r"] = factor(n)
        orthogonal = lambda n: torch.linalg.qr(torch.randn(n, n))[0].contiguous()
        self.matrix = nn.ParameterDict({name: nn.Parameter(orthogonal(n)) for name, n in sizes.items()})
        self.diag = nn.ParameterDict(
            {name: nn.Parameter(torch.ones(n)) for name, n in (("ln", HIDDEN), ("ug", HIDDEN), ("dn", INTER))})
        self.w_clip = nn.ParameterDict(
            {f"{n}_{end}": nn.Parameter(torch.full((s[0], 1), 4.0)) for n, s in SHAPES.items() for end in ("max", "min")})
        self.a_clip = nn.ParameterDict(
            {f"{n}_{end}": nn.Parameter(torch.tensor(4.0))
             for n in ("qkv", "o", "gu", "down", "k_cache", "v_cache") for end in ("max", "min")})

    def param_groups(self):
        return [{"params": self.matrix.values(), "lr": 5e-3}, {"params": self.diag.values(), "lr": 5e-3},
                {"params": self.w_clip.values(), "lr": 5e-2}, {"params": self.a_clip.values(), "lr": 5e-2}]

    def act(self, x, name, bits=A_BITS):
        return quant_act(x, self.a_clip[name + "_max"], self.a_clip[name + "_min"], bits)

    def transform(self, x, name):
        return kron(x * self.diag[name], self.matrix[name + "_l"], self.matrix[name + "_r"])

    def weight(self, n, inv, trans):
        if trans == "o":
            w = kron(self.w[n], inv["o"], inv["v"])
        else:
            w = kron(self.w[n] / self.diag[trans], inv[trans + "_l"], inv[trans + "_r"])
        lo = torch.sigmoid(self.w_clip[n + "_min"]) * w.amin(1, keepdim=True)
        hi = torch.sigmoid(self.w_clip[n + "_max"]) * w.amax(1, keepdim=True)
        w = torch.clamp(w, lo, hi)
        if n == "v":
            w = (self.matrix["v"].t() @ w.view(KV_HEADS, HEAD_DIM, -1)).reshape(w.shape)
        return quant_weight(w)

    def forward(self, x, tables, mask):
        inv = {name: inverse_t(p) for name, p in self.matrix.items()}
        y = self.act(self.transform(rms_norm(x), "ln"), "qkv")
        q, k, v = (heads(F.linear(y, self.weight(n, inv, "ln"))) for n in "qkv")
        q = rope(q, tables) @ inv["k"]
        k = self.act(rope(k, tables) @ self.matrix["k"], "k_cache", KV_BITS)
        v = self.act(v, "v_cache", KV_BITS)
        a = self.matrix["o"].t() @ attention(q, k, v, mask)
        x = x + F.linear(self.act(a.reshape(x.shape), "o"), self.weight("o", inv, "o"))
        y = self.act(self.transform(rms_norm(x), "ug"), "gu")
        h = F.silu(F.linear(y, self.weight("gate", inv, "ug"))) * F.linear(y, self.weight("up", inv, "ug"))
        return x + F.linear(self.act(self.transform(h, "dn"), "down"), self.weight("down", inv, "dn"))


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--steps", type=int, default=10)
    ap.add_argument("--warmup", type=int, default=3)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    weights = {n: torch.randn(s) / s[1] ** 0.5 for n, s in SHAPES.items()}
    x = torch.randn(BATCH, SEQ, HIDDEN)
    tables, mask = rope_tables(), torch.full((SEQ, SEQ), float("-inf")).triu(1)
    target = float_layer(x, weights, tables, mask)
    layer = FlatLayer(weights)
    optimizer = torch.optim.AdamW(layer.param_groups())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=480, eta_min=5e-6)

    times, losses = [], []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        loss = F.mse_loss(layer(x, tables, mask), target)
        optimizer.zero_grad()
        (loss / loss.detach()).backward()
        optimizer.step()
        schedule.step()
        times.append(1e3 * (time.perf_counter() - start))
        losses.append(loss.item())
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0], losses
    times = times[args.warmup:]
    print(json.dumps({"median_ms": round(statistics.median(times), 1), "min_ms": round(min(times), 1),
                      "threads": args.threads}))


if __name__ == "__main__":
    main()
