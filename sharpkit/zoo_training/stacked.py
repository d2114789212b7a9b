"""Training of many networks of one shape together, as on one device they train in far less time.

Everything random is drawn per network and from its own seed, as `train_model` draws it, so that a
network does not depend on which others are in its stack, but for rounding. At the end of an epoch
those that are done leave, and waiting ones take their places.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from sharpkit.contract.losses import resolve_loss
from sharpkit.errors import DivergedError, ModelError
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.group_terms import group_losses
from sharpkit.training.m_sam import m_sam_gradient
from sharpkit.training.noise import Noise
from sharpkit.workers.outcome import Failure, error_message
from sharpkit.workers.threads import limited_threads
from sharpkit.zoo.keras import KerasModel
from sharpkit.zoo_training.model import (
    Start,
    TrainedModel,
    begin,
    final_metrics,
    optimizer_of,
    reached,
    state_of,
)
from sharpkit.zoo_training.recipe import Recipe
from sharpkit.zoo_training.stacked_network import Draws, StackedNetwork, draws_of
from sharpkit.zoo_training.stacked_plan import shape_of, sizes_of
from sharpkit.zoo_training.stacked_step import Batches, descend, sam_slopes, sgd_slopes


@dataclass(frozen=True)
class Job:
    """One network to train.

    Args:
        id: Of the model.
        recipe: Of the shape that the stack has.
        seed: As for `train_model`.
    """

    id: str
    recipe: Recipe
    seed: tuple[int, ...]


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
        >>> x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 2
        >>> data = TensorDataset(x, y)
        >>> recipe = Recipe(width=4, batch_size=4, stop_at_loss=0.7)
        >>> jobs = [Job(str(i), recipe, (0, i)) for i in range(3)]
        >>> models = dict(train_stacked(jobs, data, data, most=2))
        >>> sorted(models), models["2"].metrics["train_loss"] <= 0.7
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
    stack = _Stack(jobs[0].recipe, x, y, most)
    while waiting or stack.members:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
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
            yield job.id, TrainedModel(model.config, member.start.initial, state_of(model), metrics)
        stack.keep(staying)


@dataclass
class _Member:
    """A network of a stack: what it has besides weights.

    Args:
        job: What it is.
        attempt: From 0.
        start: Its network before the first step, and its orders.
        noise: The random state of its dropout masks.
        optimizer: Has its settings, and its step size in this epoch.
        schedule: Changes that.
        epoch: Epochs trained.
        steps: Steps made.
        strayed: The first loss of a step of SAM that was not finite.
    """

    job: Job
    attempt: int
    start: Start
    noise: Noise
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    epoch: int = 0
    steps: int = 0
    strayed: float | None = None

    @cached_property
    def dropout(self) -> dict[str, float]:
        """Its dropout layers and their rates."""
        modules = self.start.model.named_modules()
        return {name: m.p for name, m in modules if isinstance(m, nn.Dropout)}

    def reached(self, loss: float) -> bool:
        """As `reached` of a network that trains alone, with the errors that it has."""
        if self.strayed is not None:
            raise DivergedError(
                f"the loss is not finite (here: {self.strayed}): training has diverged"
            )
        return reached(self.job.recipe, loss, self.epoch)


class _Stack:
    """Networks in training; all tensors have them on the first axis.

    Args:
        recipe: Of one of them.
        x: Inputs to fit, on the device.
        y: Their labels.
        most: Networks at a time.
    """

    def __init__(self, recipe: Recipe, x: Tensor, y: Tensor, most: int) -> None:
        self._x, self._y = x, y
        self._input_shape = (x.shape[2], x.shape[3], x.shape[1])
        self._classes = int(y.max()) + 1
        self.shape = shape_of(recipe, self._input_shape, self._classes)
        self.members: list[_Member] = []
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            self.sizes = sizes_of(self.shape, x, y, most)
            self._network = StackedNetwork(self.shape.config, x.device)
        self._state: dict[str, Tensors] = {"weights": {}, "velocity": {}, "statistics": {}}
        self._draws: dict[int, Draws] = {}  # by the size of a batch

    def add(self, jobs: list[tuple[Job, int]]) -> None:
        """Take in networks, each at the start of an attempt."""
        states = {kind: [] if not tensors else [tensors] for kind, tensors in self._state.items()}
        for job, attempt in jobs:
            config = job.recipe.network(self._input_shape, self._classes)
            start = begin(config, job.recipe, (*job.seed, attempt))
            noise = Noise(self._x.device)
            step_sizes = optimizer_of(start.model, replace(job.recipe, rho=0.0))
            self.members.append(_Member(job, attempt, start, noise, *step_sizes))
            weights = {name: p.detach() for name, p in start.model.named_parameters()}
            states["weights"].append(_row(weights))
            states["velocity"].append(_row({n: torch.zeros_like(w) for n, w in weights.items()}))
            states["statistics"].append(_row(self._network.statistics))
        if jobs:
            self._state = {kind: _joined(parts, self._x.device) for kind, parts in states.items()}

    def keep(self, places: list[int]) -> None:
        """Let all others go."""
        if len(places) == len(self.members):
            return
        self.members = [self.members[place] for place in places]
        rows = torch.tensor(places, dtype=torch.int64, device=self._x.device)
        self._state = {
            kind: {name: t[rows] for name, t in tensors.items()}
            for kind, tensors in self._state.items()
        }

    def finished(self, place: int) -> KerasModel:
        """The network at a place, by itself."""
        member = self.members[place]
        model = member.start.model.to(self._x.device)
        own = {**self._state["weights"], **self._state["statistics"]}
        counters = {
            name: torch.tensor(member.steps)
            for name in model.state_dict()
            if name.endswith("num_batches_tracked")
        }
        model.load_state_dict({name: t[place] for name, t in own.items()} | counters)
        return model

    def epoch(self) -> list[float]:
        """One epoch of all; the training loss of each after it."""
        orders = torch.stack(
            [torch.randperm(len(self._x), generator=m.start.order) for m in self.members]
        ).to(self._x.device)
        settings = [m.optimizer.param_groups[0] for m in self.members]
        rates = {kind: self._numbers([s[kind] for s in settings]) for kind in _SETTINGS}
        rho = self._numbers([m.job.recipe.rho for m in self.members])
        losses = [
            self._step(rows, rates, rho) for rows in torch.split(orders, self.shape.batch_size, 1)
        ]
        for member, of_member in zip(self.members, torch.stack(losses, 1).tolist(), strict=True):
            member.optimizer.step()  # without gradients; a schedule wants one before it
            member.schedule.step()
            member.epoch += 1
            member.steps += len(losses)
            if self.shape.m:
                member.strayed = next((x for x in of_member if not math.isfinite(x)), None)
        return self._training_losses()

    def _numbers(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._x.device)

    def _step(self, rows: Tensor, rates: dict[str, Tensor], rho: Tensor) -> Tensor:
        weights, network = self._state["weights"], self._network
        batches = Batches(self._x[rows], self._y[rows], self._masks(rows.shape[1]))
        if self.shape.m:
            m = min(self.shape.m, rows.shape[1])
            found = sam_slopes(network, weights, batches, m=m, rho=rho, at_once=self.sizes.groups)
        else:
            found = sgd_slopes(network, weights, batches)
        descend(weights, self._state["velocity"], found.gradients, rates)
        network.move_statistics(self._state["statistics"], found.statistics)
        return found.loss

    def _masks(self, size: int) -> Tensors:
        """Of a batch of every network, each from its own random numbers."""
        if not any(rate for member in self.members for rate in member.dropout.values()):
            return {}
        if size not in self._draws:
            self._draws[size] = self._draws_of_a_step(size)
        masks = []
        for member in self.members:
            own, member.noise = self._draws[size].masks(member.noise, member.dropout, self._x)
            masks.append(own)
        return {name: torch.stack([own[name] for own in masks]) for name in masks[0]}

    def _draws_of_a_step(self, size: int) -> Draws:
        x, y, m = self._x[:size], self._y[:size], self.shape.m

        def step(model: KerasModel) -> None:
            if m:
                m_sam_gradient(model, x, y, m=m)
            else:
                F.cross_entropy(model(x), y)

        return draws_of(self.shape.config, self._network.units, x, step, 2 if m else 1)

    @torch.no_grad()
    def _training_losses(self) -> list[float]:
        """Mean cross-entropy in eval mode."""
        weights, statistics = self._state["weights"], self._state["statistics"]
        parts = torch.split(self._x, self.sizes.examples)
        logits = torch.cat([self._network.outputs(weights, x, statistics) for x in parts], 1)
        count = len(self.members)
        loss = resolve_loss("cross_entropy")
        mean, _ = group_losses(loss, logits.double().flatten(0, 1), self._y.repeat(count), count)
        return mean.tolist()


def _row(tensors: Tensors) -> Tensors:
    return {name: t.unsqueeze(0) for name, t in tensors.items()}


def _joined(parts: list[Tensors], device: torch.device) -> Tensors:
    return {name: torch.cat([part[name].to(device) for part in parts]) for name in parts[0]}


_SETTINGS = ("lr", "momentum", "weight_decay")
