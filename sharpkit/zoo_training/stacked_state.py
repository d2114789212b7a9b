"""The networks of a stack: their weights on a leading axis, and what else each has of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.contract.losses import resolve_loss
from sharpkit.contract.parameters import select_parameters
from sharpkit.errors import DivergedError
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.group_gradient import group_losses
from sharpkit.training.m_sam import m_sam_gradient
from sharpkit.training.noise import Noise
from sharpkit.training.sam_groups import selection_of
from sharpkit.training.sam_timing import EVERY_STEP, SamTiming, sam_timing
from sharpkit.zoo.keras import KerasModel
from sharpkit.zoo_training.model import Start, begin, optimizer_of, reached
from sharpkit.zoo_training.recipe import Recipe
from sharpkit.zoo_training.stacked_network import Draws, StackedNetwork, draws_of
from sharpkit.zoo_training.stacked_plan import shape_of, sizes_of
from sharpkit.zoo_training.stacked_step import (
    Batches,
    Slopes,
    descend,
    joined,
    sam_slopes,
    sgd_slopes,
    taken,
)

_SETTINGS = ("lr", "momentum", "weight_decay")


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


@dataclass
class Member:
    """A network of a stack: what it has besides weights.

    Args:
        job: What it is.
        attempt: From 0.
        start: Its network before the first step, and its orders.
        noise: The random state of its dropout masks.
        optimizer: Has its settings, and its step size in this epoch.
        schedule: Changes that.
        epoch: Epochs trained.
        timing: Which of its steps are perturbed, if it is trained with SAM.
        perturbed: The parameters that are.
        steps: Steps made.
        strayed: The first loss of a step of SAM that was not finite.
    """

    job: Job
    attempt: int
    start: Start
    noise: Noise
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    timing: SamTiming
    perturbed: frozenset[str]
    epoch: int = 0
    steps: int = 0
    strayed: float | None = None

    @cached_property
    def dropout(self) -> dict[str, float]:
        """Its dropout layers and their rates."""
        modules = self.start.model.named_modules()
        return {name: m.p for name, m in modules if isinstance(m, nn.Dropout)}

    @property
    def radius(self) -> float:
        """Of its next step; 0 if that is a plain one."""
        rho = self.job.recipe.rho
        return rho * self.timing.factor(self.steps) if rho else 0.0

    def reached(self, loss: float) -> bool:
        """As `reached` of a network that trains alone, with the errors that it has."""
        if self.strayed is not None:
            raise DivergedError(
                f"the loss is not finite (here: {self.strayed}): training has diverged"
            )
        return reached(self.job.recipe, loss, self.epoch)


class Stack:
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
        self.members: list[Member] = []
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            self.sizes = sizes_of(self.shape, x, y, most)
            self._network = StackedNetwork(self.shape.config, x.device)
        self._state: dict[str, Tensors] = {"weights": {}, "velocity": {}, "statistics": {}}
        # by the size of a batch, and whether the step is perturbed
        self._draws: dict[tuple[int, bool], Draws] = {}

    def add(self, jobs: list[tuple[Job, int]]) -> None:
        """Take in networks, each at the start of an attempt."""
        states = {kind: [] if not tensors else [tensors] for kind, tensors in self._state.items()}
        for job, attempt in jobs:
            config = job.recipe.network(self._input_shape, self._classes)
            start = begin(config, job.recipe, (*job.seed, attempt))
            noise = Noise(self._x.device)
            recipe, examples = job.recipe, len(self._x)
            step_sizes = optimizer_of(start.model, replace(recipe, rho=0.0), examples)
            self.members.append(
                Member(job, attempt, start, noise, *step_sizes, *_of_sam(start, recipe, examples))
            )
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
        rows = self._index(places)
        self._state = {kind: taken(tensors, rows) for kind, tensors in self._state.items()}

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
        losses = [self._step(rows, rates) for rows in torch.split(orders, self.shape.batch_size, 1)]
        for member, of_member in zip(self.members, torch.stack(losses, 1).tolist(), strict=True):
            member.optimizer.step()  # without gradients; a schedule wants one before it
            member.schedule.step()
            member.epoch += 1
            if self.shape.m:
                member.strayed = next((x for x in of_member if not math.isfinite(x)), None)
        return self._training_losses()

    def _numbers(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._x.device)

    def _step(self, rows: Tensor, rates: dict[str, Tensor]) -> Tensor:
        """A step of all; their losses."""
        found = self._slopes(rows)
        descend(self._state["weights"], self._state["velocity"], found.gradients, rates)
        self._network.move_statistics(self._state["statistics"], found.statistics)
        for member in self.members:
            member.steps += 1
        return found.loss

    def _slopes(self, rows: Tensor) -> Slopes:
        """Of all networks: first those whose step is perturbed, then the others."""
        radii = [member.radius for member in self.members]
        perturbed = [place for place, radius in enumerate(radii) if radius > 0]
        plain = [place for place, radius in enumerate(radii) if not radius > 0]
        if not plain:
            return self._perturbed(rows, perturbed, radii)
        if not perturbed:
            return self._plain(rows, plain)
        parts = [self._perturbed(rows, perturbed, radii), self._plain(rows, plain)]
        return joined(parts).rows(self._index(perturbed + plain).argsort())

    def _perturbed(self, rows: Tensor, places: list[int], radii: list[float]) -> Slopes:
        batches, weights = self._batches(rows, places, perturbed=True), self._weights(places)
        members = [self.members[place] for place in places]
        still = {
            name: torch.tensor([name not in m.perturbed for m in members], device=self._x.device)
            for name in weights
            if not all(name in m.perturbed for m in members)
        }
        return sam_slopes(
            self._network,
            weights,
            batches,
            m=min(self.shape.m, rows.shape[1]),
            rho=self._numbers([radii[place] for place in places]),
            at_once=self.sizes.groups,
            still=still,
        )

    def _plain(self, rows: Tensor, places: list[int]) -> Slopes:
        batches = self._batches(rows, places, perturbed=False)
        return sgd_slopes(self._network, self._weights(places), batches)

    def _weights(self, places: list[int]) -> Tensors:
        """Of the networks at some places, in their order."""
        weights = self._state["weights"]
        return weights if len(places) == len(self.members) else taken(weights, self._index(places))

    def _batches(self, rows: Tensor, places: list[int], *, perturbed: bool) -> Batches:
        if len(places) < len(self.members):
            rows = rows[self._index(places)]
        masks = self._masks(rows.shape[1], places, perturbed=perturbed)
        return Batches(self._x[rows], self._y[rows], masks)

    def _index(self, places: list[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.int64, device=self._x.device)

    def _masks(self, size: int, places: list[int], *, perturbed: bool) -> Tensors:
        """Of a batch of every network, each from its own random numbers."""
        if not any(rate for member in self.members for rate in member.dropout.values()):
            return {}
        kind = size, perturbed
        if kind not in self._draws:
            self._draws[kind] = self._draws_of_a_step(size, perturbed=perturbed)
        masks = []
        for place in places:
            member = self.members[place]
            own, member.noise = self._draws[kind].masks(member.noise, member.dropout, self._x)
            masks.append(own)
        return {name: torch.stack([own[name] for own in masks]) for name in masks[0]}

    def _draws_of_a_step(self, size: int, *, perturbed: bool) -> Draws:
        x, y, m = self._x[:size], self._y[:size], self.shape.m

        def step(model: KerasModel) -> None:
            if perturbed:
                m_sam_gradient(model, x, y, m=m)
            else:
                F.cross_entropy(model(x), y)

        return draws_of(self.shape.config, self._network.units, x, step, 2 if perturbed else 1)

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


def _of_sam(start: Start, recipe: Recipe, examples: int) -> tuple[SamTiming, frozenset[str]]:
    """Which steps are perturbed, and which parameters."""
    if not recipe.rho:
        return EVERY_STEP, frozenset()
    timing = sam_timing(**recipe.sam_steps(recipe.total_steps(examples)))
    return timing, frozenset(select_parameters(start.model, selection_of(recipe.sam_parameters)))


def _row(tensors: Tensors) -> Tensors:
    return {name: t.unsqueeze(0) for name, t in tensors.items()}


def _joined(parts: list[Tensors], device: torch.device) -> Tensors:
    return {name: torch.cat([part[name].to(device) for part in parts]) for name in parts[0]}
