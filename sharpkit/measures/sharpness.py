"""Sharpness of the whole training loss: m-sharpness with a single group."""

from __future__ import annotations

import math

from torch import Tensor, nn

from sharpkit.contract.loading import Data, as_data, load_in_order
from sharpkit.contract.losses import cross_entropy
from sharpkit.measures.measure import Estimate
from sharpkit.sharpness.ascent_rules import AscentLike
from sharpkit.sharpness.m_sharpness import m_sharpness


def worst_case_sharpness(
    model: nn.Module,
    data: Data,
    *,
    rho: float = 0.05,
    norm: float = 2.0,
    adaptive: bool = False,
    ascent: AscentLike = "pgd",
    steps: int = 10,
    restarts: int = 1,
    logit_normalized: bool = False,
    seed: int = 0,
) -> float:
    """The largest increase of the training loss within a ball around the weights.

        max over ‖ε‖_p ≤ ρ of L(w + ε) − L(w);   with adaptive, ‖ε / |w|‖_p ≤ ρ

    p = 2 is Foret et al.'s, p = ∞ that of Keskar et al.; `adaptive` makes it invariant under
    rescaling the layers of a ReLU network: with p = 2 the adaptive elementwise sharpness, with
    p = ∞ the magnitude-aware one. Projected ascent gives a lower bound of the
    maximum. With `logit_normalized` the loss is that of (z − z̄) / ‖z − z̄‖₂, so that neither the
    scale of the outputs nor that of the last layer matters: a network that is more certain is not
    flatter for that. Cost: `steps` gradient passes and one forward pass, and for every further
    start one gradient pass more.

    Args:
        model: Any module.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        rho: Radius, > 0.
        norm: 2 or infinity.
        adaptive: Measure ε in units of |w|.
        ascent: "pgd", "apgd", or "one_step" for the linearised maximum (a pass of either kind).
        steps: Steps of "pgd" and "apgd".
        restarts: Starts of "pgd" and "apgd": the weights, and random points of the ball.
        logit_normalized: Centre the logits of each example and divide them by their length.
        seed: Of the random starts.

    Returns:
        float: The increase.

    Raises:
        ArgumentError: For rho, norm, steps or restarts out of range.
        DataError: For labels that do not fit the outputs.
        ModelError: For NaN or infinite weights or losses.

    Source:
        Foret et al., ICLR 2021, equation 1; Kwon et al., ICML 2021; Jiang et al., ICLR 2020
        (1912.02178), where the search is for the radius that costs a given accuracy instead;
        Andriushchenko et al., ICML 2023 (2302.07011), adaptive and logit-normalised, by APGD.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> data = torch.eye(2), torch.tensor([0, 1])
        >>> worst_case_sharpness(model, data) > 0
        True
    """
    examples = load_in_order(data)
    result = m_sharpness(
        model,
        as_data(examples),
        m=len(examples),
        rho=rho,
        norm=norm,
        adaptive=adaptive,
        ascent=ascent,
        steps=steps,
        restarts=restarts,
        loss=logit_normalized_loss if logit_normalized else "cross_entropy",
        seed=seed,
        progress=False,
    )
    return float(result.value)


def logit_normalized_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of logits (n, classes), centred and divided by their length.

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])
        >>> bool(logit_normalized_loss(z, y) == logit_normalized_loss(4 * z + 1, y))
        True
    """
    centred = logits - logits.mean(-1, keepdim=True)
    length = centred.norm(dim=-1, keepdim=True).clamp_min(1e-10)
    return cross_entropy(centred / length, labels)


def average_sharpness(
    model: nn.Module,
    data: Data,
    *,
    rho: float = 0.05,
    adaptive: bool = False,
    draws: int = 20,
    seed: int = 0,
) -> Estimate:
    """The mean increase of the training loss over random directions of a given length.

        E[L(w + ε) − L(w)],  ε Gaussian, scaled to ‖ε‖₂ = ρ

    To second order this is ρ² tr(H) / 2P for P parameters: far smaller than the worst case at the
    same ρ. Cost: `draws` + 1 forward passes.

    Args:
        model: Any module.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        rho: Length of the perturbation, > 0.
        adaptive: Measure ε in units of |w|.
        draws: Directions.
        seed: Of the directions.

    Returns:
        Estimate: The mean; its error over directions is not known (NaN).

    Raises:
        ArgumentError: For rho or draws out of range.
        DataError: For labels that do not fit the outputs.
        ModelError: For NaN or infinite weights or losses.

    Source:
        Andriushchenko et al., ICML 2023, average-case sharpness; there the noise has a given
        variance per coordinate, here a given length as a whole.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> data = torch.eye(2), torch.tensor([0, 1])
        >>> average_sharpness(model, data, rho=2.0, draws=200).value > 0
        True
    """
    examples = load_in_order(data)
    result = m_sharpness(
        model,
        as_data(examples),
        m=len(examples),
        rho=rho,
        average=True,
        adaptive=adaptive,
        steps=draws,
        seed=seed,
        progress=False,
    )
    return Estimate(float(result.value), math.nan)
