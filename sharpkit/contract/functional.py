"""Models as pure functions of their parameters, held still while they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpkit.contract.examples import Inputs
from sharpkit.errors import ModelError


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Plain kernels inside: fused attention has neither second derivatives nor batching rules."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode, with unfused attention.

    Mode and random state are restored afterwards, also after an error.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), unfused_attention():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class FunctionalModel:
    """A model as a function (parameters, inputs) -> outputs that leaves the module alone.

    Args:
        model: Any module. Inputs given as a dict are passed as keywords, as a tuple by position.
            An output with a `logits` attribute (Hugging Face) stands for its logits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> f = FunctionalModel(model)
        >>> f({"weight": torch.ones(1, 2)}, torch.tensor([[1.0, 2.0]]))
        tensor([[3.]])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # copies, so that a module that counts its calls in a buffer counts on the copy
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._parameters = {name: p.detach() for name, p in model.named_parameters()}
        self._aliases = _aliases(model)
        reference = next((p for p in self._parameters.values() if p.is_floating_point()), None)
        if reference is None:
            raise ModelError(f"{type(model).__name__} has no floating-point parameters")
        self.device, self.dtype = reference.device, reference.dtype

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """The outputs at the given values of some parameters; the others keep their own."""
        state = {**self._buffers, **self._parameters, **parameters}
        state |= {alias: state[name] for alias, name in self._aliases.items()}
        args: tuple[Any, ...] = (inputs,)
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        elif isinstance(inputs, tuple | list):
            args = tuple(inputs)
        # with ties resolved by torch, a module registered twice would keep the swapped tensors
        outputs = torch.func.functional_call(self.model, state, args, kwargs, tie_weights=False)
        if not isinstance(outputs, Tensor):
            outputs = getattr(outputs, "logits", outputs)
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"{type(self.model).__name__} returned {type(outputs).__name__}; "
                "expected a tensor of outputs, or an object with `logits`"
            )
        return outputs


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every further name of a shared parameter or buffer -> its first name; each module once."""
    first: dict[int, str] = {}
    aliases = {}
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            full = f"{prefix}.{name}" if prefix else name
            known = first.setdefault(id(tensor), full)
            if known != full:
                aliases[full] = known
    return aliases
