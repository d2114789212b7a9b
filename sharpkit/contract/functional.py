"""A module at any values of its parameters: as a pure function, or with the values assigned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sharpkit.channels_last import channels_first
from sharpkit.contract.embeddings import PlainEmbeddings, renormalised
from sharpkit.contract.examples import Inputs
from sharpkit.contract.modules import call_module, full_name, own_tensors, read_outputs, unwrapped
from sharpkit.contract.normalisation import contiguous_gradients, norms
from sharpkit.contract.state import Attributes
from sharpkit.errors import ModelError

T = TypeVar("T")


@dataclass
class Habits:
    """What a forward pass of a model does besides computing outputs, as `examine` found it."""

    writes_inputs: bool = False  # it changes its inputs in place, so it gets copies
    needs_grad_mode: bool = False  # it differentiates, so it runs with gradients enabled
    looks_up: bool = False  # it looks embeddings up with options that `PlainEmbeddings` replaces
    # what it writes to its modules; put back before every call
    attributes: list[tuple[nn.Module, str]] = field(default_factory=list)
    remembered: Attributes | None = None  # their values
    # buffers that it changes in eval mode; put back before every call
    buffers: list[str] = field(default_factory=list)
    not_functional: str = ""  # why it cannot run at swapped weights; empty if it can
    loss_sees_weights: bool = False  # the loss depends on the weights also at fixed outputs


class FunctionalModel:
    """A model as a function (parameters, inputs) -> outputs that leaves the module alone.

    Complex parameters are given and differentiated as pairs of reals, of shape (..., 2).

    Args:
        model: Any module. Inputs given as a dict are passed as keywords, as a tuple by position.
            An output with a `logits` attribute (Hugging Face) stands for its logits.
        whole: Give outputs of any structure, for a loss that takes them (see `read_outputs`).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> f = FunctionalModel(model)
        >>> f({"weight": torch.ones(1, 2)}, torch.tensor([[1.0, 2.0]]))
        tensor([[3.]])
    """

    def __init__(self, model: nn.Module, *, whole: bool = False) -> None:
        self.model = unwrapped(model)
        self.whole = whole
        self.habits = Habits(looks_up=_looks_up(self.model))
        self._own = dict(self.model.named_parameters())
        self._own_buffers = dict(self.model.named_buffers())
        scaled = renormalised(self.model)
        # in a parameter's place: rows scaled to their `max_norm`, kernels with channels first
        self._replaced = {}
        for name, parameter in self._own.items():
            own = parameter.detach()
            value = channels_first(scaled.get(id(parameter), own))
            if value is not own:
                self._replaced[name] = value
        # copies, so that a module that counts its calls in a buffer counts on the copy
        self._buffers = _copies(self._own_buffers)
        self._complex = frozenset(n for n, p in self._own.items() if p.is_complex())
        self._first_buffers: dict[str, Tensor] = {}
        self._aliases = _aliases(self.model)
        self._runner = _Runner(self.model)
        self._norms = norms(self.model)
        reference = next(
            (p for p in self._own.values() if p.is_floating_point() or p.is_complex()), None
        )
        if reference is None:
            raise ModelError(f"{type(model).__name__} has no floating-point parameters")
        self.device, self.dtype = reference.device, reference.dtype.to_real()

    @property
    def names(self) -> list[str]:
        """The names of all parameters, shared ones once."""
        return list(self._own)

    @property
    def has_complex(self) -> bool:
        """Whether any parameter is complex."""
        return bool(self._complex)

    def real(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter, or its gradient, in the form in which it is measured."""
        return torch.view_as_real(tensor.resolve_conj()) if name in self._complex else tensor

    def native(self, name: str, tensor: Tensor) -> Tensor:
        """What `real` was given."""
        return torch.complex(tensor[..., 0], tensor[..., 1]) if name in self._complex else tensor

    def value(self, name: str) -> Tensor:
        """The value at which a parameter is measured, detached."""
        return self.real(name, self._replaced.get(name, self._own[name]).detach())

    def state(self) -> dict[str, Tensor]:
        """The values of all parameters and buffers, detached."""
        return {**{n: self.value(n) for n in self._own}, **self._own_buffers}

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """The outputs at the given values of some parameters; the others keep their own."""
        return self.within(parameters, lambda: self.outputs(inputs))

    def within(self, parameters: Mapping[str, Tensor], body: Callable[[], T]) -> T:
        """What `body` returns while the module holds the given values instead of its parameters.

        They stay in place until it returns, so a backward pass inside may run the forward pass
        again.
        """
        given = {name: self.native(name, p) for name, p in parameters.items()}
        rest = {name: p.detach() for name, p in {**self._own, **self._replaced}.items()}
        state = {**self._buffers, **rest, **given}
        state |= {alias: state[name] for alias, name in self._aliases.items()}
        # with ties resolved by torch, a module registered twice would keep the swapped tensors
        result: T = torch.func.functional_call(
            self._runner,
            {f"model.{name}": tensor for name, tensor in state.items()},
            (body,),
            tie_weights=False,
        )
        return result

    @contextmanager
    def assigned(self, parameters: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
        """Inside, the module's own parameters hold the given values, as leaves for autograd.

        This is what a loop by hand does, so it works for every module: parameters are assigned (as
        `.data`, without a copy) and put back afterwards, buffers are copies, or what is given by
        their names. Gives the module's tensors in the order given; complex ones are complex.
        """
        own = {n: self.native(n, p) for n, p in parameters.items() if n in self._own}
        parts = [(self._own[n], t) for n, t in {**self._replaced, **own}.items()]
        swapped = [(p, p.data, p.requires_grad) for p, _ in parts]
        buffers = [(b, b.data) for b in self._own_buffers.values()]
        try:
            for parameter, value in parts:
                parameter.data = value.detach() if value.requires_grad else value
            for name in own:
                self._own[name].requires_grad_(True)
            for name, buffer in self._own_buffers.items():
                buffer.data = parameters.get(name, self._buffers[name])
            yield [self._own[n] if n in own else self._own_buffers[n] for n in parameters]
        finally:
            for parameter, before, flag in swapped:
                parameter.data = before
                parameter.requires_grad_(flag)
            for buffer, before in buffers:
                buffer.data = before

    def outputs(self, inputs: Inputs) -> Any:
        """The outputs at whatever weights the module holds now."""
        habits = self.habits
        if habits.attributes and habits.remembered is not None:
            habits.remembered.restore(habits.attributes)
        for name in habits.buffers:
            with torch.no_grad():
                self._buffers[name].copy_(self._first_buffers[name])
        if habits.writes_inputs:
            inputs = pytree.tree_map(torch.clone, inputs)
        with ExitStack() as stack:
            if habits.looks_up:
                stack.enter_context(PlainEmbeddings())
            # of a batch of one
            if self._norms and any(len(t) == 1 for t in pytree.tree_leaves(inputs)[:1] if t.ndim):
                stack.enter_context(contiguous_gradients(self._norms))
            output = call_module(self.model, inputs)
        return read_outputs(self.model, output, whole=self.whole)

    def evaluating(self) -> AbstractContextManager[object]:
        """Without gradients, unless the model needs them to compute its outputs."""
        return torch.enable_grad() if self.habits.needs_grad_mode else torch.no_grad()

    def keep_buffers(self, names: list[str], first: Mapping[str, Tensor]) -> None:
        """From now on, start every forward pass with the given values of these buffers."""
        self.habits.buffers, self._first_buffers = names, dict(first)

    @torch.no_grad()
    def set_buffers(self, values: Mapping[str, Tensor]) -> None:
        """From now on, run with these values of some buffers; the module's own stay."""
        for name, value in values.items():
            self._buffers[name].copy_(value)
            if name in self._first_buffers:
                self._first_buffers[name] = value

    def reset_buffers(self) -> None:
        """Start again from the module's own buffers."""
        self._buffers = _copies(self._own_buffers)

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers as forward passes have left them."""
        return {name: b.clone() for name, b in self._buffers.items()}


class _Runner(nn.Module):
    """Runs anything while `functional_call` has swapped the weights of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, body: Callable[[], Any]) -> Any:
        return body()


def _looks_up(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and (module.padding_idx is not None or module.max_norm is not None or module.sparse)
        for module in model.modules()
    )


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every further name of a shared parameter or buffer -> its first name; each module once."""
    first: dict[int, str] = {}
    aliases = {}
    for prefix, module in model.named_modules():
        for key, tensor in own_tensors(module):
            full = full_name(prefix, key)
            known = first.setdefault(id(tensor), full)
            if known != full:
                aliases[full] = known
    return aliases


@torch.no_grad()
def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, by one call for all of a kind: on a GPU a call takes longer than its work."""
    copies = {name: torch.empty_like(channels_first(t)) for name, t in tensors.items()}
    if copies:
        torch._foreach_copy_(list(copies.values()), list(tensors.values()))
    return copies
