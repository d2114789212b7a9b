"""What the benchmarks conclude from times, and that a slower commit is caught."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from compare import Comparison, compare
from run_all import machine_name, page, records_of, run_job, table
from timing import Record

import sharpkit


def test_a_record_compares_its_median_with_its_target() -> None:
    assert Record("case", "sharpkit", "s", [1.0, 9.0, 2.0], "<= 2").holds is True
    assert Record("case", "sharpkit", "s", [1.0, 9.0, 2.1], "<= 2").holds is False
    assert Record("case", "sharpkit", "s", [3.0], ">= 3.5").holds is False
    assert Record("case", "sharpkit", "s", [3.0]).holds is None


def test_the_table_has_a_row_per_case_with_the_fastest_peer() -> None:
    rows = table(
        [
            Record("product", "sharpkit", "passes", [1.0, 1.2, 1.1], "<= 1.1"),
            Record("product", "peer A", "passes", [3.3]),
            Record("product", "peer B", "passes", [2.2, 2.2]),
            Record("start", "sharpkit", "s", [12.0], "<= 10"),
        ]
    ).splitlines()[2:]
    assert rows == [
        "| product | passes | 1.1 (1-1.2) | peer A 3.3; peer B 2.2 | 2 | <= 1.1 | yes |",
        "| start | s | 12 |  |  | <= 10 | **no**: sharpkit |",
    ]


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        ("AMD EPYC 9554 64-Core Processor", "amd-epyc-9554-2-cores"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "intel-core-i7-9750h-2-cores"),
    ],
)
def test_a_machine_is_named_after_its_processor(processor: str, name: str) -> None:
    assert machine_name(processor, 2) == name


def test_a_benchmark_that_fails_is_told_from_one_that_works() -> None:
    result = run_job("bench_cmi.py --only no-such-case", quick=True, threads=1)
    assert result["records"] == []
    assert result["exit_code"] == 2
    assert "no-such-case" in result["error"]


def test_the_page_says_of_each_benchmark_when_it_ran_and_whether_it_failed() -> None:
    record = asdict(Record("product", "sharpkit", "s", [1.0], "<= 2")) | {"holds": True}
    run = {"commit": "abc", "date": "2026-11-25", "seconds": 9, "error": ""}
    jobs = {
        "bench_sam.py": run
        | {"commit": "def", "exit_code": 2, "error": "no\nreason", "records": []},
        "bench_m_sharpness.py": run | {"exit_code": 0, "records": [record]},
    }
    machine = dict.fromkeys(("processor", "family", "model", "memory_gib", "system", "python"), "x")
    result = {"machine": machine | {"cores": 2}, "versions": {"torch": "2"}, "threads": 2}
    lines = page(result | {"quick": False, "jobs": jobs}).splitlines()
    assert records_of(jobs) == [Record("product", "sharpkit", "s", [1.0], "<= 2")]
    assert "- `bench_m_sharpness.py`: commit abc, 2026-11-25, 9 s" in lines
    failed = next(line for line in lines if "bench_sam.py" in line)
    assert "commit def" in failed
    assert failed.endswith("**failed** (exit code 2): reason")
    assert "| product | s | 1 |  |  | <= 2 | yes |" in lines


def test_noise_on_one_side_is_not_slower_but_a_shift_is() -> None:
    quiet = [1.0, 1.05, 1.02, 1.01, 1.03]
    busy = [1.0, 1.9, 2.2, 1.8, 2.0]  # four of five rounds disturbed, the best is not
    assert not Comparison("case", quiet, busy).slower
    assert not Comparison("case", quiet, [1.1 * t for t in quiet]).slower
    assert Comparison("case", quiet, [1.2 * t for t in quiet]).slower


@pytest.mark.slow
def test_a_tree_with_a_slower_function_is_caught(tmp_path: Path) -> None:
    case = "pgdl score, 96 models"
    trees = [tmp_path / "base", tmp_path / "head"]
    for tree in trees:
        shutil.copytree(Path(sharpkit.__file__).parent, tree / "sharpkit")
    source = trees[1] / "sharpkit" / "evaluation" / "__init__.py"
    source.write_text(
        source.read_text()
        + "\nimport functools, time\n"
        + "_fast = conditional_mutual_information\n"
        + "@functools.wraps(_fast)\n"
        + "def conditional_mutual_information(*arguments):\n"
        + "    began = time.perf_counter()\n"
        + "    result = _fast(*arguments)\n"
        + "    time.sleep(3.0 * (time.perf_counter() - began))\n"
        + "    return result\n"
    )
    (comparison,), missing = compare(*trees, [case], 1, 9)
    assert not missing
    assert (
        comparison.slower
    )  # four times as slow; the limit is 15 %, but a test must not hang on noise
