"""Stacks in this process, whose networks are given as they finish, or in worker processes."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, TypeAlias

from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from sharpkit.contract.examples import standard_tensor
from sharpkit.workers import Failure, Workers, run_items
from sharpkit.zoo_training.model import TrainedModel
from sharpkit.zoo_training.stacked import train_stacked
from sharpkit.zoo_training.stacked_state import Job

# networks of one shape, and how many of them at a time
Stacked: TypeAlias = tuple[list[Job], int]
Outcome: TypeAlias = tuple[str, TrainedModel | Failure]


def train_stacks(
    stacks: Sequence[Stacked],
    arrays: list[NDArray[Any]],
    shipped: int,
    workers: Workers,
    *,
    device: str,
) -> Generator[Outcome]:
    """Train stack after stack in this process, or several at a time in workers.

    Args:
        stacks: What trains together.
        arrays: Inputs and labels to fit, and of the test.
        shipped: As `shipped_test` of `train_model`.
        workers: Who trains; a worker's networks are given when its whole stack is done.
        device: Where to train.

    Yields:
        tuple: Id of a network and what came of it.
    """
    train = partial(_train, arrays, shipped)
    if workers.place == "inline":
        for stack in stacks:
            yield from train(stack, device)
        return
    results = run_items(partial(_trained, train), _pieces(stacks, workers), workers, device=device)
    for (jobs, _), found in results:
        if isinstance(found, Failure):
            yield from ((job.id, found) for job in jobs)
        else:
            yield from found


def _train(
    arrays: list[NDArray[Any]], shipped: int, stack: Stacked, device: str
) -> Generator[Outcome]:
    x, y, test_x, test_y = map(standard_tensor, arrays)
    train, test = TensorDataset(x, y), TensorDataset(test_x, test_y)
    jobs, most = stack
    yield from train_stacked(jobs, train, test, most=most, shipped_test=shipped, device=device)


def _trained(train: Any, stack: Stacked, device: str) -> list[Outcome]:
    """What a worker sends back."""
    return list(train(stack, device))


def _pieces(stacks: Sequence[Stacked], workers: Workers) -> list[Stacked]:
    """Stacks that no network waits for, and as many as there are workers, if networks suffice."""
    parts = math.ceil((workers.count or 1) / max(1, len(stacks)))
    pieces = []
    for jobs, most in stacks:
        size = min(most, math.ceil(len(jobs) / parts))
        pieces += [(jobs[i : i + size], size) for i in range(0, len(jobs), size)]
    return pieces
