"""Tasks whose networks were kept at several epochs, with images that the user has elsewhere.

A format says what is in its files by a `Source`; everything else is the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sharpkit.data.published import EXPECTED, Pair, Published, images_in, known_place
from sharpkit.display import readable
from sharpkit.errors import ArgumentError, SharpkitError, ZooFormatError
from sharpkit.safe_text import printable
from sharpkit.zoo.files import is_folder
from sharpkit.zoo.grid import models_frame
from sharpkit.zoo.recomputed import Recomputed, accuracy_again, best_way
from sharpkit.zoo.task import Split, Weights

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
    from torch.utils.data import TensorDataset

    from sharpkit.zoo.remote import Mirror

_PROBES = 3  # networks by which a way to read the zoo is chosen
_LISTED = 64  # values of a hyperparameter that are listed with every model
_SPLITS: tuple[Split, ...] = ("train", "test")


class Source(Protocol):
    """What a format has of one task: networks, each at some epochs.

    Attributes:
        name: The task's name.
        path: Its folder.
        data_set: "mnist", "cifar10", ...; "" if the files do not tell.
        ways: How the files may be meant where they do not tell, the likeliest first; at least one.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def data_set(self) -> str: ...  # noqa: D102
    @property
    def ways(self) -> Sequence[str]: ...  # noqa: D102

    def networks(self) -> Sequence[str]:
        """Their ids."""

    def epochs(self, network: str) -> Sequence[int]:
        """Those of its checkpoints, in increasing order; at least one."""

    def hyperparameters(self, network: str) -> Mapping[str, Any]:
        """Name -> value."""

    def metrics(self, network: str, epoch: int) -> Mapping[str, float]:
        """train_acc, test_acc and what else was recorded then; finite numbers."""

    def load(self, network: str, epoch: int, way: str) -> nn.Module:
        """The network in eval mode."""

    def checkpoint_files(self, network: str, epoch: int) -> Sequence[Path]:
        """What `load` and `metrics` read."""

    def examples(self, images: Pair, split: Split, way: str) -> TensorDataset:
        """The examples of a split as the networks took them, of published images."""

    def remarks(self) -> Sequence[str]:
        """What a user must know before believing a measure, one sentence each."""


@readable(lambda c: f"{c.id} of task {c.task.name}", brief=True)
class Checkpoint:
    """One network at one epoch.

    Args:
        task: The task that it belongs to.
        id: Its id there.
        network: The network's id.
        epoch: Of the checkpoint; None for the last one.
    """

    def __init__(self, task: CheckpointTask, id: str, network: str, epoch: int | None) -> None:
        self.task, self.id, self.network, self._epoch = task, id, network, epoch

    @property
    def epoch(self) -> int:
        """The epoch of the checkpoint."""
        if self._epoch is None:
            self._epoch = self.task.source.epochs(self.network)[-1]
        return self._epoch

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Name to this network's value; "epoch" too in a task of several."""
        found = dict(self.task.source.hyperparameters(self.network))
        return found | ({"epoch": self.epoch} if self.task.epochs is not None else {})

    @property
    def metrics(self) -> dict[str, float]:
        """train_acc, test_acc and what else was recorded at this epoch.

        Raises:
            ZooFormatError: There is no record of it, or an accuracy is missing or not from 0 to 1.
        """
        found = dict(self.task.source.metrics(self.network, self.epoch))
        for name in ("train_acc", "test_acc"):
            value = found.get(name, math.nan)
            if not 0 <= value <= 1:
                shown = f"is {value:g}" if name in found else "is missing or not a finite number"
                raise ZooFormatError(
                    f"{self.task.path}: network {self.network}, epoch {self.epoch}: {name} "
                    f"{shown}; expected a number from 0 to 1, so it is left out"
                )
        return found

    def load(self, weights: Weights = "final") -> nn.Module:
        """The network as a torch module in eval mode.

        Args:
            weights: "final" for those of this checkpoint, "initial" for those of epoch 0.

        Raises:
            ZooFormatError: Damaged files, NaN or infinite weights, no checkpoint of epoch 0, or no
                record of the accuracies, without which a network is of no use.
        """
        self.metrics  # noqa: B018  (raises if the network cannot be rated)
        return self.task.source.load(self.network, self._epoch_of(weights), self.task.way)

    def files(self, weights: Weights = "final") -> list[Path]:
        """What `load` reads."""
        return [*self.task.source.checkpoint_files(self.network, self._epoch_of(weights))]

    @property
    def made_from(self) -> str:
        """What it depends on beside its files: how they are read where they do not tell."""
        return self.task.way if len(self.task.source.ways) > 1 else ""

    def frame(self) -> pd.DataFrame:
        """One row: task, model, the hyperparameters and the metrics."""
        import pandas as pd

        parts = {"task": self.task.name, "model": self.id}, self.hyperparameters, self.metrics
        return pd.concat([pd.DataFrame([part]) for part in parts], axis=1)

    def _epoch_of(self, weights: Weights) -> int:
        if weights not in ("final", "initial"):
            raise ArgumentError(f"weights is {weights!r}; expected 'final' or 'initial'")
        if weights == "final":
            return self.epoch
        if 0 not in self.task.source.epochs(self.network):
            raise ZooFormatError(
                f"{self.task.path}: network {self.network} has no checkpoint of epoch 0, before "
                "training"
            )
        return 0


