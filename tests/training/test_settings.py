"""One vocabulary of training: what has the same name is the same thing wherever it stands."""

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.runs.figure3.plan import TrainingPlan
from sharpkit.training import FitSettings
from sharpkit.training.settings import TrainingSettings
from sharpkit.zoo_training import Recipe


def test_fit_takes_the_settings_by_their_names_with_their_defaults():
    parameters = inspect.signature(sk.fit).parameters
    for field in fields(FitSettings):
        default = parameters[field.name].default
        if field.name == "rho":  # None tells that it was not given, which SGD asks for
            default = FitSettings.rho
        assert default is inspect.Parameter.empty or default == field.default, field.name


def test_the_command_has_an_option_for_every_setting():
    arguments = ["x", "--out", "x", "--epochs", "1"]
    given = main.commands["train"].make_context("train", arguments).params
    for field in fields(FitSettings):
        expected = {"epochs": 1, "rho": None}.get(field.name, field.default)
        assert given[field.name] == expected, field.name


def test_what_a_recipe_and_fit_both_have_is_declared_once():
    ours, theirs = ({field.name for field in fields(cls)} for cls in (Recipe, FitSettings))
    assert ours & theirs == {field.name for field in fields(TrainingSettings)}


def test_a_figures_trainings_are_settings_of_fit():
    ours, theirs = get_type_hints(TrainingPlan), get_type_hints(FitSettings)
    several = {"m": int, "rho": float, "lr": float}
    for name in ours.keys() - {"architecture", "seeds", *several}:
        assert ours[name] == theirs[name], name
    for name, kind in several.items():
        assert ours[name] == tuple[kind, ...] and name in theirs


def test_a_figures_settings_are_checked_when_it_is_read():
    common = {"architecture": "vgg-4x1", "epochs": 1, "seeds": (0,), "rho": (0.1,)}
    TrainingPlan(**common, m=(1,), lr=(0.1,))
    with pytest.raises(sk.errors.ArgumentError, match=r"lr is 0\.0: expected lr > 0"):
        TrainingPlan(**common, m=(1,), lr=(0.1, 0.0))
    with pytest.raises(sk.errors.ArgumentError, match=r"momentum is 1\.5"):
        TrainingPlan(**common, m=(1,), lr=(0.1,), momentum=1.5)
