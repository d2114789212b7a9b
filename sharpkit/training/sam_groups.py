"""Which parameters SAM perturbs: a selection as two groups of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sharpkit.contract.modules import unwrapped
from sharpkit.contract.parameters import Parameters, select_parameters, some
from sharpkit.errors import ArgumentError

ALL = "*"


def sam_groups(model: nn.Module, parameters: Parameters) -> list[dict[str, Any]]:
    """Parameter groups for `SAM`, which trains all parameters and perturbs the selected ones.

    The others get ρ = 0: they stay where they are in the perturbation, and do not count in the norm
    of the gradient. So ε is that of SAM on a network in which they are constant; the step is along
    the whole gradient at w + ε.

    Args:
        model: Whose parameters with requires_grad=True are trained.
        parameters: As for `m_sharpness`: "norm" for those of normalisation layers (SAM-ON), a name
            or glob pattern or several, a module or several; None for all.

    Returns:
        list: One group, or two: those that are perturbed, and the others. Further settings, such as
        `weight_decay`, may be added to either.

    Raises:
        ArgumentError: If a name, pattern or module matches nothing, or nothing that is trained.

    Source:
        Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs,
        NeurIPS 2023 (2306.04226).

    Example:
        >>> import torch
        >>> from sharpkit.training import SAM
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        >>> opt = SAM(sam_groups(model, "norm"), torch.optim.SGD, rho=0.5, lr=0.1)
        >>> [(len(group["params"]), group["rho"]) for group in opt.param_groups]
        [(2, 0.5), (4, 0.0)]
    """
    network = unwrapped(model)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not trained:
        raise ArgumentError("no parameter of the model requires gradients")
    chosen = select_parameters(network, parameters)
    perturbed = [p for name, p in trained.items() if name in chosen]
    others = [p for name, p in trained.items() if name not in chosen]
    if not perturbed:
        raise ArgumentError(
            f"{some(chosen)} would be perturbed, but none of them is trained (requires_grad=False)"
        )
    first: dict[str, Any] = {"params": perturbed}
    return [first, {"params": others, "rho": 0.0}] if others else [first]


def selection_text(model: nn.Module, parameters: Parameters) -> str:
    """A selection of parameters in one line: names and patterns, separated by commas.

    Raises:
        ArgumentError: As `select_parameters`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        >>> selection_text(model, model[1]), selection_text(model, ["0.*", "norm"])
        ('1.weight,1.bias', '0.*,norm')
    """
    if parameters is None:
        return ALL
    several = [parameters] if isinstance(parameters, str | nn.Module) else parameters
    if not isinstance(several, Iterable):
        raise ArgumentError(f"expected names, patterns or modules, got {type(several).__name__}")
    texts: list[str] = []
    for item in several:
        texts += [item] if isinstance(item, str) else select_parameters(model, [item])
    return ",".join(texts)


def selection_of(text: str) -> list[str]:
    """The names and patterns of a line.

    Example:
        >>> selection_of("blocks.*, norm")
        ['blocks.*', 'norm']
    """
    return [part.strip() for part in text.split(",") if part.strip()]
