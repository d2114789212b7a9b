"""BatchNorm in training, for groups that are evaluated together: whose statistics are used.

A group is normalised by its own batch statistics, in both passes, as on a device of its own. The
running statistics move once per step, by the mean over groups (counted by their size) of the
statistics of the unperturbed pass; for a single group that is the ordinary update. This is what
the average over devices of the authors' implementation amounts to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from sharpkit.errors import ModelError

Statistics: TypeAlias = dict[str, list[tuple[Tensor, Tensor]]]  # per layer and call: mean, variance


def tracked_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers in training mode that keep running statistics.

    Raises:
        ModelError: For an InstanceNorm that does, which cannot be updated once per step.
    """
    for name, module in model.named_modules():
        if isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            raise ModelError(
                f"{name}: InstanceNorm with track_running_stats=True is not supported by m-SAM; "
                "put it in eval mode or use track_running_stats=False"
            )
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and module.track_running_stats
        and module.running_mean is not None
    }


class Recorder:
    """Notes the batch statistics of BatchNorm layers and leaves the running ones untouched."""

    def __init__(self, layers: dict[str, _BatchNorm]) -> None:
        self.layers = layers
        self._recorded: Statistics = {}
        self._before = self._after = False
        self._groups = 1

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the layers use batch statistics and never write to their buffers."""
        handles = []
        for name, layer in self.layers.items():
            before, after = self._hooks(name)
            handles.append(layer.register_forward_pre_hook(before))
            handles.append(layer.register_forward_hook(after))
            layer.track_running_stats = False
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.layers.values():
                layer.track_running_stats = True

    @contextmanager
    def over_groups(self) -> Iterator[Statistics]:
        """Record what one forward pass under vmap sees, into the dict that is yielded."""
        self._recorded, self._before = {}, True
        try:
            yield self._recorded
        finally:
            self._recorded, self._before = {}, False

    @contextmanager
    def of_one_batch(self, groups: int) -> Iterator[Statistics]:
        """The same for groups as one batch, or a group alone, from what layers compute anyway.

        With a momentum of 1 they write the statistics of each group's channels to their running
        ones; the model must run on copies of its buffers (a `FunctionalModel` does).
        """
        kept = {name: dict(layer._buffers) for name, layer in self.layers.items()}
        momenta = {name: layer.momentum for name, layer in self.layers.items()}
        self._recorded, self._after, self._groups = {}, True, groups
        empty = iter(_zeros([b for layer in self.layers.values() for b in _running(layer)], groups))
        for layer in self.layers.values():
            layer.momentum, layer.track_running_stats = 1.0, True
            layer._buffers.update(running_mean=next(empty), running_var=next(empty))
        try:
            yield self._recorded
        finally:
            self._recorded, self._after = {}, False
            for name, layer in self.layers.items():
                layer.momentum, layer.track_running_stats = momenta[name], False
                layer._buffers.update(kept[name])

    def _hooks(self, name: str) -> tuple[Any, Any]:
        def before(module: _BatchNorm, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            # the layer itself refuses a single value per channel
            if self._before and x.numel() > x.shape[1]:
                variance, mean = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1])
                self._recorded.setdefault(name, []).append((mean, variance))
            if self._after and name in self._recorded:  # what the last call wrote is kept
                mean, variance = _zeros(_running(module), 1)
                module._buffers.update(running_mean=mean, running_var=variance)

        def after(module: _BatchNorm, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._after:
                mean, variance = (t.view(self._groups, -1) for t in _running(module))
                self._recorded.setdefault(name, []).append((mean, variance))

        return before, after


def _running(layer: _BatchNorm) -> list[Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None
    return [layer.running_mean, layer.running_var]


def _zeros(like: list[Tensor], times: int) -> list[Tensor]:
    """Zeros of so many times the lengths, for each dtype and device from one call."""
    found: list[Tensor] = [torch.empty(0)] * len(like)
    for kind in {(t.dtype, t.device) for t in like}:
        of_kind = [i for i, t in enumerate(like) if (t.dtype, t.device) == kind]
        lengths = [times * len(like[i]) for i in of_kind]
        whole = torch.zeros(sum(lengths), dtype=kind[0], device=kind[1])
        for i, part in zip(of_kind, torch.split(whole, lengths), strict=True):
            found[i] = part
    return found


class Averages:
    """The mean of statistics over groups, to be written to the layers at the end of a step.

    All layers are handled by one call each: on a GPU a call takes longer than its work.
    """

    def __init__(self) -> None:
        # mean and variance by layer and by which of its calls
        self._totals: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._examples = 0

    @torch.no_grad()
    def add(self, statistics: Statistics, size: int, groups: int) -> None:
        """Statistics with a leading group axis, of groups of `size` examples each."""
        self._examples += size * groups
        keys = [(name, call) for name, calls in statistics.items() for call in range(len(calls))]
        if not keys:
            return
        parts = [t for calls in statistics.values() for pair in calls for t in pair]
        sums = torch._foreach_mul([t[0] if groups == 1 else t.sum(0) for t in parts], float(size))
        pairs = dict(zip(keys, zip(sums[::2], sums[1::2], strict=True), strict=True))
        known = [key for key in keys if key in self._totals]
        if known:
            torch._foreach_add_(_flat(self._totals, known), _flat(pairs, known))
        self._totals = {**pairs, **self._totals}

    @torch.no_grad()
    def write(self, layers: dict[str, _BatchNorm]) -> None:
        """Move the running statistics of every layer, once per call of the layer."""
        if not self._totals:
            return
        means = torch._foreach_div(_flat(self._totals, self._totals), float(self._examples))
        moves: dict[tuple[int, float], list[tuple[Tensor, Tensor]]] = {}
        for (name, call), pair in zip(
            self._totals, zip(means[::2], means[1::2], strict=True), strict=True
        ):
            layer = layers[name]
            factor = layer.momentum
            if factor is None:  # a cumulative average
                factor = 1.0 / (float(layer.num_batches_tracked or 0) + call + 1)
            targets = zip(_running(layer), pair, strict=True)
            moves.setdefault((call, factor), []).extend((a, b.to(a.dtype)) for a, b in targets)
        for key in sorted(moves):
            running, new = zip(*moves[key], strict=True)
            torch._foreach_lerp_(running, new, key[1])
        for call in {call for call, _ in moves}:
            counters = [
                layers[name].num_batches_tracked for name, own in self._totals if own == call
            ]
            torch._foreach_add_([t for t in counters if t is not None], 1)


def _flat(
    pairs: Mapping[tuple[str, int], tuple[Tensor, Tensor]], keys: Iterable[tuple[str, int]]
) -> list[Tensor]:
    return [t for key in keys for t in pairs[key]]
