"""The vectorised engine: gradients and perturbed losses of many groups at a time.

The examples are streamed in chunks. In every chunk `torch.func.vmap` takes the gradient of each
base group (as many examples as the greatest common divisor of all m); the gradient of a larger
group is the mean of its base groups', so one gradient pass serves every m and rho. A group whose
gradient is complete is perturbed and evaluated at once, so memory stays at a few chunks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap
from torch.utils import _pytree as pytree

from sharpkit.errors import ModelError
from sharpkit.functional import Examples, FunctionalModel, Inputs
from sharpkit.sharpness import geometry, low_rank
from sharpkit.sharpness.ascent import Ascent, gaussian_direction, projected_ascent, scaled
from sharpkit.sharpness.geometry import Factors, Tensors

LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Objective:
    """What is measured: the loss of a functional model, and the weights that are perturbed."""

    model: FunctionalModel
    loss: LossFn
    weights: Tensors  # without a group axis
    chunk: int  # examples evaluated at a time

    @property
    def alone(self) -> int:
        """Group size from which groups are evaluated one by one: they fill the processor alone."""
        return max(1, self.chunk // 2) if self.model.device.type == "cpu" else sys.maxsize

    def at(self, weights: Tensors, inputs: Inputs, labels: Tensor) -> Tensor:
        """The mean loss of one batch at the given weights."""
        return self.loss(self.model(weights, inputs), labels)


@dataclass
class Blocks:
    """Gradients of consecutive base groups, each scaled by its own power of two.

    Scaling the loss gradient before it enters the network keeps the gradients of nearly perfectly
    fitted examples (1e-30 and below) away from underflow; the direction does not change.
    """

    size: int  # examples per block
    loss: Tensor  # (blocks,) float64
    tensors: Tensors  # (blocks, *shape), scaled by 2^exponent
    factors: Factors  # of the large linear weights, D scaled by 2^exponent
    exponent: Tensor  # (blocks,) float64; +inf where the gradient is exactly 0

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.loss)

    def slice(self, start: int, stop: int) -> Blocks:
        """Blocks start to stop, as views."""
        return Blocks(
            self.size,
            self.loss[start:stop],
            {name: t[start:stop] for name, t in self.tensors.items()},
            {name: (a[start:stop], d[start:stop]) for name, (a, d) in self.factors.items()},
            self.exponent[start:stop],
        )

    def merged(self, groups: int, factored: frozenset[str] = frozenset()) -> Blocks:
        """The mean gradient of every len/groups consecutive blocks.

        Args:
            groups: A divisor of the number of blocks.
            factored: Names whose factors are kept; the others' are multiplied out.
        """
        q = len(self) // groups
        exponent = self.exponent.view(groups, q).amin(1)  # the largest gradient sets the scale
        shift = torch.where(
            torch.isfinite(self.exponent.view(groups, q)),
            exponent.unsqueeze(1) - self.exponent.view(groups, q),
            0.0,
        )
        weight = torch.exp2(shift) / q  # (groups, q), at most 1
        tensors = self.tensors
        if q > 1:
            tensors = {
                name: (weight.to(t.dtype).unsqueeze(1) @ t.reshape(groups, q, -1)).view(
                    groups, *t.shape[1:]
                )
                for name, t in tensors.items()
            }
        factors: Factors = {}
        for name, (a, d) in self.factors.items():
            d = d * geometry.expand(weight.flatten(), d)
            a, d = (t.reshape(groups, -1, t.shape[-1]) for t in (a, d))
            if name in factored:
                factors[name] = (a, d)
            else:
                tensors = {**tensors, name: d.mT @ a}
        loss = self.loss.view(groups, q).mean(1)
        return Blocks(self.size * q, loss, tensors, factors, exponent)


def concatenated(first: Blocks, second: Blocks) -> Blocks:
    """Two parts of one group as its weighted mean gradient; both hold one block, no factors."""
    size = first.size + second.size
    exponent = torch.minimum(first.exponent, second.exponent)
    tensors = dict.fromkeys(first.tensors, torch.empty(0))
    for name in tensors:
        parts = []
        for part in (first, second):
            shift = torch.where(torch.isfinite(part.exponent), exponent - part.exponent, 0.0)
            t = part.tensors[name]
            parts.append(t * geometry.expand(torch.exp2(shift) * (part.size / size), t))
        tensors[name] = parts[0] + parts[1]
    loss = (first.loss * first.size + second.loss * second.size) / size
    return Blocks(size, loss, tensors, {}, exponent)


def stacked(blocks: list[Blocks]) -> Blocks:
    """Blocks of one size, one after the other; without factors."""
    if len(blocks) == 1:
        return blocks[0]
    return Blocks(
        blocks[0].size,
        torch.cat([b.loss for b in blocks]),
        {name: torch.cat([b.tensors[name] for b in blocks]) for name in blocks[0].tensors},
        {},
        torch.cat([b.exponent for b in blocks]),
    )


def _without_underflow(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A loss gradient scaled so that its largest entry is near 1, and the power of two that did."""
    top = delta.abs().amax().double()
    exponent = torch.where(top > 0, -torch.floor(torch.log2(top)), torch.inf)
    return geometry.power_of_two(delta, torch.where(top > 0, exponent, 0.0)), exponent


