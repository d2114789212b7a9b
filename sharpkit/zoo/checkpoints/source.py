"""What a format tells of a task whose networks were kept at several epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sharpkit.zoo.task import Split

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import TensorDataset

    from sharpkit.data.published import Pair


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