@readable(lambda t: f"{t.name}, in {t.path}", brief=True)
class CheckpointTask(Mapping[str, Checkpoint]):
    """Networks by id, each at its last checkpoint, or as many models as it has checkpoints.

    The images are where the user has put them: in `images` inside the task's folder, in
    `images/<name of the task>` beside it, or, of Fashion-MNIST, CIFAR and SVHN, where Debian's
    package or `load_dataset` keeps them.

    Args:
        source: What the files have.
        epochs: None for the last checkpoint of each network; else those epochs, of none all.

    Example:
        >>> zoo = load_zoo("smallcnnzoo")  # doctest: +SKIP
        >>> early_and_late = zoo["mnist"].at_epochs(3, 86)  # doctest: +SKIP
        >>> score_zoo(early_and_late, measures)  # doctest: +SKIP
    """

    mirror: Mirror | None = None

    def __init__(self, source: Source, epochs: Sequence[int] | None = None) -> None:
        self.source, self.epochs, self.path = source, epochs, source.path
        self.name = source.name if epochs is None else f"{source.name}@{_listed(epochs)}"
        self._datasets: dict[str, TensorDataset] = {}

    def __getstate__(self) -> dict[str, Any]:
        # other processes read the files themselves, but in the way that has been found
        kept = ("source", "epochs", "path", "name", "images", "_chosen")
        return {k: v for k, v in self.__dict__.items() if k in kept} | {"_datasets": {}}

    @cached_property
    def _models(self) -> dict[str, Checkpoint]:
        networks = self.source.networks()
        if self.epochs is None:
            return {n: Checkpoint(self, n, n, None) for n in networks}
        wanted = set(self.epochs)
        return {
            f"{n}@{e}": Checkpoint(self, f"{n}@{e}", n, e)
            for n in networks
            for e in self.source.epochs(n)
            if e in wanted or not wanted
        }

    def __getitem__(self, id_: str) -> Checkpoint:
        if str(id_) not in self._models:
            raise KeyError(f"no model {id_!r} in task {self.name} ({len(self)} models)")
        return self._models[str(id_)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def location(self) -> str:
        """The task's absolute path."""
        return str(self.path.resolve())

    def at_epochs(self, *epochs: int) -> CheckpointTask:
        """The task with a model for each network and epoch, `epoch` being a hyperparameter.

        Args:
            epochs: Such as 3, 86; none for all that there are. Networks that lack one are left out
                there. Ids are those of the networks, "@" and the epoch.

        Raises:
            ArgumentError: No network has such a checkpoint.
        """
        task = CheckpointTask(self.source, tuple(epochs))
        if not len(task):
            raise ArgumentError(
                f"no network of {self.source.name} has a checkpoint of epoch {_listed(epochs)}"
            )
        if "_chosen" in self.__dict__:  # the files are read in the same way
            task.__dict__["_chosen"] = self._chosen
        return task

    @property
    def model_configs(self) -> dict[str, Any]:
        """Id -> {"hparams", "metrics"} of the models with a usable record; see `unusable`.

        A hyperparameter that does not vary is left out; of one with more than 64 values, such as a
        continuous one, each model lists its own alone.
        """
        return self._read[0]

    @property
    def unusable(self) -> dict[str, str]:
        """Id -> why there is no usable record of a model; it is not scored."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[dict[str, Any], dict[str, str]]:
        settings, metrics, reasons = {}, {}, {}
        for id_, model in self._models.items():
            try:
                metrics[id_] = model.metrics
                settings[id_] = model.hyperparameters
            except SharpkitError as error:
                reasons[id_] = str(error)
        return _configs(settings, metrics), reasons

    def frame(self) -> pd.DataFrame:
        """One row per usable model: task, model, hyperparameters that vary, metrics."""
        return models_frame(self.name, self.model_configs)

    @cached_property
    def images(self) -> Published:
        """The data set's files.

        Raises:
            ZooFormatError: They are in none of the places.
        """
        places = [self.path / "images", self.path.parent / "images" / self.source.name]
        for place in places:
            if is_folder(place):
                if found := images_in(place):
                    return found
                raise ZooFormatError(f"{place}: no data set in it; expected {EXPECTED}")
        data_set = self.source.data_set
        if found := known_place(data_set):
            return found
        again = data_set.replace("_", "-")
        offer = f'; or sk.load_dataset("{again}") once, which keeps it' if data_set in _KEPT else ""
        raise ZooFormatError(
            f"{self.path}: such a zoo comes without images, and they are not here: put "
            f"{data_set or 'them'}, or a link to the folder that has it, at {places[0]} or at "
            f"{places[1]}: {EXPECTED}{offer}"
        )

    def files(self, split: Split = "train") -> list[Path]:
        """The files of the images."""
        _check_split(split)
        return [*self.images.files]

    def dataset(self, split: Split = "train") -> TensorDataset:
        """The examples of a split as the networks took them, kept in memory.

        Returns:
            TensorDataset: Inputs (n, channels, height, width) float32, labels (n,) int64.

        Raises:
            ZooFormatError: There are no images, or they are not those of this zoo.
            DataError: They are damaged.
        """
        _check_split(split)
        if split not in self._datasets:
            self._datasets[split] = self.source.examples(self.images.read(), split, self.way)
        return self._datasets[split]

    @property
    def way(self) -> str:
        """How the files are read where they do not tell: of `source.ways`, that which fits best."""
        return self._chosen[0]

    @property
    def ways_told(self) -> dict[str, str]:
        """What each way gave: test accuracies computed here for the recorded ones; or why not."""
        return self._chosen[1]

    @cached_property
    def _chosen(self) -> tuple[str, dict[str, str]]:
        ways = self.source.ways
        if len(ways) == 1:
            return ways[0], {}
        try:
            images = self.images.read()
        except SharpkitError as error:
            return ways[0], dict.fromkeys(ways, f"not tried: {error}")
        probes = self._probes()
        if not probes:
            return ways[0], dict.fromkeys(ways, "not tried: no network has a usable record")
        return best_way(ways, lambda way: self._try(images, way, probes))

    def _probes(self) -> list[Checkpoint]:
        """Networks that a wrong way would show: of good recorded accuracy, the smallest first."""
        recorded = {id_: c["metrics"]["test_acc"] for id_, c in self.model_configs.items()}
        best = sorted(recorded, key=lambda id_: -recorded[id_])[: (len(recorded) + 1) // 2]
        sizes = {id_: _size(self[id_].files()) for id_ in best}
        found = []
        for id_ in sorted(best, key=lambda id_: (sizes[id_], -recorded[id_]))[: 10 * _PROBES]:
            model = self[id_]
            try:
                self.source.load(model.network, model.epoch, self.source.ways[0])
            except SharpkitError:
                continue  # told where the model is
            found.append(model)
            if len(found) == _PROBES:
                break
        return found

    def _try(self, images: Pair, way: str, probes: Sequence[Checkpoint]) -> list[Recomputed]:
        test = self.source.examples(images, "test", way).tensors
        found = []
        for model in probes:
            network = self.source.load(model.network, model.epoch, way)
            found.append(accuracy_again(network, test[0], test[1], model.metrics["test_acc"]))
        return found

    def recomputed(self, id_: str) -> Recomputed:
        """The test accuracy of a model on the images here, beside the recorded one.

        Raises:
            SharpkitError: The model or the images cannot be read, or do not fit together.
        """
        model, (inputs, labels) = self[id_], self.dataset("test").tensors
        return accuracy_again(model.load(), inputs, labels, model.metrics["test_acc"])

    def read_as(self, id_: str) -> str:
        """How the files of a model are read where they do not tell, and what the other ways give.

        Such as "stride 2 (stride 1: test accuracy 0.1032)"; "" if there is one way.
        """
        ways = self.source.ways
        if len(ways) == 1:
            return ""
        images, others = self.images.read(), []
        for way in ways:
            if way != self.way:
                try:
                    [found] = self._try(images, way, [self[id_]])
                    others.append(f"{way}: test accuracy {found.found:.4f}")
                except SharpkitError:
                    others.append(f"{way}: impossible")
        return f"{self.way} ({'; '.join(others)})"

    def check(self) -> list[str]:
        """What a user must know, one sentence each: networks left out, images, accuracies.

        Raises:
            ZooFormatError: The task's files cannot be read.
        """
        messages = [*self.source.remarks()]
        if self.unusable:
            first, reason = next(iter(self.unusable.items()))
            messages.append(
                f"{len(self.unusable)} of {len(self)} models are left out; the first, {first}: "
                f"{reason}"
            )
        try:
            self.images  # noqa: B018
            failed = [r.problem for r in map(self.recomputed, self._some()) if not r.agrees]
        except SharpkitError as error:
            messages.append(f"recorded accuracies cannot be checked: {error}")
        else:
            if failed:
                told = "".join(f"; {way}: {found}" for way, found in self.ways_told.items())
                messages.append(f"{failed[0]} ({self.way}{told})")
        return [printable(message) for message in messages]

    def _some(self) -> list[str]:
        return [model.id for model in self._probes()]


_KEPT = ("cifar10", "cifar100", "svhn")  # by load_dataset


def _size(files: Sequence[Path]) -> int:
    """Bytes of a model's files."""
    try:
        return sum(file.stat().st_size for file in files)
    except OSError:  # told when the model is loaded
        return 0


def _check_split(split: str) -> None:
    if split not in _SPLITS:
        raise ArgumentError(f"split is {split!r}; expected 'train' or 'test'")


def _listed(epochs: Sequence[int]) -> str:
    return ",".join(map(str, epochs)) or "all"


def _configs(
    settings: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """As `grid.model_configs`, without what does not vary, and without long lists of values."""
    values: dict[str, dict[str, Any]] = {}
    for setting in settings.values():
        for name, value in setting.items():
            values.setdefault(name, {}).setdefault(str(value), value)
    lists = {name: [*found.values()] for name, found in values.items() if len(found) > 1}
    if len(lists.get("seed", ())) == len(settings):
        lists.pop("seed", None)  # one each: it names the network, and conditions on everything
    return {
        id_: {
            "hparams": {
                name: {
                    "possible_values": lists[name] if len(lists[name]) <= _LISTED else [value],
                    "current_value": value,
                }
                for name, value in setting.items()
                if name in lists
            },
            "metrics": dict(metrics[id_]),
        }
        for id_, setting in settings.items()
    }
