"""Training of many networks of one shape together, as on one device they train in far less time.

Everything random is drawn per network and from its own seed, as `train_model` draws it, so that a
network does not depend on which others are in its stack, but for rounding. At the end of an epoch
those that are done leave, and waiting ones take their places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import TensorDataset

from sharpkit.errors import ModelError
from sharpkit.workers.outcome import Failure, error_message
from sharpkit.workers.threads import limited_threads
from sharpkit.zoo_training.model import TrainedModel, final_metrics, sam_metrics, state_of
from sharpkit.zoo_training.stacked_state import Job, Stack


def train_stacked(
    jobs: Sequence[Job],
    train: TensorDataset,
    test: TensorDataset,
    *,
    most: int,
    shipped_test: int | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[str, TrainedModel | Failure]]:
    """Train networks of one shape together; each as `train_model` does it, up to rounding.

    The caller's random state stays.

    Args:
        jobs: Networks whose recipes have the same `shape_of`.
        train: Inputs (n, c, h, w) and labels (n,) int64 to fit.
        test: The same for the recorded test accuracy and loss.
        most: Networks at a time; fewer where memory is short.
        shipped_test: As for `train_model`.
        device: Where to train.

    Yields:
        tuple: Id of a network and what came of it, as soon as it is done.

    Example:
        >>> from sharpkit.zoo_training import Recipe
        >>> x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 2
        >>> data = TensorDataset(x, y)
        >>> recipe = Recipe(width=4, batch_size=4, stop_at_loss=0.8)
        >>> jobs = [Job(str(i), recipe, (0, i)) for i in range(3)]
        >>> models = dict(train_stacked(jobs, data, data, most=2))
        >>> sorted(models), models["2"].metrics["train_loss"] <= 0.8
        (['0', '1', '2'], True)
    """
    left = {job.id for job in jobs}
    with limited_threads(1):
        try:
            for id_, found in _trained(jobs, train, test, most, shipped_test, torch.device(device)):
                left.discard(id_)
                yield id_, found
        except Exception as error:  # of them all: their shape is the same
            message = error_message(error)
            if isinstance(error, torch.OutOfMemoryError):
                message += ": give a smaller stack"
            for job in jobs:
                if job.id in left:
                    yield job.id, Failure(message)


def _trained(
    jobs: Sequence[Job],
    train: TensorDataset,
    test: TensorDataset,
    most: int,
    shipped_test: int | None,
    device: torch.device,
) -> Iterator[tuple[str, TrainedModel | Failure]]:
    x, y, test_x, test_y = (t.to(device) for d in (train, test) for t in d.tensors)
    waiting = deque((job, 0) for job in jobs)
    stack = Stack(jobs[0].recipe, x, y, most)
    while waiting or stack.members:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            free = stack.sizes.networks - len(stack.members)
            stack.add([waiting.popleft() for _ in range(min(free, len(waiting)))])
            losses = stack.epoch()
        staying = []
        for place, (member, loss) in enumerate(zip(stack.members, losses, strict=True)):
            job, attempt = member.job, member.attempt
            try:
                done = member.reached(loss)
            except ModelError as error:
                if attempt + 1 < job.recipe.attempts:
                    waiting.appendleft((job, attempt + 1))
                else:
                    yield job.id, Failure(error_message(error))
                continue
            if not done:
                staying.append(place)
                continue
            model = stack.finished(place)
            metrics = final_metrics(model, (x, y), (test_x, test_y), shipped_test)
            metrics |= {"epochs": member.epoch, "attempt": attempt}
            metrics |= sam_metrics(job.recipe, len(x), member.epoch)
            yield job.id, TrainedModel(model.config, member.start.initial, state_of(model), metrics)
        stack.keep(staying)
