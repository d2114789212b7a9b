"""The spectrum of each layer or block: diagonal blocks of the curvature matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss
from sharpkit.contract.modules import unwrapped
from sharpkit.contract.parameters import floating_parameters
from sharpkit.curvature.density import SpectralDensity
from sharpkit.curvature.hessian import HessianOperator
from sharpkit.curvature.operator import CurvatureOperator
from sharpkit.curvature.quadrature import spectral_density
from sharpkit.errors import ArgumentError


def layer_spectra(
    model: nn.Module,
    data: Data,
    *,
    by: Literal["layer", "block"] | Mapping[str, str | Iterable[str]] = "layer",
    operator: type[CurvatureOperator] = HessianOperator,
    loss: Loss = "cross_entropy",
    n: int | None = None,
    steps: int = 80,
    probes: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, SpectralDensity]:
    """The spectral density of every layer's own block of the curvature matrix.

    Args:
        model: Any module in eval mode.
        data: As for `HessianOperator`.
        by: "layer" for every module that owns parameters, "block" for every child of the model,
            or a mapping of names to parameter names or patterns.
        operator: `HessianOperator`, `GaussNewtonOperator` or `FisherOperator`.
        loss: As for `HessianOperator`.
        n: How many examples; None for all.
        steps: Lanczos steps, at most; a layer with fewer parameters takes as many as it has.
        probes: Number of probes.
        seed: Of the probes.
        progress: Show progress bars.

    Returns:
        dict: Name of the layer to its `SpectralDensity`, in the model's order. A parameter shared
            by several layers appears in each of them.

    Raises:
        ArgumentError: If nothing is selected, or as `spectral_density`.
        ModelError: As `HessianOperator`.

    Source:
        Sagun et al. 2017 and Papyan 2020 for spectra of blocks.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> data = torch.randn(8, 2), torch.randint(0, 2, (8,))
        >>> spectra = layer_spectra(model, data, steps=5, probes=2)
        >>> {name: s.size for name, s in spectra.items()}
        {'0': 9, '2': 8}
    """
    spectra = {}
    for name, selection in _groups(model, by).items():
        with operator(
            model, data, loss=loss, parameters=selection, n=n, progress=progress
        ) as matrix:
            spectra[name] = spectral_density(
                matrix,
                steps=min(steps, matrix.shape[0]),
                probes=probes,
                seed=seed,
                progress=progress,
            )
    return spectra


def _groups(
    model: nn.Module, by: Literal["layer", "block"] | Mapping[str, str | Iterable[str]]
) -> dict[str, Any]:
    """Name of each group to the names of its parameters that are measured by default."""
    model, selected = unwrapped(model), floating_parameters(model)
    measured = {id(p) for name, p in model.named_parameters() if name in selected}
    if isinstance(by, Mapping):
        return {name: [p] if isinstance(p, str) else list(p) for name, p in by.items()}
    if by == "layer":
        modules = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(False))}
    elif by == "block":
        modules = dict(model.named_children())
    else:
        raise ArgumentError(f'by must be "layer", "block" or a mapping, got {by!r}')
    groups = {}
    for name, module in modules.items():
        own = module.named_parameters(recurse=by == "block")
        names = [f"{name}.{p}" if name else p for p, w in own if id(w) in measured]
        if names:
            groups[name] = names
    if not groups:
        raise ArgumentError(
            f"{type(model).__name__} has no {by} with parameters that require gradients"
        )
    return groups
