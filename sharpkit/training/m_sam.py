"""The gradient of the m-SAM objective, for any group size m, without a loop over groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.half_precision import refuse_half
from sharpkit.contract.losses import Loss, resolve_loss
from sharpkit.contract.modules import unwrapped
from sharpkit.errors import ArgumentError, DataError, DivergedError
from sharpkit.groupwise.fallback import Engine
from sharpkit.training.batch_norm_statistics import Recorder, tracked_layers
from sharpkit.training.group_passes import StepTask
from sharpkit.training.group_step import run
from sharpkit.training.parallel import averaged_over_ranks, on_any_rank
from sharpkit.training.radius import Radii, checked_radius
from sharpkit.training.variants import PLAIN_SAM, SamVariant, check_variant


def m_sam_gradient(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    *,
    m: int,
    rho: float = 0.05,
    loss: Loss = "cross_entropy",
    adaptive: bool = False,
    engine: Engine = "auto",
    scaler: torch.amp.GradScaler | None = None,
    variant: SamVariant = PLAIN_SAM,
    compile: bool = False,
) -> Tensor:
    """Add the m-SAM gradient of a batch to `.grad`, so that any torch optimizer can step.

    The batch is split in order into groups S_i of m examples (the last one may be smaller; groups
    count by their size). Each group has its own perturbation, and the gradient is

        Σ_i (|S_i| / n) ∇L_{S_i}(w + ε_i),   ε_i = ρ ∇L_{S_i}(w) / ‖∇L_{S_i}(w)‖₂,

    with ε_i held constant; it is 0 where the group's gradient is exactly 0. All groups are
    evaluated together, in chunks that fit the cache or the GPU (groups that fill the device by
    themselves are taken one by one); the answer does not depend on the chunk. The cost is about 2
    plain gradients at m = n and between 2.5 and 4.5 at m = 1.

    The model is used in the mode it is in. Both passes of a group draw the same random numbers, so
    they share their dropout masks (as in the authors' implementation); groups have masks of their
    own. BatchNorm in training normalises a group by the group's own statistics, in both passes,
    and its running statistics move once, by the size-weighted mean of the groups' statistics at w.
    Put BatchNorm in eval mode to train with stored statistics, which works at m = 1 too. Buffers
    that a module of another kind updates by itself are left alone.

    Args:
        model: Any module. With DistributedDataParallel the groups are formed per rank and the
            gradients averaged over ranks, as it does for plain gradients.
        inputs: Tensor of shape (n, ...), or a dict or tuple of such.
        labels: Tensor of shape (n, ...).
        m: Examples per group; n or more for a single group, which is plain SAM.
        rho: Radius of the perturbation, at least 0.
        loss: "cross_entropy", "mse", or a function (outputs, labels) -> mean over examples.
        adaptive: ASAM's geometry, ε_i = ρ w² ∇L / ‖w ∇L‖ elementwise.
        engine: "vectorized"; "loop", group by group; "auto" takes the first unless an operation of
            the model cannot be vectorised (then it warns).
        scaler: Scales the gradients for float16 autocast; then a loss that is not finite is left
            to the scaler, which skips the step.
        variant: Another direction of ε_i, or another gradient than the one at w + ε_i.
        compile: Compile the passes over groups side by side with `torch.compile`'s compiler
            (inductor): the same to rounding. It takes a minute or so, once for a model and a form
            of its chunks, and is kept for the following steps, so it is for trainings. Dropout and
            what else draws random numbers, hooks, and what cannot be traced run without, and a
            warning says so once. Attributes of modules are looked at in every step; what their
            code takes from global variables stays what it was.

    Returns:
        Tensor: The mean loss at the unperturbed weights, a scalar without history.

    Raises:
        ArgumentError: For m, rho or engine out of range, weights in half precision, or if no
            parameter requires gradients.
        DataError: For labels that do not fit the outputs or the inputs.
        DivergedError: If a loss is not finite (no `.grad` has been touched).
        ModelError: If BatchNorm in training gets a group with a single value per channel.

    Source:
        Foret et al., ICLR 2021, section 4.1 and Algorithm 1; Kwon et al., ICML 2021 (adaptive).

    Example:
        For the loss w·x the gradient is the mean of x wherever it is taken:

        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
        >>> loss = m_sam_gradient(model, x, torch.zeros(2), m=1,
        ...                       loss=lambda outputs, labels: outputs.mean())
        >>> model.weight.grad
        tensor([[4.5000, 6.0000]])
    """
    radius = checked_radius(rho)
    names = [name for name, p in unwrapped(model).named_parameters() if p.requires_grad]
    radii = Radii(dict.fromkeys(names, radius), frozenset(names if adaptive else ()))
    return accumulate(
        model, inputs, labels, m=m, radii=radii, loss=loss, engine=engine, scaler=scaler,
        variant=variant, compile=compile,
    )  # fmt: skip


def accumulate(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    *,
    m: int,
    radii: Radii,
    loss: Loss,
    engine: Engine = "auto",
    scaler: torch.amp.GradScaler | None = None,
    variant: SamVariant = PLAIN_SAM,
    compile: bool = False,
) -> Tensor:
    """As `m_sam_gradient`, for the parameters that `radii` names, each with its own radius."""
    check_group_size(m)
    if engine not in ("auto", "vectorized", "loop"):
        raise ArgumentError(f'engine must be "auto", "vectorized" or "loop", got {engine!r}')
    check_variant(variant)
    if not radii.rho:
        raise ArgumentError("no parameter of the model requires gradients")
    network = unwrapped(model)
    parameters = dict(network.named_parameters())
    own = [parameters[name] for name in radii.rho]
    refuse_half(own, "m-SAM")
    loss_fn = resolve_loss(loss)
    function = FunctionalModel(network, whole=not loss_fn.exact)
    shared = {name: function.value(name) for name in radii.rho}
    examples = batch_of(inputs, labels).to(function.device, function.dtype)
    loss_fn = loss_fn.where_all_count([examples.labels])
    if scaler is not None:
        scaler.scale(torch.zeros((), device=function.device))  # its state is made at first use
    task = StepTask(
        function, loss_fn, shared, radii, Recorder(tracked_layers(network)), examples,
        min(m, len(examples)), variant=variant, compile=compile,
        **({} if scaler is None else {"scale": scaler.scale}),
    )  # fmt: skip
    result = run(task, engine)
    value, found = result.value, result.gradient
    diverged = scaler is None and not result.finite
    if isinstance(model, DistributedDataParallel):
        diverged = on_any_rank(model, [diverged])[0]  # or the others would wait for this one
    if diverged:
        raise DivergedError(f"the loss is not finite (here: {float(value)}): training has diverged")
    if isinstance(model, DistributedDataParallel):
        found = averaged_over_ranks(model, found, list(shared.values()))
    new = {
        parameter: _in_layout_of(parameter, function.native(name, gradient))
        for name, parameter, gradient in zip(shared, own, found, strict=True)
        if gradient is not None
    }
    old = [(p, p.grad) for p in new if p.grad is not None]
    if old:  # out of place: there may be sparse gradients, or one tensor for two parameters
        sums = torch._foreach_add([new[p] for p, _ in old], [g for _, g in old])
        new |= dict(zip((p for p, _ in old), sums, strict=True))
    for parameter, gradient in new.items():
        parameter.grad = gradient
    result.averages.write(task.recorder.layers)
    return value


def _in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    same = gradient.stride() == parameter.stride()
    return gradient if same else torch.empty_like(parameter).copy_(gradient)


def check_group_size(m: int) -> None:
    """Raise ArgumentError unless m is a number of examples."""
    if isinstance(m, bool) or not isinstance(m, int) or m < 1:
        raise ArgumentError(f"m must be a whole number of examples >= 1, got {m!r}")


def batch_of(inputs: Inputs, labels: Tensor) -> Examples:
    """A batch; DataError if it is empty, or inputs and labels differ in length."""
    lengths = {len(t) for t in pytree.tree_leaves(inputs)} | {len(labels)}
    if len(lengths) != 1:
        raise DataError(f"inputs and labels differ in length: {sorted(lengths)}")
    if lengths == {0}:
        raise DataError("the batch holds no examples")
    return Examples(inputs, labels)
