"""m-sharpness as a measure of a zoo's models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from sharpkit.contract.loading import Data
from sharpkit.measures.measure import Estimate, plain
from sharpkit.sharpness import m_sharpness
from sharpkit.sharpness.m_sharpness import read_grid, read_rule


@dataclass(frozen=True)
class MSharpness:
    """m-sharpness for a grid of m and rho, ready to score a zoo with.

    Args:
        m: Group size in examples; one or several.
        rho: Radius of the perturbation; one or several.
        ascent: "one_step", "pgd" or "apgd".
        steps: Steps of "pgd" and "apgd", or directions of `average`.
        norm: Order of the ball's norm.
        adaptive: Measure perturbations in units of |w|.
        average: Mean over Gaussian directions instead of the maximum.
        restarts: Starts of "pgd" and "apgd".

    Source:
        Foret et al., ICLR 2021, section 4.1; see `sharpkit.m_sharpness`.

    Example:
        >>> import torch
        >>> measure = MSharpness(m=[1, 2], rho=0.1)
        >>> model = torch.nn.Linear(3, 2)
        >>> data = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
        >>> list(measure(model, data, seed=0))
        ['m=1,rho=0.1', 'm=2,rho=0.1']
    """

    m: int | Sequence[int]
    rho: float | Sequence[float]
    ascent: Literal["one_step", "pgd", "apgd"] = "one_step"
    steps: int = 10
    norm: float = 2.0
    adaptive: bool = False
    average: bool = False
    restarts: int = 1
    name: str = field(default="m_sharpness", init=False)

    def __post_init__(self) -> None:
        """Store plain numbers and tuples, so that a measure is hashable; refuse bad ones early."""
        for key in ("m", "rho"):
            value = plain(getattr(self, key))
            if isinstance(value, Iterable):
                value = tuple(plain(v) for v in value)
            object.__setattr__(self, key, value)
        read_grid(self.m, self.rho)
        read_rule(self.ascent, self.steps, self.norm, self.adaptive, self.average, 0, self.restarts)

    def __call__(self, model: nn.Module, data: Data, *, seed: int) -> dict[str, Estimate]:
        """The m-sharpness of one model, by setting."""
        result = m_sharpness(
            model,
            data,
            m=self.m,
            rho=self.rho,
            ascent=self.ascent,
            steps=self.steps,
            norm=self.norm,
            adaptive=self.adaptive,
            average=self.average,
            restarts=self.restarts,
            seed=seed,
            progress=False,
        )
        return {
            f"m={row['m']},rho={float(row['rho'])!r}": Estimate(row["value"], row["std_error"])
            for row in result.frame().to_dict("records")
        }
