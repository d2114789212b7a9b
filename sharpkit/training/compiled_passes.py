"""Both passes over a chunk of m-SAM as compiled code: `compile=True`.

A chunk is traced once per form, from the weights to the gradient, and compiled. What changes from
step to step is an argument of the code: weights, radii, examples, a scaler's factor; what the model
takes besides (buffers, frozen parameters) is looked up by name at every call. What cannot be
traced rightly is not compiled: random numbers, hooks, attributes that a forward pass writes. The
first chunk of every form is computed both ways, and must agree.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sharpkit.compiling import Code, Traced, compiled, failure, form_of, tensors_of, trace
from sharpkit.contract.examples import Examples, Inputs
from sharpkit.groupwise.geometry import Tensors
from sharpkit.training.group_passes import AsOneBatch, ChunkGradient, StepTask
from sharpkit.training.noise import Noise
from sharpkit.training.python_state import contents, hooked_modules, python_state
from sharpkit.training.radius import Radii
from sharpkit.training.step_plan import StepPlan, agreement, differ, same

# of a model: a chunk, a smaller last one, both again for the last batch of an epoch, and as many
# once more; inputs of ever new shapes would be compiled for longer than they are used
_MOST_FORMS = 8


@dataclass
class _Record:
    """What is known of a model over all its plans."""

    forms: int = 0  # that were compiled
    told: set[str] = field(default_factory=set)  # reasons why not, each warned of once


_RECORDS: WeakKeyDictionary[nn.Module, _Record] = WeakKeyDictionary()


class _NotCompiled(Exception):
    """Why passes are not compiled."""


class _Form(NamedTuple):
    """Compiled passes over chunks of one form."""

    code: Code
    names: list[str | None]  # of the model's tensors that it takes; None for others


class AsCompiled:
    """`AsOneBatch` by compiled code where that works, and as it is elsewhere."""

    def __init__(self, task: StepTask, plan: StepPlan) -> None:
        self.task, self.plan = task, plan
        self._radii = list(dict.fromkeys(task.radii.rho.values()))
        self._which = {name: self._radii.index(rho) for name, rho in task.radii.rho.items()}
        self._state = python_state(task.model.model, task.loss.formula.terms)
        self._plain: AsOneBatch | None = None

    def __call__(self, examples: Examples, groups: int) -> ChunkGradient:
        """As `Passes`."""
        if self.plan.not_compiled:
            return self._as_it_is(examples, groups)
        args = self._arguments(examples)
        key = (groups, tuple(self._which.items()), self.plan.careful, self._state, form_of(args))
        known: _Form | None = self.plan.code.get(key)
        if known is not None:
            return self._run(known, args, len(examples))
        if _record_of(self.task).forms == _MOST_FORMS:
            tell(self.task, f"code was made for {_MOST_FORMS} forms of chunks already")
            return self._as_it_is(examples, groups)
        before = self.task.model.buffers()
        expected = self._as_it_is(examples, groups)
        if not _is_finite(expected):  # nothing that code could be compared with
            return expected
        after = self.task.model.buffers()
        self.task.model.set_buffers(before)
        try:
            form, found = self._made(args, groups, expected)
        except _NotCompiled as reason:
            self.task.model.set_buffers(after)
            leave_uncompiled(self.task, self.plan, str(reason))
            return expected
        self.plan.code[key] = form
        return found  # of the code, as in a training that began before

    def _as_it_is(self, examples: Examples, groups: int) -> ChunkGradient:
        if self._plain is None:
            self._plain = AsOneBatch(self.task, self.plan)
        return self._plain(examples, groups)

    def _arguments(self, examples: Examples) -> tuple[Any, ...]:
        """Of the traced function: all that may change while the form stays the same."""
        model, n = self.task.model, len(self.task.examples)
        radii = [
            torch.full((), float(rho), dtype=model.dtype, device=model.device)
            for rho in self._radii
        ]
        one = torch.ones((), dtype=torch.float64, device=model.device)
        factor = self.task.scale(one) * (len(examples) / n)
        return self.task.shared, radii, factor, examples.inputs, examples.labels

    def _run(self, form: _Form, args: tuple[Any, ...], count: int) -> ChunkGradient:
        model = self.task.model
        with model.assigned({}):  # buffers are the copies of this step, which it may write to
            taken = [
                tensor if name is None else _tensor(model.model, name)
                for name, tensor in zip(form.names, form.code.taken, strict=True)
            ]
            found = ChunkGradient(*form.code(args, taken))
        return found._replace(after=found.after * (count / len(self.task.examples)))

    def _made(
        self, args: tuple[Any, ...], groups: int, expected: ChunkGradient
    ) -> tuple[_Form, ChunkGradient]:
        """The passes compiled, and what they give for a chunk.

        Raises:
            _NotCompiled: With the reason, also where they give something else than expected.
        """
        task, model = self.task, self.task.model
        _refuse_side_effects(task, self.plan)
        before = model.buffers()
        try:
            traced = _traced(task, _passes(task, self.plan, groups, self._which), args)
            names = _names(task, traced.taken, args)
            model.set_buffers(before)
            _record_of(task).forms += 1
            with model.assigned({}):
                form = _Form(compiled(traced, args), names)
            model.set_buffers(before)
            found = self._run(form, args, len(args[-1]))
        except _NotCompiled:
            raise
        except Exception as error:
            raise _NotCompiled(f"that failed: {failure(error)}") from error
        if _disagree(task, expected, found):
            raise _NotCompiled("it gave other numbers then")
        return form, found


def leave_uncompiled(task: StepTask, plan: StepPlan, reason: str) -> None:
    """Compile nothing of a plan from now on, and tell why."""
    plan.not_compiled = reason
    plan.code.clear()
    tell(task, reason)


def tell(task: StepTask, reason: str) -> None:
    """Say that passes run without being compiled.

    Warns:
        UserWarning: Once for a model and a reason.
    """
    told = _record_of(task).told
    if reason not in told:
        told.add(reason)
        warnings.warn(
            f"compile=True: m-SAM of {type(task.model.model).__name__} runs without being "
            f"compiled, because {reason}",
            stacklevel=5,
        )


def _record_of(task: StepTask) -> _Record:
    return _RECORDS.setdefault(task.model.model, _Record())


def _passes(
    task: StepTask, plan: StepPlan, groups: int, which: dict[str, int]
) -> Callable[..., tuple[Any, ...]]:
    """Both passes over a chunk as a function; what the chunk counts in its batch is a factor."""

    def function(
        weights: Tensors, radii: Sequence[Tensor], factor: Tensor, inputs: Inputs, labels: Tensor
    ) -> tuple[Any, ...]:
        own = {name: radii[i] for name, i in which.items()}
        part = replace(
            task, shared=weights, radii=Radii(own, task.radii.adaptive),
            examples=Examples(inputs, labels), scale=lambda loss: loss * factor,
        )  # fmt: skip
        return tuple(AsOneBatch(part, plan)(part.examples, groups))

    return function


def _refuse_side_effects(task: StepTask, plan: StepPlan) -> None:
    """Raise where a forward pass does what code would leave out."""
    hooked = hooked_modules(task.model.model, task.recorder.layers.values())
    if hooked:
        raise _NotCompiled(f"of the hooks of {hooked[0]!r}, which code would leave out")
    if plan.writes:
        _refuse_write(*plan.writes[0])


def _refuse_write(module: nn.Module, name: str) -> None:
    raise _NotCompiled(f"a forward pass changes {name!r} of a {type(module).__name__}")


def _traced(task: StepTask, function: Callable[..., Any], args: tuple[Any, ...]) -> Traced:
    """What a function does, unless it is more than code does or other for other values.

    Random states stay as they are.
    """
    module = task.model.model
    states, before = _RandomStates(task.model.device), contents(module)
    try:
        traced = trace(function, args)
    finally:
        drawn = states.put_back()
    after = contents(module)
    for (path, name), held in after.items():
        if before.get((path, name), held) != held:
            _refuse_write(module.get_submodule(path), name)
    nodes = list(traced.graph.graph.nodes)
    if drawn or any(map(_draws, nodes)):
        raise _NotCompiled("it draws random numbers, such as those of dropout")
    if any(map(_selects, nodes)):
        raise _NotCompiled("shapes depend on values")
    return traced


def _draws(node: fx.Node) -> bool:
    """Whether an operation draws; those of attention may, and then the random state tells."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return seeded and "attention" not in str(node.target)


