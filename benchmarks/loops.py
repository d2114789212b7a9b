"""The plain loops that sharpkit is measured against: the best that a careful person writes.

At the fastest batch size and memory layout, weights moved in place and copied back, gradients
never scaled where only their direction counts, sums kept on the device: no step waits for a GPU.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from timing import in_turn, timed
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
_NEAR = 1.25  # a short trial tells options apart whose times differ by so much
_RACED = 64  # examples of a longer one, at least, between those that are nearer
_ROUNDS, _SECONDS = 7, 10.0  # of it, at most


def gradient_pass(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> None:
    """The gradient of every batch."""
    parameters = list(model.parameters())
    for xb, yb in zip(x.split(batch), y.split(batch), strict=True):
        torch.autograd.grad(cross_entropy(model(xb), yb), parameters)


@torch.no_grad()
def forward_pass(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> None:
    """The loss of every batch."""
    for xb, yb in zip(x.split(batch), y.split(batch), strict=True):
        cross_entropy(model(xb), yb)


def unit(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> None:
    """What m-sharpness is measured in: a gradient and a forward pass over the same examples."""
    gradient_pass(model, x, y, batch)
    forward_pass(model, x, y, batch)


def sharpness_loop(
    model: nn.Module, x: Tensor, y: Tensor, m: int, rho: float, batch: int
) -> Tensor:
    """m-sharpness: per group a gradient in batches, a step in place, a forward pass, undo."""
    parameters = list(model.parameters())
    home = [p.detach().clone() for p in parameters]
    before: list[Tensor] = []
    after: list[Tensor] = []
    for xs, ys in zip(x.split(m), y.split(m), strict=True):
        batches = list(zip(xs.split(batch), ys.split(batch), strict=True))
        step = _step(model, parameters, batches, rho, before)
        with torch.no_grad():
            torch._foreach_add_(parameters, step)
            after += [cross_entropy(model(xb), yb, reduction="sum") for xb, yb in batches]
            torch._foreach_copy_(parameters, home)
    return (torch.stack(after) - torch.stack(before)).double().sum() / len(x)


def _step(
    model: nn.Module,
    parameters: Sequence[Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    rho: float,
    losses: list[Tensor],
) -> Sequence[Tensor]:
    """The step of length rho along the gradient of a group; its summed losses are appended."""
    total: Sequence[Tensor] = ()
    for xb, yb in batches:
        loss = cross_entropy(model(xb), yb, reduction="sum")
        found = torch.autograd.grad(loss, parameters)
        losses.append(loss.detach())
        if total:
            torch._foreach_add_(total, found)
        else:
            total = found
    return torch._foreach_mul(total, rho / torch.nn.utils.get_total_norm(total))


@torch.no_grad()
def landscape_loop(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    batch: int,
    directions: Sequence[Sequence[Tensor]],
    points: Iterable[Sequence[float]],
) -> Tensor:
    """Mean losses at points along directions, shape (points,): weights in place, batches, undo."""
    parameters = list(model.parameters())
    home = [p.detach().clone() for p in parameters]
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    losses = []
    for point in points:
        for c, direction in zip(point, directions, strict=True):
            torch._foreach_add_(parameters, direction, alpha=c)
        parts = [cross_entropy(model(xb), yb, reduction="sum") for xb, yb in batches]
        losses.append(torch.stack(parts).sum() / len(x))
        torch._foreach_copy_(parameters, home)
    return torch.stack(losses)


def sgd_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A plain step of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def two_pass_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """SAM as most implementations write it: one parameter at a time, and two backward passes."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            before = [p.clone() for p in parameters]
            for p in parameters:
                p.add_(p.grad * (0.05 / (norm + 1e-12)))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, weights in zip(parameters, before, strict=True):
                p.copy_(weights)
        optimizer.step()

    return step


def m_sam_loop_step(
    model: nn.Module, x: Tensor, y: Tensor, m: int, rho: float, batch: int
) -> Callable[[], object]:
    """A step of m-SAM: per group two passes in batches, the weights moved in place and put back.

    A group is cut into batches where that changes no number: not with BatchNorm in training mode.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    home = [p.detach().clone() for p in parameters]
    share = torch.tensor(1 / len(x), dtype=parameters[0].dtype, device=x.device)
    if uses_batch_statistics(model):
        batch = m

    def step() -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(home, parameters)
        for xs, ys in zip(x.split(m), y.split(m), strict=True):
            batches = list(zip(xs.split(batch), ys.split(batch), strict=True))
            ascent = _step(model, parameters, batches, rho, [])
            with torch.no_grad():
                torch._foreach_add_(parameters, ascent)
            for xb, yb in batches:
                cross_entropy(model(xb), yb, reduction="sum").backward(share)
            with torch.no_grad():
                torch._foreach_copy_(parameters, home)
        optimizer.step()

    return step


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether BatchNorm makes the examples of a batch depend on each other."""
    return any(isinstance(part, nn.BatchNorm2d) and part.training for part in model.modules())


