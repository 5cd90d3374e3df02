"""What is exported and loaded: models, schemes, formats. Makes the artefacts and exports with qrmc.

    python tests/clients/cases.py --qrmc target/release/qrmc --work DIR [--smollm2 FOLDER_OR_GGUF]

DIR/cases.json lists them with the tokens that qrmc generates from each artefact, greedily, from raw text. Nothing but the
standard library is used.
"""

import argparse
import json
import pathlib
import shutil
import subprocess

TINY = pathlib.Path(__file__).parents[1] / "data" / "tiny-qwen2-wiki"
NEW = 32
PROMPTS = ["The city of", "In 1944 , the second battalion", "The song was written by"]

WEIGHTS = ["awq", "gptq", "gptq-v2", "compressed-tensors"]
# Scheme: pipeline, models, formats. SmolLM2 has 576 channels: groups of 64 divide them, of 128 do not.
SCHEMES = {
    "W4 g64": (["rtn{bits=4,group=64,scale=f16}"], ["tiny", "smollm2"], WEIGHTS),
    "W4 g64 sym": (["rtn{bits=4,group=64,sym=true,scale=f16}"], ["tiny", "smollm2"], WEIGHTS),
    "W4 g64 sym bf16": (["rtn{bits=4,group=64,sym=true,scale=bf16}"], ["tiny"], WEIGHTS[1:]),
    "W4 g64 sym f32": (["rtn{bits=4,group=64,sym=true,scale=f32}"], ["tiny"], WEIGHTS[3:]),
    "W4 g128": (["rtn{bits=4,group=128,scale=f16}"], ["tiny"], WEIGHTS),
    "W4 row": (["rtn{bits=4,group=row,scale=f16}"], ["tiny"], WEIGHTS),
    "W4 row sym": (["rtn{bits=4,group=row,sym=true,scale=f16}"], ["tiny"], WEIGHTS),
    "W4 g64 but down_proj": (["rtn{bits=4,group=64,scale=f16,skip=[down_proj]}"], ["tiny"], WEIGHTS),
    "W4 g64 sym but down_proj": (["rtn{bits=4,group=64,sym=true,scale=f16,skip=[down_proj]}"], ["tiny"], WEIGHTS),
    "W4 g64 sym head 8": (["rtn{bits=4,group=64,sym=true,scale=f16,head=8}"], ["tiny"], WEIGHTS[3:]),
    "W2 g64": (["rtn{bits=2,group=64,scale=f16}"], ["tiny"], WEIGHTS[1:]),
    "W3 g64": (["rtn{bits=3,group=64,scale=f16}"], ["tiny", "smollm2"], WEIGHTS[1:]),
    "W3 g64 sym": (["rtn{bits=3,group=64,sym=true,scale=f16}"], ["tiny"], WEIGHTS[1:]),
    "W8 g64": (["rtn{bits=8,group=64,scale=f16}"], ["tiny"], WEIGHTS[1:]),
    "W8 g64 sym": (["rtn{bits=8,group=64,sym=true,scale=f16}"], ["tiny", "smollm2"], WEIGHTS[1:]),
    "W4 g32": (["rtn{bits=4,group=32,scale=f16}"], ["tiny", "smollm2"], ["gguf"]),
    "W4 g32 sym": (["rtn{bits=4,group=32,sym=true,scale=f16}"], ["tiny", "smollm2"], ["gguf"]),
    "W8 g32 sym": (["rtn{bits=8,group=32,sym=true,scale=f16}"], ["tiny", "smollm2"], ["gguf"]),
    "W8A8 asym": (["rtn{bits=8,a=8,group=row,sym=true}"], ["tiny", "smollm2"], WEIGHTS[3:]),
    "W8A8 sym": (["annotate{w=8,group=row,sym=true,a=8,a_sym=true}", "rtn"], ["tiny", "smollm2"], WEIGHTS[3:]),
}


def qrmc(binary, *args):
    """What qrmc prints, or the last line of its complaint."""
    done = subprocess.run([binary, *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def slug(*words):
    return "-".join(words).replace(" ", "-")


def make(binary, work, models):
    """Compiles, generates and exports; what exists is kept."""
    out = []
    for scheme, (pipeline, on, formats) in SCHEMES.items():
        for model in (m for m in on if m in models):
            folder = work / slug(model, scheme)
            if not folder.exists():
                passes = [x for p in pipeline for x in ("--pass", p)]
                qrmc(binary, "compile", models[model], *passes, "--no-check", "-o", folder)
            wanted = folder.with_suffix(".json")
            if not wanted.exists():
                flags = ["--raw", "--greedy", "--max-new", NEW, "--json", "--prompt"]
                runs = [json.loads(qrmc(binary, "generate", folder, *flags, p)) for p in PROMPTS]
                runs = [{"prompt": p, "prompt_tokens": r["prompt_tokens"], "tokens": r["tokens"]} for p, r in zip(PROMPTS, runs)]
                wanted.write_text(json.dumps(runs))
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
                case["export"] = str(export)
                out.append(case)
    (work / "cases.json").write_text(json.dumps(out, indent=1))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--qrmc", required=True)
    p.add_argument("--work", required=True, type=pathlib.Path)
    p.add_argument("--smollm2", type=pathlib.Path, help="SmolLM2-135M; left out if not given")
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    models = {"tiny": TINY} | ({"smollm2": a.smollm2} if a.smollm2 else {})
    for case in make(shutil.which(a.qrmc) or a.qrmc, a.work.resolve(), models):
        print(case["model"], case["scheme"], case["format"], case.get("refused", ""), sep=" | ")


if __name__ == "__main__":
    main()
