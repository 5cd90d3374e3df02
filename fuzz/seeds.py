"""Writes small valid inputs for the fuzz targets into fuzz/corpus. Standard library only:

    python3 fuzz/seeds.py
"""
import json
import struct
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I8": 1, "U8": 1, "I64": 8}
H, I, V = 32, 32, 4  # hidden, intermediate, vocabulary
LINEAR = {"self_attn.q_proj": (H, H), "self_attn.k_proj": (16, H), "self_attn.v_proj": (16, H),
          "self_attn.o_proj": (H, H), "mlp.gate_proj": (I, H), "mlp.up_proj": (I, H), "mlp.down_proj": (H, I)}


def put(target, name, data):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def safetensors(tensors):
    """Header and data of named (dtype, shape, bytes)."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        size = SIZES[dtype]
        for n in shape:
            size *= n
        content = (content * (size // max(1, len(content)) + 1))[:size]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += content
    return json.dumps(header, separators=(",", ":")).encode(), data


def config(quantization):
    out = {"model_type": "llama", "hidden_size": H, "intermediate_size": I, "num_hidden_layers": 1,
           "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": V, "max_position_embeddings": 16,
           "tie_word_embeddings": True}
    if quantization is not None:
        out["quantization_config"] = quantization
    return json.dumps(out, separators=(",", ":")).encode()


def decoder(linear):
    """The tensors of a decoder of one layer; `linear(rows, cols)` gives those of a linear layer."""
    half = struct.pack("<e", 0.5)
    t = {"model.embed_tokens.weight": ("F16", [V, H], half)}
    for name, (rows, cols) in LINEAR.items():
        for part, tensor in linear(rows, cols).items():
            t[f"model.layers.0.{name}.{part}"] = tensor
    for norm in ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"):
        t[f"{norm}.weight"] = ("F16", [H], half)
    return t


def folder(name, quantization, linear, description=None):
    """`description` is the type of all linear layers in a description for vllm-ascend, and that of caches behind a space."""
    head, data = safetensors(decoder(linear))
    text = config(quantization)
    if description is not None:
        kind, *cached = description.split()
        types = {f"model.layers.0.{n}.weight": kind for n in LINEAR}
        text += b"\x1e" + json.dumps({**types, **{"kv_cache_type": k for k in cached}}, separators=(",", ":")).encode()
    put("quantized", name, struct.pack("<H", len(text)) + text + struct.pack("<H", len(head)) + head + data)
    return struct.pack("<Q", len(head)) + head + data


def folders():
    half, one = struct.pack("<e", 0.5), struct.pack("<e", 1.0)
    word = struct.pack("<I", 0x88888888)
    full = folder("float", None, lambda r, c: {"weight": ("F16", [r, c], half)})
    put("safetensors", "float", full)
    folder("awq", {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
           lambda r, c: {"qweight": ("I32", [c, r // 8], word), "qzeros": ("I32", [c // 16, r // 8], word),
                         "scales": ("F16", [c // 16, r], half)})
    for version in ("gptq", "gptq_v2"):
        order = struct.pack("<32i", *(i % 2 if version == "gptq_v2" else i // 16 for i in range(32)))
        folder(version, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True,
                         "checkpoint_format": version, "dynamic": {"-:lm_head": {}}},
               lambda r, c: {"qweight": ("I32", [c // 8, r], word), "qzeros": ("I32", [c // 16, r // 8], word),
                             "scales": ("F16", [c // 16, r], half), "g_idx": ("I32", [c], order)})
    weights = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights}
    put("safetensors", "packed", folder(
        "packed", {"quant_method": "compressed-tensors", "format": "pack-quantized",
                   "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*norm$"]},
        lambda r, c: {"weight_packed": ("I32", [r, c * 3 // 32], word), "weight_scale": ("BF16", [r, c // 16], one),
                      "weight_zero_point": ("I32", [(r * 3 + 31) // 32, c // 16], word),
                      "weight_shape": ("I64", [2], struct.pack("<2q", r, c))}))
    weights = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    token = {"num_bits": 8, "symmetric": False, "strategy": "token", "dynamic": True}
    folder("bytes", {"quant_method": "compressed-tensors", "format": "int-quantized",
                     "config_groups": {"group_0": {"targets": ["re:model.*"], "weights": weights,
                                                   "input_activations": token}}},
           lambda r, c: {"weight": ("I8", [r, c], b"\x80\x7f\x01"), "weight_scale": ("F32", [r, 1], b"\0\0\x80?")})
    whole = {"num_bits": 8, "symmetric": False, "strategy": "tensor", "dynamic": False}
    folder("static", {"quant_method": "compressed-tensors", "format": "int-quantized",
                      "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
                                                    "input_activations": whole}}, "ignore": ["lm_head"]},
           lambda r, c: {"weight": ("I8", [r, c], b"\x80\x7f\x01"), "weight_scale": ("F16", [r, 1], half),
                         "input_scale": ("F16", [1], half), "input_zero_point": ("I8", [1], b"\x05")})
    zero, full = struct.pack("<f", 0.0), struct.pack("<f", 1.0)
    sides = lambda r: {"weight_scale": ("F32", [r, 1], full), "weight_offset": ("F32", [r, 1], zero)}
    folder("described", None, lambda r, c: {"weight": ("I8", [r, c], b"\x80\x7f\x01"), **sides(r)}, "W8A8_DYNAMIC")
    folder("calibrated", None,
           lambda r, c: {"weight": ("I8", [r, c], b"\x80\x7f\x01"), "input_scale": ("F32", [1], full),
                         "input_offset": ("F32", [1], zero), "deq_scale": ("I64", [r], full + b"\0\0\0\0"),
                         "quant_bias": ("I32", [r], zero)}, "W8A8")
    folder("cached", None,
           lambda r, c: {"weight": ("I8", [r, c], b"\x80\x7f\x01"), **sides(r), **(
               {"kv_cache_scale": ("F32", [16], full), "kv_cache_offset": ("F32", [16], zero)} if r == 16 else {})},
           "W8A8_DYNAMIC C8")
    folder("transformed", None,
           lambda r, c: {"weight": ("I8", [r, c], b"\xf8\x07\x01"), **sides(r), "left_trans": ("F32", [4, 4], full),
                         "right_trans": ("F32", [8, 8], full), "clip_ratio": ("F32", [1], full)}, "W4A4_FLATQUANT_DYNAMIC")
    put("safetensors", "empty", struct.pack("<Q", 2) + b"{}")


def string(s):
    return struct.pack("<Q", len(s)) + s.encode()


def gguf(name, kind, block, tokens):
    """A decoder whose linear layers are stored in blocks of 32."""
    meta = [("general.architecture", 8, string("llama"))]
    for key, n in [("block_count", 1), ("embedding_length", H), ("feed_forward_length", I), ("context_length", 16),
                   ("attention.head_count", 2), ("attention.head_count_kv", 1), ("rope.dimension_count", 16)]:
        meta.append((f"llama.{key}", 4, struct.pack("<I", n)))
    meta.append(("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)))
    meta += tokens
    names = {"attn_q": (H, H), "attn_k": (16, H), "attn_v": (16, H), "attn_output": (H, H), "ffn_gate": (I, H),
             "ffn_up": (I, H), "ffn_down": (H, I)}
    tensors = [("token_embd.weight", [H, V], 0, b"\0\0\0?" * (H * V))]
    for part, (rows, cols) in names.items():
        tensors.append((f"blk.0.{part}.weight", [cols, rows], kind, block * (rows * cols // 32)))
    for norm in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors.append((f"{norm}.weight", [H], 0, b"\0\0\x80?" * H))
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    for key, number, value in meta:
        out += string(key) + struct.pack("<I", number) + value
    data = b""
    for key, sizes, number, content in tensors:
        data += b"\0" * (-len(data) % 32)
        out += string(key) + struct.pack("<I", len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
        out += struct.pack("<IQ", number, len(data))
        data += content
    put("gguf", name, out + b"\0" * (-len(out) % 32) + data)


def ggufs():
    half = struct.pack("<e", -0.5)
    words = ["a", "b", "ab", "</s>"]

    def texts(list):
        return struct.pack("<IQ", 8, len(list)) + b"".join(map(string, list))
    kinds = struct.pack("<IQ4i", 5, 4, 1, 1, 1, 3)
    bpe = [("tokenizer.ggml.model", 8, string("gpt2")), ("tokenizer.ggml.pre", 8, string("smollm")),
           ("tokenizer.ggml.tokens", 9, texts(words)), ("tokenizer.ggml.token_type", 9, kinds),
           ("tokenizer.ggml.merges", 9, texts(["a b"])), ("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 3))]
    scores = struct.pack("<IQ4f", 6, 4, 0, -1, -2, 0)
    spm = [("tokenizer.ggml.model", 8, string("llama")), ("tokenizer.ggml.tokens", 9, texts(["<unk>", "a", "b", "ab"])),
           ("tokenizer.ggml.scores", 9, scores),
           ("tokenizer.ggml.token_type", 9, struct.pack("<IQ4i", 5, 4, 2, 1, 1, 1))]
    gguf("q4_0", 2, half + bytes(range(16)), bpe)
    gguf("q8_0", 8, half + bytes(range(32)), spm)
    gguf("q4_1", 3, half + struct.pack("<e", 3.5) + bytes(range(16)), [])
    gguf("q5_1", 7, half + half + bytes(range(20)), bpe)


QIR = """qir 1
fact arch = llama
fact hidden = 32
fact layers = 1
fact eos = [2, 3]
applied "rtn{skip=[]}"
weight @w.codes : u4<group:16, f16, zero>[8, 32]
weight @w.scale : f16[8, 2]
weight @w.zero : u8[8, 2]
weight @g : bf16[32]

func @layer0(%x: f32[B, S, 32], %pos: i32[S], %past: f32[B, P, 8]) -> (f32[B, S, 8], f32[B, T, 8]) {
  %in = rms_norm %x, @g {eps = 1e-5}
  %0 = fake_quant %in {q = u8<token, f32, zero>, rule = dynamic}
  %1 = dcast @w.codes, @w.scale, @w.zero
  %2 = matmul.t %0, %1
  %3 = rope %2, %pos {head_dim = 4, theta = 10000.0, scaling = linear, factor = 2.0}
  %all = cache_append %past, %3
  %4 = attention %3, %all, %all {heads = 2, kv_heads = 2, scale = 0.5}
  %5 = silu %4
  %c = const {shape = [1], data = [0.5]}
  %6 = mul %5, %c
  return %6, %all // a comment
}
"""


if __name__ == "__main__":
    folders()
    ggufs()
    put("qir", "layer", QIR.encode())
    put("qir", "empty", b"qir 1\n")
