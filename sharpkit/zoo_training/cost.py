"""What training a zoo would cost, told before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sharpkit.device import check_device
from sharpkit.errors import ArgumentError
from sharpkit.training.settings import check_number
from sharpkit.zoo.keras import build_model
from sharpkit.zoo_training.cost_counts import (
    DataSizes,
    disk_of_model,
    flops_of_an_example,
    sizes_of_data,
)
from sharpkit.zoo_training.cost_result import ShapeCost, TrainingCost
from sharpkit.zoo_training.cost_trial import epoch_seconds
from sharpkit.zoo_training.grid_file import ZooPlan, read_plan, settings_of
from sharpkit.zoo_training.recipe import Recipe
from sharpkit.zoo_training.sam_checks import check_where_sam_acts
from sharpkit.zoo_training.stacked_plan import (
    Shape,
    Stack,
    check_stack,
    needs_of,
    shape_of,
    sizes_of,
    stacks_of,
)

# what decides the shape of a network and of its steps, but for rho, where 0 differs from the rest
_OF_SHAPE = (
    *("architecture", "width", "num_conv_blocks", "convs_per_block", "num_dense_layers"),
    *("dense_units", "batch_size", "m", "rho"),
)


def training_cost(
    plan: str | Path | ZooPlan,
    *,
    data: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
    stack: Stack = None,
    seconds: float = 0.5,
) -> TrainingCost:
    """What `train_zoo` would cost: an epoch of each shape of network is timed, nothing is written.

    Epochs are timed on random images of the right shape, on one thread as in a training, with all
    networks of a stack at a time, and with step sizes of almost 0; where SAM is in some steps only,
    one epoch with it and one without, in proportion. Where an epoch takes longer than `seconds`, it
    is one of fewer examples, and its time is taken in proportion; that is too much where they are
    fewer than a batch. What data sets by name have is known and not read.

    Args:
        plan: A grid file, the name of a preset, or a `ZooPlan`.
        data: Other data, as for `sharpkit zoo train --data`.
        limit: Only the first models of the grid.
        device: Where to train.
        stack: Networks at a time, as for `train_zoo`.
        seconds: What an epoch that is timed should take, about.

    Returns:
        TrainingCost: Networks, steps, operations, hours, memory and disk, by shape and in total.

    Raises:
        ArgumentError: An argument is out of range, or a network of the grid cannot be built.
        DataError: Data that must be read are missing or damaged.

    Example:
        >>> cost = training_cost("mini", limit=3, seconds=0.01)
        >>> cost.networks, cost.steps_at_most, [shape.parameters for shape in cost.shapes]
        (3, 132000, [16142, 16142, 16142])
    """
    check_device(device)
    check_stack(stack)
    check_number("seconds", seconds, lambda v: 0 < v < math.inf, "seconds > 0")
    plan = plan if isinstance(plan, ZooPlan) else read_plan(plan)
    if data is not None:
        plan = replace(plan, data=plan.data.at(data))
    sizes = sizes_of_data(plan)
    settings = dict(list(settings_of(plan.grid, plan.replicates).items())[:limit])
    if not settings:
        raise ArgumentError(f"limit is {limit}: expected at least one network")
    recipes = {i: replace(plan.recipe, **setting) for i, setting in settings.items()}
    check_where_sam_acts(recipes, sizes.input_shape, sizes.classes, sizes.train)
    where = torch.device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        shapes = tuple(
            _cost(
                [recipes[i] for i in ids],
                sizes,
                most,
                shape=_shared([settings[i] for i in ids]),
                grid=plan.grid,
                recorded=plan.recorded_epochs,
                device=where,
                seconds=seconds,
            )
            for ids, most in _together(recipes, sizes, stack, where)
        )
    return TrainingCost(
        task=plan.task,
        device=device,
        shapes=shapes,
        most_epochs=max(recipe.epochs for recipe in recipes.values()),
        attempts=max(recipe.attempts for recipe in recipes.values()),
        recorded_epochs=plan.recorded_epochs,
        data_disk=sizes.disk,
    )


def _together(
    recipes: Mapping[str, Recipe], data: DataSizes, stack: Stack, device: torch.device
) -> list[tuple[list[str], int]]:
    """Ids of networks of one shape, and how many train at a time, in the order of the grid."""
    shapes: dict[Shape, list[str]] = {}
    for id_, recipe in recipes.items():
        shapes.setdefault(shape_of(recipe, data.input_shape, data.classes), []).append(id_)
    stacks = stacks_of(recipes, data.input_shape, data.classes, stack=stack, device=device)
    most = {ids[0]: count for ids, count in stacks}
    return [(ids, min(len(ids), most.get(ids[0], 1))) for ids in shapes.values()]


def _shared(settings: Sequence[Mapping[str, Any]]) -> str:
    """The values of the grid that make the shape of these networks."""
    first = settings[0]
    same = [n for n in first if n in _OF_SHAPE and all(s[n] == first[n] for s in settings)]
    texts = [f"{name}={first[name]}" for name in same]
    if "rho" in first and "rho" not in same:  # of one shape, so each is above 0
        texts.append("rho>0")
    return " ".join(texts) or "all"


def _cost(
    recipes: Sequence[Recipe],
    data: DataSizes,
    most: int,
    *,
    shape: str,
    grid: Mapping[str, Sequence[Any]],
    recorded: float | None,
    device: torch.device,
    seconds: float,
) -> ShapeCost:
    """Of networks of one shape; an epoch of one with the most dropout is timed."""
    recipe = max(recipes, key=lambda recipe: recipe.dropout)
    common = shape_of(recipe, data.input_shape, data.classes)
    x = torch.zeros(1, *data.shape, device=device).expand(data.train, *data.shape)
    y = torch.zeros(data.train, dtype=torch.int64, device=device)
    sizes = sizes_of(common, x, y, most)
    epochs = sum(r.epochs for r in recipes)
    share = sum(r.epochs * r.perturbed(data.train, r.epochs) for r in recipes) / epochs
    soon = share
    if recorded is not None:
        soon = sum(r.perturbed(data.train, recorded) for r in recipes) / len(recipes)
    plain = replace(recipe, rho=0.0)
    pass_, forward = flops_of_an_example(plain, data.input_shape, data.classes)
    took: dict[bool, float] = {}  # by whether steps are perturbed
    for perturbed in [True] * (max(share, soon) > 0) + [False] * (min(share, soon) < 1):
        took[perturbed], timed = epoch_seconds(
            _everywhere(recipe) if perturbed else plain,
            data,
            sizes.networks,
            flops=(1 + perturbed) * pass_ + forward,
            device=device,
            seconds=seconds,
        )
    flops = data.train * ((1 + share) * pass_ + forward)
    last = (data.train + data.test + data.shipped) * forward
    return ShapeCost(
        shape=shape,
        networks=len(recipes),
        stack=sizes.networks,
        parameters=build_model(common.config, device="meta").parameter_count,
        steps=recipe.steps_of_an_epoch(data.train),
        perturbed=share,
        flops=flops,
        seconds=_mixed(took, share),
        recorded_seconds=_mixed(took, soon),
        timed=timed,
        epochs=epochs,
        last=last / flops,
        memory=data.memory + needs_of(common, x, y).of(sizes),
        disk=len(recipes) * disk_of_model(recipe, data, grid),
    )


def _everywhere(recipe: Recipe) -> Recipe:
    """The recipe with SAM in every step."""
    return replace(recipe, sam_interval=1, sam_start=0.0, sam_stop=1.0, rho_warmup=0.0)


def _mixed(took: Mapping[bool, float], share: float) -> float:
    """Seconds of an epoch with a share of perturbed steps, by those with all and with none."""
    return sum(took[kind] * part for kind, part in ((True, share), (False, 1 - share)) if part)