class GradientPass:
    """Per-block gradients at the unperturbed weights.

    Args:
        objective: What is measured.
        factored: Names of linear weights whose gradient is kept as factors.
        losses_only: Skip the gradients.
    """

    def __init__(
        self, objective: Objective, factored: frozenset[str], *, losses_only: bool = False
    ) -> None:
        self.objective, self.losses_only = objective, losses_only
        self.dense = {k: w for k, w in objective.weights.items() if k not in factored}
        self.factored = {k: w for k, w in objective.weights.items() if k in factored}
        self._shapes: dict[int, dict[str, list[torch.Size]]] = {}

    def __call__(self, examples: Examples, size: int) -> Blocks:
        """Gradients of consecutive blocks of `size` examples each."""
        count = len(examples) // size
        if not self.factored and (count == 1 or size >= self.objective.alone):
            return stacked(
                [self._one_block(examples.slice(i * size, (i + 1) * size)) for i in range(count)]
            )
        outputs = vmap(lambda x, y: self._block(x, y, size))(*_grouped(examples, count))
        return self._blocks(size, *outputs)

    def _one_block(self, examples: Examples) -> Blocks:
        """A block of any size without vmap, in slices of a chunk; exact for the mean loss."""
        total: Blocks | None = None
        for start in range(0, len(examples), self.objective.chunk):
            part = self._slice(examples.slice(start, start + self.objective.chunk))
            total = part if total is None else concatenated(total, part)
        assert total is not None
        return total

    def _slice(self, part: Examples) -> Blocks:
        """One block by plain autograd, which has less overhead than torch.func."""
        f = self.objective
        if self.losses_only:
            raw = pytree.tree_map(
                lambda t: t.unsqueeze(0), self._block(part.inputs, part.labels, len(part))
            )
            return self._blocks(len(part), *raw)
        weights = {name: w.detach().requires_grad_() for name, w in f.weights.items()}
        with torch.enable_grad():
            out = f.model(weights, part.inputs)
            leaf = out.detach().requires_grad_()
            loss = f.loss(leaf, part.labels)
            delta = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)[0]
        delta, exponent = _without_underflow(delta)
        leaves = list(weights.values())
        gradient: Sequence[Tensor] = [torch.zeros_like(w) for w in leaves]
        if out.requires_grad:  # else no selected weight is used
            gradient = torch.autograd.grad(
                out, leaves, delta, allow_unused=True, materialize_grads=True
            )
        tensors = {k: g.unsqueeze(0) for k, g in zip(weights, gradient, strict=True)}
        loss = loss.detach().double().unsqueeze(0)
        return Blocks(len(part), loss, tensors, {}, exponent.unsqueeze(0))

    def _block(
        self, inputs: Inputs, labels: Tensor, size: int
    ) -> tuple[Tensor, Tensors, dict[str, list[Tensor]], dict[str, list[Tensor]], Tensor]:
        f = self.objective
        if self.losses_only:
            with torch.no_grad():
                loss = f.at(f.weights, inputs, labels).double()
            return loss, {}, {}, {}, torch.zeros_like(loss)
        probes = {
            name: [torch.zeros(s, device=f.model.device, dtype=f.model.dtype) for s in shapes]
            for name, shapes in self._output_shapes(inputs, size).items()
        }

        def outputs(
            dense: Tensors, probes: dict[str, list[Tensor]]
        ) -> tuple[Tensor, dict[str, list[Tensor]]]:
            layer_inputs: dict[str, list[Tensor]] = {name: [] for name in self.factored}

            def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
                layer_inputs[name].append(layer_input)
                return out + probes[name][call]

            with low_rank.Calls(self.factored, rule):
                return f.model({**dense, **self.factored}, inputs), layer_inputs

        out, pull, layer_inputs = vjp(  # type: ignore[misc]
            outputs, self.dense, probes, has_aux=True
        )
        delta, loss = grad_and_value(f.loss)(out, labels)
        delta, exponent = _without_underflow(delta)
        with torch.no_grad():  # else torch.func records the backward pass for a second derivative
            dense, deltas = pull(delta, retain_graph=False)
        return loss.double(), dense, layer_inputs, deltas, exponent

    def _blocks(
        self,
        size: int,
        loss: Tensor,
        dense: Tensors,
        layer_inputs: dict[str, list[Tensor]],
        deltas: dict[str, list[Tensor]],
        exponent: Tensor,
    ) -> Blocks:
        factors: Factors = {}
        for name in self.factored:
            a = torch.cat([t.reshape(len(loss), -1, t.shape[-1]) for t in layer_inputs[name]], 1)
            d = torch.cat([t.reshape(len(loss), -1, t.shape[-1]) for t in deltas[name]], 1)
            factors[name] = (a, d)
        return Blocks(size, loss, dense, factors, exponent)

    def _output_shapes(self, inputs: Inputs, size: int) -> dict[str, list[torch.Size]]:
        """Shapes of the factored layers' outputs for one block, from a forward pass of its own."""
        if not self.factored:
            return {}
        if size not in self._shapes:
            shapes: dict[str, list[torch.Size]] = {name: [] for name in self.factored}

            def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
                shapes[name].append(out.shape)
                return out

            with torch.no_grad(), low_rank.Calls(self.factored, rule):
                self.objective.model(self.objective.weights, inputs)
            self._shapes[size] = shapes
        return self._shapes[size]


