"""Is one commit slower than another? `make bench-compare BASE=<commit> [HEAD=<commit>]`.

    python benchmarks/compare.py BASE [HEAD] [--only CASE] [--pairs N] [--rounds N]

Both commits are checked out, and each is measured by processes of its own that take turns, case by
case, so that noise hits both. A case is slower if both the median of the paired ratios and the
ratio of the best times are past 1.15: a busy moment moves one of the two, a slower program both.
The exit code is then 1. The benchmark code is that of this tree for both commits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from timing import short

LIMIT = 1.15
IMPORT = "import sharpkit after torch"


@dataclass(frozen=True)
class Comparison:
    """Paired seconds of one case at both commits."""

    case: str
    base: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)

    @property
    def paired(self) -> float:
        """Median of the ratios of neighbours in time."""
        return statistics.median(h / b for b, h in zip(self.base, self.head, strict=True))

    @property
    def best(self) -> float:
        """Ratio of the smallest times, which noise can only raise."""
        return min(self.head) / min(self.base)

    @property
    def slower(self) -> bool:
        return min(self.paired, self.best) > LIMIT


def cases() -> dict[str, Callable[[], Callable[[], object]]]:
    """Name -> what builds the call to time; public names only, since old commits run it too."""
    import bench_cmi
    import bench_curvature
    import bench_speed
    import torch
    from networks import NETWORKS, small_cnn

    import sharpkit as sk

    def cnn_data(n: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        data = torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,))
        return small_cnn().eval(), data

    def sharpness(m: int | list[int], rho: float | list[float], n: int) -> Callable[[], object]:
        return bench_speed.measurement(*cnn_data(n), m, rho)

    def operator() -> sk.HessianOperator:
        return sk.HessianOperator(bench_curvature.cnn(), bench_curvature.images(200, 28))

    def products() -> Callable[[], object]:
        kept = operator()
        v = torch.randn(kept.shape[0])
        return lambda: [kept.matvec(v) for _ in range(3)]

    def density() -> Callable[[], object]:
        kept = operator()
        return lambda: sk.spectral_density(kept, steps=10, probes=1, seed=0)

    def m_sam(m: int) -> Callable[[], object]:
        return bench_speed.m_sam_step(*NETWORKS["CNN 0.22 M"].case(128, "cpu"), m)

    def sam() -> Callable[[], object]:
        return bench_speed.closure_step(*NETWORKS["CNN 0.22 M"].case(128, "cpu"))

    def loading() -> Callable[[], object]:
        entries = list(sk.embedded_zoo()["fashion_mnist_14x14"].values())[:10]
        return lambda: [entry.load() for entry in entries]

    def run() -> Callable[[], object]:
        measure = sk.MSharpness(m=[1, 16], rho=0.1)
        zoo = sk.embedded_zoo()
        return lambda: sk.score_zoo(zoo, measure, n=64, limit=3, progress=False)

    return {
        "m-sharpness, m = 1": lambda: sharpness(1, 0.05, 128),
        "m-sharpness, m = 16": lambda: sharpness(16, 0.05, 128),
        "m-sharpness, 3 m x 2 rho": lambda: sharpness([1, 4, 16], [0.02, 0.05], 64),
        "3 Hessian-vector products": products,
        "10-step spectral density": density,
        "SAM.step(closure)": sam,
        "m-SAM step, m = 1": lambda: m_sam(1),
        "pgdl score, 96 models": lambda: bench_cmi.score(96, "pgdl"),
        "jiang score, 96 models": lambda: bench_cmi.score(96, "jiang"),
        "load 10 models": loading,
        "a run over 3 models": run,
    }


def work(only: Sequence[str] | None) -> None:
    """What a worker does: import, prepare every case, then time the one that it is told."""
    import torch

    began = time.perf_counter()
    import sharpkit

    seconds = time.perf_counter() - began
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tell({"import": seconds, "path": sharpkit.__file__})
    calls: dict[str, Callable[[], object]] = {}
    for name, build in cases().items():
        if only and name not in only:
            continue
        try:
            calls[name] = build()
            calls[name]()  # warm
        except Exception as error:  # a commit may lack what a case needs; the driver decides
            calls.pop(name, None)
            tell({"case": name, "error": f"{type(error).__name__}: {error}"})
    tell({"cases": list(calls)})
    for line in sys.stdin:
        call = calls[line.strip()]
        began = time.perf_counter()
        call()
        tell({"seconds": time.perf_counter() - began})


def tell(message: object) -> None:
    print(json.dumps(message), flush=True)


class Worker:
    """A process that times the cases with the package of one tree."""

    def __init__(self, tree: Path, only: Sequence[str]) -> None:
        chosen = [word for name in only for word in ("--only", name)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", *chosen],
            env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started = self.hear()
        if not Path(started["path"]).resolve().is_relative_to(tree.resolve()):
            raise SystemExit(f"expected sharpkit from {tree}, got {started['path']}")
        self.import_seconds = started["import"]
        self.missing: dict[str, str] = {}
        while "cases" not in (message := self.hear()):
            self.missing[message["case"]] = message["error"]
        self.cases = message["cases"]

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with exit code {self.process.wait()}")
        return json.loads(line)

    def time(self, case: str) -> float:
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        return self.hear()["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(
    base: Path, head: Path, only: Sequence[str], pairs: int, rounds: int
) -> tuple[list[Comparison], dict[str, str]]:
    """Compare two trees, in fresh pairs of processes.

    Returns:
        tuple: The comparisons, and the cases that the base cannot run, with its error.

    Raises:
        SystemExit: If the head cannot run a case.
    """
    found: dict[str, Comparison] = {}
    for pair in range(pairs):
        workers = {"base": Worker(base, only), "head": Worker(head, only)}
        if workers["head"].missing:
            raise SystemExit(f"the head cannot run {workers['head'].missing}")
        missing = workers["base"].missing
        shared = [case for case in workers["head"].cases if case not in missing]
        imports = found.setdefault(IMPORT, Comparison(IMPORT))
        imports.base.append(workers["base"].import_seconds)
        imports.head.append(workers["head"].import_seconds)
        for turn in range(rounds):
            order = ["base", "head"] if (pair + turn) % 2 else ["head", "base"]
            for case in shared:
                comparison = found.setdefault(case, Comparison(case))
                for side in order:
                    getattr(comparison, side).append(workers[side].time(case))
        for worker in workers.values():
            worker.close()
    if only:
        del found[IMPORT]
    return list(found.values()), missing


@contextmanager
def checkouts(*commits: str) -> Iterator[list[Path]]:
    """Worktrees of some commits, compiled, removed at the end."""
    repository = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(repository), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / str(i) for i in range(len(commits))]
        try:
            for tree, commit in zip(trees, commits, strict=True):
                subprocess.run([*git, "add", "--quiet", "--detach", tree, commit], check=True)
                subprocess.run(
                    [sys.executable, "-m", "compileall", "-q", tree / "sharpkit"], check=True
                )
            yield trees
        finally:
            for tree in trees:
                if tree.exists():
                    subprocess.run([*git, "remove", "--force", tree], check=True)


def table(comparisons: Sequence[Comparison]) -> str:
    lines = [
        "| case | base ms | head ms | head / base, paired | best | |",
        "|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        base, head = (short(1e3 * statistics.median(side)) for side in (c.base, c.head))
        verdict = "**slower**" if c.slower else ""
        lines.append(f"| {c.case} | {base} | {head} | {c.paired:.2f} | {c.best:.2f} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?")
    parser.add_argument("head", nargs="?", default="HEAD")
    parser.add_argument("--only", action="append", default=[], help="A case; repeatable.")
    parser.add_argument("--pairs", type=int, default=5, help="Pairs of processes.")
    parser.add_argument("--rounds", type=int, default=3, help="Measurements in each.")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.only)
        return
    if not arguments.base:
        parser.error("BASE is missing: make bench-compare BASE=<commit> [HEAD=<commit>]")
    with checkouts(arguments.base, arguments.head) as (base, head):
        comparisons, missing = compare(
            base, head, arguments.only, arguments.pairs, arguments.rounds
        )
    print(table(comparisons))
    for case, error in missing.items():
        print(f"not in {arguments.base}: {case} ({error})")
    slower = [c.case for c in comparisons if c.slower]
    if slower:
        sys.exit(f"{arguments.head} is more than {LIMIT - 1:.0%} slower in: {', '.join(slower)}")


if __name__ == "__main__":
    main()
