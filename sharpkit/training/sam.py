"""Sharpness-aware minimization as a torch optimizer around any other (Foret et al. 2021)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sharpkit.contract.examples import Inputs
from sharpkit.contract.losses import Loss
from sharpkit.contract.modules import unwrapped
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.training.m_sam import accumulate, check_group_size
from sharpkit.training.noise import BufferGuard, Noise
from sharpkit.training.perturbation import perturb, perturb_along, real
from sharpkit.training.plain_pass import accumulate_plain
from sharpkit.training.radius import checked_radius, radii_of_groups
from sharpkit.training.sam_timing import EVERY_STEP, SamTiming, sam_timing
from sharpkit.training.schedules import Schedule, ScheduleRule
from sharpkit.training.variants import PLAIN_SAM, SamVariant, both, check_variant


class _Phase(Enum):
    IDLE = "before the first pass"
    PERTURBED = "at the perturbed weights"
    READY = "back at the weights, with the gradient of the perturbed ones"


class SAM(Optimizer):
    """Steps of any optimizer along the gradient at w + ε, the worst weights near w.

    One step, Algorithm 1 of the paper, with g the gradient of the batch loss L:

        ε = ρ g(w) / ‖g(w)‖₂,    w ← base step from w along g(w + ε).

    The norm is over all parameters of all groups. Groups may have a `rho` and `adaptive` of their
    own: with T = ρ, or ρ|w| where adaptive (ASAM), the ball is ‖ε / T‖₂ ≤ 1 and
    ε = T² g / ‖T g‖₂; a group with ρ = 0 is not perturbed and does not count in the norm.
    There is no epsilon in the denominator: a zero gradient gives ε = 0. The weights are put back
    from a copy, bit for bit, also when a pass fails. Running statistics (BatchNorm) move in the
    first pass only, and `step(closure)` gives both passes the same random numbers, so the same
    dropout masks, as in the authors' implementation. Weight decay of the base optimizer acts on w
    and does not enter ε.

    Ways to make a step, all of which end at a step of the base optimizer:

    - `step(closure)` runs both passes; only one where the step is not perturbed.
    - `first_step()`, second backward pass, `second_step()` in a loop of your own; several backward
      passes may be accumulated before each, and gradients clipped before the last.
    - `with opt.perturbed():` around the second pass, then `step()`: as before, but safe against
      errors.
    - `step_batch(model, inputs, labels, m=...)`: m-SAM, a perturbation for each group of m.

    `interval`, `start` and `stop` choose the steps that are perturbed; the others are plain steps
    of the base optimizer, with one pass over the whole batch. Where passes are written out,
    `perturbs` tells whether the second one is due. Steps are counted in the state (`sam_step` of
    the groups), so a training that goes on from a `state_dict`, with the same arguments, takes the
    same steps.

    With `torch.amp.GradScaler`, scale both losses and call `scaler.step(opt)` in place of
    `second_step()`. The ascent does not depend on the scale, so only the second gradient is
    unscaled; a step that the scaler skips still puts the weights back. With
    DistributedDataParallel, run the first backward pass inside `model.no_sync()` (or
    `step(closure, no_sync=model.no_sync)`): each rank's shard then has its own ε, as in the paper.
    Every rank must hold whole parameters, so this is not for sharded ones (FSDP).

    Args:
        params: Parameters or groups of them, as for every torch optimizer.
        base_optimizer: An optimizer class, such as `torch.optim.SGD`. Its groups and state are
            shared with this object, so schedulers of `lr` or `rho` act on either.
        rho: Radius of the perturbation, at least 0; 0.05 is the paper's for CIFAR.
        adaptive: Measure ε relative to |w| elementwise (then ρ is 10 times larger or more).
        variant: Another direction of ε, or another gradient than g(w + ε): see `SamVariant`.
        interval: Perturb every interval-th step, from the first of `start` on.
        start: The first step that is perturbed, counted from 0: a whole number of steps, or a
            fraction (float) of `total_steps`, rounded; 0.8 for the last fifth of a training.
        stop: The step before which the last one is perturbed, in the same way; None for no end.
        total_steps: Steps of the whole training, which fractions and schedules need.
        rho_schedule: Factor on ρ from `start` to `stop`: "constant", "linear" or "cosine" (from 1
            to 0), "step" (a tenth after half, a hundredth after three quarters), or a function of
            the progress, from 0 to 1.
        rho_warmup: Steps, or fraction (float) of those from `start` to `stop`, over which ρ first
            rises from 0 along a line; the schedule takes the rest.
        base_kwargs: Passed to `base_optimizer`.

    Raises:
        ArgumentError: For a rho below 0, or a base optimizer that is not a class or needs a
            closure itself; for steps out of range or none; for a fraction without `total_steps`.

    Source:
        Foret et al., ICLR 2021, Algorithm 1 and equation 2; Kwon et al., ICML 2021 (adaptive);
        Zhou et al. 2024 (2410.10373), SAM late in training (start).

    Example:
        L(w) = w²/2 at w = 1: ε = 0.5, the gradient there is 1.5, so w becomes 1 − 0.1 · 1.5.

        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> opt = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
        >>> def closure():
        ...     loss = (w ** 2 / 2).sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure).item()
        0.5
        >>> w.data
        tensor([0.8500])
    """

    # GradScaler then always calls `step`, which puts the weights back even if it skips the update
    _step_supports_amp_scaling = True
    splits_batches = False  # whether a batch has had a perturbation for each group of m
    timing: SamTiming = EVERY_STEP  # which steps are perturbed; of pickles that have none

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        variant: SamVariant = PLAIN_SAM,
        interval: int = 1,
        start: int | float = 0,
        stop: int | float | None = None,
        total_steps: int | None = None,
        rho_schedule: Schedule | ScheduleRule = "constant",
        rho_warmup: int | float = 0,
        **base_kwargs: Any,
    ) -> None:
        if isinstance(base_optimizer, Optimizer) or not callable(base_optimizer):
            raise ArgumentError(
                "base_optimizer must be a class such as torch.optim.SGD, with its arguments "
                f"passed to SAM; got {type(base_optimizer).__name__}"
            )
        check_variant(variant)
        self._reset()
        self.variant = variant
        self.timing = sam_timing(
            interval=interval, start=start, stop=stop, total_steps=total_steps,
            rho_schedule=rho_schedule, rho_warmup=rho_warmup,
        )  # fmt: skip
        super().__init__(params, {"rho": checked_radius(rho), "adaptive": adaptive})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        closure = inspect.signature(self.base_optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ArgumentError(
                f"{type(self.base_optimizer).__name__} evaluates a closure of its own and cannot "
                "follow the gradient of SAM"
            )
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = {**self.base_optimizer.defaults, **self.defaults}
        self.steps = 0

    @property
    def steps(self) -> int:
        """Steps made, of either kind; also those that a `GradScaler` skipped.

        Set it where a training goes on of which no state was saved.
        """
        return int(self.param_groups[0]["sam_step"])

    @steps.setter
    def steps(self, value: int) -> None:
        for group in self.param_groups:
            group["sam_step"] = value

    @property
    def perturbs(self) -> bool:
        """Whether the step that comes, or is under way, takes a second pass, at w + ε.

        Example:
            >>> import torch
            >>> w = torch.nn.Parameter(torch.tensor([1.0]))
            >>> opt = SAM([w], torch.optim.SGD, rho=0.5, interval=2, lr=0.1)
            >>> for _ in range(3):
            ...     opt.zero_grad()
            ...     (w ** 2 / 2).sum().backward()
            ...     if opt.perturbs:
            ...         with opt.perturbed():
            ...             (w ** 2 / 2).sum().backward()
            ...     opt.step()
            >>> opt.steps, opt.perturbs
            (3, False)
        """
        moves = self.variant.combine is not None or any(g["rho"] for g in self.param_groups)
        return moves and self.factor > 0

    @property
    def factor(self) -> float:
        """What ρ is multiplied by in this step; 0 where the step is a plain one."""
        return self.timing.factor(self.steps)

    def _check_length(self) -> None:
        total = self.timing.total
        if total is not None and self.steps >= total:
            raise ArgumentError(
                f"this is step {self.steps + 1}, but total_steps is {total}: give the number of "
                "steps that the training has"
            )

    def _reset(self) -> None:
        self._phase = _Phase.IDLE
        self._moved: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._plain: list[Tensor] = []  # gradients at w, where the variant combines them
        self._guard = BufferGuard()
        self._finite = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; `rho` and `adaptive` as given in it, or this object's."""
        if "rho" in param_group:
            param_group["rho"] = checked_radius(param_group["rho"])
        super().add_param_group(param_group)
        base = getattr(self, "base_optimizer", None)
        if base is not None:
            group = self.param_groups.pop()  # one shared list: let the base optimizer append it
            base.add_param_group({**group, "sam_step": self.steps})

    def first_step(self, *, zero_grad: bool = True) -> None:
        """Move the weights to w + ε along the gradients in `.grad`; ε = 0 if the step is plain.

        Until the weights are back, buffers of modules in training mode are noted, to be put back
        with them.

        Args:
            zero_grad: Clear the gradients afterwards, ready for the second backward pass.

        Raises:
            ModelError: If a gradient is sparse, or weights in half precision round ε away.
            ArgumentError: If the weights are perturbed already, or a group's rho is below 0, or
                all steps of `total_steps` have been made.
        """
        if self._phase is _Phase.PERTURBED:
            raise ArgumentError(
                "the weights are perturbed already: call second_step(), or restore() to go back"
            )
        self._check_length()
        factor = self.factor
        rhos = [checked_radius(group["rho"]) * factor for group in self.param_groups]
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        every = [p for group in groups for p in group]
        for p in every:
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise ModelError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient: SAM needs dense "
                    "ones (Embedding(..., sparse=False))"
                )
        self._moved, self._copies = every, [p.detach().clone() for p in every]
        self._phase = _Phase.PERTURBED
        self._guard.start()
        if self.variant.combine is not None and factor > 0:
            self._plain = [real(p.grad).clone() for p in every if p.grad is not None]
        adaptive = [bool(group["adaptive"]) for group in self.param_groups]
        try:
            if self.variant.direction is None or not factor > 0:
                self._finite = perturb(groups, rhos, adaptive)
            else:
                self._finite = perturb_along(self.variant.direction, groups, rhos, adaptive)
        except ModelError:  # half precision does not hold the perturbation
            self.restore()
            raise
        torch.clear_autocast_cache()  # it may hold half-precision copies of w
        if zero_grad:
            self.zero_grad()

    def second_step(self, *, zero_grad: bool = False) -> None:
        """Put the weights back to w and step the base optimizer along the gradients in `.grad`.

        Args:
            zero_grad: Clear the gradients afterwards.

        Raises:
            ArgumentError: Without a first step.
        """
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Put weights and buffers back without a step, for instance after a failed second pass."""
        if self._phase is _Phase.PERTURBED:
            if self._moved:
                torch._foreach_copy_(self._moved, self._copies)
            torch.clear_autocast_cache()
            self._guard.stop()
        self._moved, self._copies, self._plain, self._phase = [], [], [], _Phase.IDLE

    @torch.no_grad()
    def _combine(self) -> None:
        """Replace the gradients of the perturbed weights by what the variant makes of both."""
        if self._phase is not _Phase.PERTURBED or self.variant.combine is None or not self._plain:
            return
        own = {str(i): real(p.grad) for i, p in enumerate(self._moved) if p.grad is not None}
        if own:
            found = both(
                self.variant.combine,
                {name: self._plain[int(name)].unsqueeze(0) for name in own},
                {name: g.unsqueeze(0) for name, g in own.items()},
            )
            for name, g in own.items():
                g.copy_(found[name][0])

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Be at w + ε inside, and back at w on leaving, also after an error; then call `step()`.

        Example:
            >>> import torch
            >>> w = torch.nn.Parameter(torch.tensor([1.0]))
            >>> opt = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
            >>> (w ** 2 / 2).sum().backward()
            >>> with opt.perturbed():
            ...     (w ** 2 / 2).sum().backward()
            >>> opt.step()
            >>> w.data
            tensor([0.8500])
        """
        self.first_step()
        try:
            yield
        except BaseException:
            self.restore()
            raise
        if self._phase is _Phase.PERTURBED:
            self._combine()
            self.restore()
            self._phase = _Phase.READY

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> Any:
        """Make a whole step with a closure, or finish one without.

        Args:
            closure: Computes the loss, calls its backward and returns it. It is called twice (once
                where the step is not perturbed), with the gradients cleared before each call, and
                with the same random numbers.
            no_sync: Context for the first call, such as `no_sync` of a DistributedDataParallel.

        Returns:
            What the closure returned at the unperturbed weights; None without one.

        Raises:
            ArgumentError: Without a closure, unless `first_step` (or `perturbed`, or
                `accumulate_groups`) came before, or the step is not perturbed; or with one after
                it; or with `no_sync` for a variant that combines the gradients of both passes; or
                after all steps of `total_steps`.
        """
        if closure is None:
            return self._finish()
        if self._phase is not _Phase.IDLE:
            raise ArgumentError(
                f"step(closure) makes a whole step, but one has begun ({self._phase.value}): "
                "call step() to finish it, or restore() to drop it"
            )
        if no_sync is not None and self.variant.combine is not None:
            raise ArgumentError(
                f"the variant {self.variant.name!r} combines the gradients of both passes, which "
                "must then be the same on all ranks: leave out no_sync"
            )
        self._check_length()
        if not self.perturbs:
            self.zero_grad()
            with torch.enable_grad():
                value = closure()
            self._phase, self._finite = _Phase.READY, True
            self._finish()
            return value
        noise = Noise.of(p for group in self.param_groups for p in group["params"])
        self.zero_grad()
        with torch.enable_grad(), no_sync() if no_sync is not None else nullcontext():
            loss = closure()
        drawn = self.variant.direction is not None
        with self.perturbed(), torch.enable_grad(), noise.replayed(then_on=drawn):
            closure()
        self._finish()
        return loss

    def _finish(self) -> None:
        if self._phase is _Phase.IDLE and self.perturbs:
            raise ArgumentError(
                "SAM needs two passes: give step() a closure that computes the loss and calls its "
                "backward, or call first_step() and a second backward pass before it"
            )
        self._check_length()
        self._finite = self._finite or self._phase is _Phase.IDLE
        self._combine()
        self.restore()
        self.steps += 1
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and (bool(found_inf) or not self._finite):
            return
        if scale is not None:
            gradients = [
                p.grad for g in self.param_groups for p in g["params"] if p.grad is not None
            ]
            for gradient in gradients:
                gradient.mul_(scale.double().reciprocal().to(gradient.device))
        self.base_optimizer.step()

    def accumulate_groups(
        self,
        model: nn.Module,
        inputs: Inputs,
        labels: Tensor,
        *,
        m: int,
        loss: Loss = "cross_entropy",
        scaler: torch.amp.GradScaler | None = None,
        compile: bool = False,
    ) -> Tensor:
        """Add the m-SAM gradient of a batch to `.grad`; `step()` then uses it.

        As `m_sam_gradient`, with rho and adaptive from the parameter groups. The gradients of
        several calls add up, and may be clipped before `step()`. In a step that is not perturbed it
        is the plain gradient of the whole batch, in one pass.
        """
        if self._phase is _Phase.PERTURBED:
            raise ArgumentError("the weights are perturbed: call second_step() or restore() first")
        self._check_length()
        network, factor = unwrapped(model), self.factor
        radii = radii_of_groups(self.param_groups, network, factor=factor)
        if factor > 0:
            value = accumulate(
                model, inputs, labels, m=m, radii=radii, loss=loss, scaler=scaler,
                variant=self.variant, compile=compile,
            )  # fmt: skip
        else:
            check_group_size(m)
            own = [p for name, p in network.named_parameters() if name in radii.rho]
            value = accumulate_plain(model, inputs, labels, own, loss=loss, scaler=scaler)
        self._phase, self._finite = _Phase.READY, True
        self.splits_batches = self.splits_batches or m < len(labels)
        return value

    def step_batch(
        self,
        model: nn.Module,
        inputs: Inputs,
        labels: Tensor,
        *,
        m: int,
        loss: Loss = "cross_entropy",
        compile: bool = False,
    ) -> Tensor:
        """One m-SAM step: clear gradients, `accumulate_groups`, `step()`.

        Args:
            model: The model whose parameters this optimizer has.
            inputs: Tensor of shape (n, ...), or a dict or tuple of such.
            labels: Tensor of shape (n, ...).
            m: Examples per group; n or more for plain SAM.
            loss: "cross_entropy", "mse", or a function (outputs, labels) -> mean over examples.
            compile: Compile the passes over groups, once for the following steps (see
                `m_sam_gradient`).

        Returns:
            Tensor: The mean loss at the weights before the step.
        """
        self.zero_grad()
        value = self.accumulate_groups(model, inputs, labels, m=m, loss=loss, compile=compile)
        self.step()
        return value

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: nothing of a step half made."""
        kept = {
            "base_optimizer": self.base_optimizer,
            "variant": self.variant,
            "timing": self.timing,
        }
        return {**super().__getstate__(), **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ArgumentError: If it does not tell how many steps were made, which `interval` and the
                like depend on.
        """
        counted = all("sam_step" in group for group in state_dict["param_groups"])
        if not self.timing.everywhere and not counted:
            raise ArgumentError(
                "the state does not tell how many steps were made, as that of another optimizer: "
                "note them in it, `group['sam_step'] = n` for each of its param_groups, or leave "
                "out interval, start, stop and the schedule"
            )
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_phase" not in self.__dict__:
            self._reset()
        for group in self.param_groups:  # a checkpoint of the plain base optimizer has none
            group.setdefault("rho", self.defaults["rho"])
            group.setdefault("adaptive", self.defaults["adaptive"])
            group.setdefault("sam_step", 0)
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
