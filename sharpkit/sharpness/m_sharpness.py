"""m-sharpness: the public function and its result."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit.contract.checks import examine, warn_of_unused
from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss, MeanLoss, resolve_loss
from sharpkit.contract.parameters import Parameters, floating_parameters, left_out
from sharpkit.contract.precision import current_precision
from sharpkit.contract.ranks import ALONE, Team
from sharpkit.contract.shares import Share, read_share
from sharpkit.contract.state import Found
from sharpkit.contract.streams import Stream
from sharpkit.contract.team_checks import require_same_arguments, require_same_weights
from sharpkit.curvature.memory import require_memory
from sharpkit.display import readable
from sharpkit.errors import ArgumentError, DataError
from sharpkit.sharpness.ascent_rules import Ascent, AscentLike, ascent_rule
from sharpkit.sharpness.measurement import (
    Groups,
    Measured,
    Measurement,
    estimate,
    joined,
    no_groups,
    on_cpu,
)
from sharpkit.sharpness.sweep_plan import keep_groups, sweep_plan

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


@readable(lambda r: f"n = {r.n}, {r.parameters} parameters, {r.seconds:.2g} s, engine {r.engine!r}")
@dataclass(frozen=True)
class SharpnessResult:
    """m-sharpness on a grid of m and rho.

    An axis is left out of the arrays where a single m or rho was asked for; with both single,
    `value` and `std_error` are floats.

    Attributes:
        m: Group sizes.
        rho: Radii.
        value: Mean loss increase, shape (len(m), len(rho)) or less; groups count by their weight.
        std_error: Standard error of the value over groups (NaN for a single group), same shape.
        group_values: (m, rho) -> loss increase of every group, shape (groups,).
        group_sizes: m -> number of examples of every group, shape (groups,).
        group_weights: m -> what every group counts in the value, shape (groups,): its examples, or
            the sum of the loss's own weights over it (class weights, labelled tokens).
        zero_gradient_groups: m -> groups whose gradient is exactly 0, so that they do not move.
        n: Examples used.
        seconds: Wall time; of several processes the longest, and so the largest `peak_memory`.
        engine: The engine that computed it, "vectorized" or "loop".
        parameters: Numbers that were perturbed together (a complex one is two).
        left_out: Names of the parameters that were not.
        precision: "full", or "tf32" inside `precision("tf32")`.
        peak_memory: Bytes: on a GPU what the allocator held at most during the call, on a CPU what
            the plan counts for a chunk (activations, gradients, perturbed weights).
    """

    m: tuple[int, ...]
    rho: tuple[float, ...]
    value: Any
    std_error: Any
    group_values: dict[tuple[int, float], NDArray[np.float64]]
    group_sizes: dict[int, NDArray[np.int64]]
    group_weights: dict[int, NDArray[np.float64]]
    zero_gradient_groups: dict[int, int]
    n: int
    seconds: float
    engine: str
    parameters: int
    left_out: tuple[str, ...]
    precision: str
    peak_memory: int

    def frame(self) -> pd.DataFrame:
        """One row per (m, rho): value, std_error, groups, zero_gradient_groups, n, seconds."""
        import pandas as pd

        value = np.reshape(self.value, (len(self.m), len(self.rho)))
        std_error = np.reshape(self.std_error, (len(self.m), len(self.rho)))
        return pd.DataFrame(
            [
                {
                    "m": m,
                    "rho": rho,
                    "value": value[i, j],
                    "std_error": std_error[i, j],
                    "groups": len(self.group_sizes[m]),
                    "zero_gradient_groups": self.zero_gradient_groups[m],
                    "n": self.n,
                    "seconds": self.seconds,
                }
                for i, m in enumerate(self.m)
                for j, rho in enumerate(self.rho)
            ]
        )


def m_sharpness(
    model: nn.Module,
    data: Data | DistributedData,
    *,
    m: int | Sequence[int],
    rho: float | Sequence[float],
    loss: Loss = "cross_entropy",
    ascent: AscentLike = "one_step",
    steps: int = 10,
    restarts: int = 1,
    norm: float = 2.0,
    adaptive: bool = False,
    average: bool = False,
    n: int | None = None,
    seed: int | None = 0,
    parameters: Parameters = None,
    tolerance: float | None = None,
    chunk: int | Literal["auto"] = "auto",
    memory_budget: int | None = None,
    engine: Literal["auto", "vectorized", "loop"] = "auto",
    compile: bool = False,
    progress: bool = True,
) -> SharpnessResult:
    """Mean loss increase under the worst weight perturbation of each group of m examples.

    A seeded random order of the data is cut into groups S of m examples, and

        s_m(w) = mean over S of [ max over ‖ε‖_p ≤ ρ of L_S(w + ε) − L_S(w) ].

    The last group is smaller where m does not divide n; groups count by their size. If the loss has
    a normaliser of its own (class weights, ignored labels, tokens), L_S is the sum over the group
    divided by its weight, and groups count by that weight: at any m, the unperturbed losses average
    to the loss of all examples. The model is evaluated in eval mode, in full precision (see
    `precision`), and left exactly as found, which takes memory for one copy of its weights. All m
    and rho of one call share one gradient pass; each pair costs one more forward pass.

    Args:
        model: Any module; inputs in, one row of outputs per example out. Wrappers that compile or
            distribute it are taken off.
        data: A `Dataset` of (input, label) pairs, a `DataLoader` (its data set is read in index
            order), a list of (inputs, labels) batches, or a pair (inputs of shape (n, ...), labels
            of shape (n,) or (n, ...)); see `load_examples`. A stream, such as an `IterableDataset`,
            a loader of one, or a function that returns an iterator of batches, is read batch by
            batch: once to count and compare, once to check labels, once to measure; the examples
            of the largest group are held, but for m = n, which is read again for every evaluation.
            With `DistributedData` processes divide the groups, which are those of one process.
        m: Group size in examples, 1 to n; one or several.
        rho: Radius of the ball, > 0, in units of the norm of the weights; one or several.
        loss: "cross_entropy" (exact for saturated examples; with outputs (n, ..., classes) and
            labels (n, ...), of which -100 is ignored), "mse", a torch loss module, or a callable
            (outputs, labels) that returns the mean over the examples, or a pair (sums, weights).
        ascent: "one_step", the closed form of the linearised maximum, as in SAM; "pgd", `steps`
            projected steps from 0; or "apgd", the same with momentum and steps that halve. The
            best point met is kept: a lower bound of the maximum, which 10 steps of "pgd" may miss
            by a third. A rule of your own is an `AscentRule`, or a function (ball, rho) -> the
            increases of the groups (see `sharpkit.sharpness.Ball`).
        steps: Steps of "pgd" and "apgd", or directions of `average`.
        restarts: Starts of "pgd" and "apgd"; the first is at the weights, others at random points
            of the ball. The value can only grow with them.
        norm: Order p of the ball, from 1 to infinity (2 or infinity for "pgd" and "apgd").
        adaptive: Measure ε elementwise in units of |w|, as in ASAM.
        average: Replace the maximum by the mean over `steps` Gaussian directions, each scaled to
            norm ρ.
        n: Number of examples; None for all.
        seed: Order of the examples, and the Gaussian directions. None keeps the data's own order
            (groups are consecutive examples); a stream always does.
        parameters: What is perturbed: names, glob patterns or modules; None for those that require
            gradients (all if none does), "*" for all.
        tolerance: Stop early once std_error <= tolerance * |value| for every m and rho; considered
            at fixed shares of n.
        chunk: Examples evaluated at a time. "auto" follows from the sizes of model and cache; the
            answer changes by rounding only.
        memory_budget: Bytes for one chunk; None for 4 GiB, or half of the GPU.
        engine: "vectorized"; "loop", plain Python over groups; "auto" takes the first unless an
            operation of the model cannot be vectorised (then it warns).
        compile: Compile the passes over groups side by side with `torch.compile`, which takes tens
            of seconds once per call and pays on a GPU, for long measurements; the same to rounding.
            Runs without, and warns, where that fails.
        progress: Show a progress bar if it takes longer than two seconds.

    Returns:
        SharpnessResult: value, std_error, group_values and `.frame()`.

    Raises:
        ArgumentError: For m, rho, n or another argument out of range.
        DataError: For labels that do not fit the outputs, or NaN inputs.
        ModelError: For NaN or infinite weights, a loss that is not finite or no mean over examples,
            or a model that is random or lets examples influence each other.

    Source:
        Foret et al., ICLR 2021, section 4.1 and equation 2; Kwon et al., ICML 2021 (adaptive);
        Croce and Hein, ICML 2020 ("apgd").

    Example:
        For a linear model with loss w·x the increase is exactly ρ‖x‖ at m = 1:

        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
        >>> result = m_sharpness(model, (x, torch.zeros(2)), m=1, rho=0.1,
        ...                      loss=lambda outputs, labels: outputs.mean())
        >>> round(result.value, 4)
        0.75
    """
    began = time.perf_counter()
    team = data.team if isinstance(data, DistributedData) else ALONE

    def read() -> tuple[tuple[int, ...], tuple[float, ...], Ascent, MeanLoss]:
        ms, rhos = read_grid(m, rho)
        rule = read_rule(ascent, steps, norm, adaptive, average, seed, restarts)
        _check(tolerance, engine, team)
        return ms, rhos, rule, resolve_loss(loss)

    ms, rhos, rule, loss_fn = team.together(read)
    require_same_arguments(
        team, model, loss=loss, parameters=parameters, m=ms, rho=rhos, steps=steps,
        ascent=ascent_rule(ascent).name, restarts=restarts, norm=norm, adaptive=adaptive,
        average=average, n=n, seed=seed, precision=current_precision(),
    )  # fmt: skip
    require_same_weights(team, model)
    with frozen(model) as found:
        weights = floating_parameters(model, parameters)
        function = FunctionalModel(model, whole=not loss_fn.exact)
        weights = {name: function.value(name) for name in weights}
        numbers = sum(w.numel() for w in weights.values())
        team.gathered(
            lambda: require_memory(
                2 * sum(w.nbytes for w in weights.values()),
                function.device,
                f"m-sharpness in {numbers:,} parameters (weights that move, and a gradient)",
                "select fewer with parameters=",
            )
        )
        share = read_share(data, n=n, seed=seed, multiple=math.lcm(*ms))
        if max(ms) > share.total:
            raise ArgumentError(f"m = {max(ms)} is larger than n = {share.total} examples")

        def measure() -> Measured:
            if not len(share.examples):  # there are fewer groups than ranks
                return Measured([no_groups(len(rhos)) for _ in ms], True, 0, 0.0)
            return _measured(
                function, loss_fn, weights, share, found, began, ms, rhos, rule,
                chunk=chunk, memory_budget=memory_budget, engine=engine, compile=compile,
                tolerance=tolerance, progress=progress and team.rank == 0,
            )  # fmt: skip

        parts = team.gathered(measure)
        outside = left_out(model, weights)
    levels = [joined(groups) for groups in zip(*(part.levels for part in parts), strict=True)]
    if not float(levels[0].weights.sum()) > 0:
        raise DataError("no label counts in the loss: all are ignored, or weigh 0")
    return result_of(
        levels, ms, rhos, m, rho,
        seconds=max(part.seconds for part in parts),
        engine="vectorized" if all(part.vectorised for part in parts) else "loop",
        parameters=numbers,
        left_out=outside,
        precision=current_precision(),
        peak_memory=max(part.peak_memory for part in parts),
    )  # fmt: skip


def _measured(
    function: FunctionalModel,
    loss: MeanLoss,
    weights: dict[str, Tensor],
    share: Share,
    found: Found,
    began: float,
    ms: tuple[int, ...],
    rhos: tuple[float, ...],
    rule: Ascent,
    *,
    chunk: int | Literal["auto"],
    memory_budget: int | None,
    engine: Literal["auto", "vectorized", "loop"],
    compile: bool,
    tolerance: float | None,
    progress: bool,
) -> Measured:
    """All groups of a share; the model is inside `frozen`, which gave `found`."""
    examples = share.examples
    if examples.in_memory:
        parts = examples.chunks(len(examples))
        loss = loss.where_all_count(part.labels for part in parts)
    probe = examine(function, loss, examples, found)
    plan = sweep_plan(
        function, loss, weights, probe, ms, chunk, memory_budget,
        allows_factors=rule.allows_factors,
    )  # fmt: skip
    warn_of_unused(plan.unused, weights)
    if isinstance(examples, Stream):
        keep_groups(examples, ms, plan.chunk)
    measurement = Measurement(
        plan, probe, examples, ms, rhos, rule, engine, compile, tolerance, progress, share.first
    )
    if function.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(function.device)
    sweep, vectorised = measurement()
    peak = plan.memory
    if function.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(function.device)
    probe.confirm()
    levels = [on_cpu(level) for level in sweep.levels]
    return Measured(levels, vectorised, peak, time.perf_counter() - began)


def _check(tolerance: float | None, engine: str, team: Team) -> None:
    if tolerance is not None and not tolerance > 0:
        raise ArgumentError(f"tolerance must be positive, got {tolerance}")
    if tolerance is not None and team.world > 1:
        raise ArgumentError(
            "with a tolerance it stops after some of the groups in their order, which are on "
            f"{team.world} processes here: pass n instead, or measure in one process"
        )
    if engine not in ("auto", "vectorized", "loop"):
        raise ArgumentError(f'engine must be "auto", "vectorized" or "loop", got {engine!r}')


def read_grid(
    m: int | Sequence[int], rho: float | Sequence[float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """m and rho as tuples of valid values."""
    ms = tuple(m) if isinstance(m, Iterable) else (m,)
    rhos = tuple(rho) if isinstance(rho, Iterable) else (rho,)
    for name, values in (("m", ms), ("rho", rhos)):
        if not values:
            raise ArgumentError(f"{name} is empty: expected one value or more")
        if len(set(values)) != len(values):
            raise ArgumentError(f"{name} has a value twice: {list(values)}")
    for value in ms:
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ArgumentError(f"m must be a whole number of examples >= 1, got {value}")
    for radius in rhos:
        if not (math.isfinite(radius) and radius > 0):
            raise ArgumentError(f"rho must be positive and finite, got {radius}")
    return tuple(int(v) for v in ms), tuple(float(r) for r in rhos)


def read_rule(
    ascent: AscentLike,
    steps: int,
    norm: float,
    adaptive: bool,
    average: bool,
    seed: int | None,
    restarts: int = 1,
) -> Ascent:
    """The ascent that these arguments describe."""
    rule = ascent_rule(ascent)
    if not norm >= 1:
        raise ArgumentError(f"norm must be at least 1, got {norm}")
    if steps < 1:
        raise ArgumentError(f"steps must be at least 1, got {steps}")
    if restarts < 1 or (restarts > 1 and not rule.projected):
        raise ArgumentError(f'restarts = {restarts}: expected 1, or more with "pgd" or "apgd"')
    if average and not rule.linearised:
        raise ArgumentError(
            f'average=True has no maximum to ascend to: leave out ascent="{rule.name}"'
        )
    if rule.projected and norm not in (2.0, math.inf):
        raise ArgumentError(
            f'"{rule.name}" projects on balls of norm 2 or infinity only, got {norm}'
        )
    kind = "average" if average else rule
    return Ascent(kind, float(norm), adaptive, steps, 0 if seed is None else seed, restarts)


def result_of(
    levels: Sequence[Groups],
    ms: tuple[int, ...],
    rhos: tuple[float, ...],
    m: int | Sequence[int],
    rho: float | Sequence[float],
    **how: Any,
) -> SharpnessResult:
    """The result of groups of every m; `m` and `rho` as they were given, for the axes left out."""
    pairs = [estimate(level.increases, level.weights) for level in levels]
    value, std_error = (torch.stack(part).numpy() for part in zip(*pairs, strict=True))
    drop = (
        slice(None) if isinstance(m, Iterable) else 0,
        slice(None) if isinstance(rho, Iterable) else 0,
    )
    value, std_error = value[drop], std_error[drop]
    scalar = not isinstance(value, np.ndarray) or value.ndim == 0
    return SharpnessResult(
        m=ms,
        rho=rhos,
        value=float(value) if scalar else value,
        std_error=float(std_error) if scalar else std_error,
        group_values={
            (k, r): level.increases[j].numpy()
            for k, level in zip(ms, levels, strict=True)
            for j, r in enumerate(rhos)
        },
        group_sizes={k: np.array(level.sizes) for k, level in zip(ms, levels, strict=True)},
        group_weights={k: level.weights.numpy() for k, level in zip(ms, levels, strict=True)},
        zero_gradient_groups={k: v.zero_gradients for k, v in zip(ms, levels, strict=True)},
        n=sum(levels[0].sizes),
        **how,
    )
