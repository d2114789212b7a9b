"""The barrier between two models: how far the loss rises on the line from one to the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss
from sharpkit.contract.modules import unwrapped
from sharpkit.contract.parameters import Parameters
from sharpkit.display import readable
from sharpkit.errors import ArgumentError, DataError
from sharpkit.groupwise.fallback import Engine
from sharpkit.landscapes.band import Band, excess_band
from sharpkit.landscapes.measured import BatchNorm, How, evaluate, opened
from sharpkit.landscapes.passes import Terms
from sharpkit.landscapes.request import between

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


def _text(b: Barrier) -> str:
    share = f"{100 * b.confidence:g} %"
    text = f"loss barrier {b.value:.4g} ({b.low:.4g} to {b.high:.4g}, {share}) at t = {b.at:.3g}"
    if b.error is not None:
        text += f", error barrier {b.error:.4g} ({b.error_low:.4g} to {b.error_high:.4g})"
    return f"{text}, n = {b.n}"


@readable(_text)
@dataclass(frozen=True)
class Barrier:
    """The barrier between two models, with the curve that it is the maximum of.

    Attributes:
        value: max over t of L(t) − (1 − t) L(0) − t L(1), at least 0.
        low: Lower end of its interval.
        high: Upper end.
        bias: By how much the value is likely to be too large, being a maximum of noisy numbers.
        at: The t of the maximum.
        error: The same of the classification error; None where that has no meaning.
        error_low: Lower end of its interval.
        error_high: Upper end.
        t: Points on the line.
        loss: L(t), same shape.
        std_error: Of the loss over examples.
        accuracy: Same shape; None where it has no meaning.
        excess: L(t) above the straight line between its ends.
        excess_low: Lower end of a band that holds the whole curve at once.
        excess_high: Upper end.
        confidence: Nominal coverage of intervals and band.
        distance: Between the models, in weight space.
        batch_norm: "stored" or "recomputed".
        n: Examples.
    """

    value: float
    low: float
    high: float
    bias: float
    at: float
    error: float | None
    error_low: float | None
    error_high: float | None
    t: NDArray[np.float64]
    loss: NDArray[np.float64]
    std_error: NDArray[np.float64]
    accuracy: NDArray[np.float64] | None
    excess: NDArray[np.float64]
    excess_low: NDArray[np.float64]
    excess_high: NDArray[np.float64]
    confidence: float
    distance: float
    batch_norm: str
    n: int

    def frame(self) -> pd.DataFrame:
        """One row per t: t, loss, std_error, excess, low, high, accuracy (where it is known)."""
        import pandas as pd

        table = {
            "t": self.t, "loss": self.loss, "std_error": self.std_error, "excess": self.excess,
            "low": self.excess_low, "high": self.excess_high,
        }  # fmt: skip
        if self.accuracy is not None:
            table["accuracy"] = self.accuracy
        return pd.DataFrame(table)

    def plot(self, out: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
        """Draw it; see `sharpkit.plot.barrier`."""
        from sharpkit.plot.landscape import barrier

        return barrier(self, out, ax=ax)


def barrier(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    points: int = 25,
    loss: Loss = "cross_entropy",
    n: int | None = None,
    seed: int = 0,
    parameters: Parameters = None,
    batch_norm: BatchNorm = "stored",
    confidence: float = 0.95,
    resamples: int = 1000,
    chunk: int | Literal["auto"] = "auto",
    engine: Engine = "auto",
    progress: bool = True,
) -> Barrier:
    """How far the loss rises above its ends on the line between two models.

    With L(t) the loss at (1 − t) a + t b, on evenly spaced t from 0 to 1,

        barrier = max_t [ L(t) − (1 − t) L(0) − t L(1) ],

    which is 0 for models that are linearly connected. The interval is for the maximum of the
    expected curve at these t, over examples drawn as the given ones were, for these two models as
    they are. A maximum of noisy numbers is too large on average (see `bias`), so it does not come
    from the curve at its highest point alone: examples are resampled as a whole, a band is found
    that holds the curve at all t at once, and the interval runs from the highest point of its lower
    end to that of its upper end. It covers at least as often as asked for, mostly more; with few
    examples that change at all between the models it may not.

    Units of a network can be permuted without changing its function, and two models that were
    trained apart rarely have theirs in one order. This function takes the models as they are: align
    them first if the barrier up to permutation is meant.

    Args:
        a: One model.
        b: The other, of the same layers.
        data: As for `m_sharpness`; the same examples at every t.
        points: Number of t, both ends included.
        loss: As for `m_sharpness`.
        n: Number of examples; None for all.
        seed: Of the choice of n examples and of the resamples.
        parameters: What moves; None for all parameters, and then t = 1 is the model b. With a
            selection, all else is a's.
        batch_norm: "stored", the mean of both models' running statistics, or "recomputed", those of
            the examples at each t; see `landscape`. With stored statistics, part of the
            barrier may be theirs.
        confidence: Nominal coverage of interval and band.
        resamples: Draws of examples.
        chunk: Examples at a time.
        engine: As for `landscape`.
        progress: Show a bar if it takes longer than two seconds.

    Returns:
        Barrier: value, low, high, the same of the error, `.frame()` and `.plot()`.

    Raises:
        ArgumentError: For an argument out of range.
        DataError: As `m_sharpness`.
        ModelError: As `m_sharpness`; or if the models have other layers.

    Source:
        Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020;
        Entezari et al., "The Role of Permutation Invariance in Linear Mode Connectivity of Neural
        Networks", ICLR 2022, definition 1.

    Example:
        Two minima of (w² − 1)² at −1 and 1, with the maximum of 1 between them:

        >>> import torch
        >>> def linear(w):
        ...     model = nn.Linear(1, 1, bias=False)
        ...     model.weight.data = torch.tensor([[w]])
        ...     return model
        >>> data = torch.ones(2, 1), torch.zeros(2, 1)
        >>> found = barrier(linear(-1.0), linear(1.0), data, points=3,
        ...                 loss=lambda f, y: ((f**2 - 1) ** 2).mean())
        >>> found.value, found.at
        (1.0, 0.5)
    """
    how = How(batch_norm, chunk, engine, progress)
    how.check(a)
    _check(b, points, confidence, resamples)
    t = np.linspace(0.0, 1.0, points)
    with opened(a, data, loss, n, seed, "*" if parameters is None else parameters) as what:
        line = between(what, [b], 1, buffers=parameters is None, called="b")
        found, _ = evaluate(what, line, t[:, None], how, _on_cpu)
    sums, weights = (torch.stack([f[k] for f in found]).numpy() for k in range(2))  # type: ignore[misc]
    if not (weights.sum(1) > 0).all():
        raise DataError("no label counts in the loss: all are ignored, or weigh 0")
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    band = excess_band(sums, weights, t, **options)  # type: ignore[arg-type]
    rights = [f.right for f in found if f.right is not None]
    wrong, accuracy = None, None
    if rights:
        right = torch.stack(rights).numpy()
        counted = ~np.isnan(right)
        missed = np.where(counted, 1.0 - right, 0.0)
        wrong = excess_band(missed, counted.astype(np.float64), t, **options)  # type: ignore[arg-type]
        accuracy = np.nanmean(right, 1)
    return _result(band, wrong, t, sums, weights, accuracy, line.norms[0], confidence, batch_norm)


def _check(b: nn.Module, points: int, confidence: float, resamples: int) -> None:
    if not isinstance(b, nn.Module):
        raise ArgumentError(f"b is {type(b).__name__}: expected a module")
    unwrapped(b)
    if not isinstance(points, int) or points < 3:
        raise ArgumentError(f"points = {points!r}: expected a whole number of at least 3")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence = {confidence}: expected a number between 0 and 1")
    if resamples < 1:
        raise ArgumentError(f"resamples = {resamples}: expected at least 1")


def _on_cpu(terms: Terms) -> Terms:
    return Terms(*(None if part is None else part.cpu() for part in terms))  # type: ignore[arg-type]


def _result(
    band: Band,
    wrong: Band | None,
    t: NDArray[np.float64],
    sums: NDArray[np.float64],
    weights: NDArray[np.float64],
    accuracy: NDArray[np.float64] | None,
    distance: float,
    confidence: float,
    batch_norm: str,
) -> Barrier:
    n = sums.shape[1]
    loss = sums.sum(1) / weights.sum(1)
    off = (sums - loss[:, None] * weights) / weights.mean(1)[:, None]
    low, high = (None, None) if wrong is None else wrong.interval
    return Barrier(
        value=band.value,
        low=band.interval[0],
        high=band.interval[1],
        bias=band.bias,
        at=float(t[band.at]),
        error=None if wrong is None else wrong.value,
        error_low=low,
        error_high=high,
        t=t,
        loss=loss,
        std_error=np.sqrt((off**2).sum(1) / (n - 1) / n) if n > 1 else np.full_like(loss, np.nan),
        accuracy=accuracy,
        excess=band.excess,
        excess_low=band.low,
        excess_high=band.high,
        confidence=confidence,
        distance=distance,
        batch_norm=batch_norm,
        n=n,
    )