@torch.no_grad()
def moved_in_place(
    model: nn.Module, x: Tensor, y: Tensor, m: int, steps: Sequence[Tensor], batch: int
) -> Tensor:
    """The mean loss with every group at weights of its own, one after the other.

    All groups take the same steps: what is measured is a forward pass, whatever its direction.
    """
    parameters = list(model.parameters())
    home = [p.detach().clone() for p in parameters]
    losses: list[Tensor] = []
    for xs, ys in zip(x.split(m), y.split(m), strict=True):
        torch._foreach_add_(parameters, steps)
        for xb, yb in zip(xs.split(batch), ys.split(batch), strict=True):
            losses.append(cross_entropy(model(xb), yb, reduction="sum"))
        torch._foreach_copy_(parameters, home)
    return torch.stack(losses).sum() / len(x)


@torch.no_grad()
def moved_side_by_side(
    model: nn.Module, x: Tensor, y: Tensor, m: int, steps: Sequence[Tensor], batch: int
) -> Tensor:
    """The same for as many groups at a time as `batch` examples are, under vmap."""
    groups = batch // m
    weights = dict(model.named_parameters())
    stacked = [step.expand(groups, *step.shape).contiguous() for step in steps]
    losses: list[Tensor] = []

    def loss(w: dict[str, Tensor], xs: Tensor, ys: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, w, (xs,)), ys, reduction="sum")

    for xb, yb in zip(x.split(groups * m), y.split(groups * m), strict=True):
        count = len(xb) // m
        at = {k: w + s[:count] for (k, w), s in zip(weights.items(), stacked, strict=True)}
        losses.append(vmap(loss)(at, xb.unflatten(0, (count, m)), yb.unflatten(0, (count, m))))
    return torch.cat(losses).sum() / len(x)


# --- the fastest batch size and layout --------------------------------------------------------

Option: TypeAlias = tuple[str, int]  # a layout, and examples at a time


@dataclass(frozen=True)
class Setup:
    """A network and data in a layout, and the examples that it takes at a time."""

    model: nn.Module
    x: Tensor
    y: Tensor
    batch: int
    layout: str


class Layouts:
    """Copies of a network and its images in every layout; which is fastest is measured.

    Args:
        model: The network.
        x: Inputs.
        y: Labels.
        work: What is to be fast, called with network, inputs, labels and batch size.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        work: Callable[[nn.Module, Tensor, Tensor, int], object] = unit,
    ) -> None:
        self._work, self._costs = work, dict[Option, float]()
        self._chosen: dict[tuple[Option, ...], Option] = {}
        self._cases: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
        for name, layout in LAYOUTS.items():
            if x.ndim == 4 or not self._cases:
                own = copy.deepcopy(model).to(memory_format=layout)
                for part in own.modules():
                    if isinstance(part, nn.RNNBase) and not part.dropout:
                        part.train()  # cuDNN differentiates no other; the numbers are the same
                data = x.contiguous(memory_format=layout) if x.ndim == 4 else x
                self._cases[name] = own, data, y

    def best(self, batches: Iterable[int]) -> Setup:
        """The fastest per example of these batch sizes, in the layout that is fastest for it."""
        sizes = sorted({min(batch, len(self._cases["contiguous"][1])) for batch in batches})
        options = [(layout, batch) for layout in self._cases for batch in sizes]
        least = min(self._cost(option) for option in options)
        layout, batch = self._fastest(tuple(o for o in options if self._cost(o) <= _NEAR * least))
        return Setup(*self._cases[layout], batch, layout)

    def _fastest(self, options: tuple[Option, ...]) -> Option:
        """The one that takes least for an example, in turn over about as many, by the median."""
        if len(options) == 1:
            return options[0]
        if options not in self._chosen:
            most = min(len(self._cases["contiguous"][1]), max(_RACED, *(b for _, b in options)))
            examples = {str(o): most // o[1] * o[1] for o in options}
            runs = {str(o): self._run(o, examples[str(o)]) for o in options}
            for run in runs.values():
                run()
            times = in_turn(runs, _ROUNDS, _SECONDS)
            medians = {name: statistics.median(found) for name, found in times.items()}
            self._chosen[options] = min(options, key=lambda o: medians[str(o)] / examples[str(o)])
        return self._chosen[options]

    def _run(self, option: Option, examples: int) -> Callable[[], None]:
        """The work over so many examples."""
        layout, batch = option
        model, x, y = self._cases[layout]
        return lambda: self._work(model, x[:examples], y[:examples], batch)

    def _cost(self, option: Option) -> float:
        """Seconds per example, the best of a few runs over one batch."""
        if option not in self._costs:
            batch, x = option[1], self._cases[option[0]][1]
            few = max(1, 16 // batch) * batch
            run = self._run(option, few)
            try:
                spent, best = timed(run), float("inf")
                for _ in range(4):
                    best = min(best, timed(run))
                    spent += best
                    if spent > 1.0:
                        break
            except torch.OutOfMemoryError:
                best = float("inf")
            self._costs[option] = best / min(few, len(x))
        return self._costs[option]


def fastest(runs: Mapping[str, Callable[[], object]], examples: Mapping[str, int]) -> str:
    """The name of the run that takes least for an example, the best of two after one."""
    best: dict[str, float] = {}
    for name, run in runs.items():
        run()
        best[name] = min(timed(run), timed(run)) / examples[name]
    return min(best, key=best.__getitem__)
