"""What a measure without information has: the null of a conditional mutual information.

A mutual information is never negative, so that of noise is above 0, and that of a measure that
merely follows the hyperparameters above that of noise. Both are found by shuffling the measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.display import one_row, readable
from sharpkit.errors import ArgumentError
from sharpkit.evaluation.arguments import LEAST_CERTAIN
from sharpkit.evaluation.cmi import DEFINITIONS
from sharpkit.evaluation.correlations import mean_ranks
from sharpkit.evaluation.grid import Configs, Floats, Grid, Ints, Measure, read_comparable
from sharpkit.evaluation.permutation import p_values
from sharpkit.evaluation.shuffled_information import ShuffledInformation
from sharpkit.evaluation.sorted_pairs import MANY
from sharpkit.evaluation.threads import in_threads

if TYPE_CHECKING:
    import pandas as pd


@readable(
    lambda s: (
        f"{s.value:.4g}, of {s.shuffles} shuffles mean {s.mean:.4g} and 95th percentile "
        f"{s.percentile_95:.4g}, p = {s.p_value:.2g}{s.note and f', {s.note}'}"
    ),
    brief=True,
)
@dataclass(frozen=True)
class CMINull:
    """A conditional mutual information beside that of shuffled measures.

    Attributes:
        value: Of the measure.
        mean: Of the shuffles; NaN, as all that follows, where `note` says why.
        percentile_95: What 5 % of the shuffles exceed.
        p_value: Share of the shuffles that reach the value, the measure itself counted in.
        adjusted: (value − mean) / (1 − mean): 0 for what shuffles have on average, 1 at best.
        shuffles: How many.
        note: Why there is no null; empty if there is one.
    """

    value: float
    mean: float
    percentile_95: float
    p_value: float
    adjusted: float
    shuffles: int
    note: str = ""

    def frame(self) -> pd.DataFrame:
        """One row, with the attributes as columns."""
        return one_row(self)


def cmi_null(
    measure: Measure,
    configs: Configs,
    definition: str = "pgdl",
    *,
    shuffles: int = 1000,
    seed: int = 0,
) -> CMINull:
    """Is a conditional mutual information more than noise and hyperparameters give?

    The null hypothesis: the measure is what the hyperparameters explain, plus noise that has
    nothing to do with the gap. A shuffle keeps the explained part and shuffles the rest. With r the
    ranks of the measure about their mean and f their least-squares fit by one effect per value of
    each hyperparameter (of a continuous one, an effect per bin and a slope by rank within it),

        u = λ f + √(n / (n − p)) e_π,    λ = max(0, 1 − 1 / F),

    e = r − f the residuals in a random order π, n models, p effects, and F the ratio of explained
    to residual variance; where λ = 0 the ranks themselves are shuffled. The values of the measure
    are then dealt out in the order of u, so that ties stay as many as they are.

    Which cells are shuffled for which set: all models at once, the same shuffles for every set, and
    the minimum over sets is taken of each shuffle as it is of the measure. Shuffling within the
    cells of one set S keeps what S explains but not what the other hyperparameters do: given any S,
    those still make a measure without information of its own look informed. And the minimum is
    attained at a set that the measure's noise has chosen, so that shuffles within its cells are too
    seldom reached if there are no effects, and too often if there are many.

    Models without a value or a gap are left out, as in `rate_measures`.

    Time: about 0.2 ms per shuffle of 96 models and 4 ms per shuffle of 1,000.

    Args:
        measure: Mapping or Series of model id -> value.
        configs: A `Task`, or the content of a `model_configs.json`.
        definition: "pgdl" or "jiang".
        shuffles: How many.
        seed: Determines them.

    Returns:
        CMINull: The value, mean and 95th percentile of the null, p-value, adjusted value.

    Raises:
        ScoreError: If fewer than two models can be compared, or the input is unusable.
        ArgumentError: If the definition is unknown or there are no shuffles.

    Source:
        Freedman and Lane, Journal of Business and Economic Statistics 1 (1983), for shuffling
        residuals; James and Stein, Fourth Berkeley Symposium (1961), for the shrinkage; Phipson and
        Smyth, Statistical Applications in Genetics and Molecular Biology 9 (2010), for the p-value;
        the adjustment is that of Vinh, Epps and Bailey, JMLR 11 (2010).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> from sharpkit.zoo.grid import model_configs
        >>> settings = {k: {"width": 8 * (1 + k % 2), "depth": 1 + k // 2 % 2} for k in range(32)}
        >>> metrics = {k: {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k} for k in range(32)}
        >>> configs = model_configs(settings, metrics)
        >>> noise = cmi_null(dict(enumerate(rng.random(32))), configs, shuffles=99)
        >>> noise.value < noise.percentile_95
        True
        >>> good = {k: k + 8 * rng.random() for k in range(32)}
        >>> cmi_null(good, configs, shuffles=99).p_value
        0.01
    """
    if definition not in DEFINITIONS:
        raise ArgumentError(f"unknown definition {definition!r}: expected 'pgdl' or 'jiang'")
    if shuffles < 1:
        raise ArgumentError(f"shuffles = {shuffles}: expected at least 1")
    values, grid = read_comparable(measure, configs)
    return cmi_nulls(values[:, None], grid, shuffles, seed)[definition][0]


def cmi_nulls(values: Floats, grid: Grid, shuffles: int, seed: int) -> dict[str, list[CMINull]]:
    """Null of each measure (models, measures) by both definitions: definition -> one per measure.

    The measures share the random orders of their residuals.
    """
    n = len(grid)
    effects = _effects(grid)
    information = ShuffledInformation.of(grid.conditioned)
    orders = np.random.default_rng(seed).random((shuffles, n)).argsort(axis=1)
    ties = np.random.default_rng([seed, 1]).random((shuffles, n))
    few = ""
    if n < LEAST_CERTAIN:
        few = f"fewer than {LEAST_CERTAIN} models"
    elif effects.shape[1] > n // 2:
        few = "too few models for the values of the hyperparameters"
    found: dict[str, list[CMINull]] = {name: [] for name in DEFINITIONS}

    def of_measure(column: Floats) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats] | None]:
        observed = information(column[None])
        if few:
            return observed, None
        return observed, information(explained_shuffles(column, effects, orders, ties))

    # of many models the shuffles of one measure share the cores instead
    each = in_threads if n <= MANY else lambda function, items: [function(i) for i in items]
    nan = float("nan")
    for observed, chance in each(of_measure, list(values.T)):
        for k, name in enumerate(DEFINITIONS):
            value = float(observed[k][0])
            note = no_value(name, grid) if np.isnan(value) else few
            if chance is None or note:
                found[name].append(CMINull(value, nan, nan, nan, nan, shuffles, note))
            else:
                found[name].append(_null(value, chance[k]))
    return found


def explained_shuffles(values: Floats, effects: Floats, orders: Ints, ties: Floats) -> Floats:
    """The values (models,) dealt out anew (shuffles, models), what the effects explain kept.

    Args:
        values: Of one measure.
        effects: Orthonormal columns (models, p) that span the effects, the mean among them.
        orders: Of the residuals (shuffles, models).
        ties: Uniform random numbers (shuffles, models) that decide among equal ones.
    """
    ranks = mean_ranks(values)
    fit = effects @ (effects.T @ ranks)
    explained, residual = fit - ranks.mean(), ranks - fit
    n, p = effects.shape
    above, below = float(explained @ explained) / max(p - 1, 1), float(residual @ residual)
    below /= n - p
    kept = 1.0 - below / above if above > below else 0.0
    if kept > 0:
        latent = kept * explained + np.sqrt(n / (n - p)) * residual[orders]
    else:
        latent = ranks[orders]
    latent = latent + 1e-6 * ties  # ranks are multiples of a half
    dealt = np.empty_like(latent)
    np.put_along_axis(dealt, latent.argsort(axis=1), np.sort(values)[None], axis=1)
    return np.asarray(dealt, dtype=np.float64)


def adjusted_for_noise(value: float, null_mean: float) -> float:
    """(value − null mean) / (1 − null mean); NaN where the null leaves nothing to gain."""
    return (value - null_mean) / (1 - null_mean) if null_mean < 1 else float("nan")


def _effects(grid: Grid) -> Floats:
    """Orthonormal basis (models, p) of the mean and one effect per hyperparameter value.

    Of a continuous hyperparameter, each bin also has the slope by its ranks.
    """
    columns = [np.ones(len(grid))]
    seen = grid.conditioned.codes
    for h in range(len(grid.names)):
        columns += [(seen[:, h] == code) * 1.0 for code in np.unique(seen[:, h])[1:]]
        if h in grid.bins:
            inside = [seen[:, h] == code for code in np.unique(seen[:, h])]
            ranks = grid.bins[h].ranks / len(grid)
            columns += [np.where(bin_, ranks - ranks[bin_].mean(), 0.0) for bin_ in inside]
    basis, size, _ = np.linalg.svd(np.stack(columns, axis=1), full_matrices=False)
    spanned: Floats = basis[:, size > 1e-9 * size[0]]
    return spanned


def _null(value: float, chance: Floats) -> CMINull:
    mean, high = float(chance.mean()), float(np.quantile(chance, 0.95))
    p_value = float(p_values(np.array([value]), chance[:, None])[0])
    return CMINull(value, mean, high, p_value, adjusted_for_noise(value, mean), len(chance))


def no_value(definition: str, grid: Grid) -> str:
    """Why a mutual information has no value in this zoo, where it has none."""
    if definition == "jiang":
        return "no entropy of the gap"
    return "empty cells" if len(grid.names) > 1 else "fewer than two hyperparameters"
