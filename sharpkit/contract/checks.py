"""The contract between a model, a loss and data, checked before anything is measured.

Outputs have a row per example, examples do not influence each other, the same call gives the same
outputs, the loss is a mean over examples or comes with its weights, and it fits outputs and labels.
What a forward pass does besides is found out here as well, so that the passes that follow can put
it back (see `Habits`). It looks at a few examples with labels as different as there are.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sharpkit.contract.embeddings import PlainEmbeddings
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.half_precision import HalfResults
from sharpkit.contract.losses import MeanLoss, check_is_mean, check_labels
from sharpkit.contract.modules import call_module
from sharpkit.contract.parameters import some
from sharpkit.contract.precision import may_use_tf32
from sharpkit.contract.state import Found, differing
from sharpkit.errors import DataError, ModelError, SharpkitError, first_sentence

_PROBED, _PROBED_LOSS = 4, 32  # examples; more for a loss whose form is not known
# relative to the largest output: what different batch sizes may change by rounding
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
_HALF = 0.1  # of half precision, and of TF32
_LARGE = 2**25  # bytes of outputs, above which fewer examples are looked at


@dataclass(frozen=True)
class Probe:
    """A few examples and the outputs that the model had for them when it was examined."""

    function: FunctionalModel
    loss: MeanLoss
    examples: Examples
    outputs: Any

    def try_swapping(self) -> str:
        """Why the model cannot run at swapped weights as it does at those assigned; noted, too.

        To be called before function transforms are used; empty if all is well.
        """
        function, few = self.function, self.examples
        moved = _moved(function)

        def both() -> tuple[Any, Tensor]:
            with function.evaluating():
                out = function.outputs(few.inputs)
                return out, self.loss(out, few.labels)

        with function.assigned(moved), torch.no_grad():
            assigned = both()
        try:
            swapped = function.within(moved, both)
        except Exception as error:
            function.habits.not_functional = first_sentence(error)
        else:
            if not close(assigned, swapped):
                function.habits.not_functional = (
                    "the model or the loss reaches weights by references of its own (a list, a "
                    "closure)"
                )
        return function.habits.not_functional

    def at_most(self, k: int) -> int:
        """How many examples to look at, k or fewer: outputs of a large vocabulary fill memory."""
        return _affordable(self.outputs, k)

    def confirm(self) -> None:
        """Raise ModelError if the model gives other outputs now than it did at first."""
        if not close(self.outputs, _evaluate(self.function, self.examples)):
            raise ModelError(
                "the model gives other outputs after the measurement than before: its forward "
                "pass keeps state that cannot be put back"
            )


def examine(function: FunctionalModel, loss: MeanLoss, examples: Examples, found: Found) -> Probe:
    """Raise unless model, loss and data can be measured; note the model's habits.

    The model must be inside `frozen`, which gave `found`; confirm the probe when all is measured.

    Raises:
        DataError: For labels that do not fit the outputs.
        ModelError: For a model that does not take the inputs, is random, lets examples influence
            each other or rewrites its weights, or for a loss that is not a mean over examples.
    """
    probe = _probe(function, examples, _PROBED if loss.exact else _PROBED_LOSS)
    _choose_eval(function, probe, found)
    outputs = _first_pass(function, probe, found)
    check_rows(function.model, outputs, len(probe))
    probe, outputs = _fewer(probe, outputs)
    for part in examples.chunks(len(examples)):
        alike = part.labels.shape[1:] == probe.labels.shape[1:]
        one = part.slice(0, 1).to(function.device, function.dtype)
        check_labels(part.labels, outputs if alike else _evaluate(function, one), loss.given)
    loss.check(outputs, probe.labels)
    _check_shifted(loss, probe, outputs)
    _check_independent(function, probe, outputs)
    changed = found.changed_parameters()
    if changed:
        raise ModelError(
            f"the forward pass writes to the weights themselves ({some(changed)}): the loss at "
            "given weights has no meaning; write the new values to a local variable instead"
        )
    if not loss.exact:
        check_is_mean(loss, outputs, probe.labels)
    few = probe.slice(0, 2)
    first = _rows(outputs, torch.arange(len(few)))
    function.habits.loss_sees_weights = _sees_weights(function, loss, few, first)
    return Probe(function, loss, few, first)


def close(a: Any, b: Any) -> bool:
    """Whether outputs agree up to rounding; what is not finite is reported elsewhere."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    tensors = [(x, y) for x, y in pairs if isinstance(x, Tensor)]
    if any(x.shape != y.shape for x, y in tensors):
        return False
    flags = [_close(x, y) for x, y in tensors if x.numel()]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def _close(a: Tensor, b: Tensor) -> Tensor:
    if not (a.is_floating_point() or a.is_complex()):
        return (a == b).all()
    tolerance = _TOLERANCES.get(a.dtype.to_real(), _HALF)
    if a.dtype.to_real() == torch.float32 and may_use_tf32(a.device):
        tolerance = _HALF
    near = (a - b).abs().amax() <= tolerance * a.abs().amax().clamp(min=1e-30)
    return near | ~(torch.isfinite(a).all() & torch.isfinite(b).all())


