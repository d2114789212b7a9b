"""m-sharpness as a measure of a zoo's models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.loading import Data
from sharpkit.contract.loss_text import loss_name, loss_text
from sharpkit.contract.losses import Loss, resolve_loss
from sharpkit.errors import ArgumentError
from sharpkit.measures.measure import Estimate, plain
from sharpkit.sharpness import SharpnessResult, m_sharpness, m_sharpness_stacked
from sharpkit.sharpness.ascent_rules import AscentLike, ascent_rule
from sharpkit.sharpness.m_sharpness import read_grid, read_rule

# options that are part of the name where they are not these, in this order
_NAMED: Mapping[str, Any] = {
    "loss": "cross_entropy",
    "ascent": "one_step",
    "steps": 10,
    "restarts": 1,
    "norm": 2.0,
    "adaptive": False,
    "average": False,
    "n": None,
    "seed": "run",
    "parameters": None,
    "tolerance": None,
}
# options that a run has not always noted: left out of its configuration where they are these
_LATER = ("loss", "n", "seed", "parameters", "tolerance", "chunk", "memory_budget", "engine")
# arguments of `m_sharpness_stacked`; `stacks` says that the others have no say
_OF_STACKS = ("m", "rho", "loss", "adaptive", "n", "seed", "parameters", "chunk", "memory_budget")


class _FromOptions(str):
    """A name that follows from the options, so that `dataclasses.replace` makes another one."""

    __slots__ = ()


@dataclass(frozen=True)
class MSharpness:
    """m-sharpness for a grid of m and rho, ready to score models with.

    Every argument but `seed` and `name` is that of `sharpkit.m_sharpness`.

    Args:
        m: Group size in examples; one or several.
        rho: Radius of the perturbation; one or several.
        loss: "cross_entropy", "mse", a torch loss module or a callable.
        ascent: "one_step", "pgd", "apgd", or a rule of your own.
        steps: Steps of "pgd" and "apgd", or directions of `average`.
        restarts: Starts of "pgd" and "apgd".
        norm: Order of the ball's norm.
        adaptive: Measure perturbations in units of |w|.
        average: Mean over Gaussian directions instead of the maximum.
        n: Examples that this measure uses, of those that the run gives it; None for all.
        seed: "run" for the seed of the run; another one, or None for groups of consecutive
            examples.
        parameters: Names or patterns of what is perturbed; None for all that require gradients.
        tolerance: Stop early once std_error <= tolerance * |value|.
        chunk: Examples evaluated at a time.
        memory_budget: Bytes for one chunk.
        engine: "auto", "vectorized" or "loop".
        name: What it is called in a run. By default "m_sharpness", followed by the options that
            are not the default ones, such as "m_sharpness_adaptive"; m and rho are columns.

    Raises:
        ArgumentError: For a value out of range, or modules as `parameters`.

    Source:
        Foret et al., ICLR 2021, section 4.1; see `sharpkit.m_sharpness`.

    Example:
        >>> import torch
        >>> measure = MSharpness(m=[1, 2], rho=0.1)
        >>> model = torch.nn.Linear(3, 2)
        >>> data = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
        >>> list(measure(model, data, seed=0))
        ['m=1,rho=0.1', 'm=2,rho=0.1']
        >>> MSharpness(m=1, rho=0.5, adaptive=True).name
        'm_sharpness_adaptive'
    """

    m: int | Sequence[int]
    rho: float | Sequence[float]
    ascent: AscentLike = "one_step"
    steps: int = 10
    norm: float = 2.0
    adaptive: bool = False
    average: bool = False
    restarts: int = 1
    loss: Loss = "cross_entropy"
    n: int | None = None
    seed: int | Literal["run"] | None = "run"
    parameters: str | Sequence[str] | None = None
    tolerance: float | None = None
    chunk: int | Literal["auto"] = "auto"
    memory_budget: int | None = None
    engine: Literal["auto", "vectorized", "loop"] = "auto"
    name: str = ""

    def __post_init__(self) -> None:
        """Store plain numbers and tuples, so that a measure is hashable; refuse bad ones early."""
        for key in ("m", "rho", "parameters"):
            value = plain(getattr(self, key))
            if isinstance(value, Iterable) and not isinstance(value, str):
                value = tuple(plain(v) for v in value)
            object.__setattr__(self, key, value)
        ms, _ = read_grid(self.m, self.rho)
        read_rule(self.ascent, self.steps, self.norm, self.adaptive, self.average, 0, self.restarts)
        resolve_loss(self.loss)
        if self.n is not None and max(ms) > self.n:
            raise ArgumentError(f"m = {max(ms)} is larger than n = {self.n} examples")
        if isinstance(self.seed, str) and self.seed != "run":
            raise ArgumentError(f'seed = {self.seed!r}: expected a whole number, None or "run"')
        patterns = self.parameters if isinstance(self.parameters, tuple) else (self.parameters,)
        for pattern in patterns:
            if not isinstance(pattern, str | None):
                raise ArgumentError(
                    f"parameters: found {type(pattern).__name__}, expected names or patterns, "
                    "which fit more than one model"
                )
        if not self.name or isinstance(self.name, _FromOptions):
            object.__setattr__(self, "name", _FromOptions(_name(self)))

    def __call__(
        self, model: nn.Module, data: Data | DistributedData, *, seed: int
    ) -> dict[str, Estimate]:
        """The m-sharpness of one model, by setting."""
        return _estimates(m_sharpness(model, data, **self._options(seed), progress=False))

    @property
    def stacks(self) -> bool:
        """Whether several models can be measured together: one step in the 2-norm, of all data."""
        rule = read_rule(self.ascent, self.steps, self.norm, self.adaptive, self.average, 0)
        plain = rule.rule.linearised and rule.p == 2.0
        return plain and self.tolerance is None and self.engine == "auto"

    def of_stack(
        self, models: Sequence[nn.Module], data: Data, *, seed: int
    ) -> list[dict[str, Estimate] | Exception]:
        """The same of several models, those of one shape together (see `m_sharpness_stacked`)."""
        options = {key: value for key, value in self._options(seed).items() if key in _OF_STACKS}
        found = m_sharpness_stacked(models, data, **options)
        return [each if isinstance(each, Exception) else _estimates(each) for each in found]

    def _options(self, seed: int) -> dict[str, Any]:
        """The arguments of `m_sharpness`."""
        options = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "name"}
        return options | {"seed": seed if self.seed == "run" else self.seed}

    def configuration(self) -> dict[str, Any]:
        """What determines the values, as a run keeps it: plain values only, a loss as text.

        Example:
            >>> MSharpness(m=1, rho=0.1, loss="mse").configuration()["loss"]
            'mse'
        """
        config = {key: plain(getattr(self, key)) for key in self.__dataclass_fields__}
        defaults = {f.name: f.default for f in self.__dataclass_fields__.values()}
        config = {k: v for k, v in config.items() if k not in _LATER or v != defaults[k]}
        for key in {"loss", "ascent"} & set(config):
            config[key] = loss_text(config[key])
        return config | {"name": str(self.name)}


def _estimates(result: SharpnessResult) -> dict[str, Estimate]:
    """Values by setting."""
    shape = len(result.m), len(result.rho)
    value, std_error = (np.reshape(t, shape).tolist() for t in (result.value, result.std_error))
    return {
        f"m={m},rho={rho!r}": Estimate(value[i][j], std_error[i][j])
        for i, m in enumerate(result.m)
        for j, rho in enumerate(result.rho)
    }


def _name(measure: MSharpness) -> str:
    """The name that follows from the options.

    Example:
        >>> MSharpness(m=1, rho=0.1, ascent="pgd", steps=20, norm=float("inf")).name
        'm_sharpness_pgd_steps20_norminf'
    """
    words = ["m_sharpness"]
    for key, usual in _NAMED.items():
        value = plain(getattr(measure, key))
        if value != usual:
            words.append(_word(key, value))
    return "_".join(words)


def _word(key: str, value: Any) -> str:
    if key == "loss":
        return loss_name(value)
    if key == "ascent":
        return ascent_rule(value).name
    if key in ("adaptive", "average"):
        return key
    if key == "parameters":
        return value if isinstance(value, str) else "+".join(value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{key}{value:g}"
    return f"{key}{value}"
