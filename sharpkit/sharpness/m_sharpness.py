"""m-sharpness: the public function and its result."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sharpkit.contract.examples import Data, Examples, load_examples
from sharpkit.contract.functional import FunctionalModel, frozen
from sharpkit.contract.losses import Loss, check_labels, resolve_loss
from sharpkit.contract.parameters import Parameters, floating_parameters
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.sharpness.ascent import Ascent
from sharpkit.sharpness.engine import Groupwise, Sweep
from sharpkit.sharpness.fallback import NotVectorizable, refuse_slow_vmap
from sharpkit.sharpness.loop import Loop
from sharpkit.sharpness.objective import Objective
from sharpkit.sharpness.plan import (
    activation_bytes,
    chunk_size,
    default_memory_budget,
    factored_weights,
)

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

# how often an early stop is considered, as a share of the examples; a chunk never decides it
_CHECKS = 16


@dataclass(frozen=True)
class SharpnessResult:
    """m-sharpness on a grid of m and rho.

    An axis is left out of the arrays where a single m or rho was asked for; with both single,
    `value` and `std_error` are floats.

    Attributes:
        m: Group sizes.
        rho: Radii.
        value: Mean loss increase, shape (len(m), len(rho)) or less; groups count by their size.
        std_error: Standard error of the value over groups (NaN for a single group), same shape.
        group_values: (m, rho) -> loss increase of every group, shape (groups,).
        group_sizes: m -> number of examples of every group, shape (groups,).
        zero_gradient_groups: m -> groups whose gradient is exactly 0, so that they do not move.
        n: Examples used.
        seconds: Wall time.
        engine: The engine that computed it, "vectorized" or "loop".
    """

    m: tuple[int, ...]
    rho: tuple[float, ...]
    value: Any
    std_error: Any
    group_values: dict[tuple[int, float], NDArray[np.float64]]
    group_sizes: dict[int, NDArray[np.int64]]
    zero_gradient_groups: dict[int, int]
    n: int
    seconds: float
    engine: str

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
    data: Data,
    *,
    m: int | Sequence[int],
    rho: float | Sequence[float],
    loss: Loss = "cross_entropy",
    ascent: Literal["one_step", "pgd"] = "one_step",
    steps: int = 10,
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
    progress: bool = True,
) -> SharpnessResult:
    """Mean loss increase under the worst weight perturbation of each group of m examples.

    A seeded random order of the data is cut into groups S of m examples, and

        s_m(w) = mean over S of [ max over ‖ε‖_p ≤ ρ of L_S(w + ε) − L_S(w) ].

    The last group is smaller where m does not divide n; groups count by their size. The model is
    evaluated in eval mode and left exactly as found. All m and rho of one call share one gradient
    pass; each pair costs one more forward pass.

    Args:
        model: Any module; inputs in, one row of outputs per example out.
        data: A `Dataset` of (input, label) pairs, a `DataLoader` (its data set is read in index
            order), or a pair (inputs of shape (n, ...), labels of shape (n,)).
        m: Group size in examples, 1 to n; one or several.
        rho: Radius of the ball, > 0, in units of the norm of the weights; one or several.
        loss: "cross_entropy" (exact for saturated examples), "mse", or a callable
            (outputs, labels) -> mean loss over the examples.
        ascent: "one_step", the closed form of the linearised maximum, as in SAM; or "pgd",
            `steps` projected steps from 0, of which the best is kept.
        steps: Steps of "pgd", or directions of `average`.
        norm: Order p of the ball, from 1 to infinity (2 or infinity for "pgd").
        adaptive: Measure ε elementwise in units of |w|, as in ASAM.
        average: Replace the maximum by the mean over `steps` Gaussian directions, each scaled to
            norm ρ.
        n: Number of examples; None for all.
        seed: Order of the examples, and the Gaussian directions. None keeps the data's own order
            (groups are consecutive examples).
        parameters: What is perturbed: names, glob patterns or modules; None for all.
        tolerance: Stop early once std_error <= tolerance * |value| for every m and rho; considered
            at fixed shares of n.
        chunk: Examples evaluated at a time. "auto" follows from the sizes of model and cache; the
            answer changes by rounding only.
        memory_budget: Bytes for one chunk; None for 4 GiB, or half of the GPU.
        engine: "vectorized"; "loop", plain Python over groups; "auto" takes the first unless an
            operation of the model cannot be vectorised (then it warns).
        progress: Show a progress bar on a terminal if it takes longer than two seconds.

    Returns:
        SharpnessResult: value, std_error, group_values and `.frame()`.

    Raises:
        ArgumentError: For m, rho, n or another argument out of range.
        DataError: For labels that do not fit the outputs, or NaN inputs.
        ModelError: For NaN or infinite weights, or a loss that is not finite.

    Source:
        Foret et al., ICLR 2021, section 4.1 and equation 2; Kwon et al., ICML 2021 (adaptive).

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
    ms, rhos = read_grid(m, rho)
    rule = read_rule(ascent, steps, norm, adaptive, average, seed)
    if tolerance is not None and not tolerance > 0:
        raise ArgumentError(f"tolerance must be positive, got {tolerance}")
    if engine not in ("auto", "vectorized", "loop"):
        raise ArgumentError(f'engine must be "auto", "vectorized" or "loop", got {engine!r}')
    with frozen(model):
        weights = floating_parameters(model, parameters)
        function = FunctionalModel(model)
        examples = load_examples(data, n=n, seed=seed)
        if max(ms) > len(examples):
            raise ArgumentError(f"m = {max(ms)} is larger than n = {len(examples)} examples")
        loss_fn = resolve_loss(loss)
        one = examples.slice(0, 1).to(function.device, function.dtype)
        _check_loss(function, weights, loss, loss_fn, examples)
        factored = factored_weights(function, weights, one) if rule.allows_factors else {}
        if chunk == "auto":
            dense = sum(w.nbytes for name, w in weights.items() if name not in factored)
            budget = (
                default_memory_budget(function.device) if memory_budget is None else memory_budget
            )
            chunk = chunk_size(
                activation_bytes(function, weights, loss_fn, one),
                dense,
                ms,
                budget,
                function.device,
            )
        elif not (isinstance(chunk, int) and chunk >= 1):
            raise ArgumentError(f'chunk must be "auto" or a positive integer, got {chunk!r}')
        objective = Objective(function, loss_fn, weights, chunk)
        stops = _stops(len(examples), ms, tolerance)

        def run(sweep: Sweep | Loop) -> Sweep | Loop:
            with tqdm(
                total=len(examples),
                desc="m-sharpness",
                unit="example",
                leave=False,
                delay=2,
                disable=None if progress else True,
            ) as bar:
                for start, stop in itertools.pairwise([0, *stops]):
                    sweep.extend(start, stop, bar.update)
                    if tolerance is not None and _precise(sweep.levels, tolerance):
                        break
            return sweep

        if engine != "loop":
            try:
                with refuse_slow_vmap():
                    sweep = run(Sweep(objective, examples, ms, rhos, rule, factored))
                used = "vectorized"
            except NotVectorizable as error:
                if engine == "vectorized":
                    raise ModelError(
                        f"{error.operation} cannot be vectorised: use engine='loop'"
                    ) from error
                warnings.warn(
                    f"{error.operation} cannot be vectorised over groups: using the slower loop",
                    stacklevel=2,
                )
                engine = "loop"
        if engine == "loop":
            sweep, used = run(Loop(objective, examples, ms, rhos, rule)), "loop"
    return _result(sweep.levels, ms, rhos, m, rho, time.perf_counter() - began, used)


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
    ascent: str, steps: int, norm: float, adaptive: bool, average: bool, seed: int | None
) -> Ascent:
    """The ascent that these arguments describe."""
    if ascent not in ("one_step", "pgd"):
        raise ArgumentError(f'ascent must be "one_step" or "pgd", got {ascent!r}')
    if not norm >= 1:
        raise ArgumentError(f"norm must be at least 1, got {norm}")
    if steps < 1:
        raise ArgumentError(f"steps must be at least 1, got {steps}")
    if average and ascent == "pgd":
        raise ArgumentError('average=True has no maximum to ascend to: leave out ascent="pgd"')
    if ascent == "pgd" and norm not in (2.0, math.inf):
        raise ArgumentError(f'"pgd" projects on balls of norm 2 or infinity only, got {norm}')
    kind = "average" if average else ascent
    return Ascent(kind, float(norm), adaptive, steps, 0 if seed is None else seed)


