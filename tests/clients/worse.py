"""Says which lines of a new table are worse than the lines of the kept one for the same export and runtime.

    python tests/clients/worse.py KEPT NEW...

A line that was right before and is refused or wrong now is worse; so is a bound of more than twice what it was. Versions
may differ. Exits 1 if there is one.
"""

import pathlib
import re
import sys


def rows(files):
    """By format, scheme, model and runtime without versions: rank (wrong, refused, near-ties, same tokens) and bound."""
    out = {}
    for line in (x for f in files for x in pathlib.Path(f).read_text().splitlines() if x.startswith("| ")):
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) < 8 or cells[0] in ("format", "---"):
            continue
        runtime = re.sub(r" [0-9][^ ]*", "", cells[3])
        wrong = cells[-1] == "WRONG"
        rank = 0 if wrong else 1 if cells[6].startswith(("refused", "fails")) else 3 if cells[6].startswith("same") else 2
        out[(*cells[:3], runtime)] = (rank, float(cells[7] or "inf"), line)
    return out


def main():
    kept, new = rows(sys.argv[1:2]) if pathlib.Path(sys.argv[1]).exists() else {}, rows(sys.argv[2:])
    bad = 0
    for key, (rank, bound, line) in new.items():
        before = kept.get(key, (1, float("inf"), ""))
        if rank < before[0] or bound > 2 * max(before[1], 1e-4):
            bad += 1
            print(f"worse: {line}\nwas:   {before[2]}", file=sys.stderr)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
