"""What a tracker measures at one step: columns of a row, by the names they are asked for with."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import sharpkit.measures as named_measures
from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss
from sharpkit.contract.modules import unwrapped
from sharpkit.contract.parameters import floating_parameters
from sharpkit.curvature import HessianOperator, trace
from sharpkit.curvature.linear_map import LinearMap
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures import Measure, MSharpness, critical_sharpness, make_measure, measure_names
from sharpkit.measures.measure import describe, evaluate_measure
from sharpkit.measures.passes import mean_loss, setup_together
from sharpkit.tracking.following import TOLERANCE, Followed, follow
from sharpkit.tracking.movement import Movement
from sharpkit.tracking.stability import edge, preconditions
from sharpkit.tracking.table import Row

_TRACE_PRODUCTS = 30


class Memory:
    """What one measurement leaves for the next: eigenvectors, earlier weights."""

    def __init__(self) -> None:
        self.followed: dict[str, Followed] = {}
        self.movement = Movement()
        self.critical = 0.0  # the last critical sharpness, near which the next is looked for

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and tensors on the CPU."""
        followed = {
            name: {
                **{k: getattr(f, k) for k in ("value", "residual", "products")},
                **{k: getattr(f, k).cpu().clone() for k in ("vector", "second")},
            }
            for name, f in self.followed.items()
        }
        movement = self.movement.state_dict()
        return {"followed": followed, "movement": movement, "critical": self.critical}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.followed = {name: Followed(**fields) for name, fields in state["followed"].items()}
        self.movement.load_state_dict(state["movement"])
        self.critical = float(state["critical"])


class Moment:
    """A model held still between two steps of its training; inside `standing`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        data: Data | DistributedData,
        loss: Loss,
        seed: int,
        memory: Memory,
    ) -> None:
        self.model, self.optimizer, self.data = unwrapped(model), optimizer, data
        self.loss, self.seed, self.memory = loss, seed, memory

    @cached_property
    def moved(self) -> dict[str, Tensor]:
        """The parameters that training moves, by name."""
        trained: dict[str, Tensor] = {
            k: p for k, p in self.model.named_parameters() if p.requires_grad
        }
        if self.optimizer is None:
            return trained
        there = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not there <= {id(p) for p in self.model.parameters()}:
            raise ArgumentError(
                "the optimizer moves parameters that the model does not have: give the tracker the "
                "model that is trained, and an optimizer of its own parameters"
            )
        return {k: p for k, p in trained.items() if id(p) in there}

    @cached_property
    def hessian(self) -> HessianOperator:
        """Of the mean loss, by the parameters that training moves."""
        return HessianOperator(
            self.model, self.data, loss=self.loss, parameters=list(self.moved), progress=False
        )

    def close(self) -> None:
        """Free the graphs."""
        if "hessian" in self.__dict__:
            self.hessian.close()

    def lambda_max(self, name: str, matrix: LinearMap, toward: Tensor) -> Row:
        """The largest eigenvalue in columns of that name, looked for along a gradient as well."""
        last = self.memory.followed.get(name)
        if last is not None and last.vector.shape != matrix.shape[:1]:
            last = None  # other parameters are trained now
        found = self.memory.followed[name] = follow(matrix, last, toward=toward, seed=self.seed)
        if not found.converged:
            warnings.warn(
                f"{name}: after {found.products} products the residual is {found.residual:.2g}, "
                f"more than {TOLERANCE:.0%} of the value {found.value:.4g}, which is a lower bound",
                stacklevel=2,
            )
        return {
            name: found.value,
            f"{name}_residual": found.residual,
            f"{name}_products": found.products,
        }


@contextmanager
def standing(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode as it is written, and leave everything as it was.

    Accelerate puts autocast into the forward of a model that it has prepared; inside, it is off.

    Raises:
        ArgumentError: If a parameter is sharded.
    """
    inner = unwrapped(model)
    for name, parameter in inner.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor: other processes would be waited for
            raise ArgumentError(
                f"the parameter {name!r} is sharded over processes: a tracker needs whole ones; "
                "measure a model that is loaded from a full checkpoint"
            )
    wrapped, plain = (inner.__dict__.get(name) for name in ("forward", "_original_forward"))
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        if wrapped is None or plain is None:
            yield
            return
        inner.forward = plain
        try:
            yield
        finally:
            inner.forward = wrapped


def _loss(now: Moment) -> Row:
    if "hessian" in now.__dict__:
        return {"loss": now.hessian.loss}
    with frozen(now.model) as found:
        return {
            "loss": mean_loss(setup_together(now.model, now.data, found, now.loss), {}, now.loss)
        }


def _lambda_max(now: Moment) -> Row:
    return now.lambda_max("lambda_max", now.hessian, now.hessian.gradient)


def _stability(now: Moment) -> Row:
    if now.optimizer is None:
        raise ArgumentError(
            'a threshold is that of an optimizer: call the tracker with it, or measure "lambda_max"'
        )
    name = "preconditioned_lambda_max" if preconditions(now.optimizer) else "lambda_max"
    found = edge(now.optimizer, now.moved, lambda: float(now.hessian.gradient.norm()))
    if found is None:  # nothing is known of an adaptive optimizer before its first step
        columns = (name, f"{name}_residual", f"{name}_products", "threshold")
        return dict.fromkeys(columns, math.nan)
    matrix, toward = found.matrix(now.hessian), found.gradient(now.hessian.gradient)
    return {**now.lambda_max(name, matrix, toward), "threshold": found.threshold}


