"""Every speed claim of the project beside its peers, in one go: `make bench`.

    .venv-bench/bin/python benchmarks/run_all.py [--quick] [--only TEXT] [--threads N]
        [--results FOLDER]

Each benchmark is a process of its own with the same number of threads. What it measured is written
to FOLDER/<machine>.json, and as a table to FOLDER/<machine>.md. A benchmark that fails is recorded,
the others run, and the exit code is 1. `--quick` takes minutes: sizes too small for the targets.
`--only sam` runs the benchmarks with that text in their name again, in the results that are there:
for the case that something else ran on the machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from timing import Record, short

HERE = Path(__file__).resolve().parent
JOBS = (
    "bench_speed.py --only sharpness",
    "bench_speed.py --only sam",
    "bench_speed.py --only compiled",
    "bench_speed.py --only sweep",
    "bench_speed.py --only large",
    "bench_speed.py --only calls",
    "bench_cmi.py",
    "bench_loading.py",
    "bench_contract.py",
    "bench_curvature.py --only products",
    "bench_curvature.py --only density",
    "bench_curvature.py --only agreement",
    "bench_curvature.py --only memory",
    "bench_curvature.py --only scaling",
    "bench_language.py",
    "bench_landscape.py",
    "bench_tracker.py",
    "bench_load.py --only models",
    "bench_load.py --only measures",
    "bench_runs.py --only many",
    "bench_runs.py --only overhead",
    "bench_runs.py --only speedup",
)
PACKAGES = (  # sharpkit itself is known by the commit of each job
    "torch",
    "numpy",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
    "pyhessian",
)


def run_job(job: str, quick: bool, threads: int) -> dict[str, Any]:
    """What one benchmark found, when, from which code, and why it failed, if it did."""
    script, *options = job.split()
    limits = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    result = {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "records", Path(folder) / "errors"
        command = [sys.executable, str(HERE / script), *options, "--out", str(out)]
        with errors.open("w") as stderr:
            done = subprocess.run(
                [*command, "--quick"] if quick else command,
                env={**os.environ, **limits},
                stderr=stderr,
                check=False,
            )
        lines = out.read_text().splitlines() if out.is_file() else []
        records = [Record(**json.loads(line)) for line in lines]
        error = errors.read_text()[-2000:] if done.returncode else ""
    if done.returncode:
        print(error, file=sys.stderr)
    return {
        **result,
        "seconds": round(time.monotonic() - began),
        "exit_code": done.returncode,
        "error": error,
        "records": [asdict(r) | {"median": r.median, "holds": r.holds} for r in records],
    }


def records_of(jobs: Mapping[str, Mapping[str, Any]]) -> list[Record]:
    """All records of a result, in the order of the benchmarks."""
    names = [field.name for field in fields(Record)]
    found = [record for job in JOBS if job in jobs for record in jobs[job]["records"]]
    return [Record(**{name: record[name] for name in names}) for record in found]


def table(records: Sequence[Record]) -> str:
    """One row per case: sharpkit, its peers, and the fastest peer in times of sharpkit."""
    lines = [
        "| case | unit | sharpkit | peers | fastest peer / sharpkit | target | holds |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(record.case for record in records):
        group = [record for record in records if record.case == case]
        ours = [record for record in group if record.contender.startswith("sharpkit")]
        peers = [record for record in group if record not in ours]
        fastest = ""
        if ours and peers and ours[0].median > 0:
            fastest = short(min(peer.median for peer in peers) / ours[0].median)
        targets = [record for record in group if record.target]
        cells = (
            case,
            group[0].unit,
            "; ".join(named(record, plain="sharpkit") for record in ours),
            "; ".join(named(record) for record in peers),
            fastest,
            "; ".join(dict.fromkeys(record.target for record in targets)),
            holds(targets),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def holds(records: Sequence[Record]) -> str:
    """Whether all targets of a case are met, or by whom they are not."""
    missed = [record.contender for record in records if not record.holds]
    if missed:
        return f"**no**: {', '.join(missed)}"
    return "yes" if records else ""


def named(record: Record, plain: str = "") -> str:
    """The values with the contender before them, but for the one of that name."""
    name = record.contender.removeprefix(plain).strip()
    return f"{name} {record}" if name else str(record)


def machine_name(processor: str, cores: int) -> str:
    """Such as amd-epyc-9554-2-cores, from what the processor calls itself."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|\d+-core|@.*", " ", processor.lower())
    return f"{'-'.join(re.findall('[a-z0-9]+', name))}-{cores}-cores"


