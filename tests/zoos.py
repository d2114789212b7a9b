"""A small zoo of random networks on disk, for the tests of runs and of the command line."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

import sharpkit as sk
from sharpkit.zoo import ZooWriter, build_model

GRID = {"width": [4, 8], "depth": [1, 2], "seed": [0, 1]}


def write_small_zoo(path: Path, *, tasks: tuple[str, ...] = ("small",), examples: int = 24) -> Path:
    """2 x 2 x 2 dense networks on 5 features and 3 classes."""
    writer = ZooWriter(path, shard_size=10)
    for offset, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(offset)
        for split in ("train", "test"):
            x = torch.randn(examples, 5, generator=generator)
            writer.write_dataset(
                task, split, x, torch.randint(0, 3, (examples,), generator=generator)
            )
        for i, values in enumerate(itertools.product(*GRID.values())):
            setting = dict(zip(GRID, values, strict=True))
            layers = [
                {"layer_name": "Dense", "units": setting["width"], "activation": "relu"}
                for _ in range(setting["depth"])
            ]
            config = {
                "input_shape": [5],
                "model_config": [*layers, {"layer_name": "Dense", "units": 3}],
            }
            models = []
            for part in (0, 1):
                torch.manual_seed(1000 * part + 10 * offset + i)
                model = build_model(config)
                for p in model.parameters():
                    p.data.normal_(0, 0.5)
                models.append(model)
            gap = float(torch.rand((), generator=generator)) / 2
            writer.write_model(
                task,
                2 * i + 3,
                models[0],
                initial=models[1],
                hyperparameters=setting,
                possible_values=GRID,
                metrics={"train_acc": 0.99, "test_acc": 0.99 - gap},
            )
    return path


def finished_models(run: Path) -> int:
    """How many models a run has finished, also while another process works on it."""
    if not (run / "results.sqlite").exists():
        return 0
    try:
        scores = sk.Scores.open(run)
    except sk.errors.RunError:
        return 0
    count = len(scores.provenance())
    scores.close()
    return count


def write_image_zoo(path: Path, *, channels: int) -> Path:
    """One convolutional network on images of 6 x 6 pixels, labelled as it classifies them."""
    layers = [
        {"layer_name": "Conv2D", "filters": 4, "kernel_size": 3, "padding": "same"},
        {"layer_name": "BatchNormalization"},
        {"layer_name": "Activation", "activation": "relu"},
        {"layer_name": "Conv2D", "filters": 6, "kernel_size": 3, "strides": 2},
        {"layer_name": "Activation", "activation": "relu"},
        {"layer_name": "GlobalAveragePooling2D"},
        {"layer_name": "Dense", "units": 3},
    ]
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(build_model({"input_shape": [6, 6, channels], "model_config": layers}))
    writer, network = ZooWriter(path), networks[0].eval()
    for split in ("train", "test"):
        images = torch.randn(24, channels, 6, 6)
        with torch.no_grad():
            if split == "train":  # so that every class is that of some images
                list(network.parameters())[-1].sub_(network(images).mean(0))
            writer.write_dataset("images", split, images, network(images).argmax(1))
    writer.write_model(
        "images",
        0,
        network,
        initial=networks[1],
        hyperparameters={"seed": 0},
        possible_values={"seed": [0]},
        metrics={"train_acc": 1.0, "test_acc": 1.0},
    )
    return path