def _trace(now: Moment) -> Row:
    found = trace(now.hessian, products=_TRACE_PRODUCTS, seed=now.seed, progress=False)
    return {"trace": found.value, "trace_std_error": found.std_error}


def _distance(now: Moment) -> Row:
    weights = [
        (torch.view_as_real(p) if p.is_complex() else p).detach().reshape(-1)
        for p in floating_parameters(now.model).values()
    ]
    distance, cosine = now.memory.movement.to(torch.cat(weights))
    return {"distance": distance, "update_cosine": cosine}


def _critical(now: Moment) -> Row:
    guess = 2 / now.memory.critical if now.memory.critical else 0.1
    now.memory.critical = critical_sharpness(now.model, now.data, loss=now.loss, guess=guess)
    return {"critical_sharpness": now.memory.critical}


OWN: dict[str, Callable[[Moment], Row]] = {
    "loss": _loss,
    "stability": _stability,
    "lambda_max": _lambda_max,
    "trace": _trace,
    "critical_sharpness": _critical,
    "distance": _distance,
}
_OF_HESSIAN = ("stability", "lambda_max", "trace")  # these make the operator, which knows the loss


class Quantities:
    """What is asked for, checked once.

    Args:
        measures: Names of `OWN` or of `sharpkit.measures`, or measures.
        loss: Of what takes one.

    Raises:
        ArgumentError: For an unknown name, one twice, or a measure that needs more than a model
            and data.

    Example:
        >>> Quantities(["loss", "gradient_noise"], "mse").names
        ['loss', 'gradient_noise']
    """

    def __init__(self, measures: Sequence[str | Measure] | str, loss: Loss) -> None:
        asked = [measures] if isinstance(measures, str) else list(measures)
        if not asked:
            raise ArgumentError("measures is empty: expected one or more")
        self.loss = loss
        self._measures = [_measure(one, loss) for one in asked]
        self.names = [one if isinstance(one, str) else describe(one)[0] for one in self._measures]
        for name in self.names:
            if self.names.count(name) > 1:
                raise ArgumentError(f"measures has {name!r} twice")

    def configuration(self) -> list[Any]:
        """What determines the columns, for a state that is saved."""
        return [
            one if isinstance(one, str) else [*map(str, describe(one))] for one in self._measures
        ]

    def require_together(self) -> None:
        """Raise unless all of them can be measured by several processes.

        Raises:
            ArgumentError: With those that cannot.
        """
        alone = [
            name
            for name, one in zip(self.names, self._measures, strict=True)
            if not isinstance(one, str | MSharpness)
        ]
        if alone:
            raise ArgumentError(
                f"{', '.join(alone)}: one process computes it, and the tracker has "
                f"DistributedData: expected {', '.join(OWN)} or MSharpness; for others make a "
                "second tracker with data that rank 0 alone calls"
            )

    def measure(self, now: Moment) -> tuple[Row, dict[str, str]]:
        """A row, and why what is missing in it could not be measured, by name."""
        row: Row = {}
        failed: dict[str, str] = {}
        # what makes the operator comes first, and the columns stay in the order asked for
        order = sorted(range(len(self.names)), key=lambda i: self.names[i] not in _OF_HESSIAN)
        parts: dict[int, Row] = {}
        for i in order:
            one = self._measures[i]
            if one == "lambda_max" and "lambda_max" in row:
                continue  # the matrix of the threshold was the Hessian itself
            try:
                parts[i] = OWN[one](now) if isinstance(one, str) else _own(one, now)
            except ModelError as error:
                failed[self.names[i]] = str(error)
                continue
            row |= parts[i]
        return {k: v for i in sorted(parts) for k, v in parts[i].items()}, failed


def _measure(one: str | Measure, loss: Loss) -> str | Measure:
    """A name of `OWN` as it is; a measure, also from its name."""
    if isinstance(one, str):
        if one in OWN:
            return one
        if one not in measure_names():
            known = ", ".join(dict.fromkeys([*OWN, *measure_names()]))
            raise ArgumentError(f"no measure {one!r}: expected a measure, or one of {known}")
        function = getattr(named_measures, one)
        takes_loss = "loss" in inspect.signature(function).parameters
        options: dict[str, Any] = {"loss": loss} if takes_loss else {}
        one = make_measure(one, **options)
    for need in ("initial", "metrics"):
        if getattr(one, f"needs_{need}", False):
            raise ArgumentError(
                f"{describe(one)[0]} needs more than a model and data ({need}): a tracker has none"
            )
    return one


def _own(measure: Measure, now: Moment) -> Row:
    """The columns of a measure: one for each setting, and its standard error if it is known."""
    name, _ = describe(measure)
    row: Row = {}
    for setting, found in evaluate_measure(measure, now.model, now.data, seed=now.seed).items():
        column = " ".join([name, *filter(None, setting.split(","))])
        row[column] = found.value
        if found.std_error == found.std_error:
            row[f"{column} std_error"] = found.std_error
    return row
