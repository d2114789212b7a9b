"""That the benchmarks' loops are right, what is concluded from times, and what a GPU is asked."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import factory
import gpu
import sizes
from bench_speed import How, m_sam_step
from compare import Comparison, compare
from dispatch import calls, counted, waits
from loops import (
    LAYOUTS,
    Layouts,
    landscape_loop,
    m_sam_loop_step,
    moved_in_place,
    moved_side_by_side,
    sharpness_loop,
)
from networks import NETWORKS
from run_all import machine_name, page, records_of, run_job, table
from timing import Record, in_turn, over
from torch import Tensor, nn

import sharpkit
from sharpkit.runs.provenance import own_version
from sharpkit.sharpness import m_sharpness_stacked

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def double(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = NETWORKS[name].case(n, "cpu")
    return model.double(), x if NETWORKS[name].words else x.double(), y


# --- the loops that sharpkit is measured against ----------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "batch"), [(1, 1), (3, 3), (8, 3)])  # the last group is smaller
def test_the_loop_finds_the_m_sharpness(m: int, batch: int, layout: str) -> None:
    model, x, y = double("ResNet-20", 10)
    ours = sharpkit.m_sharpness(model, (x, y), m=m, rho=0.01, seed=None, progress=False).value
    before = [p.clone() for p in model.parameters()]
    images = x.contiguous(memory_format=LAYOUTS[layout])
    found = sharpness_loop(model, images, y, m, 0.01, batch)
    # float64, and differences of losses that are a hundred times as large
    assert float(found) == pytest.approx(ours, rel=1e-10)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["CNN 0.22 M", "small ViT", "LSTM", "encoder", "LeNet-5"])
def test_the_loop_is_right_for_every_kind_of_network(name: str) -> None:
    model, x, y = double(name, 6)
    ours = sharpkit.m_sharpness(
        model, (x, y), m=2, rho=0.01, seed=None, progress=False, engine="loop"
    ).value
    assert float(sharpness_loop(model, x, y, 2, 0.01, 2)) == pytest.approx(ours, rel=1e-9)


def test_the_loop_over_a_plane_finds_the_landscape() -> None:
    model, x, y = double("CNN 0.22 M", 6)
    step = {name: 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    ours = sharpkit.landscape(model, (x, y), directions=step, points=3, progress=False).loss
    before = [p.clone() for p in model.parameters()]
    found = landscape_loop(model, x, y, 4, [list(step.values())], [(-1.0,), (0.0,), (1.0,)])
    assert found.tolist() == pytest.approx(ours.tolist(), rel=1e-10)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("training", "m", "batch"), [(False, 1, 1), (False, 5, 2), (True, 4, 4), (True, 4, 2)]
)
def test_a_step_of_the_m_sam_loop_is_that_of_sharpkit(training: bool, m: int, batch: int) -> None:
    models = [double("ResNet-20", 8) for _ in range(2)]
    for model, _, _ in models:
        model.train(training)
    m_sam_step(*models[0], m)()
    m_sam_loop_step(*models[1], m, 0.05, batch)()
    three = (double("ResNet-20", 8)[0], models[0][0], models[1][0])
    for w, ours, loop in zip(*(model.parameters() for model in three), strict=True):
        assert not torch.equal(w, ours)
        # the step is small beside the weights: what both moved by is compared
        torch.testing.assert_close(loop - w, ours - w, rtol=1e-6, atol=1e-13)


def test_both_ways_to_pass_groups_at_their_own_weights_find_the_same() -> None:
    model, x, y = double("ResNet-20", 12)
    steps = [0.01 * torch.randn_like(p) for p in model.parameters()]
    one = moved_in_place(model, x, y, 2, steps, 1)
    torch.testing.assert_close(moved_side_by_side(model, x, y, 2, steps, 8), one)


def test_the_fastest_layout_and_batch_are_chosen_among_those_allowed() -> None:
    model, x, y = NETWORKS["CNN 0.22 M"].case(8, "cpu")
    seen = []

    def work(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> None:
        seen.append((x.is_contiguous(memory_format=torch.channels_last), batch))

    chosen = Layouts(model, x, y, work).best([2, 4, 99])
    # grey images are contiguous in both layouts; their convolutions' weights are not
    assert {batch for _, batch in seen} == {2, 4, 8}
    assert chosen.batch in (2, 4, 8)
    assert chosen.layout in LAYOUTS
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("CNN 0.47 M", 0.47), ("CNN 0.22 M", 0.22), ("ResNet-20", 0.27), ("WRN-16-4", 2.75),
        ("VGG 19.2 M", 19.2), ("ResNet-50", 25.6),
    ],
)  # fmt: skip
def test_networks_have_the_size_that_their_names_say(name: str, millions: float) -> None:
    size = sum(p.numel() for p in NETWORKS[name].make().parameters())
    assert size / 1e6 == pytest.approx(millions, rel=0.03)


# --- counts and times -------------------------------------------------------------------------


def test_operations_and_waits_are_counted() -> None:
    x = torch.randn(4, 4)

    def run() -> None:
        (x.t() + 1).sum().item()
        x[x > 0]
        x[torch.tensor([0, 1])]

    found = counted(run)
    assert found.synchronising == {"aten::_local_scalar_dense": 1, "aten::index": 1}
    assert waits(run, "cpu") == 2
    assert calls(lambda: x.t() + 1) == (2, 1)


def test_contenders_run_in_turn_and_are_compared_round_by_round() -> None:
    order: list[str] = []
    runs = {name: lambda n=name: order.append(n) for name in "ab"}
    times = in_turn(runs, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(values) for values in times.values()] == [3, 3]
    assert len(in_turn(runs, 3, seconds=0)["a"]) == 1
    assert over({"a": [2.0, 9.0], "b": [1.0, 3.0]}, "a", "b") == [2.0, 3.0]


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
        "bench_cmi.py": run
        | {"commit": "def", "exit_code": 2, "error": "no\nreason", "records": []},
        "bench_loading.py": run | {"exit_code": 0, "records": [record]},
    }
    machine = dict.fromkeys(("processor", "family", "model", "memory_gib", "system", "python"), "x")
    result = {"machine": machine | {"cores": 2}, "versions": {"torch": "2"}, "threads": 2}
    lines = page(result | {"quick": False, "jobs": jobs}).splitlines()
    assert records_of(jobs) == [Record("product", "sharpkit", "s", [1.0], "<= 2")]
    assert "- `bench_loading.py`: commit abc, 2026-11-25, 9 s" in lines
    failed = next(line for line in lines if "bench_cmi.py" in line)
    assert "commit def" in failed
    assert failed.endswith("**failed** (exit code 2): reason")
    assert "| product | s | 1 |  |  | <= 2 | yes |" in lines


# --- the script for a GPU ---------------------------------------------------------------------


def test_a_case_that_fails_is_a_row_and_one_without_time_is_named() -> None:
    def works(how: How) -> Iterator[Record]:
        yield Record("case", "sharpkit", "s", [how.seconds])

    def breaks(how: How) -> Iterator[Record]:
        raise torch.OutOfMemoryError("no | memory\nmore")

    jobs = [gpu.Job("breaks", 1, breaks), gpu.Job("works", 1, works)]
    records, left_out = gpu.run_jobs(jobs, How(), seconds=1e6)
    assert left_out == []
    assert (records[0].case, records[0].unit) == ("breaks", "OutOfMemoryError: no / memory")
    assert 4e5 < records[1].values[0] <= 5e5  # half of all that is left
    assert gpu.run_jobs(jobs, How(), seconds=-1e6) == ([], ["breaks", "works"])


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_from_a_source_tree(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--quick", "--out", out],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["failed"] == {}
    assert result["left_out"] == []
    found = {record["case"] for record in result["records"]}
    assert {
        "m-sharpness, CNN 0.47 M, m = 16",
        "m-sharpness in passes, CNN 0.47 M, m = 1",
        "m-SAM step, CNN 0.22 M, batch 16, m = 1",
        "Hessian-vector product, CNN 0.11 M, 48 images",
    } <= found
    off = [r["median"] for r in result["records"] if r["case"].endswith("difference")]
    assert len(off) >= 3
    assert max(off) < 1e-3  # float32: losses are 10 to 100 times their differences
    for case in found:
        assert case in done.stdout


@pytest.mark.slow
def test_the_factory_is_measured_alone(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--only", "factory", "--out", out],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result["failed"], result["left_out"]) == ({}, [])
    found = {(record["contender"], record["unit"]) for record in result["records"]}
    ways = {"stack", "processes", "in a stack"}
    assert {(way, factory.RATE) for way in ways} <= found
    assert all(record["case"].startswith("factory, ") for record in result["records"])
    assert all(record["median"] > 0 for record in result["records"])


def test_a_network_that_did_not_train_is_no_figure() -> None:
    factory.ended_as_planned("training loss 2.3 after 3 epochs; target 1e-30", 3)
    for message in ("CUDA out of memory: give a smaller stack", ""):
        with pytest.raises(RuntimeError, match="a network did not train"):
            factory.ended_as_planned(message, 3)


def test_the_factory_trains_the_largest_network_of_a_preset() -> None:
    small, large = factory.recipes_of("medium")
    assert (small.width, small.num_conv_blocks, small.dropout) == (24, 3, 0.25)
    assert (small.batch_size, large.batch_size) == (16, 64)


def test_a_source_tree_that_is_not_installed_has_a_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("sharpkit.runs.provenance.version", missing)
    assert own_version() == sharpkit.__version__


# --- two commits ------------------------------------------------------------------------------


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


# --- sizes ------------------------------------------------------------------------------------


def test_memory_is_counted_as_the_plan_counts_it() -> None:
    c = sizes.counts("0.1 M")
    model = sizes.network("0.1 M")
    assert c.parameters == sum(p.numel() for p in model.parameters())
    data = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    for m, copies in ((1, 2), (16, 2), (32, 1)):  # of the weights, besides the plan
        plan = sharpkit.m_sharpness(model, data, m=m, rho=0.1, progress=False).peak_memory
        # the plan tells saved tensors apart by where they begin, the count by their storages
        assert plan == pytest.approx(sizes.sharpness_bytes(c, m) - copies * c.weights, rel=0.15)


def test_a_billion_parameters_are_counted_without_them() -> None:
    c = sizes.counts("1 B")
    assert c.parameters == pytest.approx(1e9, rel=0.01)
    # 2 operations for each of 64 patches, and nearly every weight
    assert c.forward == pytest.approx(2 * 65 * c.parameters, rel=0.02)
    assert sizes.density_bytes(c) > 80 * 4 * c.parameters
    rates = sizes.Rates(1e11, dict.fromkeys(sizes.MS, 1.5), 2.0, 3.0, 2.0)
    rows = dict(sizes.rows_of({"1 B": c}, {"1 B": rates}, sizes.recorded_gpu(2.0), 100))
    gradient = 3 * c.forward * 100 / 1e11
    assert rows["1 B"]["m = 16, cpu"] == pytest.approx(1.5 * gradient * 4 / 3)
    assert 2 * gradient < rows["1 B"]["density, cpu"] / sizes.STEPS <= 3 * gradient
    page = sizes.table(rows, 100)
    assert page.count("\n") == 1 + 4
    assert "density, 80 steps" in page
    assert "does not fit" in page.splitlines()[-1]


def test_networks_measured_together_take_few_calls() -> None:
    """What cannot be shared is looking at each network by itself."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 2, 8, 8), torch.arange(24) % 3
    networks = [
        nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)
        )
        for _ in range(8)
    ]
    options = {"m": [1, 2, 4, 8, 24], "rho": 0.1, "chunk": 24}
    one = counted(lambda: sharpkit.m_sharpness(networks[0], (x, y), **options))
    eight = counted(lambda: m_sharpness_stacked(networks, (x, y), **options))
    assert eight.by_name.total() < 3 * one.by_name.total()
    assert eight.synchronising.total() < 4 * one.synchronising.total()
