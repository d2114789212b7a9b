"""Processes that measure together: what they exchange, and how an error of one ends all.

Every exchange says whether a process has failed since the last one. So a process that raises still
answers the others once, all of them raise its error, and none waits for what will not come.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from sharpkit import errors
from sharpkit.contract.checksum import fingerprint
from sharpkit.errors import ArgumentError, RankError, SharpkitError, first_sentence

T = TypeVar("T")

_SIGNS = 32  # of a fingerprint: that of other numbers has the same ones once in 2^32


@dataclass(frozen=True)
class Team:
    """The processes that measure together, of which this is one; a team of one exchanges nothing.

    Every method with an exchange is called by all of them, in the same order.

    Attributes:
        rank: Number of this process, from 0.
        world: How many there are.
        group: Torch's process group; None for its default one.

    Example:
        >>> alone = Team()
        >>> alone.gathered(lambda: 7), alone.share(5)
        ([7], slice(0, 5, None))
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @classmethod
    def of(cls, group: Any = None) -> Team:
        """That of a process group, by default torch's; this process alone if there is none.

        Raises:
            ArgumentError: If this process is not in the group, or one of several that `torchrun`
                started and that have not met yet.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            started = os.environ.get("WORLD_SIZE", "1")
            if started != "1":
                raise ArgumentError(
                    f"WORLD_SIZE is {started}, so this is one of several processes, and they have "
                    "no process group: call torch.distributed.init_process_group() first"
                )
            return cls()
        rank = distributed.get_rank(group)
        if rank < 0:
            raise ArgumentError("this process is not in the process_group that was given")
        return cls(rank, distributed.get_world_size(group), group)

    def share(self, total: int, multiple: int = 1) -> slice:
        """This rank's part of `total` items in order, cut at whole multiples.

        Parts differ by one multiple at most; what is left over is the last rank's.

        Example:
            >>> [Team(rank, 2).share(11, multiple=4) for rank in range(2)]
            [slice(0, 4, None), slice(4, 11, None)]
        """
        units = total // multiple
        start, stop = (multiple * (units * r // self.world) for r in (self.rank, self.rank + 1))
        return slice(start, stop if self.rank < self.world - 1 else total)

    def gathered(self, compute: Callable[[], T]) -> list[T]:
        """What every rank computes, in the order of ranks: plain values and tensors on the CPU.

        Raises:
            SharpkitError: The error of the first rank that raised one, on all of them.
            RankError: If it is of another kind, or a process does not answer.
        """
        if self.world == 1:
            return [compute()]
        error: Exception | None = None
        value: T | None = None
        try:
            value = compute()
        except Exception as caught:
            error = caught
        found: list[Any] = [None] * self.world
        with self._answered():
            distributed.all_gather_object(found, (_described(error), value), group=self.group)
        self._raise_first([failure for failure, _ in found], error)
        return [value for _, value in found]

    def together(self, compute: Callable[[], T]) -> T:
        """What this rank computes, of any kind, if no rank raises.

        Raises:
            SharpkitError, RankError: As `gathered`.
        """
        kept: list[T] = []
        self.gathered(lambda: kept.append(compute()))
        return kept[0]

    def summed(
        self, count: int, like: Tensor, compute: Callable[[Tensor], None], *, same: Tensor
    ) -> Tensor:
        """The sum over ranks of `count` numbers that each computes in place; one all-reduce.

        The bits are the same on every rank.

        Args:
            count: How many.
            like: A tensor of their dtype and device.
            compute: Gets zeros, of shape (count,), to add to.
            same: What they are computed of, which must be the same on every rank.

        Raises:
            SharpkitError, RankError: As `gathered`; and RankError if `same` is not.
        """
        if self.world == 1:
            alone = torch.zeros(count, dtype=like.dtype, device=like.device)
            compute(alone)
            return alone
        sent = torch.zeros(count + 1 + _SIGNS, dtype=like.dtype, device=like.device)
        error: Exception | None = None
        try:
            compute(sent[:count])
            bits = fingerprint([same])
            signs = [1.0 if bits >> i & 1 else -1.0 for i in range(_SIGNS)]
            sent[count + 1 :] = torch.tensor(signs, dtype=like.dtype)
        except Exception as caught:
            error = caught
            sent[count] = 1.0
        with self._answered():
            distributed.all_reduce(sent, group=self.group)
        failed, *signs = sent[count:].tolist()
        if failed:
            found: list[Any] = [None] * self.world
            with self._answered():
                distributed.all_gather_object(found, _described(error), group=self.group)
            self._raise_first(found, error)
        if any(abs(sign) != self.world for sign in signs):
            raise RankError(
                "the vectors that are multiplied differ between ranks: give all of them the same "
                "ones (seed them, or torch.distributed.broadcast those of rank 0)"
            )
        return sent[:count]

    @torch.no_grad()
    def take_buffers_of_first(self, buffers: Iterable[Tensor]) -> None:
        """Fill buffers, such as running statistics, with those of rank 0.

        DistributedDataParallel does so before each of its forward passes.
        """
        if self.world == 1:
            return
        first = 0 if self.group is None else distributed.get_global_rank(self.group, 0)
        for buffer in buffers:
            values = buffer.detach().contiguous()
            with self._answered():
                distributed.broadcast(values, first, group=self.group)
            buffer.copy_(values)

    def require_same(self, described: Callable[[], Mapping[str, str]]) -> None:
        """Raise on every rank unless all describe what they do in the same words.

        Raises:
            SharpkitError: As `gathered`.
            RankError: With the first that differs, and what it is on two ranks.
        """
        if self.world == 1:
            return
        found = self.gathered(described)
        for name in dict.fromkeys(name for one in found for name in one):
            values = [one.get(name, "nothing") for one in found]
            for rank, value in enumerate(values):
                if value != values[0]:
                    raise RankError(
                        f"{name}: {values[0]} on rank 0, {value} on rank {rank}; expected the same "
                        "on every rank"
                    )

    def _raise_first(self, failures: list[tuple[str, str] | None], own: Exception | None) -> None:
        for rank, failure in enumerate(failures):
            if failure is not None:
                kind, text = failure
                error = getattr(errors, kind, RankError)
                raise error(f"rank {rank} of {self.world}: {text}") from own

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Torch's errors of an exchange as one of ours."""
        try:
            yield
        except (RuntimeError, EOFError) as error:
            raise RankError(
                f"rank {self.rank} of {self.world}: the other processes do not answer. One of them "
                "has ended (see what it printed), or does not make this call, which all must make "
                f"({first_sentence(error)})"
            ) from error


ALONE = Team()


def _described(error: Exception | None) -> tuple[str, str] | None:
    """The class of an error, if it is of ours, and its text."""
    if error is None:
        return None
    if isinstance(error, SharpkitError) and hasattr(errors, type(error).__name__):
        return type(error).__name__, str(error)
    return RankError.__name__, f"{type(error).__name__}: {error}"
