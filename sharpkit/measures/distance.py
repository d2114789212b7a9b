"""How far training moved the weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from sharpkit.contract.loading import Data
from sharpkit.contract.parameters import select_parameters
from sharpkit.errors import ModelError
from sharpkit.measures.margins import margin_squared
from sharpkit.measures.norms import frobenius_squared, products
from sharpkit.measures.spectral import spectral_norm
from sharpkit.measures.weight_layers import initial_layers, weight_layers


def distance_from_initial(
    model: nn.Module, data: Data, *, initial: nn.Module, percentile: float = 10.0
) -> dict[str, float]:
    """Distances of the layers from their values before training.

    With W⁰ the initial weights, BatchNorm folded in on both sides, s_i = ‖W_i‖₂² and margin γ:

        frobenius       Σ ‖W_i − W_i⁰‖_F²
        spectral        Σ ‖W_i − W_i⁰‖₂²
        log_complexity  Σ log s_i − 2 log|γ| + log Σ ‖W_i − W_i⁰‖_F² / s_i
        euclidean       ‖w − w⁰‖₂ over all parameters as they are, biases included

    `log_complexity` is −infinity, and so an error, for a network that has not moved. Cost: the
    spectral norms, twice; one forward pass for the margin.

    Args:
        model: The trained network.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        initial: The same architecture before training.
        percentile: Of the margins, 0 to 100.

    Returns:
        dict: Name to value.

    Raises:
        ModelError: If the architectures differ, the networks are equal, or a weight is zero.
        ArgumentError: For a percentile outside 0 to 100.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), equations 29, 40 and 41.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, initial = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.diag(torch.tensor([4.0, 5.0]))
        >>> initial.weight.data = torch.eye(2)
        >>> data = torch.eye(2), torch.tensor([0, 1])
        >>> moved = distance_from_initial(model, data, initial=initial)
        >>> round(moved["frobenius"], 6), round(moved["spectral"], 6)  # differences 3 and 4
        (25.0, 16.0)
    """
    layers = weight_layers(model, data)
    pairs = list(initial_layers(layers, initial, data))
    changes = [a.weight - b.weight.to(a.weight.device) for a, b in pairs]
    frobenius = [frobenius_squared(change) for change in changes]
    if not any(frobenius):
        raise ModelError("the model equals its initial state: there is no distance to measure")
    squares = [spectral_norm(layer) ** 2 for layer in layers]
    base = products(layers, squares, margin_squared(model, data, percentile))
    ratio = sum(f / s for f, s in zip(frobenius, squares, strict=True))
    return {
        "frobenius": sum(frobenius),
        "spectral": sum(
            spectral_norm(layer, change) ** 2 for layer, change in zip(layers, changes, strict=True)
        ),
        "log_complexity": base["log_product_over_margin"] + math.log(ratio),
        "euclidean": math.sqrt(squared_distance(model, initial)),
    }


def squared_distance(model: nn.Module, initial: nn.Module) -> float:
    """‖w − w⁰‖₂² over all parameters of two networks of the same architecture.

    Raises:
        ModelError: If the parameters differ in name or shape.
    """
    ours, theirs = select_parameters(model), select_parameters(initial)
    shapes = [{name: p.shape for name, p in side.items()} for side in (ours, theirs)]
    if shapes[0] != shapes[1]:
        odd = sorted(
            name for name in set(ours) | set(theirs) if shapes[0].get(name) != shapes[1].get(name)
        )
        raise ModelError(f"initial model: parameters differ from the model's: {', '.join(odd)}")
    return sum(
        float(torch.linalg.vector_norm(p.double() - theirs[name].to(p.device).double())) ** 2
        for name, p in ours.items()
    )
