"""How accuracy falls as training inputs are mixed with others: response curves and their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures.passes import Setup, images, setup
from sharpkit.measures.robustness import same_class_pairs

_LARGEST = 0.5  # share of the other input: beyond it, the pair changes its roles
_BOTTOM, _TOP = 0.1, 0.4  # ends of the weakest tenth and start of the strongest six tenths


def perturbation_response(
    model: nn.Module, data: Data, *, steps: int = 10, seed: int = 0
) -> dict[str, float]:
    """Gi and Pal scores of the accuracy on training inputs mixed with others, ever more strongly.

        A(t) = mean over i of 1[argmax f((1 − t/2) x_i + (t/2) x_j) = y_i],   t = 0, 1/steps, ..., 1

    with y_j = y_i (`same`) or y_j ≠ y_i (`other`); see `gi_score` and `pal_score` for what they
    make of the curve. Partners are drawn once: in the same class the next one in a random cyclic
    order, in other classes any, with equal chances. Invariant under rescaling layers, permuting
    units and everything else that keeps the decision. Cost: 2 · `steps` + 1 F.

    Args:
        model: Any module with outputs of shape (n, classes).
        data: Inputs of shape (n, ...), real numbers, and labels of shape (n,).
        steps: Levels of mixing above 0, at least 1.
        seed: Of the partners.

    Returns:
        dict: "gi_same", "gi_other" (smaller is better), "pal_same", "pal_other" (larger is better).

    Raises:
        ArgumentError: For steps below 1.
        DataError: For inputs that are tokens or dicts, no class with two examples, or one class.
        ModelError: For NaN or infinite outputs, or a model that is wrong on all examples.

    Source:
        Schiff, Quanz, Das and Chen, "Predicting deep neural network generalization with
        perturbation response curves", NeurIPS 2021 (2106.04765); mixing of inputs alone.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2)  # right of 0.5 is class 1
        >>> model.weight.data = torch.tensor([[0.0], [1.0]])
        >>> model.bias.data = torch.tensor([0.0, -0.5])
        >>> x, y = torch.tensor([[0.0], [0.0], [2.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> scores = perturbation_response(model, (x, y))
        >>> scores["gi_same"], round(scores["pal_same"], 6)  # nothing changes within a class
        (0.0, 84.0)
        >>> scores["gi_other"] > 0  # 2 (t/2) > 0.5 from t = 0.6 on
        True
    """
    if steps < 1:
        raise ArgumentError(f"steps must be at least 1, got {steps}")
    with frozen(model) as found:
        run = setup(model, data, found)
        inputs = images(run.examples, "mixing")
        labels = run.examples.labels.cpu()
        whole = run.logits().argmax(1).cpu() == labels
        generator = torch.Generator().manual_seed(seed)
        pairs = {
            "same": same_class_pairs(labels, generator),
            "other": _other_class_partners(labels, generator),
        }
        curves = {
            kind: _curve(run, inputs, labels, whole, chosen, partner, steps)
            for kind, (chosen, partner) in pairs.items()
        }
    gi = {f"gi_{kind}": gi_score(curve) for kind, curve in curves.items()}
    return gi | {f"pal_{kind}": pal_score(curve) for kind, curve in curves.items()}


def gi_score(accuracies: Sequence[float]) -> float:
    """Area between the cumulated accuracies of a model that nothing disturbs and of this one.

        ∫₀¹ (t − C(t)) dt,   C(t) = ∫₀ᵗ A(s) ds

    After the Gini coefficient, whose Lorenz curve C resembles; 0 for A = 1, ½ for A = 0.

    Args:
        accuracies: A at t = 0, 1/steps, ..., 1, from 0 to 1; taken as linear in between, for which
            the integrals are exact.

    Raises:
        ArgumentError: For fewer than two accuracies, or one out of range.

    Source:
        Schiff et al., NeurIPS 2021 (2106.04765).

    Example:
        >>> round(gi_score([1.0, 0.5, 0.0]), 6)  # A = 1 − t: ∫ t²/2 dt
        0.166667
    """
    return _area(1 - _checked(accuracies), 0.0, 1.0)


def pal_score(accuracies: Sequence[float]) -> float:
    """Area below the cumulated accuracies at the strongest six tenths, over the weakest tenth's.

        ∫_{0.4}^1 C(t) dt / ∫_0^{0.1} C(t) dt,   C(t) = ∫₀ᵗ A(s) ds

    After the Palma ratio of incomes; 84 for A constant, less for an A that falls.

    Args:
        accuracies: As for `gi_score`.

    Raises:
        ArgumentError: For fewer than two accuracies, or one out of range.
        ModelError: If the model is wrong throughout the weakest tenth.

    Source:
        Schiff et al., NeurIPS 2021 (2106.04765).

    Example:
        >>> round(pal_score([0.5, 0.5]), 6), round(pal_score([1.0, 0.0]), 6)
        (84.0, 54.62069)
    """
    curve = _checked(accuracies)
    weakest = _area(curve, 0.0, _BOTTOM)
    if not weakest > 0:
        raise ModelError("no mixed example is classified as its first part: no Pal score")
    return _area(curve, _TOP, 1.0) / weakest


def _checked(accuracies: Sequence[float]) -> np.ndarray:
    curve = np.asarray(accuracies, dtype=np.float64)
    if curve.ndim != 1 or len(curve) < 2 or not ((curve >= 0) & (curve <= 1)).all():
        raise ArgumentError(f"expected two accuracies or more, from 0 to 1; got {accuracies}")
    return curve


def _area(curve: np.ndarray, low: float, high: float) -> float:
    """∫ C(t) dt between two levels: C is a parabola in each piece, for which Simpson is exact."""
    levels = np.linspace(0.0, 1.0, len(curve))
    inside = levels[(levels > low) & (levels < high)]
    knots = np.concatenate([[low], inside, [high]])
    middles = (knots[1:] + knots[:-1]) / 2
    c, c_middle = _cumulated(curve, levels, knots), _cumulated(curve, levels, middles)
    return float((np.diff(knots) * (c[:-1] + 4 * c_middle + c[1:]) / 6).sum())


def _cumulated(curve: np.ndarray, levels: np.ndarray, at: np.ndarray) -> np.ndarray:
    """C at some levels."""
    width = levels[1]
    whole = np.concatenate([[0.0], np.cumsum((curve[1:] + curve[:-1]) / 2 * width)])
    piece = np.clip(np.searchsorted(levels, at, side="right") - 1, 0, len(curve) - 2)
    rest = at - levels[piece]
    slope = (curve[piece + 1] - curve[piece]) / width
    result: np.ndarray = whole[piece] + curve[piece] * rest + slope * rest**2 / 2
    return result


def _curve(
    run: Setup,
    inputs: Tensor,
    labels: Tensor,
    whole: Tensor,
    chosen: Tensor,
    partner: Tensor,
    steps: int,
) -> list[float]:
    """The accuracies at all levels; `whole` are the hits without mixing."""
    target = labels[chosen]
    first, second = inputs[chosen.to(inputs.device)], inputs[partner.to(inputs.device)]
    accuracies = [float(whole[chosen].double().mean())]
    for step in range(1, steps + 1):
        share = _LARGEST * step / steps
        mixed = Setup(run.function, Examples((1 - share) * first + share * second, target))
        accuracies.append(mixed.accuracy())
    return accuracies


def _other_class_partners(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every example, and for each one of another class."""
    partner = torch.empty_like(labels)
    classes = sorted(set(labels.tolist()))
    if len(classes) < 2:
        raise DataError("all examples are of one class: there is no other to mix with")
    for label in classes:
        others = torch.nonzero(labels != label).squeeze(1)
        members = labels == label
        drawn = torch.randint(0, len(others), (int(members.sum()),), generator=generator)
        partner[members] = others[drawn]
    return torch.arange(len(labels)), partner