def _selects(node: fx.Node) -> bool:
    """Whether the shape of what an operation gives depends on values; of an index, if a mask's."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    masks = (torch.bool, torch.uint8)
    by_index = node.target is torch.ops.aten.index.Tensor
    return not by_index or any(part.meta["val"].dtype in masks for part in node.all_input_nodes[1:])


class _RandomStates:
    """The states of torch, Python and NumPy that all share, as they are when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._torch, self._python = device, Noise(device), random.getstate()
        # what has not been imported has drawn nothing
        self._numpy: Any = sys.modules["numpy"].random if "numpy" in sys.modules else None
        self._of_numpy = None if self._numpy is None else self._numpy.get_state(legacy=False)

    def put_back(self) -> bool:
        """Put them back; whether one had changed."""
        changed = not self._torch.same_as(Noise(self._device))
        changed |= random.getstate() != self._python
        self._torch.replay()
        random.setstate(self._python)
        if self._numpy is not None:
            changed |= str(self._numpy.get_state(legacy=False)) != str(self._of_numpy)
            self._numpy.set_state(self._of_numpy)
        return changed


def _names(task: StepTask, taken: Sequence[Tensor], args: tuple[Any, ...]) -> list[str | None]:
    """The names that tensors have in the model; None for what is none of its.

    Raises:
        _NotCompiled: If one is a weight, or lies in the memory of another tensor that changes.
    """
    module = task.model.model
    own = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
    names = [own.get(id(tensor)) for tensor in taken]
    with task.model.assigned({}):
        places = {_place(t) for t in (*module.parameters(), *module.buffers(), *tensors_of(args))}
    hidden = [
        t for name, t in zip(names, taken, strict=True)
        if name is None and t.numel() and _place(t) in places
    ]  # fmt: skip
    if hidden or any(name in task.shared for name in names):
        raise _NotCompiled("it uses a parameter or buffer otherwise than as such")
    return names


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer."""
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    found = owner._parameters[key] if key in owner._parameters else owner._buffers[key]
    assert found is not None
    return found


def _is_finite(found: ChunkGradient) -> bool:
    parts = [found.loss.sum(), found.after, *(g.sum() for g in found.gradient if g is not None)]
    return bool(torch.stack([part.double() for part in parts]).isfinite().all())


def _disagree(task: StepTask, expected: ChunkGradient, found: ChunkGradient) -> bool:
    """Whether two results differ by more than rounding."""
    unused = [[g is None for g in each.gradient] for each in (expected, found)]
    if unused[0] != unused[1] or differ(task, list(expected.gradient), list(found.gradient)):
        return True
    others = [
        pytree.tree_leaves((e.loss, e.weight, e.after, e.statistics, e.doubtful.double()))
        for e in (expected, found)
    ]
    return not all(same(b, a, agreement(task)) for a, b in zip(*others, strict=True))
