"""One vocabulary of training: what has the same name is the same thing wherever it stands."""

import inspect
from dataclasses import fields
from typing import get_type_hints

import click
import pytest

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.runs.figure3.plan import Training
from sharpkit.training import FitSettings
from sharpkit.training.settings import TrainingSettings
from sharpkit.zoo_training import Recipe

SHARED = [field.name for field in fields(TrainingSettings)]


def test_fit_takes_the_settings_by_their_names_with_their_defaults():
    parameters = inspect.signature(sk.fit).parameters
    for field in fields(FitSettings):
        default = parameters[field.name].default
        assert default is inspect.Parameter.empty or default == field.default, field.name


def test_the_command_has_an_option_for_every_setting():
    command = main.commands["train"]
    options = {option.name: option for option in command.params}
    context = click.Context(command)
    for field in fields(FitSettings):
        option = options[field.name]
        if not option.required:
            given = option.get_default(context)

            assert given == field.default, field.name


@pytest.mark.parametrize("name", SHARED)
def test_a_recipe_has_the_settings_of_every_training(name):
    value = getattr(Recipe(), name)
    assert isinstance(value, int | float)
    assert name in get_type_hints(FitSettings)


def test_a_figures_trainings_are_settings_of_fit():
    ours, theirs = get_type_hints(Training), get_type_hints(FitSettings)
    several = {"m": int, "rho": float, "lr": float}
    for name in ours.keys() - {"architecture", "seeds", *several}:
        assert ours[name] == theirs[name], name
    for name, kind in several.items():
        assert ours[name] == tuple[kind, ...] and name in theirs


def test_a_figures_settings_are_checked_when_it_is_read():
    common = {"architecture": "vgg-4x1", "epochs": 1, "seeds": (0,), "rho": (0.1,)}
    Training(**common, m=(1,), lr=(0.1,))
    with pytest.raises(sk.errors.ArgumentError, match=r"lr is 0\.0: expected lr > 0"):
        Training(**common, m=(1,), lr=(0.1, 0.0))
    with pytest.raises(sk.errors.ArgumentError, match=r"momentum is 1\.5"):
        Training(**common, m=(1,), lr=(0.1,), momentum=1.5)