def _probe(function: FunctionalModel, examples: Examples, count: int) -> Examples:
    """A few examples of one shape, with labels as different as there are."""
    parts = examples.diverse(count).chunks(count)
    return max(parts, key=len).to(function.device, function.dtype)


def _check_shifted(loss: MeanLoss, probe: Examples, outputs: Any) -> None:
    """Raise DataError if each position is to give its own token: labels were left where they stand.

    Losses inside language models shift the labels by one; here output t is compared with label t.
    """
    labels = probe.labels
    if not loss.exact or labels.ndim < 2 or labels.is_floating_point():
        return
    counted, inputs = labels >= 0, probe.inputs
    if isinstance(inputs, Mapping):  # a decoder may repeat what its encoder reads
        inputs = inputs.get("decoder_input_ids", inputs)
    for tokens in pytree.tree_leaves(inputs):
        whole = not (tokens.is_floating_point() or tokens.is_complex())
        if not whole or tokens.shape != labels.shape or not bool(counted.any()):
            continue
        several = bool((labels[counted] != labels[counted][0]).any())
        if several and bool((tokens == labels)[counted].all()):
            raise DataError(
                "the labels are the input tokens, position by position, and output t is compared "
                "with label t: shift them, so that label t is token t + 1 "
                "(torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)); if a "
                "network is to repeat its input, give the loss as a callable"
            )


