"""Loads every export in one runtime and compares it with what qrmc does with the artefact.

    python tests/clients/compare.py transformers|gptqmodel|vllm --work DIR --table FILE [--only PATTERN] [--must-load]

DIR is made by cases.py. For each export: the matrices that the runtime multiplies by against `scale * (code - zero)` of the
artefact, rounded once to the runtime's type; 32 greedy tokens for each prompt; and, with qrmc's tokens before each position,
the log-probabilities of the runtime's 20 likeliest tokens against f32. A line of the table says what was found, or how the
runtime refuses. Exits 3 where a matrix differs, a bound is larger than rounding explains, a token that differs is no near-tie
within the bound, or, with --must-load, the runtime refuses.
"""

import argparse
import importlib
import json
import os
import pathlib
import re
import sys
import time
import traceback

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The models are small, and threads that wait for each other beside other work cost most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Largest difference of a matrix from the artefact's, relative to its largest value: two ulps of 16-bit floats there, as
# kernels that keep `scale * zero` round it, and of 2 bits that may be larger than any weight.
KERNEL = {"float32": 0, "float16": 2**-9, "bfloat16": 2**-6}
# Largest difference of a log-probability that rounding explains: a few times what plain matrices in the type show. A tie
# within twice the bound proves nothing unless the bound is small.
BOUND = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
# Weights of 2 and 3 bits leave so little of the model that the same rounding moves it more.
BOUND_COARSE = 0.5
# Inputs of 8 bits fall on other codes, and the layers after them add to that: what this shows is only that nothing is left
# out, since a layer or a scale that is missing gives 10. The tokens of the shipped model in float32 show more.
BOUND_ROUNDED = 2.0


def compare(client, artefact):
    """One loaded export: what the matrices and tokens are like, and whether that is right."""
    said, good = [client.dtype], True
    different, gap = [], 0.0
    rounds_inputs = artefact.rounding() is not None
    # Of a model of many layers, those of the first and last: the probe is a pass of as many tokens as there are channels.
    names = list(artefact.matrices)
    names = names if len(names) <= 64 else names[:7] + names[-7:]
    for name in names:
        want, have = artefact.matrices[name], client.matrix(name, artefact.unit(name))
        if have is None:
            continue
        want = want.to(have.dtype)
        off = (have.float() - want.float()).abs().max().item() / want.float().abs().max().item()
        gap = max(gap, off)
        if not (have.shape == want.shape and bool((have == want).all())):
            different.append(name)
    if not different:
        all_of = len(names) == len(artefact.matrices)
        said.append("weights equal" if all_of else f"weights equal ({len(names)} of {len(artefact.matrices)})")
    elif rounds_inputs:
        # Probed through the rounding of inputs: 1 becomes a code times a scale.
        good &= gap < 1e-2
        said.append(f"weights within {gap:.0e} through rounded inputs")
    else:
        # Some kernels keep `scale * zero` rounded to 16 bits instead of the zero point.
        good &= gap < KERNEL[client.dtype]
        said.append(f"{len(different)} matrices within {gap:.0e}")
    ties, bound = [], 0.0
    references = artefact.reference()
    for i, ((ids, want), reference) in enumerate(zip(artefact.prompts(), references)):
        for step, found in enumerate(client.top(ids + want[:-1], len(ids) - 1)):
            for token, value in found:
                bound = max(bound, abs(value - reference[step, token].item()))
        have = client.generate(ids, len(want))
        at = next((k for k, (a, b) in enumerate(zip(have, want)) if a != b), None)
        if at is not None:
            margin = (reference[at, want[at]] - reference[at, have[at]]).item()
            ties.append(f"prompt {i + 1} token {at + 1}, margin {margin:.1e}")
            good &= -artefact.near() <= margin <= 2 * bound
        elif len(have) < len(want):
            good = False
            ties.append(f"prompt {i + 1} ends after {len(have)} tokens")
    allowed = BOUND_ROUNDED if rounds_inputs else BOUND[client.dtype]
    good &= bound <= (allowed if artefact.bits > 3 else max(allowed, BOUND_COARSE))
    said.append("same 32 tokens" if not ties else "tokens differ at " + "; ".join(ties))
    said.append(f"{bound:.1e}")
    return said, good


def one(runtime, case, mode):
    """Loads and compares in this process."""
    from artefact import Artefact

    artefact = Artefact(case["artefact"])
    # Outside of what counts as the runtime's refusal.
    try:
        artefact.reference(), list(artefact.prompts())
    except AssertionError as e:
        return {"died": str(e)}
    stage = "refused"
    try:
        client = importlib.import_module(f"load_{runtime}").Client(case["export"], mode)
        stage = "fails when run"
        said, good = compare(client, artefact)
    except (Exception, SystemExit) as e:
        traceback.print_exc()
        text = " ".join(f"{type(e).__name__}: {e}".split())
        return {"refused": f"{stage}: {text[:400]}"}
    return {"said": said, "good": good}


def forked(runtime, case, mode):
    """The result of one case in a process of its own, which its memory dies with."""
    r, w = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(r)
            os.write(w, json.dumps(one(runtime, case, mode)).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    os.close(w)
    with os.fdopen(r) as f:
        text = f.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(text) if text else {"died": f"the process ended with status {status}"}


def kept(table):
    """Lines of an earlier run by their first four cells."""
    lines = table.read_text().splitlines() if table.exists() else []
    return {tuple(c.strip() for c in line.split("|")[1:5]): line for line in lines}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runtime", choices=["transformers", "gptqmodel", "vllm"])
    p.add_argument("--work", required=True, type=pathlib.Path)
    p.add_argument("--table", required=True, type=pathlib.Path)
    p.add_argument("--only", default="", help="cases whose line matches this pattern; other lines that FILE has stay")
    p.add_argument("--must-load", action="store_true", help="what is refused is wrong, too")
    a = p.parse_args()
    module = importlib.import_module(f"load_{a.runtime}")
    # A process of its own for each case frees what vLLM holds; threads that GPTQModel starts do not survive a fork.
    run = forked if module.FORK else one
    lines, ran, bad = kept(a.table) if a.only else {}, 0, 0
    cases = json.loads((a.work / "cases.json").read_text())
    loads = [(c, m, f"{module.VERSION} ({m})" if m else module.VERSION) for c in cases for m in module.modes(c)]
    loads = {(c["format"], c["scheme"], c["model"], r): (c, m) for c, m, r in loads if c["format"] != "gguf"}
    for head, (case, mode) in loads.items():
        if not re.search(a.only, " ".join(head)):
            continue
        start, ran = time.monotonic(), ran + 1
        found = {"refused": "refused: qrmc: " + case["refused"]} if "refused" in case else run(a.runtime, case, mode)
        if "said" in found:
            rest, good = found["said"], found["good"]
        elif "refused" in found:
            rest, good = ["", "", found["refused"].replace("|", "\\|"), ""], not a.must_load
        else:
            rest, good = ["", "", f"nothing compared: {found['died']}", ""], False
        rest.append(case.get("check", {}).get(module.TARGET, ""))
        bad += not good
        lines[head] = line = "| " + " | ".join([*head, *rest]) + " |" + ("" if good else " WRONG |")
        print(line, f"({time.monotonic() - start:.0f} s)", flush=True)
        a.table.write_text("".join(f"{lines[h]}\n" for h in loads if h in lines))
    if not ran:
        sys.exit(f"{a.work}/cases.json has no case for {a.runtime} that matches {a.only!r}")
    sys.exit(3 if bad else 0)


if __name__ == "__main__":
    main()
