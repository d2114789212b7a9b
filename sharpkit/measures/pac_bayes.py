"""PAC-Bayes measures: how much Gaussian noise on the weights the training accuracy survives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data, load_in_order
from sharpkit.contract.parameters import floating_parameters, select_parameters
from sharpkit.errors import ArgumentError
from sharpkit.measures.distance import squared_distance
from sharpkit.measures.passes import setup
from sharpkit.measures.search import check_drop, size_of_drop


def noise_scale(
    model: nn.Module,
    data: Data,
    *,
    magnitude: bool = False,
    epsilon: float = 1e-3,
    drop: float = 0.1,
    draws: int = 10,
    seed: int = 0,
) -> float:
    """The size of Gaussian weight noise at which the training accuracy has fallen by `drop`.

        σ with  A(w) − mean_k A(w + σ u_k) = drop,           u_k ~ N(0, I)
        σ with  A(w) − mean_k A(w + √(σ² w² + ε²) u_k) = drop   if magnitude

    The same K draws u_k serve every σ, so that the left side is one fixed function of σ; its root
    is bracketed by factors of 4 and then found by Brent's method in log σ, to 0.5 %. Cost: about
    8 K forward passes, no gradients.

    Args:
        model: Any module with outputs of shape (n, classes); all its parameters are perturbed.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        magnitude: Noise in proportion to each weight.
        epsilon: The floor ε of that noise.
        drop: Fall in accuracy, between 0 and 1.
        draws: Number K of noise vectors.
        seed: Of the noise.

    Returns:
        float: σ; larger means flatter.

    Raises:
        ArgumentError: For drop, draws or epsilon out of range.
        ModelError: If no amount of noise lowers the accuracy by `drop` (it is too low already), or
            the floor ε alone lowers it more.

    Source:
        Dziugaite et al., NeurIPS 2020 (2010.11924) and its program, with a drop of 0.1, ten draws
        and ε = 10⁻³; there new noise is drawn at every step of the search.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> data = torch.eye(2), torch.tensor([0, 1])
        >>> wide = noise_scale(model, data, draws=50)
        >>> model.weight.data *= 2  # twice the weights survive twice the noise
        >>> round(noise_scale(model, data, draws=50) / wide, 2)
        2.0
    """
    check_drop(drop)
    if draws < 1:
        raise ArgumentError(f"draws must be at least 1, got {draws}")
    if epsilon < 0:
        raise ArgumentError(f"epsilon must not be negative, got {epsilon}")
    with frozen(model) as found, torch.no_grad():
        run = setup(model, data, found)
        weights = floating_parameters(model)
        spread = (lambda s, p: (s**2 * p.square() + epsilon**2).sqrt()) if magnitude else None

        def noisy(sigma: float) -> float:
            generator = torch.Generator().manual_seed(seed)
            accuracies = [
                run.accuracy(_perturbed(weights, sigma, spread, generator)) for _ in range(draws)
            ]
            return sum(accuracies) / draws

        guess = 0.1 if magnitude else 0.1 * typical_weight(weights)
        hint = ": try a smaller epsilon" if magnitude else ""
        return size_of_drop(noisy, run.accuracy(), drop, guess, hint)


def pac_bayes(
    model: nn.Module,
    data: Data,
    *,
    initial: nn.Module,
    drop: float = 0.1,
    draws: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """PAC-Bayes bounds with an isotropic Gaussian posterior around the weights.

    With n examples and the noise scale σ (see `noise_scale`):

        origin    ‖w‖² / 4σ² + log(n / σ) + 10         prior centred at 0
        initial   ‖w − w⁰‖² / 4σ² + log(n / σ) + 10    prior centred at the initial weights
        flatness  1 / σ²

    The bound on the gap is √(value / n); these are the values under the root. Cost: about 80
    forward passes.

    Args:
        model: Any module with outputs of shape (n, classes).
        data: Inputs of shape (n, ...) and labels of shape (n,).
        initial: The same architecture before training.
        drop: Fall in accuracy that defines σ.
        draws: Noise vectors.
        seed: Of the noise.

    Returns:
        dict: "origin", "initial" and "flatness".

    Raises:
        ModelError: If the architectures differ, or σ does not exist.
        ArgumentError: For drop or draws out of range.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), equations 48, 49 and 53. w is all parameters, those
        that the noise moves; the papers' program leaves biases out of the norms.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> data = torch.eye(2), torch.tensor([0, 1])
        >>> sorted(pac_bayes(model, data, initial=torch.nn.Linear(2, 2, bias=False)))
        ['flatness', 'initial', 'origin']
    """
    moved = squared_distance(model, initial)
    sigma = noise_scale(model, data, drop=drop, draws=draws, seed=seed)
    n = len(load_in_order(data))
    rest = math.log(n / sigma) + 10
    return {
        "origin": squared_norm(select_parameters(model)) / (4 * sigma**2) + rest,
        "initial": moved / (4 * sigma**2) + rest,
        "flatness": sigma**-2,
    }


def pac_bayes_magnitude(
    model: nn.Module,
    data: Data,
    *,
    initial: nn.Module,
    epsilon: float = 1e-3,
    drop: float = 0.1,
    draws: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """PAC-Bayes bounds with noise in proportion to each weight.

    With ω parameters, n examples and the magnitude-aware noise scale σ (see `noise_scale`):

        origin    ¼ Σ_i log[(ε² + (σ² + 1) ‖w‖² / ω) / (ε² + σ² (w_i − w_i⁰)²)] + log(n / σ) + 10
        initial   the same with ‖w − w⁰‖² in the numerator
        flatness  1 / σ²

    Cost: about 80 forward passes.

    Args:
        model: Any module with outputs of shape (n, classes).
        data: Inputs of shape (n, ...) and labels of shape (n,).
        initial: The same architecture before training.
        epsilon: Floor of the noise.
        drop: Fall in accuracy that defines σ.
        draws: Noise vectors.
        seed: Of the noise.

    Returns:
        dict: "origin", "initial" and "flatness".

    Raises:
        ModelError: If the architectures differ, or σ does not exist.
        ArgumentError: For epsilon (> 0), drop or draws out of range.

    Source:
        Jiang et al., ICLR 2020 (1912.02178), equations 56, 57 and 61, with the denominator as in
        the program of Dziugaite et al. 2020: the distance moved, also for "origin".

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> data = torch.eye(2), torch.tensor([0, 1])
        >>> sorted(pac_bayes_magnitude(model, data, initial=torch.nn.Linear(2, 2, bias=False)))
        ['flatness', 'initial', 'origin']
    """
    if not epsilon > 0:
        raise ArgumentError(f"epsilon must be positive, got {epsilon}")
    moved = squared_distance(model, initial)
    sigma = noise_scale(
        model, data, magnitude=True, epsilon=epsilon, drop=drop, draws=draws, seed=seed
    )
    n = len(load_in_order(data))
    weights, before = select_parameters(model), select_parameters(initial)
    omega = sum(p.numel() for p in weights.values())
    denominator = sum(
        float(
            ((p.double() - before[k].to(p).double()).square() * sigma**2 + epsilon**2).log().sum()
        )
        for k, p in weights.items()
    )

    def bound(squared: float) -> float:
        top = omega * math.log(epsilon**2 + (sigma**2 + 1) * squared / omega)
        return 0.25 * (top - denominator) + math.log(n / sigma) + 10

    return {"origin": bound(squared_norm(weights)), "initial": bound(moved), "flatness": sigma**-2}


def squared_norm(weights: dict[str, Tensor]) -> float:
    """‖w‖² over all tensors."""
    return sum(float(torch.linalg.vector_norm(p.double())) ** 2 for p in weights.values())


def typical_weight(weights: dict[str, Tensor]) -> float:
    """Root mean square of the weights; 1 if all are zero."""
    return math.sqrt(squared_norm(weights) / sum(p.numel() for p in weights.values())) or 1.0


def _perturbed(
    weights: dict[str, Tensor],
    sigma: float,
    spread: Callable[[float, Tensor], Tensor] | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """One draw; made on the CPU in float32, so that it is the same on every device."""
    moved = {}
    for name, p in weights.items():
        noise = torch.randn(p.shape, generator=generator).to(p)
        moved[name] = p + noise * (sigma if spread is None else spread(sigma, p))
    return moved
