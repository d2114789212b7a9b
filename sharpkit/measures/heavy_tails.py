"""Power laws in the spectra of weight matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit.contract.parameters import select_parameters
from sharpkit.display import one_row, readable
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures.weight_layers import linear_maps

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike


@readable(
    lambda p: f"α {p.alpha:.4g} from {p.xmin:.4g} on, {p.n_tail} values, distance {p.distance:.2g}",
    brief=True,
)
@dataclass(frozen=True)
class PowerLaw:
    """A power law fitted to the tail of a sample.

    Attributes:
        alpha: Exponent of the density, p(x) ∝ x^{−α} for x ≥ xmin; greater than 1.
        xmin: Where the tail begins.
        distance: Kolmogorov-Smirnov distance of tail and fit, at the foot of each step.
        n_tail: Observations in the tail.
    """

    alpha: float
    xmin: float
    distance: float
    n_tail: int

    def frame(self) -> pd.DataFrame:
        """One row, with the attributes as columns."""
        return one_row(self)


def fit_power_law(values: ArrayLike) -> PowerLaw:
    """Fit a power law by maximum likelihood to the tail where it fits best.

        α = 1 + k / Σ_{x_i ≥ xmin} log(x_i / xmin),   k the number of x_i ≥ xmin

    Every value but the largest is tried as xmin; the one with the least Kolmogorov-Smirnov
    distance is kept. As in the authors' program the distance is taken at the foot of each step
    of the sample's distribution function, so that it can be up to 1/k below the usual one. The
    results equal those of the `powerlaw` package (2.0.0) without its default limit α ≤ 3, which
    would cut off most layers of a network.

    Args:
        values: Positive numbers of shape (k,), at least two of them different; others are
            dropped.

    Returns:
        PowerLaw: alpha, xmin, distance, n_tail.

    Raises:
        ArgumentError: For fewer than two different positive values, or NaN.

    Source:
        Clauset, Shalizi and Newman, SIAM Review 2009, equation 3.1.

    Example:
        >>> import numpy as np
        >>> u = (np.arange(2000) + 0.5) / 2000
        >>> round(fit_power_law((1 - u) ** (-1 / 1.5)).alpha, 2)  # density x^(-2.5)
        2.5
    """
    sample = np.asarray(values, dtype=float).ravel()
    if not bool(np.isfinite(sample).all()):
        raise ArgumentError("the values have NaN or infinite entries")
    sample = np.sort(sample[sample > 0])
    starts = np.unique(sample, return_index=True)[1][:-1]
    if len(starts) == 0:
        raise ArgumentError("a power law needs at least two different positive values")
    logs = np.log(sample)
    best = PowerLaw(math.nan, math.nan, math.inf, 0)
    for start in starts:
        excess = logs[start:] - logs[start]
        k = len(excess)
        alpha = 1 + k / float(excess.sum())
        fitted = -np.expm1(-(alpha - 1) * excess)
        distance = float(np.abs(fitted - np.arange(k) / k).max())
        if distance < best.distance:
            best = PowerLaw(alpha, float(sample[start]), distance, k)
    return best


def spectrum(weight: Tensor) -> np.ndarray:
    """Eigenvalues of WᵀW, or of all cells of a kernel (out, in, ...) together; ascending."""
    matrices = weight.double().flatten(2).movedim(-1, 0) if weight.ndim > 2 else weight.double()
    values: np.ndarray = torch.linalg.svdvals(matrices).square().flatten().cpu().numpy()
    return np.sort(values)


def heavy_tail_exponent(
    model: nn.Module, *, min_eigenvalues: int = 20, halve_convolutions: bool = False
) -> dict[str, float]:
    """The exponents of power laws in the spectra of the weight matrices.

    With α_l the exponent fitted to the eigenvalues of W_lᵀW_l and λ_l the largest of them:

        alpha           mean over layers of α_l
        alpha_weighted  mean over layers of α_l log₁₀ λ_l

    Small exponents, heavy tails, are a sign of well trained layers. Neither data nor gradients
    are used; cost: one singular value decomposition per layer, one per cell for a kernel, whose
    eigenvalues are pooled. Weights are taken as they are, without BatchNorm. `alpha` is invariant
    under scaling each layer and under permuting units.

    WeightWatcher multiplies the kernels of convolutions by 1/√2 unless told otherwise
    (`conv2d_norm`), which halves their eigenvalues: its α_l log₁₀ λ_l of a convolution is
    0.301 α_l below the one here, and equal to it with `halve_convolutions`.

    Args:
        model: Any module with weight matrices or convolutions.
        min_eigenvalues: Layers with fewer non-zero eigenvalues are left out: a fit to a dozen
            numbers says nothing.
        halve_convolutions: Halve the eigenvalues of kernels, as WeightWatcher does by default.

    Returns:
        dict: "alpha" and "alpha_weighted".

    Raises:
        ModelError: If no layer has enough eigenvalues.
        ArgumentError: If min_eigenvalues is less than 2.

    Source:
        Martin and Mahoney, JMLR 2021; alpha_weighted: Martin, Peng and Mahoney, Nature
        Communications 2021.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> 1 < heavy_tail_exponent(torch.nn.Linear(50, 40))["alpha"] < 20
        True
    """
    if min_eigenvalues < 2:
        raise ArgumentError(f"min_eigenvalues must be at least 2, got {min_eigenvalues}")
    select_parameters(model)  # refuses NaN
    alphas, weighted = [], []
    for _, _, weight in linear_maps(model):
        values = spectrum(weight) * (0.5 if halve_convolutions and weight.ndim > 2 else 1.0)
        values = values[values > 1e-12 * values[-1]]
        if len(values) >= min_eigenvalues and values[0] < values[-1]:
            alpha = fit_power_law(values).alpha
            alphas.append(alpha)
            weighted.append(alpha * math.log10(values[-1]))
    if not alphas:
        raise ModelError(f"no weight has {min_eigenvalues} different non-zero eigenvalues")
    return {"alpha": float(np.mean(alphas)), "alpha_weighted": float(np.mean(weighted))}
