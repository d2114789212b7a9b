"""Margins in units of how far apart two halves of a class lie."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.errors import DataError, ModelError
from sharpkit.measures.layer_margins import LayerMargins, layer_margins
from sharpkit.measures.passes import setup
from sharpkit.measures.weight_layers import Convolution, called_layers

_FLOOR = 1e-6  # of the gradient's norm, as in the authors' program


def k_variance_margin(model: nn.Module, data: Data, *, seed: int = 0) -> dict[str, float]:
    """The median margin at a layer, over the transport distance between halves of the classes.

        median over i of γ_i / (‖∂γ_i / ∂h_i‖₂ + 10⁻⁶)  /  Σ_c (n_c / n) W₁(S_c, S'_c)

    h is the representation at the layer, γ_i = z_y − max_{j≠y} z_j, and S_c and S'_c two disjoint
    random sets of k = ⌊n_c / 2⌋ examples of class c; W₁ is the least mean distance at which one can
    be matched to the other (the k-variance); classes with one example are left out of it. Two
    layers are measured:

    - shallow: h is what the second linear or convolutional layer receives;
    - deep: h is what the last convolution receives, the last linear layer where there are fewer
      than two convolutions.

    Invariant under rescaling layers and permuting units, and for networks without biases under
    scaling weights or inputs. Cost: 2 G, and an assignment problem per class, k³ at worst.

    Args:
        model: Any module whose examples do not influence each other, with outputs (n, classes).
        data: Inputs of shape (n, ...) and labels of shape (n,), two of some class.
        seed: Of the halves.

    Returns:
        dict: "shallow" and "deep"; larger is better, negative where most margins are.

    Raises:
        DataError: For labels that do not fit the outputs, a single output, or no class with two
            examples.
        ModelError: For NaN or infinite weights or outputs, or a representation that is the same for
            all examples of a class.

    Source:
        Chuang et al., "Measuring generalization with optimal transport", NeurIPS 2021 (2106.03314),
        the kV-GN-margin, and the authors' program; there at most 200 examples a class, and layers
        by their position in Keras ("1st", "8th").

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0], [-1.0]])
        >>> x = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]])
        >>> found = k_variance_margin(model, (x, torch.tensor([0, 0, 1, 1])))
        >>> round(found["deep"], 4)  # distances 1, 2, 1, 2 from the boundary; halves 1 apart
        1.5
    """
    layers, _ = called_layers(model, data)
    convolutions = [layer for layer in layers if isinstance(layer, Convolution)]
    chosen = {
        "shallow": layers[min(1, len(layers) - 1)],
        "deep": convolutions[-1] if len(convolutions) > 1 else layers[-1],
    }
    with frozen(model) as found:
        run = setup(model, data, found)
        labels = run.examples.labels.cpu()
        at = {form: layer_margins(run, model, layer) for form, layer in chosen.items()}
    return {form: _normalised(margins, labels, seed) for form, margins in at.items()}


def _normalised(at: LayerMargins, labels: Tensor, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    spread, counted = 0.0, 0
    for label in sorted(set(labels.tolist())):
        members = torch.nonzero(labels == label).squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        half = len(members) // 2
        if half:
            rows = at.rows[members]
            distance = transport_distance(rows[:half], rows[half : 2 * half])
            spread += len(members) * distance
            counted += len(members)
    if not counted:
        raise DataError("no class has two examples: its halves have no distance")
    if not spread > 0:
        raise ModelError("the representation is the same for all examples of each class")
    distances = at.margins / (at.slopes + _FLOOR)
    return float(np.median(distances.numpy())) / (spread / counted)


def transport_distance(a: Tensor, b: Tensor) -> float:
    """W₁ between two sets of k points each, (k, d): the least mean distance of a matching.

    Example:
        >>> a, b = torch.tensor([[0.0], [10.0]]), torch.tensor([[11.0], [2.0]])
        >>> transport_distance(a, b)  # 0 to 2 and 10 to 11
        1.5
    """
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    return float(cost[linear_sum_assignment(cost)].mean())
