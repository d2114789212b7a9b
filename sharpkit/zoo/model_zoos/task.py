"""Tasks of the model zoos and of the phase-transition zoos: a folder for each network.

Source: Schuerholt et al. 2022, arXiv:2209.14764, and 2025, arXiv:2504.18072; data under CC-BY 4.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sharpkit.data.published import Pair
from sharpkit.errors import SharpkitError, ZooFormatError
from sharpkit.safe_text import printable
from sharpkit.zoo.checkpoint_task import CheckpointTask
from sharpkit.zoo.files import is_file, is_folder, list_directory
from sharpkit.zoo.model_zoos.networks import build_network
from sharpkit.zoo.model_zoos.preparation import PREPARATIONS, Preparation, data_set_in, kind_of
from sharpkit.zoo.model_zoos.trial import PARAMS, RESULT, Trial
from sharpkit.zoo.remote import Mirror
from sharpkit.zoo.task import Split

EXPECTED = f"<network>/{PARAMS} beside <network>/{RESULT} (a model zoo, or a phase-transition zoo)"
_RAY_NAME = re.compile(r".*_([0-9a-f]{5,8}_[0-9]{5})_[0-9]+_.*", re.DOTALL)
_SETTINGS = re.compile(r"model::.*|optim::.*|seed|training::batchsize")
_GIVEN = "prepared images"  # floats of an .npz file


class ModelZoo:
    """The folders of one zoo, a `Source`.

    A network's id is that which Ray Tune gave it, such as 0ada0_00024, or its folder's name if not
    all folders have one. Metrics are the numbers in the line of result.json whose
    `training_iteration` is the checkpoint's epoch: landscape metrics too, where they were written.

    Args:
        name: The task's name.
        path: Its folder.
        folders: Those of the networks.
    """

    def __init__(self, name: str, path: Path, folders: Sequence[Path]) -> None:
        self.name, self.path = name, path
        ids = [m[1] if (m := _RAY_NAME.fullmatch(f.name)) else "" for f in folders]
        if "" in ids or len(set(ids)) < len(ids):
            ids = [folder.name for folder in folders]
        self._trials = {id_: Trial(f) for id_, f in zip(ids, folders, strict=True)}
        self._metrics: dict[tuple[str, int], dict[str, float]] = {}

    @cached_property
    def _params(self) -> dict[str, Any]:
        """The settings of the first network that has readable ones."""
        failure: SharpkitError | None = None
        for trial in self._trials.values():
            try:
                return trial.params
            except SharpkitError as error:
                failure = error
        raise failure or ZooFormatError(f"{self.path}: no network")

    @cached_property
    def data_set(self) -> str:
        """By the name of the folder, or the path of the data that params.json has."""
        paths = [str(self._params.get(k, "")) for k in ("dataset::dump", "training::data_path")]
        return data_set_in(self.name, *paths)

    @cached_property
    def _preparations(self) -> dict[str, Preparation]:
        return PREPARATIONS.get((self.data_set, kind_of(self._params.get("model::type"))), {})

    @property
    def ways(self) -> Sequence[str]:
        """How the images may have been prepared."""
        return tuple(self._preparations) or (_GIVEN,)

    def networks(self) -> Sequence[str]:
        """Ids in the order of the folders."""
        return list(self._trials)

    def epochs(self, network: str) -> Sequence[int]:
        """Those of the checkpoints that are there."""
        return list(self._trials[network].checkpoints)

    def hyperparameters(self, network: str) -> dict[str, Any]:
        """What params.json has of the model, the optimizer, the batch size and the seed."""
        return {
            name: value
            for name, value in self._trials[network].params.items()
            if _SETTINGS.fullmatch(name) and isinstance(value, str | int | float | None)
        }

    def metrics(self, network: str, epoch: int) -> dict[str, float]:
        """The numbers of an epoch."""
        key = network, epoch
        if key not in self._metrics:
            self._metrics[key] = self._trials[network].metrics(epoch)
        return self._metrics[key]

    def load(self, network: str, epoch: int, way: str) -> nn.Module:
        """The network of a checkpoint."""
        trial = self._trials[network]
        state = trial.state(epoch)
        return build_network(str(trial.checkpoints[epoch]), trial.params, state)

    def checkpoint_files(self, network: str, epoch: int) -> list[Path]:
        """params.json, result.json and the checkpoint."""
        trial = self._trials[network]
        return [trial.path / PARAMS, trial.path / RESULT, trial.checkpoints[epoch]]

    def examples(self, images: Pair, split: Split, way: str) -> TensorDataset:
        """As the training program prepared them; images of floats as they are."""
        pixels, labels = images[0] if split == "train" else images[1]
        if pixels.dtype != np.uint8:
            return TensorDataset(torch.from_numpy(pixels), torch.from_numpy(labels))
        if way not in self._preparations:
            raise ZooFormatError(
                f"{self.path}: how the images were prepared is not known for the data set "
                f"{self.data_set or '?'} and model::type {self._params.get('model::type')!r}; give "
                "prepared ones: an .npz file whose x_train and x_test are floats"
            )
        return self._preparations[way]((pixels, labels), split, str(self.path))

    def remarks(self) -> list[str]:
        """None: what is particular to these zoos holds for all of them, and is documented."""
        return []


def model_zoo_tasks(
    path: Path, mirror: Mirror | None
) -> tuple[list[CheckpointTask], dict[str, str]]:
    """The zoos at a folder or in the folders below it, without opening a file; see `Finder`."""
    if mirror is not None:
        return [], _remote(path, mirror)
    children = [child for child in list_directory(path) if is_folder(child)]
    if here := _networks(children):
        return [CheckpointTask(ModelZoo(path.resolve().name, path, here))], {}
    zoos = {child: _networks(_folders(child)) for child in children}
    return [CheckpointTask(ModelZoo(z.name, z, found)) for z, found in zoos.items() if found], {}


def _folders(path: Path) -> list[Path]:
    try:
        return [child for child in list_directory(path) if is_folder(child)]
    except ZooFormatError:  # one that may not be entered
        return []


def _networks(folders: Sequence[Path]) -> list[Path]:
    return [folder for folder in folders if is_file(folder / PARAMS)]


def _remote(path: Path, mirror: Mirror) -> dict[str, str]:
    for folder in (path, *mirror.children(path)):
        if any(mirror.has(child / PARAMS) for child in mirror.children(folder)):
            reason = f"{mirror.location(folder)}: a model zoo must be on this machine: copy it here"
            return {printable(folder.name): reason}
    return {}
