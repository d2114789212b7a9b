"""Tasks whose networks were kept at several epochs, with images that the user has elsewhere.

A format says what is in its files by a `Source`; everything else is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.data.published import Pair, Published
from sharpkit.display import readable
from sharpkit.errors import ArgumentError, SharpkitError
from sharpkit.safe_text import printable
from sharpkit.zoo.checkpoints.checkpoint import Checkpoint
from sharpkit.zoo.checkpoints.configs import varying_configs
from sharpkit.zoo.checkpoints.images import images_of
from sharpkit.zoo.checkpoints.source import Source
from sharpkit.zoo.grid import models_frame
from sharpkit.zoo.recomputed import Recomputed, accuracy_again, best_way
from sharpkit.zoo.task import Split, known_id

if TYPE_CHECKING:
    import pandas as pd
    from torch.utils.data import TensorDataset

    from sharpkit.zoo.remote import Mirror

_PROBES = 3  # networks by which a way to read the zoo is chosen
_SPLITS: tuple[Split, ...] = ("train", "test")


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
        return self._models[known_id(id_, self._models, self.name)]

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
            ArgumentError: No network has such a checkpoint, or something else than numbers.
        """
        if not all(isinstance(e, int) and not isinstance(e, bool) for e in epochs):
            raise ArgumentError(f"at_epochs{epochs!r}: expected numbers, as in at_epochs(3, 86)")
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
        return varying_configs(settings, metrics), reasons

    def frame(self) -> pd.DataFrame:
        """One row per usable model: task, model, hyperparameters that vary, metrics."""
        return models_frame(self.name, self.model_configs)

    @cached_property
    def images(self) -> Published:
        """The data set's files.

        Raises:
            ZooFormatError: They are in none of the places.
        """
        return images_of(self.source)

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