def _check_loss(
    function: FunctionalModel,
    weights: dict[str, Tensor],
    loss: Loss,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    examples: Examples,
) -> None:
    """Raise unless the loss is a scalar mean over examples that fits the outputs and labels."""
    few = examples.slice(0, 2).to(function.device, function.dtype)
    with torch.no_grad():
        outputs = function(weights, few.inputs)
        if outputs.ndim == 0 or outputs.shape[0] != len(few):
            raise ModelError(
                f"the model returned outputs of shape {tuple(outputs.shape)} for {len(few)} "
                "examples: expected one row of outputs per example"
            )
        check_labels(examples.labels, outputs, loss)
        value = loss_fn(outputs, few.labels)
        if value.ndim != 0:
            raise ModelError(
                f"the loss has shape {tuple(value.shape)}: expected a scalar, "
                "the mean over examples"
            )
        _check_independence(function, weights, few, outputs)
        each = torch.stack(
            [loss_fn(outputs[i : i + 1], few.labels[i : i + 1]) for i in range(len(few))]
        )
    if bool(torch.isfinite(each).all()) and not torch.allclose(each.mean(), value, rtol=1e-3):
        raise ModelError(
            f"the loss of two examples together is {float(value):g}, but their mean loss is "
            f"{float(each.mean()):g}: expected a loss that is the mean over examples"
        )


