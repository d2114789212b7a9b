"""A small zoo of random networks on disk, for the tests of runs and of the command line."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

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
