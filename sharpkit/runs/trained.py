"""Networks that `sharpkit train` left in a run directory, with the data they were trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from sharpkit.datasets import load_dataset
from sharpkit.doors import MAX_CONFIG_BYTES, read_json, reading, shown
from sharpkit.errors import ArgumentError, ModelError, RunError
from sharpkit.runs.checkpoints import load_checkpoint
from sharpkit.training.architectures import build_architecture
from sharpkit.training.augmentation import noisy_labels
from sharpkit.training.fit import FitResult, fit

_FINAL = "model.safetensors"
_MAX_SIZE = 2**31  # of one axis of the inputs, and of the classes
_MAX_AXES = 32


def provenance(
    data: str, root: str | None, architecture: str, train: TensorDataset
) -> dict[str, Any]:
    """What `sharpkit.fit` has to note in config.json so that the run can be opened again."""
    inputs, labels = train.tensors
    return {
        "architecture": architecture,
        "input_shape": list(inputs.shape[1:]),
        "classes": int(labels.max()) + 1,
        "data": data,
        "root": root,
    }


def train_named(
    data: str, root: Path | None, architecture: str, *, seed: int, keep: Any, **options: Any
) -> FitResult:
    """Train a network by its name on data by their name, as `sharpkit train` does."""
    train, test = load_dataset(data, root=root)
    origin = provenance(data, None if root is None else str(root), architecture, train)
    shape, classes = tuple(origin["input_shape"]), origin["classes"]
    model = build_architecture(architecture, shape, classes, seed=seed)
    return fit(model, train, test, seed=seed, keep=keep or (), provenance=origin, **options)


def is_trained(path: str | Path) -> bool:
    """Whether a weight file or directory is of `sharpkit train`."""
    return _weights(Path(path)).with_name("config.json").is_file()


def load_trained(path: str | Path, build: str | Callable[[], Any] | None = None) -> nn.Module:
    """A network that `sharpkit train` has trained.

    Args:
        path: The run directory, for the final weights; or one of its .safetensors files, such as
            `epoch-10.safetensors`.
        build: As for `load_checkpoint`: what builds the network, in place of the architecture that
            config.json names. Needed where that is a "module:callable", as code that a file names
            is not run.

    Returns:
        nn.Module: In eval mode, on the CPU.

    Raises:
        RunError: If there is no config.json of `sharpkit train` beside the weights, or it names
            code and `build` is not given.
        ModelError: If the weights are missing or damaged, or do not fit.
    """
    weights = _weights(Path(path))
    origin = _config(weights)["provenance"]
    if build is not None:
        return load_checkpoint(weights, build)
    if ":" in origin["architecture"]:
        raise RunError(
            f"{weights.with_name('config.json')}: names the code {origin['architecture']!r} as its "
            "architecture, and code that a file names is not run. If you trust it, repeat it: "
            "--build module:callable, or load_trained(path, build=...)"
        )
    shape = tuple(origin["input_shape"])
    known = partial(build_architecture, origin["architecture"], shape, origin["classes"], seed=0)
    _require_size(weights, known)
    return load_checkpoint(weights, known)


def _require_size(weights: Path, build: Callable[[], nn.Module]) -> None:
    """Refuse, before memory is taken for it, a network with more values than its weight file."""
    where = weights.with_name("config.json")
    with reading(where, RunError, "an architecture that fits input_shape and classes"):
        with _named(weights), torch.device("meta"):
            network = build()
        size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    # a file may hold the same weights in a smaller dtype
    if weights.is_file() and size > 8 * weights.stat().st_size:
        raise ModelError(
            f"{weights} does not fit the model: the network that {where.name} names has {size:,} "
            f"bytes of weights, the file has {weights.stat().st_size:,}"
        )


def trained_data(path: str | Path) -> tuple[TensorDataset, TensorDataset]:
    """The training and test data of a run of `sharpkit train`, label noise included.

    Raises:
        RunError: If there is no config.json of `sharpkit train`, or no data set of the name in it.
        DataError: If the data are damaged.
    """
    weights = _weights(Path(path))
    config = _config(weights)
    origin = config["provenance"]
    with _named(weights):
        train, test = load_dataset(origin["data"], root=origin["root"])
        inputs, labels = train.tensors
        noisy = noisy_labels(labels, config["label_noise"], config["seed"])
    return TensorDataset(inputs, noisy), test


def same_examples(one: str | Path, other: str | Path) -> bool:
    """Whether two runs of `sharpkit train` were trained on the same examples and labels.

    Raises:
        RunError: If one has no config.json of `sharpkit train`.
    """
    return _examples(Path(one)) == _examples(Path(other))


def _examples(path: Path) -> tuple[Any, ...]:
    """All that decides what a run was trained on; the seed only where it draws wrong labels."""
    weights = _weights(path)
    config = _config(weights)
    # a name is no path, but equal names give equal paths, and so do two ways to write one file
    places = (config["provenance"][key] for key in ("data", "root"))
    with reading(weights.with_name("config.json"), RunError, "names of data"):
        resolved = [place and Path(place).expanduser().resolve() for place in places]
    noise = config["label_noise"]
    return *resolved, noise, config["seed"] if noise else None


@contextmanager
def _named(weights: Path) -> Iterator[None]:
    """What config.json asks for and cannot be had, as an error that names it."""
    try:
        yield
    except ArgumentError as error:
        raise RunError(f"{weights.with_name('config.json')}: {error}") from error


def _weights(path: Path) -> Path:
    return path / _FINAL if path.is_dir() else path


def _config(weights: Path) -> dict[str, Any]:
    path = weights.with_name("config.json")
    where = f"{path}: not the config.json of a run of `sharpkit train`"
    config: dict[str, Any] = read_json(path, RunError, MAX_CONFIG_BYTES)
    origin = config.get("provenance") if isinstance(config, dict) else None
    if not isinstance(origin, dict):
        raise RunError(f"{where} (not JSON with a provenance)")
    fields = {name: (config if name in _OUTSIDE else origin).get(name, _ABSENT) for name in _FIELDS}
    if _ABSENT in fields.values():
        raise RunError(f"{where} (it does not name architecture and data)")
    for name, (fits, expected) in _FIELDS.items():
        if not fits(fields[name]):
            raise RunError(f"{where} (its {name} is {shown(fields[name])}, expected {expected})")
    return config


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_SIZE


_ABSENT = object()
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architecture": (lambda v: isinstance(v, str), "text"),
    "input_shape": (
        lambda v: isinstance(v, list) and len(v) <= _MAX_AXES and all(map(_is_size, v)),
        "a list of sizes",
    ),
    "classes": (_is_size, "a whole number >= 1"),
    "data": (lambda v: isinstance(v, str), "text"),
    "root": (lambda v: v is None or isinstance(v, str), "text or null"),
    "label_noise": (lambda v: type(v) in (int, float) and 0 <= v <= 1, "0 to 1"),
    "seed": (lambda v: type(v) is int and v >= 0, "a whole number >= 0"),
}
_OUTSIDE = ("label_noise", "seed")  # of the provenance
