"""All measures by name, and functions turned into measures that can score a zoo."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sharpkit.contract.loading import Data
from sharpkit.errors import ArgumentError
from sharpkit.measures import (
    box_sharpness,
    distance,
    gradients,
    heavy_tails,
    layer_margins,
    margins,
    norms,
    pac_bayes,
    representations,
    robustness,
    sharpness,
    spectral,
)
from sharpkit.measures.curvature import (
    EigenvalueRatio,
    HessianRank,
    HessianTrace,
    MaxEigenvalue,
)
from sharpkit.measures.m_sharpness import MSharpness
from sharpkit.measures.measure import Estimate, Measure, needed
from sharpkit.measures.recorded import TrainingSteps

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        norms.parameter_count,
        norms.depth,
        norms.frobenius_norms,
        spectral.spectral_norms,
        norms.path_norm,
        distance.distance_from_initial,
        margins.training_loss,
        margins.output_margin,
        margins.inverse_margin,
        margins.normalized_margin,
        layer_margins.all_layer_margin,
        pac_bayes.pac_bayes,
        pac_bayes.pac_bayes_magnitude,
        box_sharpness.accuracy_sharpness,
        sharpness.worst_case_sharpness,
        sharpness.average_sharpness,
        gradients.gradient_noise,
        gradients.fisher_rao_norm,
        gradients.jacobian_norm,
        representations.davies_bouldin,
        representations.representation_variance,
        representations.effective_rank,
        robustness.mixup_error,
        robustness.augmentation_inconsistency,
        heavy_tails.heavy_tail_exponent,
    )
}
_GIVEN = ("model", "data", "initial", "seed")  # not options


@dataclass(frozen=True)
class FunctionMeasure:
    """A function of this package as a measure; made by `make_measure`.

    Attributes:
        name: What it is called in a run.
        function: Name of the function.
        options: Pairs (keyword, value) for it.
    """

    name: str
    function: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def needs_initial(self) -> bool:
        """Whether the measure has to be given the network before training, as `initial`."""
        return "initial" in inspect.signature(_FUNCTIONS[self.function]).parameters

    def __call__(
        self, model: nn.Module, data: Data, *, seed: int, initial: nn.Module | None = None
    ) -> float | Estimate | Mapping[str, float | Estimate]:
        """The value of the function; several values have the settings "form=<name>".

        Raises:
            ArgumentError: If the measure needs the initial network and none is given.
        """
        if self.needs_initial:
            needed(self.name, "initial", initial)
        function = _FUNCTIONS[self.function]
        given = dict(zip(_GIVEN, (model, data, initial, seed), strict=True))
        wanted = inspect.signature(function).parameters
        value = function(
            **{key: v for key, v in given.items() if key in wanted}, **dict(self.options)
        )
        if isinstance(value, Mapping):
            return {f"form={key}": v for key, v in value.items()}
        result: float | Estimate = value
        return result


def measure_names() -> list[str]:
    """The names that `make_measure` knows.

    Example:
        >>> "path_norm" in measure_names()
        True
    """
    return sorted(_FUNCTIONS)


def make_measure(function: str, *, name: str | None = None, **options: Any) -> FunctionMeasure:
    """A measure from the name of one of the package's functions and options for it.

    Args:
        function: One of `measure_names()`.
        name: What it is called in a run; None for the function's own name.
        options: Keywords of the function, other than model, data, initial and seed.

    Returns:
        FunctionMeasure: Ready for `score_zoo`.

    Raises:
        ArgumentError: For an unknown function or option.

    Example:
        >>> import torch
        >>> measure = make_measure("output_margin", percentile=50)
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> measure(model, (torch.eye(2), torch.tensor([0, 1])), seed=0)
        1.0
    """
    if function not in _FUNCTIONS:
        raise ArgumentError(
            f"unknown measure {function!r}: expected one of {', '.join(measure_names())}"
        )
    known = [key for key in inspect.signature(_FUNCTIONS[function]).parameters if key not in _GIVEN]
    for key in options:
        if key not in known:
            raise ArgumentError(
                f"{function} has no option {key!r}: expected one of {', '.join(known) or 'none'}"
            )
    return FunctionMeasure(name or function, function, tuple(sorted(options.items())))


def standard_measures(
    m: int | Sequence[int] = (1, 4, 16, 64, 256),
    *,
    rho: float = 0.05,
    images: bool = True,
    recorded: bool = False,
) -> list[Measure]:
    """Every measure of the package with the papers' settings, each under its own name.

    Args:
        m: Group sizes of m-sharpness, none larger than the number of examples scored.
        rho: Radius of m-sharpness and of the sharpness family in the plain 2-norm.
        images: Whether inputs are images (n, c, h, w); otherwise the augmentation is left out.
        recorded: Whether the zoo records the length of training; adds `TrainingSteps`.

    Returns:
        list: Measures with different names; those with `needs_initial` want `initial=`.

    Example:
        >>> [measure.name for measure in standard_measures()][:3]
        ['m_sharpness', 'parameter_count', 'depth']
    """
    infinity = float("inf")
    special: dict[str, list[FunctionMeasure]] = {
        "worst_case_sharpness": [
            make_measure("worst_case_sharpness", name="sharpness_l2", rho=rho),
            make_measure("worst_case_sharpness", name="sharpness_linf", rho=5e-4, norm=infinity),
            make_measure(
                "worst_case_sharpness", name="sharpness_adaptive", rho=10 * rho, adaptive=True
            ),
            make_measure(
                "worst_case_sharpness",
                name="sharpness_magnitude",
                rho=5e-3,
                norm=infinity,
                adaptive=True,
            ),
        ],
        "average_sharpness": [make_measure("average_sharpness", rho=10 * rho)],
    }
    chosen: list[Measure] = [MSharpness(m=m, rho=rho)]
    for function in _FUNCTIONS:
        if images or function != "augmentation_inconsistency":
            chosen.extend(special.get(function) or [make_measure(function)])
    chosen += [MaxEigenvalue(), EigenvalueRatio(), HessianTrace(), HessianRank()]
    return [*chosen, TrainingSteps()] if recorded else chosen
