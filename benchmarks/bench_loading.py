"""Time to load a task-1 VGG of 19.2 M parameters, and to import sharpkit.

    python benchmarks/bench_loading.py

Loading reads the config and both weight files, and checks that every number is finite. The import
is timed in fresh processes, after torch's own import.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from timing import Case, Record, parser, run_cases

from sharpkit.zoo import ZooWriter, build_model, load_zoo

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


CASES: dict[str, Case] = {"loading": loading, "importing": importing}

if __name__ == "__main__":
    run_cases(parser(__doc__, CASES).parse_args(), CASES)
