"""Damage every kind of file in thousands of ways: each loads, or raises sharpkit's own error.

    python benchmarks/fuzz.py --cases 20000 --out fuzz.md

Cases run in worker processes with a limit of 1 GiB and 10 s each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

from fuzzing import KINDS, try_case, write_seeds

from sharpkit.workers import Failure, Workers, run_items


def case(folder: Path, item: tuple[str, int], device: str) -> tuple[str, float]:
    began = time.perf_counter()
    outcome = try_case(folder, *item)
    return outcome, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="Seed of the first case.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    each = -(-arguments.cases // len(arguments.kinds))
    items = [(k, arguments.first + i) for k in arguments.kinds for i in range(each)]
    counts: Counter[tuple[str, str]] = Counter()
    slowest, bad = dict.fromkeys(arguments.kinds, 0.0), []
    with tempfile.TemporaryDirectory() as folder:
        write_seeds(Path(folder))
        results = run_items(
            partial(case, Path(folder)),
            items,
            Workers(1, "processes", timeout=10, memory=2**30),
        )
        for (kind, seed), result in tqdm(results, total=len(items)):
            if isinstance(result, Failure):
                bad.append(f"{kind} {seed}: {result.message}")
                counts[kind, "failed"] += 1
                continue
            outcome, seconds = result
            slowest[kind] = max(slowest[kind], seconds)
            if outcome.startswith("ESCAPED"):
                bad.append(outcome)
                outcome = "failed"
            counts[kind, "loaded" if outcome == "loaded" else outcome] += 1
    lines = [
        "| file | cases | loaded | refused | failed | slowest s |",
        "|---|---|---|---|---|---|",
    ]
    for kind in arguments.kinds:
        total = sum(n for (k, _), n in counts.items() if k == kind)
        loaded, failed = counts[kind, "loaded"], counts[kind, "failed"]
        lines.append(
            f"| {kind} | {total:,} | {loaded:,} | {total - loaded - failed:,} | {failed} "
            f"| {slowest[kind]:.2f} |"
        )
    text = "\n".join(lines)
    print(text)
    print("\n".join(bad[:20]))
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