def _check_independence(
    function: FunctionalModel, weights: dict[str, Tensor], few: Examples, together: Tensor
) -> None:
    """Raise if the outputs of an example depend on the others evaluated with it."""
    try:
        alone = torch.cat([function(weights, few.slice(i, i + 1).inputs) for i in range(len(few))])
    except ValueError as error:  # BatchNorm with batch statistics refuses a single value
        raise ModelError(f"the model cannot evaluate a single example: {error}") from error
    precise = together.dtype in (torch.float32, torch.float64)
    size = float(together.abs().max()) * (1e-3 if precise else 0.1)
    if bool(torch.isfinite(together).all()) and not torch.allclose(
        alone, together, rtol=0.0, atol=size
    ):
        raise ModelError(
            "the outputs of an example depend on the other examples of its batch "
            "(BatchNorm without running statistics?): groups have no loss of their own"
        )


def _stops(n: int, ms: tuple[int, ...], tolerance: float | None) -> list[int]:
    """Where an early stop is considered: whole groups of every m, whatever the chunk size."""
    step = math.lcm(*ms)
    if tolerance is None or step >= n:
        return [n]
    step *= max(1, round(n / _CHECKS / step))
    return [*range(step, n, step), n]


def _estimate(increases: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and its standard error over groups, which count by their size; (rho,) each."""
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    mean = increases @ share
    groups = len(sizes)
    if groups == 1:
        return mean, torch.full_like(mean, torch.nan)
    squares = ((increases - mean.unsqueeze(1)) * share).square().sum(1)
    return mean, torch.sqrt(squares * groups / (groups - 1))


def _precise(levels: Sequence[Groupwise], tolerance: float) -> bool:
    for level in levels:
        mean, error = _estimate(torch.cat(level.increases, 1), level.sizes)
        if not bool((error <= tolerance * mean.abs()).all()):
            return False
    return True


def _result(
    levels: Sequence[Groupwise],
    ms: tuple[int, ...],
    rhos: tuple[float, ...],
    m: int | Sequence[int],
    rho: float | Sequence[float],
    seconds: float,
    engine: str,
) -> SharpnessResult:
    increases = [torch.cat(level.increases, 1) for level in levels]
    pairs = [_estimate(x, level.sizes) for x, level in zip(increases, levels, strict=True)]
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
            (k, r): x[j].numpy()
            for k, x in zip(ms, increases, strict=True)
            for j, r in enumerate(rhos)
        },
        group_sizes={level.m: np.array(level.sizes) for level in levels},
        zero_gradient_groups={level.m: level.zero_gradients for level in levels},
        n=sum(levels[0].sizes),
        seconds=seconds,
        engine=engine,
    )