class Groups:
    """Groups of consecutive examples, to be evaluated each at weights of its own."""

    def __init__(self, objective: Objective, examples: Examples, count: int) -> None:
        self.objective, self.examples, self.count = objective, examples, count

    def losses(
        self, weights: Tensors, factors: Factors | None = None, amount: Tensor | None = None
    ) -> Tensor:
        """The mean loss of each group, (groups,) float64.

        Args:
            weights: (groups, *shape) each.
            factors: Linear weights that are W + amount · DᵀA instead.
            amount: (groups,).
        """
        f = self.objective
        if factors:
            assert amount is not None
            return self._factored_losses(weights, factors, amount)
        if self.count > 1:
            return vmap(f.at)(weights, *_grouped(self.examples, self.count)).double()
        single = {name: w[0] for name, w in weights.items()}
        total = torch.zeros(1, dtype=torch.float64, device=f.model.device)
        for e in self._slices():
            total += f.at(single, e.inputs, e.labels).double() * len(e)
        return total / len(self.examples)

    def gradients(self, weights: Tensors) -> tuple[Tensors, Tensor]:
        """The gradient (groups, *shape) and loss (groups,) of each group at its own weights."""
        f = self.objective
        if self.count > 1:
            gradient, loss = vmap(grad_and_value(f.at))(
                weights, *_grouped(self.examples, self.count)
            )
            return gradient, loss.double()
        single = {name: w[0] for name, w in weights.items()}
        total: Tensors = {}
        value = torch.zeros(1, dtype=torch.float64, device=f.model.device)
        for e in self._slices():
            gradient, loss = grad_and_value(f.at)(single, e.inputs, e.labels)
            share = len(e) / len(self.examples)
            value += loss.double() * share
            total = {k: t * share + total.get(k, 0.0) for k, t in gradient.items()}
        return {name: t.unsqueeze(0) for name, t in total.items()}, value

    def _factored_losses(self, weights: Tensors, factors: Factors, amount: Tensor) -> Tensor:
        f = self.objective
        layers = {name: f.weights[name] for name in factors}
        # the amount may leave float32 although its product with the factors does not
        root = amount.sqrt().view(-1, 1, 1)
        thin = {
            name: ((a.double() * root).to(a.dtype), (d.double() * root).to(d.dtype))
            for name, (a, d) in factors.items()
        }

        def one(w: Tensors, thin: Factors, inputs: Inputs, labels: Tensor) -> Tensor:
            def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
                a, d = thin[name]
                return out + (layer_input @ a.mT) @ d

            with low_rank.Calls(layers, rule):
                return f.at({**w, **layers}, inputs, labels)

        return vmap(one)(weights, thin, *_grouped(self.examples, self.count)).double()

    def _slices(self) -> Iterator[Examples]:
        for start in range(0, len(self.examples), self.objective.chunk):
            yield self.examples.slice(start, start + self.objective.chunk)


