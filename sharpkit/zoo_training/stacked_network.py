"""Networks of one shape as one function: weights, statistics and masks lie on a leading axis."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkit.errors import ModelError
from sharpkit.groupwise.geometry import Tensors
from sharpkit.training.noise import Noise
from sharpkit.zoo.keras import KerasModel, build_model


class Masked(nn.Module):
    """Dropout by a mask that is given to it, as long as it is in training mode."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x times the mask."""
        return x * self.mask if self.training else x


class StackedNetwork:
    """A network as a function of many sets of weights at once.

    Args:
        config: Its config.json, with all dropout layers that any of the sets has.
        device: Where to compute.

    Raises:
        ModelError: The network draws random numbers otherwise than by dropout of single units.

    Example:
        >>> config = {"input_shape": [3], "model_config": [{"layer_name": "Dense", "units": 2}]}
        >>> network = StackedNetwork(config, torch.device("cpu"))
        >>> weights = {"dense.weight": torch.ones(5, 2, 3), "dense.bias": torch.zeros(5, 2)}
        >>> network.outputs(weights, torch.ones(5, 4, 3)).shape
        torch.Size([5, 4, 2])
    """

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        self.model: KerasModel = build_model(config, device=device)
        self.units = _units(config)  # dropout layer -> shape of an example there
        for name in self.units:
            self.model.set_submodule(name, Masked())
        self._norms = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm)
        }
        self._momenta = {name: float(norm.momentum or 0.0) for name, norm in self._norms.items()}
        for norm in self._norms.values():
            norm.momentum = 1.0  # then it writes the statistics of a batch as they are

    @property
    def statistics(self) -> Tensors:
        """Running statistics of BatchNorm layers before any step, (channels,)."""
        return {
            f"{name}.{kind}": getattr(norm, kind)
            for name, norm in self._norms.items()
            for kind in ("running_mean", "running_var")
        }

    def outputs(
        self,
        weights: Tensors,
        inputs: Tensor,
        statistics: Tensors | None = None,
        masks: Tensors | None = None,
        *,
        training: bool = False,
    ) -> Tensor:
        """What every set of weights gives for inputs of its own.

        Args:
            weights: Of every parameter, (sets, *shape).
            inputs: (sets, n, ...), or (n, ...) for all.
            statistics: Of BatchNorm layers, (sets, channels): those to normalise by, or in training
                zeros, to be overwritten by those of the inputs.
            masks: Of dropout layers by name, (sets, n, ...), in training.
            training: Whether to normalise by the inputs and to drop units.

        Returns:
            Tensor: (sets, n, classes).
        """
        masked = {f"{name}.mask": mask for name, mask in (masks or {}).items()}
        self.model.train(training)

        def one(given: Tensors, inputs: Tensor) -> Tensor:
            out: Tensor = functional_call(self.model, given, (inputs,))
            return out

        shared = inputs.ndim == len(self.model.input_shape) + 1
        given = {**weights, **(statistics or {}), **masked}
        return vmap(one, (0, None if shared else 0))(given, inputs)

    def move_statistics(self, running: Tensors, batch: Tensors) -> None:
        """Move running statistics towards those of a batch, as the layers do."""
        for name, statistic in running.items():
            statistic.lerp_(batch[name], self._momenta[name.rpartition(".")[0]])


def _units(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Dropout layers in order, and the shape of an example there.

    Raises:
        ModelError: A layer draws random numbers otherwise.
    """
    model = build_model(config, device="meta").eval()
    found: dict[str, torch.Size] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Dropout:

            def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                found[name] = inputs[0].shape[1:]

            module.register_forward_pre_hook(note)
        elif isinstance(module, _DropoutNd):
            raise ModelError(
                f"{name}: {type(module).__name__} cannot be stacked: train with stack=None"
            )
    model(torch.empty(1, *model.input_shape, device="meta"))
    return found


_TRIES = 5


@dataclass(frozen=True)
class Draws:
    """How a network alone draws its dropout masks in a step: part after part of a batch.

    Args:
        units: Dropout layer to the shape of an example there.
        parts: Of every part of the batch, the shapes and strides in the order of the layers.
    """

    units: Mapping[str, torch.Size]
    parts: list[list[tuple[torch.Size, tuple[int, ...]]]]

    def masks(
        self, noise: Noise, rates: Mapping[str, float], like: Tensor
    ) -> tuple[Tensors, Noise]:
        """The masks of one network, 0 or 1 / (1 - rate), and the random state after them.

        Args:
            noise: The network's random state.
            rates: Dropout layer to rate; a layer without one keeps every unit.
            like: Of the dtype and device of the masks.
        """
        noise.replay()
        drawn: dict[str, list[Tensor]] = {name: [] for name in self.units}
        for part in self.parts:
            for (name, units), (shape, stride) in zip(self.units.items(), part, strict=True):
                whole = torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)
                kept = F.dropout(whole.fill_(1.0), rates.get(name, 0.0))
                drawn[name].append(kept.reshape(-1, *units))
        return {name: torch.cat(parts) for name, parts in drawn.items()}, Noise(like.device)


def draws_of(
    config: dict[str, Any],
    units: Mapping[str, torch.Size],
    examples: Tensor,
    step: Callable[[KerasModel], object],
    passes: int,
) -> Draws:
    """How a step draws, as a network alone does it.

    Args:
        config: The network's config.json, with rates above 0.
        units: Dropout layer to the shape of an example there, in order.
        examples: The inputs that the step is over.
        step: Takes a network, in training mode, through them.
        passes: How often it goes through every part of a batch, with the same masks.

    Raises:
        ModelError: The network draws in an order that is not understood.
    """
    for _ in range(_TRIES):
        model = build_model(config, device=examples.device).train()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model)  # a first step tries things out, and draws for that too
        if not caught:  # else groups are taken one by one, mostly because of unlucky draws
            break
    with _DropoutCalls() as calls:
        step(model)
    layers = len(units)
    starts = range(0, len(calls.drawn), layers * passes)
    parts = [calls.drawn[s : s + layers] for s in starts]
    for i, shape in enumerate(units.values()):
        rows = sum(part[i][0].numel() for part in parts if len(part) == layers)
        if rows != len(examples) * shape.numel():
            raise ModelError("dropout masks are drawn in an unknown order: train with stack=None")
    return Draws(units, parts)


class _DropoutCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The shapes and strides of what dropout layers draw, on a CPU and on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn: list[tuple[torch.Size, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note a draw, and run the function."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn.append((args[0].shape, args[0].stride()))
        return func(*args, **(kwargs or {}))
