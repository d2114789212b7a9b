"""Time to load a task-1 VGG of 19.2 M parameters, and to import sharpkit.

    python benchmarks/bench_loading.py

Loading reads the config and both weight files, and checks that every number is finite. The import
is timed in fresh processes, after torch's own import.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

import torch

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


def load_times(folder: str, repeats: int = 9) -> list[float]:
    model = build_model(VGG)
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
    print(f"parameters: {model.parameter_count:,}")
    entry = load_zoo(folder)["vgg"]["0"]
    entry.load()  # reads h5py and the disk's cache in
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        entry.load("final")
        entry.load("initial")
        times.append(time.perf_counter() - start)
    return times


def import_times(repeats: int = 5) -> list[float]:
    command = [sys.executable, "-c", IMPORT]
    return [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(repeats)
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        loads = load_times(folder)
    print("| case | median s | range | bound |\n|---|---|---|---|")
    for name, times, bound in (
        ("load a 19.2 M-parameter VGG, both weight files", loads, "0.25"),
        ("import sharpkit, torch's own time excluded", import_times(), "0.3"),
    ):
        spread = f"{min(times):.3f}-{max(times):.3f}"
        print(f"| {name} | {statistics.median(times):.3f} | {spread} | {bound} |")


if __name__ == "__main__":
    main()
