"""Flatness of the last layer, in units of its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.contract.losses import check_class_labels
from sharpkit.contract.modules import hooked
from sharpkit.errors import ModelError
from sharpkit.measures.measure import Estimate
from sharpkit.measures.passes import mean_of, setup
from sharpkit.measures.weight_layers import called_layers


def relative_flatness(model: nn.Module, data: Data) -> Estimate:
    """The Hessian of the last layer, traced neuron by neuron and weighed by the neurons' weights.

        κ = Σ_{s,t} ⟨w_s, w_t⟩ tr H_st,   H_st = ∂²L / ∂w_s ∂w_t

    w_s are the rows of the weight W of the last linear layer, of the mean cross-entropy L. With φ_i
    what that layer receives and p_i the predicted probabilities, the Hessian of this layer is known
    in closed form, and so is the measure:

        κ = mean over i of ‖φ_i‖₂² tr Wᵀ (diag p_i − p_i p_iᵀ) W

    Invariant under rescaling layers, since φ grows where W shrinks, and under permuting units; not
    under rescaling single units, for which the authors first give every feature unit variance.
    Labels enter through the network only. Cost: 1 F.

    Args:
        model: Any module whose outputs (n, classes) are those of a linear layer.
        data: Inputs of shape (n, ...) and labels of shape (n,).

    Returns:
        Estimate: The mean, and its standard error over examples; smaller is flatter.

    Raises:
        DataError: For labels that do not fit the outputs.
        ModelError: If the outputs are not those of a linear layer, or not finite.

    Source:
        Petzka et al., "Relative flatness and generalization", NeurIPS 2021 (2001.00939),
        definition 3, for the layer that they measure.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0], [1.0]])
        >>> data = torch.tensor([[2.0]]), torch.tensor([0])
        >>> relative_flatness(model, data).value  # equal rows: no curvature along both
        0.0
        >>> model.weight.data = torch.tensor([[0.0], [0.5]])
        >>> round(relative_flatness(model, data).value, 4)  # 4 · ¼ · p (1 − p), p = 0.731
        0.1966
    """
    layer = called_layers(model, data)[0][-1]
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"the last layer is {type(layer).__name__}: expected nn.Linear")
    weight = layer.weight.detach().double()
    calls: list[tuple[Tensor, Tensor]] = []
    keep = layer.register_forward_hook(lambda _, given, out: calls.append((given[0], out)))
    values = []
    with hooked([keep]), frozen(model) as found, torch.no_grad():
        run = setup(model, data, found)
        for batch in run.batches():
            logits = run.function({}, batch.inputs)
            check_class_labels(batch.labels, logits)
            features, output = calls[-1]
            calls.clear()
            if output.shape != logits.shape or not torch.equal(output, logits):
                raise ModelError("the outputs are not those of the last linear layer called")
            p = logits.double().softmax(1)
            # Σ_s p_s ‖w_s − Σ_t p_t w_t‖², exact also where one p is nearly 1
            off = weight - (p @ weight).unsqueeze(1)  # (examples, classes, features)
            spread = (p * off.square().sum(2)).sum(1)
            values.append(features.double().square().sum(1) * spread)
    result = torch.cat(values)
    if not bool(torch.isfinite(result).all()):
        raise ModelError("the model has NaN or infinite outputs")
    return mean_of(result)
