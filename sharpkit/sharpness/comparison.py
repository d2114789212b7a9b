"""Two models: the difference of their m-sharpness over the same groups of examples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from torch import nn

from sharpkit.contract.loading import Data, as_data, load_examples
from sharpkit.contract.losses import Loss, resolve_loss
from sharpkit.contract.mean_loss import loss_of
from sharpkit.contract.modules import unwrapped
from sharpkit.display import readable
from sharpkit.errors import ArgumentError, DataError
from sharpkit.sharpness.ascent_rules import AscentLike
from sharpkit.sharpness.m_sharpness import SharpnessResult, m_sharpness

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

_LOSSES_ALIKE = 1.5  # the ratio of training losses from which on a warning is given


class PairedDifference(NamedTuple):
    """A weighted mean of differences with its standard error, interval and p-value.

    Attributes:
        value: Σ w_g d_g / Σ w_g.
        std_error: Over groups; NaN for one group.
        low: Lower end of the interval.
        high: Upper end.
        p_value: Two-sided, of the hypothesis that the expectation is 0.
    """

    value: float
    std_error: float
    low: float
    high: float
    p_value: float


@readable(
    lambda c: (
        f"{c.names[0]} − {c.names[1]}, n = {c.results[0].n}, losses {c.losses[0]:.4g} and "
        f"{c.losses[1]:.4g}, {100 * c.confidence:g} % intervals"
    )
)
@dataclass(frozen=True)
class ModelComparison:
    """m-sharpness of two models over the same groups; `.frame()` is the table.

    Attributes:
        names: Of the two models.
        results: The `SharpnessResult` of each.
        losses: The loss of each over the examples used.
        confidence: Nominal coverage of the intervals.
    """

    names: tuple[str, str]
    results: tuple[SharpnessResult, SharpnessResult]
    losses: tuple[float, float]
    confidence: float

    def frame(self) -> pd.DataFrame:
        """One row per (m, rho): both values, their difference, interval and p-value.

        Returns:
            DataFrame: m, rho, the value of each model under its name, difference (first − second),
                std_error, low, high, p_value, groups. p-values are not corrected for the number of
                rows.
        """
        import pandas as pd

        first = self.results[0]
        rows = []
        for m, rho in product(first.m, first.rho):
            weights = first.group_weights[m]
            values = [result.group_values[m, rho] for result in self.results]
            shares = weights / weights.sum()
            difference = paired_difference(values[0] - values[1], weights, self.confidence)
            rows.append(
                {
                    "m": m,
                    "rho": rho,
                    **{name: float(v @ shares) for name, v in zip(self.names, values, strict=True)},
                    "difference": difference.value,
                    **difference._asdict(),
                    "groups": int((weights > 0).sum()),
                }
            )
        return pd.DataFrame(rows).drop(columns="value")


def compare_models(
    a: nn.Module,
    b: nn.Module,
    data: Data,
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
    parameters: str | Sequence[str] | None = None,
    chunk: int | Literal["auto"] = "auto",
    memory_budget: int | None = None,
    engine: Literal["auto", "vectorized", "loop"] = "auto",
    names: tuple[str, str] = ("a", "b"),
    confidence: float = 0.95,
    progress: bool = True,
) -> ModelComparison:
    """Which of two models is sharper: the paired difference of m-sharpness over the same groups.

    With s_g the loss increase of group g, at its weight w_g (see `m_sharpness`),

        d = Σ w_g (s_g(a) − s_g(b)) / Σ w_g,

    and its interval is d ± t SE(d), with Student's t of G − 1 degrees of freedom for G groups of
    equal weight (fewer for unequal ones). The estimand is the expectation of d over groups of m
    examples drawn as the given ones were, for these two models as they are: not over repeated
    trainings, for which several models per recipe have to be trained. Groups that are hard for one
    model mostly are for the other, so the pairing takes fewer examples than two separate intervals.

    A model is not sharper as such, but at some m and rho. Between architectures, or at different
    training losses, the order may be the other way round at another m or rho; a warning says when
    this has to be reckoned with, and when it happens within the grid asked for.

    Args:
        a: One model.
        b: The other.
        data: Training examples, as for `m_sharpness`; read once, so that both see the same.
        m: Group size in examples; one or several.
        rho: Radius; one or several.
        loss: As for `m_sharpness`, as are the following.
        ascent: "one_step", "pgd", "apgd", or a rule of your own.
        steps: Steps of "pgd" and "apgd", or directions of `average`.
        restarts: Starts of "pgd" and "apgd".
        norm: Order of the ball's norm.
        adaptive: Measure perturbations in units of |w|.
        average: Mean over Gaussian directions instead of the maximum.
        n: Number of examples; None for all.
        seed: Order of the examples; None keeps the data's own. (Random directions and starts are
            those of seed 0.)
        parameters: Names or patterns of what is perturbed, in both models.
        chunk: Examples evaluated at a time.
        memory_budget: Bytes for one chunk.
        engine: "auto", "vectorized" or "loop".
        names: What the models are called in the table.
        confidence: Nominal coverage of the intervals.
        progress: Show a bar for each model.

    Returns:
        ModelComparison: With `.frame()`.

    Raises:
        ArgumentError: As `m_sharpness`; or if `names` are not two different ones, or `confidence`
            is not between 0 and 1.
        DataError: As `m_sharpness`; or if groups weigh differently in the two models.
        ModelError: As `m_sharpness`.

    Example:
        The increase of w·x is ρ‖x‖ at m = 1, whatever w is, and twice that of the loss doubled:

        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 5.0]])
        >>> class Scaled(nn.Module):
        ...     def __init__(self, factor):
        ...         super().__init__()
        ...         self.linear, self.factor = nn.Linear(2, 1, bias=False), factor
        ...         nn.init.ones_(self.linear.weight)
        ...     def forward(self, x):
        ...         return self.factor * self.linear(x)
        >>> with warnings.catch_warnings(action="ignore"):
        ...     found = compare_models(Scaled(2.0), Scaled(1.0), (x, torch.zeros(3)), m=1, rho=0.1,
        ...                            loss=lambda outputs, labels: outputs.mean())
        >>> found.frame()[["a", "b", "difference", "groups"]].round(4)
                a       b  difference  groups
        0  1.3333  0.6667      0.6667       3
    """
    names = _checked(names, confidence)
    loss_fn = resolve_loss(loss)
    examples = load_examples(data, n=n, seed=seed)
    same = as_data(examples)

    def measured(model: nn.Module) -> SharpnessResult:
        return m_sharpness(
            model, same, m=m, rho=rho, loss=loss_fn, ascent=ascent, steps=steps, restarts=restarts,
            norm=norm, adaptive=adaptive, average=average, seed=None, parameters=parameters,
            chunk=chunk, memory_budget=memory_budget, engine=engine, progress=progress,
        )  # fmt: skip

    results = measured(a), measured(b)
    for size in results[0].m:
        weights = [result.group_weights[size] for result in results]
        if not np.array_equal(weights[0], weights[1]):
            raise DataError(
                f"at m = {size} the groups weigh differently in the two models, because the "
                "loss's weights follow from the outputs: they cannot be compared pair by pair"
            )
    losses = loss_of(a, examples, loss_fn), loss_of(b, examples, loss_fn)
    comparison = ModelComparison(names, results, losses, confidence)
    _warn(a, b, comparison)
    return comparison


def paired_difference(
    differences: NDArray[np.float64], weights: NDArray[np.float64], confidence: float = 0.95
) -> PairedDifference:
    """The weighted mean of differences with a t interval and a two-sided p-value.

    With shares p_g = w_g / Σ w: d = Σ p_g d_g and SE² = G / (G − 1) Σ p_g² (d_g − d)², as the
    standard error of m-sharpness; the degrees of freedom are (Σ p²)² / Σ p⁴ − 1, which is G − 1
    for equal weights. Groups of weight 0 do not count.

    Args:
        differences: Of each group, shape (G,).
        weights: Of each group, shape (G,), at least 0.
        confidence: Nominal coverage.

    Returns:
        PairedDifference: With NaN for all but the value if fewer than two groups count.

    Source:
        Student's paired t test; Satterthwaite, Biometrics Bulletin 1946 (degrees of freedom).

    Example:
        >>> found = paired_difference(np.array([1.0, 2.0, 3.0]), np.ones(3))
        >>> round(found.value, 3), round(found.std_error, 3), round(found.p_value, 3)
        (2.0, 0.577, 0.074)
    """
    from scipy import stats

    counted = weights > 0
    share = weights[counted] / weights[counted].sum()
    d, groups = differences[counted], int(counted.sum())
    value = float(share @ d)
    if groups < 2:
        return PairedDifference(value, math.nan, math.nan, math.nan, math.nan)
    error = math.sqrt(float((share * (d - value)) @ (share * (d - value))) * groups / (groups - 1))
    freedom = float((share**2).sum() ** 2 / (share**4).sum()) - 1.0
    if error == 0.0:  # the same difference in every group
        return PairedDifference(value, error, value, value, float(value == 0.0))
    if not freedom > 0:
        return PairedDifference(value, error, math.nan, math.nan, math.nan)
    half = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * error
    p_value = 2.0 * float(stats.t.sf(abs(value) / error, freedom))
    return PairedDifference(value, error, value - half, value + half, p_value)


def _checked(names: Any, confidence: float) -> tuple[str, str]:
    if isinstance(names, str) or len(names) != 2 or len(set(map(str, names))) != 2:
        raise ArgumentError(f"names = {names!r}: expected two different names")
    taken = {"m", "rho", *PairedDifference._fields, "difference", "groups"} & set(names)
    if taken:
        raise ArgumentError(f"names: {min(taken)!r} is a column of its own, choose another name")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence = {confidence}: expected a number between 0 and 1")
    return str(names[0]), str(names[1])


def _warn(a: nn.Module, b: nn.Module, comparison: ModelComparison) -> None:
    """What keeps the order from being one of the models as such."""
    names, (low, high) = comparison.names, sorted(map(abs, comparison.losses))
    again = "look at several m and rho before you call one model flatter"
    if high > _LOSSES_ALIKE * low:
        both = " and ".join(f"{loss:.3g}" for loss in comparison.losses)
        warnings.warn(
            f"the training losses of {names[0]} and {names[1]} differ much ({both}): gradients "
            "shrink as the loss does, and sharpness with them, so the difference may say no more "
            f"than how far each was trained; compare at the same loss, and {again}",
            stacklevel=3,
        )
    if _architecture(a) != _architecture(b):
        warnings.warn(
            f"{names[0]} and {names[1]} have different architectures: a distance rho between "
            "weights does not mean the same in both, and the order by sharpness may reverse with "
            f"m and rho; {again}",
            stacklevel=3,
        )
    table = comparison.frame()
    signs = set(np.sign(table["difference"][table["p_value"] < 1 - comparison.confidence]))
    if {1.0, -1.0} <= signs:
        warnings.warn(
            f"the order of {names[0]} and {names[1]} reverses within this grid of m and rho: "
            "neither is the flatter one as such",
            stacklevel=3,
        )


def _architecture(model: nn.Module) -> Any:
    """Layers and shapes, by which two models are of one architecture or not."""
    model = unwrapped(model)
    layers = [(name, type(module), module.extra_repr()) for name, module in model.named_modules()]
    return layers, [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def sharpness_table(
    models: Mapping[str, nn.Module], data: Data, **options: Any
) -> tuple[pd.DataFrame, ModelComparison | None]:
    """The m-sharpness of models by name, one below the other; of two, their comparison as well.

    Args:
        models: By name, at least one.
        data: Their examples.
        options: Of `m_sharpness`.

    Returns:
        tuple: Columns model, m, rho, value, std_error, groups, n; and None unless there are two.

    Example:
        >>> import torch
        >>> data = torch.rand(8, 2), torch.arange(8) % 2
        >>> table, compared = sharpness_table({"a": nn.Linear(2, 2)}, data, m=[1, 4], rho=0.1)
        >>> list(table["m"]), compared
        ([1, 4], None)
    """
    import pandas as pd

    compared = None
    if len(models) == 2:
        (one, first), (other, second) = models.items()
        compared = compare_models(first, second, data, names=(one, other), **options)
        results: Sequence[SharpnessResult] = compared.results
    else:
        results = [m_sharpness(model, data, **options) for model in models.values()]
    columns = ["m", "rho", "value", "std_error", "groups", "n"]
    frames = [result.frame()[columns] for result in results]
    for name, frame in zip(models, frames, strict=True):
        frame.insert(0, "model", name)
    return pd.concat(frames, ignore_index=True), compared