def describe_machine() -> dict[str, Any]:
    """What the figures depend on; no host name."""
    info: dict[str, str] = {}
    if Path("/proc/cpuinfo").is_file():
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        info = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in first.splitlines())}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "family": info.get("cpu family", ""),
        "model": info.get("model", ""),
        "cores": cores,
        "memory_gib": round(memory),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of the contenders, which must all be there.

    Raises:
        SystemExit: If one is missing.
    """
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: run `make bench`, which installs it") from None


def commit() -> str:
    """Of the working tree, with a + if it was changed since; "" outside a repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=10", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def page(result: Mapping[str, Any]) -> str:
    """The Markdown page of a result."""
    machine, jobs = result["machine"], result["jobs"]
    records = records_of(jobs)
    missed = [record for record in records if record.holds is False]
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    kind = f" (family {machine['family']}, model {machine['model']})" if machine["family"] else ""
    lines = [
        f"# Benchmarks: {machine['processor']}, {machine['cores']} cores",
        "",
        "Written by `make bench`; see [the explanations](../README.md).",
        "Medians, with the smallest and largest value in brackets. A ratio above 1 in the fifth",
        "column means that sharpkit took less than the fastest (or smallest) peer.",
        "",
        f"- {machine['processor']}{kind}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}",
        f"- {result['threads']} threads for every contender; Python {machine['python']}, {used}",
        f"- {len(missed)} of {sum(bool(r.target) for r in records)} targets missed",
    ]
    if result["quick"]:
        lines.append("- **`--quick`: sizes too small for the targets to mean anything**")
    for job in filter(jobs.__contains__, JOBS):
        run = jobs[job]
        lines.append(
            f"- `{job}`: commit {run['commit'] or 'unknown'}, {run['date']}, {run['seconds']} s"
        )
        if run["exit_code"]:
            reason = (run["error"].strip().splitlines() or [""])[-1]
            lines[-1] += f"; **failed** (exit code {run['exit_code']}): {reason}"
    return "\n".join([*lines, "", table(records), ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="Text in the names of the benchmarks to run again.")
    parser.add_argument("--threads", type=int, help="Of every contender; all cores by default.")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    machine = describe_machine()
    result: dict[str, Any] = {
        "machine": machine,
        "versions": versions(),
        "threads": arguments.threads or machine["cores"],
        "quick": arguments.quick,
    }
    name = machine_name(machine["processor"], machine["cores"]) + "-quick" * arguments.quick
    written = arguments.results / f"{name}.json"
    jobs: dict[str, Any] = {}
    if arguments.only and written.is_file():
        earlier = json.loads(written.read_text())
        jobs = {job: run for job, run in earlier.pop("jobs").items() if job in JOBS}
        if earlier != result:
            sys.exit(f"{written} is of another machine, other versions or threads: run everything")
    chosen = [job for job in JOBS if (arguments.only or "") in job]
    if not chosen:
        sys.exit(f"no benchmark has {arguments.only!r} in its name: {', '.join(JOBS)}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    for job in chosen:
        print(f"\n{job}", flush=True)
        jobs[job] = run_job(job, arguments.quick, result["threads"])
        written.write_text(json.dumps({**result, "jobs": jobs}, indent=1) + "\n")
        written.with_suffix(".md").write_text(page({**result, "jobs": jobs}))
    failed = sum(bool(jobs[job]["exit_code"]) for job in chosen)
    print(f"\n{written} and .md; {failed} of {len(chosen)} benchmarks failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
