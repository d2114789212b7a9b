"""The spectra of weight matrices against those of random ones, as WeightWatcher reports them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit.contract.parameters import select_parameters
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures.heavy_tails import spectrum
from sharpkit.measures.weight_layers import linear_maps

_BANDWIDTH = 0.1  # of the kernel density of eigenvalues whose mean is 1
_GRID = 1000
_THRESHOLD = 0.01  # below this density a grid point is left out of the fit


def weight_spectrum(
    model: nn.Module, *, min_eigenvalues: int = 10, halve_convolutions: bool = False, seed: int = 0
) -> dict[str, float]:
    """Sizes of the layers' spectra, and how far they are from those of random matrices.

    With λ the eigenvalues of W_lᵀW_l, those of all cells of a kernel together, means over layers of

    - log_norm: log₁₀ Σ λ;
    - log_spectral_norm: log₁₀ max λ;
    - mp_softrank: λ⁺ / max λ, λ⁺ the upper edge of the Marchenko-Pastur law that fits best;
    - rand_distance: Jensen-Shannon distance between the sorted λ and those of W_l with its entries
      shuffled, each divided by its sum.

    A random matrix has mp_softrank near 1 and rand_distance near 0; training moves both. The law is
    fitted through its width σ to a kernel density of the eigenvalues, scaled to mean 1. Weights are
    taken as they are, without BatchNorm; neither data nor gradients are used. The last two are
    invariant under scaling each layer, all under permuting units. Cost: two singular value
    decompositions per layer, one per cell for a kernel.

    Args:
        model: Any module with weight matrices or convolutions.
        min_eigenvalues: Layers with fewer eigenvalues are left out.
        halve_convolutions: Halve the eigenvalues of kernels, as WeightWatcher does by default.
        seed: Of the shuffles.

    Returns:
        dict: The four means.

    Raises:
        ArgumentError: If min_eigenvalues is less than 2.
        ModelError: If no layer has enough eigenvalues, or a weight is zero.

    Source:
        Martin and Mahoney, JMLR 2021 (1810.01075), section 5 for the soft rank; Martin, Peng and
        Mahoney, Nature Communications 2021, for the norms; the program WeightWatcher (0.7.7) for
        the fit and the distance. For square matrices it fits a quarter circle of fixed radius,
        here the radius follows σ.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(60, 40)
        >>> _ = torch.nn.init.normal_(model.weight)
        >>> found = weight_spectrum(model)
        >>> abs(found["mp_softrank"] - 1) < 0.15, found["rand_distance"] < 0.03
        (True, True)
    """
    if min_eigenvalues < 2:
        raise ArgumentError(f"min_eigenvalues must be at least 2, got {min_eigenvalues}")
    select_parameters(model)  # refuses NaN
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {}
    for name, _, weight in linear_maps(model):
        factor = 0.5 if halve_convolutions and weight.ndim > 2 else 1.0
        values = factor * spectrum(weight)
        if len(values) < min_eigenvalues:
            continue
        if not values[-1] > 0:
            raise ModelError(f"{name!r} is zero, so that the logarithm of its norm is infinite")
        shape = sorted(weight.shape[:2])
        random = factor * spectrum(_shuffled(weight, generator))
        each = {
            "log_norm": math.log10(values.sum()),
            "log_spectral_norm": math.log10(values[-1]),
            "mp_softrank": marchenko_pastur_edge(values, shape[1] / shape[0]) / values[-1],
            "rand_distance": jensen_shannon(values, random),
        }
        for form, value in each.items():
            found.setdefault(form, []).append(float(value))
    if not found:
        raise ModelError(f"no weight has {min_eigenvalues} eigenvalues")
    return {form: float(np.mean(values)) for form, values in found.items()}


def _shuffled(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A weight with the entries of each cell in random order."""
    cells = weight.cpu().flatten(2) if weight.ndim > 2 else weight.cpu().unsqueeze(2)
    mixed = [
        cell.flatten()[torch.randperm(cell.numel(), generator=generator)].view_as(cell)
        for cell in cells.movedim(-1, 0)
    ]
    return torch.stack(mixed, -1).view_as(weight)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """√(½ KL(p, m) + ½ KL(q, m)) with m = (p + q) / 2, in nats, of two vectors divided by sums.

    Example:
        >>> round(jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) ** 2, 4)  # log 2
        0.6931
    """
    from scipy.special import rel_entr

    # WeightWatcher's m is the mean before the division, whose entries are then divided as well
    m = (p + q) / (p + q).sum()
    p, q = p / p.sum(), q / q.sum()
    return math.sqrt(max(float(rel_entr(p, m).sum() + rel_entr(q, m).sum()) / 2, 0.0))


def marchenko_pastur_edge(eigenvalues: np.ndarray, ratio: float) -> float:
    """The upper edge σ² (1 + 1/√Q)² of the Marchenko-Pastur law that fits the eigenvalues best.

    Args:
        eigenvalues: Of WᵀW, shape (k,), not all 0.
        ratio: Q ≥ 1, the longer side of W over the shorter.

    Returns:
        float: The edge, in units of the eigenvalues.

    Source:
        Marchenko and Pastur, 1967; the least-squares fit of σ on a grid is WeightWatcher's.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> w = rng.standard_normal((2000, 500))
        >>> edge = marchenko_pastur_edge(np.linalg.eigvalsh(w.T @ w / 2000), 4.0)
        >>> abs(edge / 1.5**2 - 1) < 0.03  # (1 + ½)²
        True
    """
    from scipy.optimize import brute
    from sklearn.neighbors import KernelDensity

    scale = len(eigenvalues) / eigenvalues.sum()
    values = eigenvalues * scale
    top = math.sqrt(values.max()) / (1 + ratio**-0.5)
    values = np.sqrt(values) if ratio == 1 else values
    x = np.linspace(0, values.max() + 0.5, _GRID)
    kernel = KernelDensity(kernel="linear", bandwidth=_BANDWIDTH).fit(values[:, None])
    density = np.exp(kernel.score_samples(x[:, None]))
    x, density = x[density > _THRESHOLD], density[density > _THRESHOLD]
    law = _quarter_circle if ratio == 1 else _law(ratio)
    peak = x[density.argmax()]

    def misfit(sigma: np.ndarray) -> float:
        low, high = ((sigma.item() * (1 + sign * ratio**-0.5)) ** 2 for sign in (-1, 1))
        if ratio != 1 and not (low <= peak <= high <= x.max()):
            return 1e6 * len(x)
        return float(np.square(law(x, sigma.item()) - density).sum())

    sigma = brute(misfit, (slice(0.05 * top, 2.0 * top, 0.01 * top),)).item()
    return float((sigma * (1 + ratio**-0.5)) ** 2 / scale)


def _quarter_circle(x: np.ndarray, sigma: float) -> np.ndarray:
    """Density of the singular values of a square random matrix."""
    inside: np.ndarray = np.sqrt(np.maximum(4 * sigma**2 - x**2, 0.0))
    return inside / (np.pi * sigma**2)


def _law(ratio: float) -> Callable[[np.ndarray, float], np.ndarray]:
    """The Marchenko-Pastur density of x > 0, 0 outside its edges."""

    def density(x: np.ndarray, sigma: float) -> np.ndarray:
        low, high = ((sigma * (1 + sign * ratio**-0.5)) ** 2 for sign in (-1, 1))
        inside: np.ndarray = np.sqrt(np.maximum((high - x) * (x - low), 0.0))
        law: np.ndarray = inside * ratio / (2 * np.pi * sigma**2 * np.maximum(x, 1e-300))
        return law

    return density
