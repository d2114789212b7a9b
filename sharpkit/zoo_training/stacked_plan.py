"""Which networks of a grid train together, and how many at a time: by shapes and memory alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import resolve_loss
from sharpkit.errors import ArgumentError, SharpkitError
from sharpkit.groupwise.memory import default_memory_budget, try_gradient
from sharpkit.groupwise.survey import GPU, chunk_that_fills
from sharpkit.memory import available_memory
from sharpkit.training.settings import check_whole
from sharpkit.zoo.keras import build_model
from sharpkit.zoo_training.recipe import Recipe

Stack: TypeAlias = Literal["auto"] | int | None
_LARGEST_EVALUATED = 1000  # examples at a time


@dataclass(frozen=True)
class Shape:
    """What networks of one stack have in common.

    Args:
        network: The config.json, with all dropout layers that any of them has.
        batch_size: Examples of a step.
        m: Group size of m-SAM, at most the batch size; 0 for SGD.
    """

    network: str
    batch_size: int
    m: int

    @property
    def config(self) -> dict[str, Any]:
        """The network, parsed."""
        config: dict[str, Any] = json.loads(self.network)
        return config


def shape_of(recipe: Recipe, input_shape: tuple[int, int, int], classes: int) -> Shape:
    """The shape of a recipe's network and steps, for inputs (h, w, c).

    Example:
        >>> plain, other = Recipe(architecture="vgg"), Recipe(architecture="vgg", dropout=0.5, lr=1)
        >>> shape_of(plain, (8, 8, 3), 10) == shape_of(other, (8, 8, 3), 10)
        True
        >>> shape_of(plain, (8, 8, 3), 10) == shape_of(replace(plain, rho=0.1), (8, 8, 3), 10)
        False
    """
    config = replace(recipe, dropout=0.5).network(input_shape, classes)
    m = min(recipe.m or recipe.batch_size, recipe.batch_size) if recipe.rho else 0
    return Shape(json.dumps(config), recipe.batch_size, m)


def check_stack(stack: Any) -> None:
    """ArgumentError unless networks can be stacked in this way."""
    if stack is not None and stack != "auto":
        try:
            check_whole("stack", stack, 1)
        except ArgumentError:
            raise ArgumentError(
                f'stack is {stack!r}: expected "auto", a number of networks >= 1, or None'
            ) from None


def stacks_of(
    recipes: Mapping[str, Recipe],
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    stack: Stack,
    device: torch.device,
) -> list[tuple[list[str], int]]:
    """The networks that train together, and how many of them at a time.

    Args:
        recipes: Model id to recipe.
        input_shape: Of an input, (h, w, c).
        classes: Of the labels.
        stack: Networks at a time; "auto" for as many as it takes to keep a GPU busy, and no stack
            on a CPU, where small networks are as fast one by one; None for no stack.
        device: Where to train.

    Returns:
        list: Ids of one shape, and networks at a time. Ids that are in none train alone: such as
            those whose network fills a GPU, or cannot be built, as its own training then says.
    """
    if stack is None or (stack == "auto" and device.type != "cuda"):
        return []
    shapes: dict[Shape, list[str]] = {}
    for id_, recipe in recipes.items():
        try:
            shapes.setdefault(shape_of(recipe, input_shape, classes), []).append(id_)
        except SharpkitError:
            continue
    found = []
    for shape, ids in shapes.items():
        try:
            most = _that_fill(shape) if stack == "auto" else stack
        except SharpkitError:
            continue
        if stack != "auto" or min(most, len(ids)) > 1:
            found.append((ids, most))
    return found


def _that_fill(shape: Shape) -> int:
    """Networks whose steps together keep a GPU busy."""
    model = build_model(shape.config, device="meta")
    examples = chunk_that_fills(GPU, 2.0 * model.work, len(model))
    return max(1, examples // shape.batch_size)


@dataclass(frozen=True)
class Sizes:
    """What is computed at a time.

    Args:
        networks: In the stack.
        groups: Of m-SAM, of a network.
        examples: Of an evaluation, for a network.
    """

    networks: int
    groups: int
    examples: int


@dataclass(frozen=True)
class Needs:
    """Bytes that one network takes.

    Args:
        kept: Throughout: copies of its weights.
        passing: A batch, or a group of m-SAM, on its way through.
        example: Of an evaluation.
        groups: In a batch.
    """

    kept: int
    passing: int
    example: int
    groups: int

    def of(self, sizes: Sizes) -> int:
        """What networks take that train so many at a time."""
        steps = self.kept + min(sizes.groups, self.groups) * self.passing
        return sizes.networks * max(steps, self.kept + sizes.examples * self.example)


def needs_of(shape: Shape, x: Tensor, y: Tensor) -> Needs:
    """What a network of a shape takes, by what autograd saves for the first examples.

    Args:
        shape: Of the network.
        x: The inputs to fit, on the device.
        y: Their labels.
    """
    model = build_model(shape.config, device=x.device).train()
    function, loss = FunctionalModel(model), resolve_loss("cross_entropy")
    weights = {name: function.value(name) for name in dict(model.named_parameters())}
    of_example = try_gradient(function, loss, weights, Examples(x[:2], y[:2])).bytes
    batch = min(shape.batch_size, len(x))
    group = min(shape.m, batch) or batch
    parameters = sum(w.nbytes for w in weights.values())
    return Needs(
        kept=4 * parameters,
        passing=(6 if shape.m else 2) * parameters + 2 * of_example * group,
        example=4 * x.element_size() * model.largest,
        groups=math.ceil(batch / group),
    )


def sizes_of(shape: Shape, x: Tensor, y: Tensor, most: int) -> Sizes:
    """As many networks at a time as fit half of the memory, and then as many groups.

    Args:
        shape: Of the networks.
        x: The inputs to fit, on the device.
        y: Their labels.
        most: Networks at a time.
    """
    budget = default_memory_budget(x.device)
    free = available_memory(x.device)
    budget = budget if free is None else min(budget, free // 2)
    needs = needs_of(shape, x, y)
    networks = max(1, min(most, budget // (needs.kept + needs.passing)))
    left = budget - networks * needs.kept
    groups = max(1, min(needs.groups, left // (networks * needs.passing)))
    examples = budget // (networks * needs.example)
    return Sizes(networks, groups, max(1, min(_LARGEST_EVALUATED, examples)))