def _affordable(outputs: Any, k: int) -> int:
    each = sum(t.nbytes // max(len(t), 1) for t in _tensors(outputs))
    return min(k, max(1, _LARGE // max(each, 1)))


def _fewer(probe: Examples, outputs: Any) -> tuple[Examples, Any]:
    """Three of the examples, as different as these are, if all take much memory."""
    n = len(probe)
    if n <= 3 or _affordable(outputs, n) == n:
        return probe, outputs
    kept = torch.tensor([0, n // 2, n - 1])
    return probe.select(kept), _rows(outputs, kept)


def _rows(outputs: Any, indices: Tensor) -> Any:
    """Copies of some rows: a view would hold them all."""
    return pytree.tree_map(
        lambda t: t[indices.to(t.device)] if isinstance(t, Tensor) else t, outputs
    )


def _evaluate(function: FunctionalModel, examples: Examples) -> Any:
    with function.evaluating(), function.assigned({}):
        outputs = function.outputs(examples.inputs)
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, outputs)


def _choose_eval(function: FunctionalModel, probe: Examples, found: Found) -> None:
    """Call an overridden `train(False)` if it changes outputs, and not only how they are made.

    Merging adapters or caching biases would hide weights; switching noise off must not be missed.
    """
    modules = list(function.model.modules())
    overridden = [m for m in modules if type(m).train is not nn.Module.train]
    overridden += [m for m in modules if type(m).eval is not nn.Module.eval]
    if not overridden or not found.was_training:
        return
    few = probe.slice(0, 2)
    with torch.enable_grad(), function.assigned({}):
        flags_only = call_module(function.model, _copied(few.inputs))
        found.attributes.restore()
        function.model.eval()
        found.entered_eval = True
        called = call_module(function.model, _copied(few.inputs))
    tensors = [
        [t for t in pytree.tree_leaves(o) if isinstance(t, Tensor)] for o in (flags_only, called)
    ]
    if len(tensors[0]) == len(tensors[1]) and close(*tensors):
        found.restore()
        found.entered_eval = False
        for module in modules:
            module.training = False


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _copied(inputs: Any) -> Any:
    return pytree.tree_map(torch.clone, inputs)


def _first_pass(function: FunctionalModel, probe: Examples, found: Found) -> Any:
    """The outputs of the first forward pass, watching what else it does."""
    habits, buffers = function.habits, function.buffers()
    inputs = _copied(probe.inputs)
    watch, halves = PlainEmbeddings(), HalfResults()
    try:
        with torch.no_grad(), halves, watch, function.assigned({}):
            outputs = function.outputs(inputs)
    except SharpkitError:
        raise
    except Exception as error:
        habits.needs_grad_mode = True
        try:
            with torch.enable_grad(), halves, watch, function.assigned({}):
                outputs = function.outputs(inputs)
        except Exception:
            shapes = [(tuple(t.shape), str(t.dtype)) for t in pytree.tree_leaves(probe.inputs)]
            raise ModelError(
                f"{type(function.model).__name__} does not take the inputs, (shape, dtype) "
                f"{shapes}: {first_sentence(error)}"
            ) from error
    habits.looks_up |= watch.replaced
    halves.warn(type(function.model).__name__)
    leaves = zip(pytree.tree_leaves(inputs), pytree.tree_leaves(probe.inputs), strict=True)
    habits.writes_inputs = bool(differing(list(leaves)))
    habits.attributes, habits.remembered = found.attributes.changed(), found.attributes
    after = function.buffers()
    names = list(buffers)
    written = [names[i] for i in differing([(buffers[name], after[name]) for name in names])]
    if written:
        function.keep_buffers(written, buffers)
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, outputs)


def check_rows(model: nn.Module, outputs: Any, n: int) -> None:
    """Raise ModelError unless every tensor of the outputs has a row for each of n examples."""
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != n):
            raise ModelError(
                f"{type(model).__name__} returned outputs of shape {tuple(leaf.shape)} for {n} "
                "examples: expected one row of outputs per example"
            )


def _check_independent(function: FunctionalModel, probe: Examples, outputs: Any) -> None:
    """Raise if outputs differ from call to call, or depend on the batch that an example is in."""
    k = len(probe)
    cuts = sorted({0, min(1, k), k // 3, k})
    try:
        parts = [_evaluate(function, probe.slice(a, b)) for a, b in itertools.pairwise(cuts)]
    except SharpkitError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model cannot evaluate a single example, or some of them: {first_sentence(error)}"
        ) from error
    leaves = zip(*(pytree.tree_leaves(part) for part in parts), strict=True)
    together = [torch.cat(list(column)) for column in leaves if isinstance(column[0], Tensor)]
    if close(_tensors(outputs), together):
        return
    if not close(*(_evaluate(function, probe) for _ in range(2))):
        raise ModelError(
            "the model is random: two passes over the same examples differ (dropout that ignores "
            "eval mode, or F.dropout without training=self.training?)"
        )
    raise ModelError(
        "the outputs of an example depend on the others in its batch (BatchNorm without running "
        "statistics?), so groups of examples have no loss of their own"
    )


def _sees_weights(function: FunctionalModel, loss: MeanLoss, few: Examples, outputs: Any) -> bool:
    """Whether a loss gives something else at other weights, for the same outputs."""
    if loss.exact:
        return False
    found = loss(outputs, few.labels).detach()
    with function.assigned(_moved(function)), torch.no_grad():
        elsewhere = loss(outputs, few.labels)
    rounding = 100 * torch.finfo(found.dtype).eps
    return not torch.allclose(found, elsewhere, rounding, 0.0, equal_nan=True)


def _moved(function: FunctionalModel) -> dict[str, Tensor]:
    """Other values of all weights, of their own size and without a pattern in common."""
    weights = {name: function.value(name) for name in function.names}
    return {
        name: w + 0.1 * w.flatten().roll(1).view_as(w) + 0.01
        for name, w in weights.items()
        if w.is_floating_point()
    }


def warn_of_unused(names: Sequence[str], weights: Mapping[str, Tensor]) -> None:
    """Warn of parameters that the loss does not depend on.

    Raises:
        ModelError: If it depends on none.
    """
    if names and len(names) == len(weights):
        raise ModelError(
            f"the loss does not depend on any selected parameter ({some(names)}): a forward pass "
            "under no_grad, a detach, or merged adapters?"
        )
    if names:
        warnings.warn(
            f"the loss does not depend on {some(names)} (of a few examples tried)", stacklevel=4
        )


def reason(error: BaseException, model: nn.Module) -> str:
    """Which layer or operation failed, and how, as part of a sentence.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 2))
        >>> try:
        ...     layer(torch.zeros(3))
        ... except RuntimeError as error:
        ...     print(reason(error, layer)[:23])
        '0' (Linear) failed: ma...
    """
    names = {id(module): name for name, module in model.named_modules()}
    innermost: nn.Module | None = None
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names and names[id(owner)]:
            innermost = owner
        trace = trace.tb_next
    if innermost is None:
        return first_sentence(error)
    return f"{names[id(innermost)]!r} ({type(innermost).__name__}) failed: {first_sentence(error)}"
