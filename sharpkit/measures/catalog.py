"""All measures by name, and functions turned into measures that can score a zoo."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from sharpkit.contract.loading import Data
from sharpkit.errors import ArgumentError
from sharpkit.measures import (
    all_layer_margins,
    box_sharpness,
    clusters_and_mixup,
    constrained_margins,
    critical,
    distance,
    geodesic,
    gradients,
    heavy_tails,
    layer_margins,
    margins,
    norms,
    pac_bayes,
    path_norms,
    perturbation_response,
    perturbed_margins,
    relative_flatness,
    representations,
    robustness,
    sharpness,
    spectral,
    transport_margins,
    weight_spectra,
)
from sharpkit.measures.curvature import (
    EigenvalueRatio,
    HessianRank,
    HessianTrace,
    MaxEigenvalue,
    SoftRank,
)
from sharpkit.measures.m_sharpness import MSharpness
from sharpkit.measures.measure import Estimate, Measure, describe, needed, parse_setting
from sharpkit.measures.recorded import TrainingSteps

Direction = int | None | Mapping[str, int | None]

# Whether a large value should mean a large generalization gap (1), a small one (-1), or nothing
# is known (None), by what the theory or the paper of a measure says; by form where forms differ.
_DIRECTIONS: dict[Callable[..., Any], Direction] = {
    norms.parameter_count: 1,
    norms.depth: 1,
    norms.frobenius_norms: 1,
    spectral.spectral_norms: 1,
    path_norms.path_norm: 1,
    distance.distance_from_initial: 1,
    margins.training_loss: None,
    margins.output_margin: -1,
    margins.inverse_margin: 1,
    spectral.normalized_margin: -1,
    layer_margins.hidden_layer_margin: -1,
    all_layer_margins.all_layer_margin: -1,
    transport_margins.k_variance_margin: -1,
    perturbed_margins.mixup_margin: -1,
    perturbed_margins.augmented_margin: -1,
    constrained_margins.constrained_margin: -1,
    pac_bayes.pac_bayes: 1,
    pac_bayes.pac_bayes_magnitude: 1,
    box_sharpness.accuracy_sharpness: 1,
    sharpness.worst_case_sharpness: 1,
    sharpness.average_sharpness: 1,
    critical.critical_sharpness: 1,
    geodesic.geodesic_sharpness: None,  # the paper finds either sign
    relative_flatness.relative_flatness: 1,
    gradients.gradient_noise: 1,
    gradients.fisher_rao_norm: 1,
    gradients.jacobian_norm: 1,
    representations.davies_bouldin: 1,
    representations.representation_variance: 1,
    representations.effective_rank: None,
    robustness.mixup_error: 1,
    robustness.augmentation_inconsistency: 1,
    clusters_and_mixup.davies_bouldin_mixup: 1,
    perturbation_response.perturbation_response: {
        "gi_same": 1,
        "gi_other": 1,
        "pal_same": -1,
        "pal_other": -1,
    },
    heavy_tails.heavy_tail_exponent: 1,
    weight_spectra.weight_spectrum: {
        "log_norm": 1,
        "log_spectral_norm": 1,
        "mp_softrank": 1,
        "rand_distance": -1,
    },
    MSharpness: 1,
    MaxEigenvalue: 1,
    EigenvalueRatio: 1,
    HessianTrace: 1,
    HessianRank: None,
    SoftRank: 1,
    TrainingSteps: 1,
}
_FUNCTIONS = {
    function.__name__: function for function in _DIRECTIONS if not isinstance(function, type)
}
OF_IMAGES = {"augmentation_inconsistency", "augmented_margin"}
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
    def direction(self) -> Direction:
        """What a large value should mean, see `direction`."""
        return _DIRECTIONS[_FUNCTIONS[self.function]]

    @property
    def needs_initial(self) -> bool:
        """Whether the measure has to be given the network before training, as `initial`."""
        return "initial" in _parameters(self.function)

    def __call__(
        self, model: nn.Module, data: Data, *, seed: int, initial: nn.Module | None = None
    ) -> float | Estimate | Mapping[str, float | Estimate]:
        """The value of the function; several values have the settings "form=<name>".

        Raises:
            ArgumentError: If the measure needs the initial network and none is given.
        """
        if self.needs_initial:
            needed(self.name, "initial", initial)
        given = dict(zip(_GIVEN, (model, data, initial, seed), strict=True))
        wanted = _parameters(self.function)
        value = _FUNCTIONS[self.function](
            **{key: v for key, v in given.items() if key in wanted}, **dict(self.options)
        )
        if isinstance(value, Mapping):
            return {f"form={key}": v for key, v in value.items()}
        result: float | Estimate = value
        return result


def direction(measure: Measure | str, setting: str = "") -> int | None:
    """Whether a large value of a measure should mean a large generalization gap.

    Args:
        measure: A measure, or the name under which `standard_measures` has it. A measure of your
            own says so by an attribute `direction`: 1, -1 or None, or a dict of these by form.
        setting: Which of its values, such as "form=rand_distance".

    Returns:
        int | None: 1 for a large gap, -1 for a small one, None where it is not known.

    Example:
        >>> direction("output_margin"), direction("sharpness_l2"), direction("effective_rank")
        (-1, 1, None)
        >>> direction(make_measure("weight_spectrum"), "form=rand_distance")
        -1
    """
    if isinstance(measure, str):
        found: Direction = _by_name().get(measure)
    elif type(measure) in _DIRECTIONS:
        found = _DIRECTIONS[type(measure)]
    else:
        found = getattr(measure, "direction", None)
    if isinstance(found, Mapping):
        return found.get(str(parse_setting(setting).get("form", "")))
    return found


@cache
def _parameters(function: str) -> tuple[str, ...]:
    """Names of the arguments of a function of the catalog."""
    return tuple(inspect.signature(_FUNCTIONS[function]).parameters)


@cache
def _by_name() -> dict[str, Direction]:
    """Directions by the names of `standard_measures` and of the functions."""
    names = {function: make_measure(function).direction for function in _FUNCTIONS}
    for measure in standard_measures(attention=True, recorded=True):
        own = _DIRECTIONS.get(type(measure), getattr(measure, "direction", None))
        names[describe(measure)[0]] = own
    return names


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
    known = [key for key in _parameters(function) if key not in _GIVEN]
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
    attention: bool = False,
    recorded: bool = False,
) -> list[Measure]:
    """Every measure of the package with the papers' settings, each under its own name.

    Args:
        m: Group sizes of m-sharpness, none larger than the number of examples scored.
        rho: Radius of m-sharpness and of the sharpness family in the plain 2-norm.
        images: Whether inputs are images (n, c, h, w); otherwise what moves images is left out.
        attention: Whether the networks have attention; adds `geodesic_sharpness`, which without it
            is adaptive sharpness.
        recorded: Whether the zoo records the length of training; adds `TrainingSteps`.

    Returns:
        list: Measures with different names; those with `needs_initial` want `initial=`.

    Example:
        >>> [measure.name for measure in standard_measures()][:3]
        ['m_sharpness', 'parameter_count', 'depth']
    """
    relative = {"rho": 5e-3, "norm": float("inf"), "adaptive": True}
    longer = {"logit_normalized": True, "ascent": "apgd", "steps": 20, "restarts": 2}
    worst: dict[str, dict[str, Any]] = {
        "l2": {"rho": rho},
        "linf": {"rho": 5e-4, "norm": float("inf")},
        "adaptive": {"rho": 10 * rho, "adaptive": True},
        "magnitude": relative,
        "logit_normalized": relative | longer,
    }
    special: dict[str, list[FunctionMeasure]] = {
        "worst_case_sharpness": [
            make_measure("worst_case_sharpness", name=f"sharpness_{kind}", **options)
            for kind, options in worst.items()
        ],
        "average_sharpness": [make_measure("average_sharpness", rho=10 * rho)],
    }
    chosen: list[Measure] = [MSharpness(m=m, rho=rho)]
    for function in _FUNCTIONS:
        if (images or function not in OF_IMAGES) and (
            attention or function != "geodesic_sharpness"
        ):
            chosen.extend(special.get(function) or [make_measure(function)])
    chosen += [MaxEigenvalue(), EigenvalueRatio(), HessianTrace(), HessianRank(), SoftRank()]
    return [*chosen, TrainingSteps()] if recorded else chosen


def chosen_measures(
    names: str,
    m_sharpness: MSharpness,
    *,
    images: bool = True,
    attention: bool = True,
    recorded: bool = True,
) -> list[Measure]:
    """Measures by their names in `standard_measures`.

    Args:
        names: Comma-separated, or "all".
        m_sharpness: What the name "m_sharpness" stands for.
        images: Whether "all" has those of images; see `standard_measures`.
        attention: Whether "all" has those of networks with attention.
        recorded: Whether "all" has those of what a zoo recorded.

    Raises:
        ArgumentError: For an unknown name; lists the known ones.

    Example:
        >>> own = MSharpness(m=1, rho=0.1)
        >>> [measure.name for measure in chosen_measures("depth,m_sharpness", own)]
        ['depth', 'm_sharpness']
    """
    every = names == "all"
    known = {
        describe(measure)[0]: measure
        for measure in standard_measures(
            images=images or not every,
            attention=attention or not every,
            recorded=recorded or not every,
        )
    }
    known["m_sharpness"] = m_sharpness  # under whichever name its options give it
    wanted = list(known) if every else names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise ArgumentError(f'no measure {unknown[0]!r}: "all" or some of {", ".join(known)}')
    return [known[name] for name in wanted]
