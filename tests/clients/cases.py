"""What is exported and loaded: models, schemes, formats. Makes the artefacts and exports with qrmc.

    python tests/clients/cases.py --qrmc target/release/qrmc --work DIR [--smollm2 FOLDER_OR_GGUF] [--only PATTERN]

DIR/cases.json lists them, with what `check --target` says; beside each artefact lie the tokens that qrmc generates from it, greedily, from raw text. Nothing
but the standard library is used.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys

TINY = pathlib.Path(__file__).parents[1] / "data" / "tiny-qwen2-wiki"
NEW = 32
PROMPTS = ["The city of", "In 1944 , the second battalion", "The song was written by"]

AWQ, GPTQ, GPTQ_V2, TENSORS, GGUF = FORMATS = ["awq", "gptq", "gptq-v2", "compressed-tensors", "gguf"]
WEIGHTS = FORMATS[:4]
# Scheme: pipeline, formats of the shipped model, of SmolLM2. That has 576 channels: groups of 64 divide them, of 128 do not.
SCHEMES = {
    "W4 g64": (["rtn{bits=4,group=64,scale=f16}"], WEIGHTS, [AWQ, GPTQ_V2, TENSORS]),
    "W4 g64 sym": (["rtn{bits=4,group=64,sym=true,scale=f16}"], WEIGHTS, [AWQ, GPTQ, TENSORS]),
    "W4 g64 sym bf16": (["rtn{bits=4,group=64,sym=true,scale=bf16}"], [GPTQ, TENSORS], []),
    "W4 g64 sym f32": (["rtn{bits=4,group=64,sym=true,scale=f32}"], [TENSORS], []),
    "W4 g128": (["rtn{bits=4,group=128,scale=f16}"], [AWQ, GPTQ_V2, TENSORS], []),
    "W4 row": (["rtn{bits=4,group=row,scale=f16}"], [AWQ, GPTQ_V2, TENSORS], []),
    "W4 row sym": (["rtn{bits=4,group=row,sym=true,scale=f16}"], [GPTQ, TENSORS], []),
    "W4 g64 but down_proj": (["rtn{bits=4,group=64,scale=f16,skip=[down_proj]}"], [AWQ, GPTQ_V2, TENSORS], []),
    "W4 g64 sym but down_proj": (["rtn{bits=4,group=64,sym=true,scale=f16,skip=[down_proj]}"], [AWQ, GPTQ, TENSORS], []),
    "W4 g64 sym head 8": (["rtn{bits=4,group=64,sym=true,scale=f16,head=8}"], [TENSORS], []),
    "W2 g64": (["rtn{bits=2,group=64,scale=f16}"], [AWQ, GPTQ_V2, TENSORS], []),
    "W2 g64 sym": (["rtn{bits=2,group=64,sym=true,scale=f16}"], [GPTQ, TENSORS], []),
    "W3 g64": (["rtn{bits=3,group=64,scale=f16}"], [GPTQ_V2, TENSORS], [GPTQ_V2]),
    "W3 g64 sym": (["rtn{bits=3,group=64,sym=true,scale=f16}"], [GPTQ, TENSORS], []),
    "W8 g64": (["rtn{bits=8,group=64,scale=f16}"], [GPTQ_V2, TENSORS], []),
    "W8 g64 sym": (["rtn{bits=8,group=64,sym=true,scale=f16}"], [GPTQ, TENSORS], [GPTQ, TENSORS]),
    "W4 g32": (["rtn{bits=4,group=32,scale=f16}"], [GGUF], [GGUF]),
    "W4 g32 sym": (["rtn{bits=4,group=32,sym=true,scale=f16}"], [GGUF], [GGUF]),
    "W8 g32 sym": (["rtn{bits=8,group=32,sym=true,scale=f16}"], [GGUF], [GGUF]),
    "W8A8 asym": (["rtn{bits=8,a=8,group=row,sym=true}"], [TENSORS], [TENSORS]),
    "W8A8 sym": (["annotate{w=8,group=row,sym=true,a=8,a_sym=true}", "rtn"], [TENSORS], [TENSORS]),
    "W8A8 static": (["static-inputs{scale=f32}", "annotate{w=8,group=row,sym=true}", "rtn"], [TENSORS], []),
    "W8A8 static asym": (["static-inputs{scale=f32,sym=false}", "annotate{w=8,group=row,sym=true}", "rtn"], [TENSORS], []),
}


# What `check --target` calls the runtimes.
TARGETS = ["transformers", "gptqmodel", "vllm-cpu", "llama.cpp"]


def qrmc(binary, *args):
    """What qrmc prints; RuntimeError with its complaint."""
    done = subprocess.run([binary, *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def slug(*words):
    return "-".join(words).replace(" ", "-")


def verdict(binary, export, target):
    """What `check --target` says of an export: loads or refuses."""
    export = export / "model.gguf" if target == "llama.cpp" else export
    done = subprocess.run([binary, "check", str(export), "--target", target, "--json"], capture_output=True, text=True)
    if done.returncode not in (0, 4):
        raise RuntimeError(done.stderr.strip())
    return "loads" if done.returncode == 0 else "refuses"


def make(binary, work, models, only):
    """Compiles, generates and exports what matches "format scheme model"; what exists is kept."""
    out = []
    for scheme, (pipeline, *wanted_of) in SCHEMES.items():
        for model, wanted in ((m, w) for m, w in zip(["tiny", "smollm2"], wanted_of) if m in models):
            formats = [f for f in wanted if re.search(only, f"{f} {scheme} {model}")]
            if not formats:
                continue
            folder = work / slug(model, scheme)
            if not folder.exists():
                passes = [x for p in pipeline for x in ("--pass", p)]
                qrmc(binary, "compile", models[model], *passes, "--no-check", "-o", folder)
            tokens = folder.with_suffix(".json")
            if not tokens.exists():
                flags = ["--raw", "--greedy", "--max-new", NEW, "--json", "--prompt"]
                runs = [json.loads(qrmc(binary, "generate", folder, *flags, p)) for p in PROMPTS]
                runs = [{"prompt": p, "prompt_tokens": r["prompt_tokens"], "tokens": r["tokens"]} for p, r in zip(PROMPTS, runs)]
                tokens.write_text(json.dumps(runs))
            for name in formats:
                case = {"model": model, "scheme": scheme, "format": name, "artefact": str(folder)}
                export = work / slug(model, scheme, name)
                refusal = export.with_suffix(".refused")
                if not export.exists() and not refusal.exists():
                    try:
                        qrmc(binary, "export", folder, "--format", name, "-o", export)
                    except RuntimeError as e:
                        refusal.write_text(str(e))
                if refusal.exists():
                    case["refused"] = " ".join(refusal.read_text().split())
                else:
                    case["check"] = {t: verdict(binary, export, t) for t in TARGETS if (t == "llama.cpp") == (name == GGUF)}
                case["export"] = str(export)
                out.append(case)
    (work / "cases.json").write_text(json.dumps(out, indent=1))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--qrmc", required=True)
    p.add_argument("--work", required=True, type=pathlib.Path)
    p.add_argument("--smollm2", type=pathlib.Path, help="SmolLM2-135M; left out if not given")
    p.add_argument("--only", default="", help='cases whose "format scheme model" matches this pattern')
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    models = {"tiny": TINY} | ({"smollm2": a.smollm2} if a.smollm2 else {})
    made = make(shutil.which(a.qrmc) or a.qrmc, a.work.resolve(), models, a.only)
    if not made:
        sys.exit(f"no case matches {a.only!r}")
    for case in made:
        print(case["model"], case["scheme"], case["format"], case.get("refused", ""), sep=" | ")


if __name__ == "__main__":
    main()
