"""A user's own models by name: checked, made ready to measure, and their identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor, nn

from sharpkit.contract.holding import frozen
from sharpkit.digests import described, digest
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.evaluation.grid import normal_id
from sharpkit.zoo.grid import model_configs

Model: TypeAlias = "nn.Module | Callable[[], nn.Module]"


def check_models(models: Mapping[str, Model], initial: Mapping[str, Model] | None) -> None:
    """Raise ArgumentError unless all are modules, or functions that give one, under fit names."""
    for label, given in (("models", models), ("initial", {} if initial is None else initial)):
        _check_mapping(label, given, "names to modules")
        for name, source in given.items():
            if not isinstance(name, str):
                raise ArgumentError(f"{label}: found the name {name!r}, expected text")
            if not callable(source):  # a module is callable, too
                raise ArgumentError(
                    f"{label}, {name}: found {type(source).__name__}, expected an nn.Module or a "
                    "function that returns one"
                )
    if not models:
        raise ArgumentError("no models are given: expected a mapping of names to modules")
    if len({normal_id(name) for name in models}) < len(models):
        raise ArgumentError(
            'two names of models differ only by spaces or a leading "model_": rename one'
        )
    if initial is not None:
        _check_names("initial", initial, models)


def _check_mapping(label: str, given: Any, of: str) -> None:
    if not isinstance(given, Mapping | nn.ModuleDict):
        raise ArgumentError(f"{label}: found {type(given).__name__}, expected a mapping of {of}")


def _check_names(label: str, given: Mapping[str, Any], models: Mapping[str, Model]) -> None:
    missing = [name for name in models if name not in given]
    unknown = [name for name in given if name not in models]
    if missing:
        raise ArgumentError(f"{label} lacks the models {', '.join(missing)}")
    if unknown:
        raise ArgumentError(f"{label} names models that are not given: {', '.join(unknown)}")


def level_table(
    models: Mapping[str, Model], given: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, dict[str, Any]]:
    """Model -> hparams as in a model_configs.json, the values that occur as the possible ones."""
    if given is None:
        return {name: {} for name in models}
    _check_mapping("hyperparameters", given, "models to hyperparameters")
    _check_names("hyperparameters", given, models)
    for model in models:
        _check_mapping(f"hyperparameters of {model}", given[model], "names to values")
    first = next(iter(models))
    names = list(given[first])
    rows: dict[str, dict[str, Any]] = {}
    for model in models:
        if set(given[model]) != set(names):
            raise ArgumentError(
                f"hyperparameters of {model}: found {', '.join(map(str, given[model])) or 'none'}, "
                f"expected those of {first}: {', '.join(map(str, names)) or 'none'}"
            )
        rows[model] = {name: _plain(model, name, given[model][name]) for name in names}
    configs = model_configs(rows, {model: {} for model in rows})
    return {model: config["hparams"] for model, config in configs.items()}


def _plain(model: str, name: str, value: Any) -> Any:
    """A value that JSON can hold; numpy's and torch's scalars become Python's."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, str | int | float | bool):
        raise ArgumentError(
            f"hyperparameters of {model}, {name}: found {type(value).__name__}, expected a "
            "number, text or bool"
        )
    return value


@contextmanager
def ready(source: Model, device: str) -> Iterator[nn.Module]:
    """The module on the device and in eval mode; afterwards as it was, and where it was.

    Raises:
        ModelError: If a function returns something else, or the module is on several devices.
    """
    model = source if isinstance(source, nn.Module) else source()
    if not isinstance(model, nn.Module):
        raise ModelError(f"the function returned {type(model).__name__}: expected an nn.Module")
    homes = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    if len(homes) > 1:
        raise ModelError(f"the model is on {', '.join(sorted(map(str, homes)))}: expected one")
    model.to(device)
    try:
        with frozen(model):
            yield model
    finally:
        for home in homes:
            model.to(home)


def hash_model(model: nn.Module) -> str:
    """SHA-256 of a module's printed form and state, buffers outside the state dict too.

    Also of which parameters are frozen: they are left out of what is measured.
    """
    held = [name for name, p in model.named_parameters() if not p.requires_grad]

    def parts() -> Iterator[str | Tensor]:
        yield f"{model!r} {held}"
        for name, value in {**dict(model.named_buffers()), **model.state_dict()}.items():
            yield name
            yield from described([value]) if isinstance(value, Tensor) else [repr(value)]

    return digest(parts())
