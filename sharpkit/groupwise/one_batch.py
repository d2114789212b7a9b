"""All groups as one ordinary batch: the model runs once, its layers know whose examples are whose.

No function transform is needed: the model sees a batch of the examples of all groups, and holds
NaN in place of its weights. Every call that takes one of those is recognised and runs at the
weights of each example's group. A call that is not recognised gives NaN, never a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sharpkit.groupwise import example_rules, windows
from sharpkit.groupwise.geometry import Factors, Tensors
from sharpkit.groupwise.group_layers import (
    GroupConvolution,
    GroupLinear,
    GroupProbe,
    convolution,
    linear,
)
from sharpkit.groupwise.layer_calls import LayerCall, recognise

# by table, the shapes of indices that are the same for all examples
Positions: TypeAlias = Mapping[str, frozenset[torch.Size]]


@dataclass
class Point:
    """Where every group is evaluated, and what is differentiated there."""

    groups: int  # their number
    size: int  # examples of each
    values: Tensors  # what layers run at: (*shape), or (groups, *shape) where groups differ
    # further perturbations DᵀA of weights of linear layers and convolutions, and of tables
    thin: Factors = field(default_factory=dict)
    # what gets the gradient: (groups, *shape) for one per group, (*shape) for the sum; empty if
    # none is wanted
    targets: Tensors = field(default_factory=dict)
    # the value as a function of the target, where it is not the target itself
    moved: Callable[[str], Tensor] | None = None
    probed: frozenset[str] = frozenset()  # weights whose gradient is wanted as factors
    # values by example that were made once, by name and form
    of_examples: dict[tuple[str, str], Tensor] = field(default_factory=dict)


class OneBatch(TorchFunctionMode):
    """Inside, calls that take a held tensor run at the point's values.

    Held tensors are recognised by identity, and so are parts of them; `kept` are buffers repeated
    for every example, kept between passes over as many examples. `positions` are the shapes of
    indices, by table, that are the same for all examples; None to find them out.
    """

    def __init__(
        self,
        held: Mapping[str, Tensor],
        point: Point,
        kept: dict[Any, Tensor] | None = None,
        positions: Positions | None = None,
    ) -> None:
        super().__init__()
        self.point, self.kept = point, {} if kept is None else kept
        self.known, self.positions = positions, dict[str, frozenset[torch.Size]]()
        self.elsewhere: set[str] = set()  # names that a call took which was not recognised
        # names that a call took which has no rows: their gradient is no product of factors
        self.whole: set[str] = set()
        self.decides = False  # whether Python looked at values, maybe for all groups at once
        self.calls = 0  # of functions
        self.recurs = False  # whether a recurrent layer was called
        # the rows A of every call of a probed weight, (groups, rows, in), and tensors whose
        # gradients are those at the outputs of these calls
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in point.probed}
        self.probes: dict[str, list[Tensor]] = {name: [] for name in point.probed}
        self.rows: dict[str, int] = {}  # per example, of all layers of a weight
        self.looked_up: dict[str, int] = {}  # rows per example, of all uses of a table
        self._names = {id(t): name for name, t in held.items()}
        self._shapes = {name: t.shape for name, t in held.items()}
        # parts of held tensors: what the model has in their place, and their values
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}
        self._of_parts: dict[tuple[str, str], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, at the groups' own weights where it takes one."""
        kwargs = kwargs or {}
        self.calls += func not in example_rules.QUESTIONS
        self.decides |= func in example_rules.DECISIONS
        used = {self._names[id(a)] for a in (*args, *kwargs.values()) if id(a) in self._names}
        if not used:
            if func in example_rules.POOLINGS:
                return example_rules.max_pool(func, args, kwargs)
            if func in example_rules.GROUP_NORMALISING:  # without weights it mixes groups as well
                out = example_rules.GROUP_NORMALISING[func](self, func, args, kwargs)
                return func(*args, **kwargs) if out is None else out
            used = self._listed((*args, *kwargs.values()))
            if not used:
                return func(*args, **kwargs)
        call = recognise(func, args, kwargs)
        if call is not None and self.holds_examples(call.inputs) and not used & self._parts.keys():
            return self.layer(call)
        rule = None if call is not None else example_rules.RULES.get(func)
        counted = {name: self._counted(name) for name in used}
        out = None if rule is None else rule(self, func, args, kwargs)
        if out is not None:
            self.whole |= {name for name in used if self._counted(name) == counted[name]}
            return out
        if func not in example_rules.QUESTIONS:
            self.elsewhere |= used
        return func(*args, **kwargs)

    def _listed(self, args: tuple[Any, ...]) -> set[str]:
        """Names of held tensors in lists among the arguments."""
        lists = [a for a in args if isinstance(a, list | tuple | dict) and not _is_sizes(a)]
        if not lists:  # of most calls, of which a pass has hundreds
            return set()
        leaves = {self._names.get(id(leaf)) for leaf in pytree.tree_leaves(lists)}
        return {name for name in leaves if name is not None}

    def _counted(self, name: str) -> tuple[int, int]:
        return self.rows.get(name, 0), self.looked_up.get(name, 0)

    def held_ndim(self, name: str) -> int:
        """Axes of a held tensor."""
        return len(self._shapes[name])

    @property
    def examples(self) -> int:
        """Of all groups."""
        return self.point.groups * self.point.size

    def holds_examples(self, x: Any) -> bool:
        """Whether the first axis of a tensor is that of the examples."""
        return isinstance(x, Tensor) and x.ndim > 1 and len(x) == self.examples

    def name_of(self, tensor: Any) -> str | None:
        """The name of a held tensor."""
        return self._names.get(id(tensor))

    def part(self, of: Tensor, held: Tensor, value: Tensor) -> Tensor | None:
        """Hold a part of a held tensor, of NaN, whose value is shared or has an axis of groups.

        None for a part of what is in factors.
        """
        whole = self._names[id(of)]
        if whole in self.point.probed or whole in self.point.thin:
            return None
        name, held = f"{whole}, part {len(self._parts)}", held.detach()
        self._parts[name] = held, value
        self._names[id(held)], self._shapes[name] = name, held.shape
        return held

    def is_part(self, tensor: Tensor) -> bool:
        """Whether it is a part of a held tensor."""
        return self._names.get(id(tensor)) in self._parts

    def of_groups(self, tensor: Tensor) -> Tensor:
        """A held tensor's value, shared or with an axis of groups, in the graph of its target."""
        name, point = self._names[id(tensor)], self.point
        if name in self._parts:
            return self._parts[name][1]
        if not (torch.is_grad_enabled() and name in point.targets):
            return point.values[name]
        return point.targets[name] if point.moved is None else point.moved(name)

    def of_examples(self, tensor: Tensor) -> Tensor:
        """A held tensor's value for every example, (n, *shape), in the graph of its target."""
        name, point = self._names[id(tensor)], self.point
        made, key = self._made(name), (name, "rows")
        if key not in made:
            shape, value = self._shapes[name], self.of_groups(tensor)
            if value.ndim == len(shape):
                value = value.expand(self.examples, *shape)
            elif point.size > 1:
                value = value.unsqueeze(1).expand(point.groups, point.size, *shape)
                value = value.reshape(-1, *shape)
            made[key] = value
        return made[key]

    def flat_of_examples(self, tensor: Tensor) -> Tensor:
        """The same in one row, (n · shape,)."""
        name = self._names[id(tensor)]
        made, key = self._made(name), (name, "flat")
        if key not in made:
            made[key] = self.of_examples(tensor).flatten()
        return made[key]

    def _made(self, name: str) -> dict[tuple[str, str], Tensor]:
        """Values by example: those of parts are of this pass alone."""
        return self._of_parts if name in self._parts else self.point.of_examples

    def layer(self, call: LayerCall) -> Tensor:
        """The output of a layer, at the groups' own values of the held tensors that it takes."""
        name, bias_name = self.name_of(call.weight), self.name_of(call.bias)
        weight = call.weight if name is None else self.point.values[name]
        bias = call.bias if bias_name is None else self.point.values[bias_name]
        if torch.is_autocast_enabled(weight.device.type):  # which functions of autograd evade
            call = replace(call, inputs=_autocast(call.inputs))
            weight, bias = _autocast(weight), None if bias is None else _autocast(bias)
        if name is not None:
            self.rows[name] = self.rows.get(name, 0) + windows.rows_per_example(call)
        if torch.is_grad_enabled() and self.point.targets:
            out = self._differentiated(call, name, weight, bias_name, bias)
        elif call.geometry is None:
            out = linear(call.inputs, weight, bias)
        else:
            out = convolution(call.inputs, weight, bias, call.geometry)
        if name is not None and name in self.point.thin:
            # what the perturbation DᵀA adds to the output: (x Aᵀ) D, row by row
            a, d = self.point.thin[name]
            extra = (windows.rows_of(call, self.point.groups) @ a.mT) @ d
            out = out + windows.as_output(extra, call, out)
        return out

    def _differentiated(
        self,
        call: LayerCall,
        name: str | None,
        weight: Tensor,
        bias_name: str | None,
        bias: Tensor | None,
    ) -> Tensor:
        point = self.point
        bias_target = bias if bias_name is None else point.targets.get(bias_name, bias)
        operands: tuple[Any, ...] = (_constant(weight), bias_target, _constant(bias), point.groups)
        result: Tensor
        if name in point.probed:
            assert name is not None
            self.inputs[name].append(windows.rows_of(call, point.groups).detach())
            probe = windows.probe(call, weight)
            self.probes[name].append(probe)
            result = GroupProbe.apply(  # type: ignore[no-untyped-call]
                call.inputs, probe, *operands, call.geometry
            )
            return result
        target = weight if name is None else point.targets.get(name, weight)
        if call.geometry is None:
            result = GroupLinear.apply(call.inputs, target, *operands)  # type: ignore[no-untyped-call]
        else:
            result = GroupConvolution.apply(  # type: ignore[no-untyped-call]
                call.inputs, target, *operands, call.geometry
            )
        return result


def _is_sizes(listed: Any) -> bool:
    """Whether these are numbers, such as axes or the size of a kernel."""
    return isinstance(listed, tuple) and all(type(entry) is int for entry in listed)


def _autocast(tensor: Tensor) -> Tensor:
    """In autocast's dtype, except for float64, which it leaves alone."""
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _constant(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor
