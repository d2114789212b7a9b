"""What training a network takes that can be counted: examples, operations, bytes on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sharpkit.errors import ArgumentError, DataError
from sharpkit.zoo.keras import build_model
from sharpkit.zoo.keras.weights import weights_content
from sharpkit.zoo.shards.tfrecord import shard_bytes
from sharpkit.zoo_training.grid_file import EMBEDDED_DATA, EMBEDDED_SIZE, ZooPlan
from sharpkit.zoo_training.model import METRICS
from sharpkit.zoo_training.recipe import Recipe

# (c, h, w), classes, training and test examples of the data sets that have a name
_KNOWN = {
    EMBEDDED_DATA: ((1, 14, 14), 10, 60_000, 10_000),
    "fashion-mnist": ((1, 28, 28), 10, 60_000, 10_000),
    "cifar10": ((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": ((3, 32, 32), 100, 50_000, 10_000),
    "svhn": ((3, 32, 32), 10, 73_257, 26_032),
}


@dataclass(frozen=True)
class DataSizes:
    """How much data there is.

    Args:
        shape: Of an image, (c, h, w).
        classes: Of the labels.
        train: Examples to fit.
        test: Examples of the test.
        shipped: Those of them that are written to the zoo.
    """

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int
    shipped: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(h, w, c), as in a zoo's files."""
        c, h, w = self.shape
        return h, w, c

    @property
    def memory(self) -> int:
        """Bytes of all examples."""
        return (self.train + self.test) * (4 * math.prod(self.shape) + 8)

    @property
    def disk(self) -> int:
        """Bytes of the shards that a zoo has of them."""
        return shard_bytes(self.train, self.input_shape) + shard_bytes(
            self.shipped, self.input_shape
        )


def sizes_of_data(plan: ZooPlan) -> DataSizes:
    """The sizes of a plan's data: known for a data set by name, which is not read; else counted.

    Raises:
        ArgumentError: More training examples are asked for than there are.
        DataError: Files that must be read are missing or damaged.
    """
    source = plan.data
    if source.root is None and source.name in _KNOWN:
        shape, classes, there, test = _KNOWN[source.name]
        usual = EMBEDDED_SIZE if source.name == EMBEDDED_DATA else there
        train = usual if source.train_size is None else source.train_size
        if not 0 < train <= there:
            raise ArgumentError(f"train_size is {train}, of {there} examples")
    else:
        (x, y), (test_x, _) = (part.tensors for part in plan.load_data())
        if x.ndim != 4:
            raise DataError(
                f"{source.name}: training inputs of shape {tuple(x.shape)}, expected (n, c, h, w)"
            )
        channels, height, width = x.shape[1:]
        shape, classes = (channels, height, width), int(y.max()) + 1
        train, test = len(x), len(test_x)
    shipped = test if plan.shipped_test is None else min(plan.shipped_test, test)
    return DataSizes(shape, classes, train, test, shipped)


def flops_of_an_example(
    recipe: Recipe, input_shape: tuple[int, int, int], classes: int
) -> tuple[int, int]:
    """Floating-point operations of an example in a step of training, and in an evaluation.

    Those of convolutions and matrix products, forward and backward: two for each multiplication.
    A perturbed step of SAM has two passes.

    Example:
        >>> dense = Recipe(num_conv_blocks=0, num_dense_layers=0)  # one layer of 16 x 10 weights
        >>> flops_of_an_example(dense, (4, 4, 1), 10)
        (640, 320)
    """
    model = build_model(recipe.network(input_shape, classes), device="meta")
    x = torch.empty(1, *model.input_shape, device="meta")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as both:
        labels = torch.zeros(1, dtype=torch.int64, device="meta")
        torch.autograd.backward(nn.functional.cross_entropy(model(x), labels))
    passes = 2 if recipe.rho else 1
    return passes * both.get_total_flops(), forward.get_total_flops()


def disk_of_model(
    recipe: Recipe, data: DataSizes, possible_values: Mapping[str, Sequence[Any]]
) -> int:
    """Bytes of a network's files: its weights before and after training, config, line in a list."""
    config = recipe.network(data.input_shape, data.classes)
    hparams = {
        name: {"possible_values": list(values), "current_value": values[0]}
        for name, values in possible_values.items()
    }
    entry = {"hparams": hparams, "metrics": dict.fromkeys(METRICS, math.pi / 10)}
    texts = (json.dumps(content, indent=1) for content in (config, {"0": {"0": entry}}))
    return 2 * weights_content(build_model(config)).getbuffer().nbytes + sum(map(len, texts))
