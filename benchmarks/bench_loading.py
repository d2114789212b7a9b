"""Time to load a task-1 VGG of 19.2 M parameters, to use a zoo of 10,000, and to import sharpkit.

    python benchmarks/bench_loading.py

Loading reads the config and both weight files, and checks that every number is finite. The zoo has
networks of 1,002 parameters and is written in stacks, one by one as a training writes it, and from
there as directories; then one more network is written, and the zoo is opened. The import is timed
in fresh processes, after torch's own import.
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from timing import Case, Record, parser, run_cases

from sharpkit.digests import digest_of_files
from sharpkit.zoo import ModelEntry, ZooWriter, build_model, load_zoo, write_zoo

CONV = {"layer_name": "Conv2D", "kernel_size": 3, "padding": "same", "activation": "relu"}
VGG = {
    "input_shape": [32, 32, 3],
    "model_config": [
        {**CONV, "filters": 512},
        {**CONV, "filters": 512},
        {"layer_name": "MaxPooling2D", "pool_size": 2},
        {"layer_name": "Flatten"},
        {"layer_name": "Dense", "units": 128, "activation": "relu"},
        {"layer_name": "Dense", "units": 10},
    ],
}
IMPORT = (
    "import torch, time; t = time.perf_counter(); import sharpkit; print(time.perf_counter() - t)"
)


SMALL = {
    "input_shape": [20],
    "model_config": [
        {"layer_name": "Dense", "units": 32, "activation": "relu"},
        {"layer_name": "Dense", "units": 10},
    ],
}


def large_zoo(arguments: argparse.Namespace) -> Iterator[Record]:
    """Both layouts: writing, opening, loading."""
    side = 5 if arguments.quick else 10
    grid = {f"h{k}": [j / side for j in range(side)] for k in range(4)}
    settings = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    case = f"zoo of {len(settings):,} networks"
    with tempfile.TemporaryDirectory() as folder:
        stacked, plain = Path(folder, "stacked"), Path(folder, "directories")
        seconds = clock(lambda: write_large(ZooWriter(stacked, layout="stacked"), settings, grid))
        yield Record(f"{case}, writing one by one", "stacks", "s", [seconds])
        zoo = load_zoo(stacked)
        seconds = clock(lambda: write_zoo(zoo, Path(folder, "copy"), layout="stacked"))
        yield Record(f"{case}, writing all", "stacks", "s", [seconds])
        seconds = clock(lambda: write_zoo(zoo, plain))
        yield Record(f"{case}, writing all", "directories", "s", [seconds])
        for name, path in (("stacks", stacked), ("directories", plain)):
            writer = ZooWriter(path, layout="stacked" if path == stacked else "pgdl")
            writer.entries("large")  # read once
            times = [clock(partial(write_large, writer, settings[-1:], grid)) for _ in range(5)]
            yield Record(f"{case}, writing one more", name, "s", times)
            times = [clock(partial(load_zoo, path)) for _ in range(3)]
            yield Record(f"{case}, opening", name, "s", times, "<= 10")
            entries = list(load_zoo(path)["large"].values())[:: len(settings) // 200]
            total = clock(partial(use, entries))
            yield Record(
                f"{case}, hash and both weights", name, "s a model", [total / len(entries)]
            )


def write_large(writer: ZooWriter, settings: list[dict[str, float]], grid: dict[str, list]) -> None:
    """The last networks of the grid, each other weights than before."""
    writer.write_dataset("large", "train", torch.zeros(4, 20), torch.arange(4))
    first = len(next(iter(grid.values()))) ** len(grid) - len(settings)
    for i, setting in enumerate(settings, first):
        network = build_model(SMALL)
        writer.write_model(
            "large",
            i,
            network,
            initial=network,
            hyperparameters=setting,
            possible_values=grid,
            metrics={"train_acc": 1.0, "test_acc": random.random()},
        )
    writer.finish()


def use(entries: list[ModelEntry]) -> None:
    """Hash each, as a run tells whether it has changed, and load both weights."""
    for entry in entries:
        entry.digest() if hasattr(entry, "digest") else digest_of_files(entry.files())
        entry.load()
        entry.load("initial")


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def loading(arguments: argparse.Namespace) -> Iterator[Record]:
    """Both weight files of one model."""
    model = build_model(VGG)
    with tempfile.TemporaryDirectory() as folder:
        writer = ZooWriter(folder)
        writer.write_dataset("vgg", "train", torch.zeros(4, 3, 32, 32), torch.arange(4))
        writer.write_model(
            "vgg",
            0,
            model,
            initial=model,
            hyperparameters={"width": 512},
            possible_values={"width": [512]},
            metrics={"train_acc": 1.0, "test_acc": 0.5},
        )
        entry = load_zoo(folder)["vgg"]["0"]
        entry.load()  # reads h5py and the disk's cache in
        times = []
        for _ in range(3 if arguments.quick else 9):
            start = time.perf_counter()
            entry.load("final")
            entry.load("initial")
            times.append(time.perf_counter() - start)
    size = f"{model.parameter_count / 1e6:.1f} M"
    yield Record(f"load a VGG of {size}, both weight files", "sharpkit", "s", times, "<= 0.25")


def importing(arguments: argparse.Namespace) -> Iterator[Record]:
    """In fresh processes, after torch."""
    command = [sys.executable, "-c", IMPORT]
    times = [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(2 if arguments.quick else 5)
    ]
    case = "import sharpkit, torch's own time excluded"
    yield Record(case, "sharpkit", "s", times, "<= 0.3")


CASES: dict[str, Case] = {"loading": loading, "zoo": large_zoo, "importing": importing}

if __name__ == "__main__":
    run_cases(parser(__doc__, CASES).parse_args(), CASES)
