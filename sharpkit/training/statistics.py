"""BatchNorm in training, for groups that are evaluated together: whose statistics are used.

A group is normalised by its own batch statistics, in both passes, as on a device of its own. The
running statistics move once per step, by the mean over groups (counted by their size) of the
statistics of the unperturbed pass; for a single group that is the ordinary update. This is what
the average over devices of the authors' implementation amounts to.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """Notes the batch statistics of BatchNorm layers and leaves the running ones untouched.

    Args:
        layers: As `tracked_layers` finds them.
    """

    def __init__(self, layers: dict[str, _BatchNorm]) -> None:
        self.layers = layers
        self._recorded: Statistics = {}
        self._before = self._after = False
        self._groups: int | None = None

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
    def of_one_group(self) -> Iterator[Statistics]:
        """The same for a single group without vmap, from what the layers compute anyway.

        With a momentum of 1 they write the statistics of the batch to their running ones; the
        model must run on copies of its buffers (a `FunctionalModel` does).
        """
        momenta = {name: layer.momentum for name, layer in self.layers.items()}
        self._recorded, self._after = {}, True
        for layer in self.layers.values():
            layer.momentum, layer.track_running_stats = 1.0, True
        try:
            yield self._recorded
        finally:
            self._recorded, self._after = {}, False
            for name, layer in self.layers.items():
                layer.momentum, layer.track_running_stats = momenta[name], False

    @contextmanager
    def of_one_batch(self, groups: int) -> Iterator[Statistics]:
        """The same for groups as one batch, whose layers normalise channels of `groups` groups."""
        kept = {name: dict(layer._buffers) for name, layer in self.layers.items()}
        self._groups = groups
        try:
            with self.of_one_group() as recorded:
                for layer in self.layers.values():
                    for kind in ("running_mean", "running_var"):
                        one = layer._buffers[kind]
                        assert one is not None
                        layer._buffers[kind] = one.new_zeros(groups * len(one))
                yield recorded
        finally:
            self._groups = None
            for name, layer in self.layers.items():
                layer._buffers.update(kept[name])

    def _hooks(self, name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            # the layer itself refuses a single value per channel
            if self._before and x.numel() > x.shape[1]:
                variance, mean = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1])
                self._recorded.setdefault(name, []).append((mean, variance))

        def after(module: _BatchNorm, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._after:
                assert module.running_mean is not None and module.running_var is not None
                mean, variance = module.running_mean.clone(), module.running_var.clone()
                if self._groups is not None:
                    mean, variance = (t.view(self._groups, -1) for t in (mean, variance))
                self._recorded.setdefault(name, []).append((mean, variance))

        return before, after


class Averages:
    """The mean of statistics over groups, to be written to the layers at the end of a step."""

    def __init__(self) -> None:
        self._totals: Statistics = {}
        self._examples = 0

    def add(self, statistics: Statistics, size: int, groups: int) -> None:
        """Statistics with a leading group axis, of groups of `size` examples each."""
        self._examples += size * groups
        for name, calls in statistics.items():
            sums = [(mean.sum(0) * size, variance.sum(0) * size) for mean, variance in calls]
            if name in self._totals:
                sums = [
                    (a + c, b + d) for (a, b), (c, d) in zip(self._totals[name], sums, strict=True)
                ]
            self._totals[name] = sums

    @torch.no_grad()
    def write(self, layers: dict[str, _BatchNorm]) -> None:
        """Move the running statistics of every layer, once per call of the layer."""
        for name, calls in self._totals.items():
            layer = layers[name]
            assert layer.running_mean is not None and layer.running_var is not None
            for mean, variance in calls:
                if layer.num_batches_tracked is not None:
                    layer.num_batches_tracked.add_(1)
                factor = layer.momentum
                if factor is None:  # a cumulative average
                    factor = 1.0 / float(layer.num_batches_tracked or 1)
                for running, total in ((layer.running_mean, mean), (layer.running_var, variance)):
                    running.lerp_((total / self._examples).to(running.dtype), factor)
