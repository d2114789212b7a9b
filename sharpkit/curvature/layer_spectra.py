"""The spectrum of each layer or block: diagonal blocks of the curvature matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss
from sharpkit.contract.modules import unwrapped
from sharpkit.contract.parameters import floating_parameters
from sharpkit.curvature.block_result import LayerSpectra
from sharpkit.curvature.coupling import block_lengths
from sharpkit.curvature.hessian import HessianOperator
from sharpkit.curvature.operator import CurvatureOperator
from sharpkit.curvature.quadrature import spectral_density
from sharpkit.errors import ArgumentError

Selection: TypeAlias = "str | nn.Module | Iterable[str | nn.Module]"


def layer_spectra(
    model: nn.Module,
    data: Data | DistributedData,
    *,
    by: Literal["layer", "block"] | Mapping[str, Selection] = "layer",
    operator: type[CurvatureOperator] = HessianOperator,
    loss: Loss = "cross_entropy",
    n: int | None = None,
    steps: int = 80,
    probes: int = 4,
    share_probes: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> LayerSpectra:
    """The spectral density of every layer's own block of the curvature matrix.

    With them comes the share of the matrix's squared Frobenius norm that lies between blocks, which
    their spectra do not show: 1 − Σ_b ‖A_bb‖²_F / ‖A‖²_F, from products of random signs z_b in each
    block with the matrix of all blocks. Cost: steps x probes products of each block, and
    share_probes x blocks products of the whole.

    Args:
        model: Any module in eval mode.
        data: As for `HessianOperator`.
        by: "layer" for every module that owns parameters, "block" for every child of the model,
            or a mapping of names to parameter names, patterns or modules, one or several:
            {"adapters": "*lora*", "norms": "*norm*", "embeddings": "*embed*"}. What is in no block
            is left out everywhere.
        operator: `HessianOperator`, `GaussNewtonOperator` or `FisherOperator`.
        loss: As for `HessianOperator`.
        n: How many examples; None for all.
        steps: Lanczos steps, at most; a layer with fewer parameters takes as many as it has.
        probes: Number of probes.
        share_probes: Random vectors for the cross-block share; 0 to leave it out.
        seed: Of the probes.
        progress: Show progress bars.

    Returns:
        LayerSpectra: Maps the name of the layer to its `SpectralDensity`, in the model's order. A
            parameter shared by several layers appears in each of them; there is no cross-block
            share then.

    Raises:
        ArgumentError: If nothing is selected, or as `spectral_density`.
        ModelError: As `HessianOperator`.

    Source:
        Sagun et al. 2017 and Papyan 2020 for spectra of blocks; Zhang et al., NeurIPS 2024, for how
        they differ; arXiv:2602.00816 for what they leave out.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> data = torch.randn(8, 2), torch.randint(0, 2, (8,))
        >>> spectra = layer_spectra(model, data, steps=5, probes=2)
        >>> {name: s.size for name, s in spectra.items()}
        {'0': 9, '2': 8}
    """
    if share_probes < 0:
        raise ArgumentError(f"share_probes must be 0 or more, got {share_probes}")
    groups = _groups(model, by)
    resolved = {g: list(floating_parameters(model, names)) for g, names in groups.items()}
    count = Counter(name for names in resolved.values() for name in names)
    shared = tuple(name for name, times in count.items() if times > 1)
    spectra = {}
    for name, selection in groups.items():
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
    if shared or not share_probes:
        return LayerSpectra(spectra, None, shared)
    with operator(model, data, loss=loss, parameters=list(count), n=n, progress=progress) as whole:
        places = whole.split(torch.arange(whole.shape[0], device=whole.device))
        blocks = [
            torch.cat([places[name].flatten() for name in names]) for names in resolved.values()
        ]
        lengths = block_lengths(whole, blocks, share_probes, seed, progress)
    return LayerSpectra(spectra, lengths, ())


def _groups(
    model: nn.Module, by: Literal["layer", "block"] | Mapping[str, Selection]
) -> dict[str, Any]:
    """Name of each group to the names of its parameters that are measured by default."""
    model, selected = unwrapped(model), floating_parameters(model)
    measured = {id(p) for name, p in model.named_parameters() if name in selected}
    if isinstance(by, Mapping):
        single = str | nn.Module
        return {name: [p] if isinstance(p, single) else list(p) for name, p in by.items()}
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
