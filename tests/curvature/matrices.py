"""Symmetric matrices of known spectrum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def with_spectrum(values: np.ndarray, seed: int = 0) -> Tensor:
    """A dense matrix with these eigenvalues and random eigenvectors, float64."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    a = (q * torch.tensor(values, dtype=torch.float64)) @ q.T
    return (a + a.T) / 2


def wishart(size: int, samples: int, seed: int = 0) -> Tensor:
    """XᵀX / samples for standard normal X."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, size, generator=g, dtype=torch.float64)
    return x.T @ x / samples


def marchenko_pastur(size: int, samples: int) -> np.ndarray:
    """Quantiles of the Marchenko-Pastur law, size of them, by integrating its density."""
    ratio = size / samples
    low, high = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    x = np.linspace(low, high, 200_001)
    density = np.sqrt(np.maximum((high - x) * (x - low), 0)) / (2 * np.pi * ratio * x)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    return np.interp((np.arange(size) + 0.5) / size, cumulative / cumulative[-1], x)


_rng = np.random.default_rng(0)
SPECTRA: dict[str, np.ndarray] = {
    "outliers": np.concatenate([_rng.normal(0, 0.1, 115), [5.0, 8.0, 9.0, 20.0, 100.0]]),
    "clustered": np.concatenate([c + 1e-7 * _rng.normal(size=30) for c in (-2.0, 0.0, 1.0, 7.0)]),
    "degenerate": np.repeat([-1.0, 0.0, 3.0, 4.0], 30),
    "rank_deficient": np.concatenate([np.zeros(110), np.linspace(1, 2, 10)]),
    "identity": np.ones(120),
    "zero": np.zeros(120),
    "one_by_one": np.array([3.0]),
    "uniform": np.linspace(-1, 1, 120),
    "tiny": 1e-12 * np.linspace(1, 2, 120),
}
