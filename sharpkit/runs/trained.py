"""Networks that `sharpkit train` left in a run directory, with the data they were trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import TensorDataset

from sharpkit.data import load_dataset
from sharpkit.errors import RunError
from sharpkit.files import read_regular
from sharpkit.runs.checkpoints import load_checkpoint
from sharpkit.training.architectures import build_architecture
from sharpkit.training.augmentation import noisy_labels

_FINAL = "model.safetensors"
_MAX_CONFIG = 2**24  # bytes


def provenance(
    data: str, root: str | None, architecture: str, train: TensorDataset
) -> dict[str, Any]:
    """What `sharpkit.fit` has to note in config.json so that the run can be opened again.

    Args:
        data: The data set's name, as for `load_dataset`.
        root: Its folder, or None.
        architecture: As for `build_architecture`.
        train: The training examples; they give the network's input shape and classes.
    """
    inputs, labels = train.tensors
    return {
        "architecture": architecture,
        "input_shape": list(inputs.shape[1:]),
        "classes": int(labels.max()) + 1,
        "data": data,
        "root": root,
    }


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
    return load_checkpoint(weights, known)


def trained_data(path: str | Path) -> tuple[TensorDataset, TensorDataset]:
    """The training and test data of a run of `sharpkit train`, label noise included.

    Raises:
        RunError: If there is no config.json of `sharpkit train`.
        DataError: If the data are not there any more.
    """
    config = _config(_weights(Path(path)))
    origin = config["provenance"]
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
    config = _config(_weights(path))
    # a name is no path, but equal names give equal paths, and so do two ways to write one file
    places = (config["provenance"][key] for key in ("data", "root"))
    resolved = [None if place is None else Path(place).expanduser().resolve() for place in places]
    noise = config["label_noise"]
    return *resolved, noise, config["seed"] if noise else None


def _weights(path: Path) -> Path:
    return path / _FINAL if path.is_dir() else path


def _config(weights: Path) -> dict[str, Any]:
    path = weights.with_name("config.json")
    try:
        config = json.loads(read_regular(path, _MAX_CONFIG))
        wanted = {"architecture", "input_shape", "classes", "data", "root"}
        origin = config["provenance"]
        if not wanted <= set(origin) or not {"label_noise", "seed"} <= set(config):
            reason = "it does not name architecture and data"
        elif not isinstance(origin["architecture"], str):
            reason = f"its architecture is {origin['architecture']!r}, expected text"
        else:
            return dict(config)
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError):
        reason = "not JSON with a provenance"
    raise RunError(f"{path}: not the config.json of a run of `sharpkit train` ({reason})")
