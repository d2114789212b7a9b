"""Whether SAM has something to do in the networks of a grid, asked before any is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping

from sharpkit.errors import ArgumentError, SharpkitError
from sharpkit.training.sam_groups import ALL, sam_groups, selection_of
from sharpkit.zoo.keras import build_model
from sharpkit.zoo_training.recipe import Recipe


def check_where_sam_acts(
    recipes: Mapping[str, Recipe], input_shape: tuple[int, int, int], classes: int, examples: int
) -> None:
    """Raise ArgumentError where a recipe leaves SAM no step or no parameter.

    Args:
        recipes: Model id to recipe.
        input_shape: Of an input, (h, w, c).
        classes: Of the labels.
        examples: To fit.

    Example:
        >>> check_where_sam_acts({"0": Recipe(sam_interval=5)}, (4, 4, 1), 2, 100)
        Traceback (most recent call last):
        sharpkit.errors.ArgumentError: sam_interval is 5, but no network is trained with SAM: give \
rho > 0
    """
    if not any(recipe.rho for recipe in recipes.values()):
        for recipe in recipes.values():
            for name, value in recipe.where_sam_acts().items():
                raise ArgumentError(
                    f"{name} is {value!r}, but no network is trained with SAM: give rho > 0"
                )
    seen = set()
    for id_, recipe in recipes.items():
        if not recipe.rho:
            continue
        try:
            recipe.sam_steps(recipe.total_steps(examples))
            if recipe.sam_parameters != ALL:
                network = _network(recipe, input_shape, classes)
                if (network, recipe.sam_parameters) not in seen:
                    _check_selection(network, recipe.sam_parameters)
                seen.add((network, recipe.sam_parameters))
        except ArgumentError as error:
            raise ArgumentError(f"network {id_}: {error}") from error


def _network(recipe: Recipe, input_shape: tuple[int, int, int], classes: int) -> str | None:
    """Its config.json; None if there is none, as its training then says."""
    try:
        return json.dumps(recipe.network(input_shape, classes))
    except SharpkitError:
        return None


def _check_selection(network: str | None, parameters: str) -> None:
    try:
        model = None if network is None else build_model(json.loads(network))
    except SharpkitError:
        return
    if model is not None:
        try:
            sam_groups(model, selection_of(parameters))
        except ArgumentError as error:
            raise ArgumentError(f"sam_parameters is {parameters!r}: {error}") from error