def _grouped(examples: Examples, groups: int) -> tuple[Inputs, Tensor]:
    size = len(examples) // groups
    grouped: tuple[Inputs, Tensor] = pytree.tree_map(
        lambda t: t.view(groups, size, *t.shape[1:]), (examples.inputs, examples.labels)
    )
    return grouped


@dataclass
class Groupwise:
    """What was measured at one m, in the order of the groups."""

    m: int
    increases: list[Tensor] = field(default_factory=list)  # (rho, groups) float64 each, on the CPU
    sizes: list[int] = field(default_factory=list)
    zero_gradients: int = 0

    @property
    def start(self) -> int:
        """The first example of the next group."""
        return sum(self.sizes)


@dataclass
class Level(Groupwise):
    """The groups of one m while they are collected from base groups."""

    factored: frozenset[str] = frozenset()  # linear weights whose gradient stays factored
    pending: Blocks | None = None  # the mean gradient of a group that is not complete yet


class Sweep:
    """All m and rho over a stream of chunks.

    Args:
        objective: What is measured.
        examples: In the order of the groups.
        ms: Group sizes.
        rhos: Radii.
        ascent: How the inner maximum is found.
        factored: Rows per example of every linear weight whose gradient may stay factored.
    """

    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        ms: Sequence[int],
        rhos: Sequence[float],
        ascent: Ascent,
        factored: dict[str, int],
    ) -> None:
        self.objective, self.examples, self.rhos, self.ascent = objective, examples, rhos, ascent
        self.block = math.gcd(*ms)
        self.scale = (
            {name: w.abs() for name, w in objective.weights.items()} if ascent.adaptive else None
        )

        def factored_at(m: int) -> frozenset[str]:
            # groups that are evaluated alone, or span chunks, are few: theirs are multiplied out
            if m > objective.chunk or m >= objective.alone:
                return frozenset()
            return frozenset(
                name for name, rows in factored.items() if pays(objective.weights[name], m * rows)
            )

        self.gradient_pass = GradientPass(
            objective, factored_at(self.block), losses_only=not ascent.needs_gradient
        )
        self.levels = [Level(m, factored=factored_at(m)) for m in ms]

    def extend(self, start: int, stop: int, advance: Callable[[int], object]) -> None:
        """Measure the groups that examples start to stop complete; all of them at the end."""
        step = max(self.block, self.objective.chunk // self.block * self.block)
        for a in range(start, stop, step):
            self._chunk(a, min(a + step, stop))
            advance(min(a + step, stop) - a)
        if stop == len(self.examples):
            for level in self.levels:
                if level.pending is not None:  # the smaller last group
                    self._measure(level, level.pending)
                    level.pending = None

    def _chunk(self, start: int, stop: int) -> None:
        whole = start + (stop - start) // self.block * self.block
        for a, b, size in ((start, whole, self.block), (whole, stop, stop - whole)):
            if b > a:
                blocks = self.gradient_pass(self._examples(a, b), size)
                _check(blocks, a)
                for level in self.levels:
                    self._add(level, blocks)

    def _add(self, level: Level, blocks: Blocks) -> None:
        done = 0
        if level.pending is not None:
            done = min(len(blocks), (level.m - level.pending.size) // blocks.size)
            if done:
                part = blocks.slice(0, done).merged(1)
                level.pending = concatenated(level.pending, part)
            if level.pending.size == level.m:
                self._measure(level, level.pending)
                level.pending = None
        if level.pending is None:
            per_group = level.m // blocks.size
            groups = (len(blocks) - done) // per_group
            if groups:
                whole = blocks.slice(done, done + groups * per_group)
                self._measure(level, whole.merged(groups, level.factored))
                done += groups * per_group
        if done < len(blocks):
            rest = blocks.slice(done, len(blocks)).merged(1)
            level.pending = rest if level.pending is None else concatenated(level.pending, rest)

    def _measure(self, level: Level, blocks: Blocks) -> None:
        count, size = len(blocks), blocks.size
        if count > 1 and size >= self.objective.alone:
            for i in range(count):
                self._measure(level, blocks.slice(i, i + 1))
            return
        examples = self._examples(level.start, level.start + count * size)
        groups = Groups(self.objective, examples, count)
        with torch.no_grad():
            if self.ascent.kind == "average":
                increases = self._average(level, groups, blocks.loss)
            else:
                increases = self._ascend(level, groups, blocks)
        for rho, row in zip(self.rhos, increases, strict=True):
            if not bool(torch.isfinite(row).all()):
                raise ModelError(
                    f"the loss is not finite at the perturbed weights (m = {level.m}, rho = {rho})"
                )
        level.increases.append(increases.cpu())
        level.sizes += [size] * count

    def _ascend(self, level: Level, groups: Groups, blocks: Blocks) -> Tensor:
        ascent, weights = self.ascent, self.objective.weights
        first = geometry.steepest(scaled(blocks.tensors, self.scale), ascent.p, blocks.factors)
        moves = first.coefficient > 0
        level.zero_gradients += int((~moves).sum())
        rows = []
        if ascent.kind == "pgd":
            rows = [
                projected_ascent(
                    ascent,
                    weights,
                    self.scale,
                    first,
                    blocks.loss,
                    rho,
                    groups.gradients,
                    groups.losses,
                )
                for rho in self.rhos
            ]
        else:
            step = scaled(first.tensors, self.scale)
            for rho in self.rhos:
                amount = rho * first.coefficient
                at = geometry.moved(weights, step, amount)
                rows.append(groups.losses(at, first.factors, amount) - blocks.loss)
        # without a gradient there is no perturbation: exactly 0, not the rounding of two passes
        return torch.where(moves, torch.stack(rows), 0.0)

    def _average(self, level: Level, groups: Groups, base: Tensor) -> Tensor:
        weights, steps = self.objective.weights, self.ascent.steps
        total = torch.zeros(len(self.rhos), len(base), dtype=torch.float64, device=base.device)
        for sample in range(steps):
            direction = gaussian_direction(
                self.ascent, weights, level.m, len(level.sizes), len(base), sample
            )
            step = scaled(direction.tensors, self.scale)
            for i, rho in enumerate(self.rhos):
                at = geometry.moved(weights, step, rho * direction.coefficient)
                total[i] += groups.losses(at) - base
        return total / steps

    def _examples(self, start: int, stop: int) -> Examples:
        f = self.objective.model
        return self.examples.slice(start, stop).to(f.device, f.dtype)


def pays(weight: Tensor, rows: int) -> bool:
    """Whether the factors of a group's gradient are at most half as large as the weight."""
    out, features = weight.shape
    return 2 * rows * (out + features) <= out * features


def _check(blocks: Blocks, start: int) -> None:
    bad = (~torch.isfinite(blocks.loss)).nonzero()
    if len(bad):
        first = start + int(bad[0]) * blocks.size
        raise ModelError(
            f"the loss is not finite at the unperturbed weights (examples {first} to "
            f"{first + blocks.size - 1} in the order measured)"
        )
