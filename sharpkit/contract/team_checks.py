"""Whether processes that measure together measure the same thing."""

from __future__ import annotations

from typing import Any

from torch import nn

from sharpkit.contract.checksum import fingerprint
from sharpkit.contract.loss_text import loss_name, loss_text
from sharpkit.contract.modules import unwrapped
from sharpkit.contract.parameters import Parameters, floating_parameters
from sharpkit.contract.ranks import Team
from sharpkit.errors import ArgumentError, RankError


def require_same_weights(team: Team, model: nn.Module) -> None:
    """Raise RankError on every rank unless parameters and buffers are the same on all.

    Example:
        >>> require_same_weights(Team(), nn.Linear(2, 2))
    """
    if team.world == 1:
        return

    def prints() -> dict[str, int]:
        inner = unwrapped(model)
        _refuse_parts(inner)
        tensors = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
        return {name: fingerprint([tensor]) for name, tensor in tensors.items()}

    found = team.gathered(prints)
    for rank, other in enumerate(found):
        known = {**found[0], **other}
        name = next((name for name in known if other.get(name) != found[0].get(name)), None)
        if name is None:
            continue
        buffer = name in dict(unwrapped(model).named_buffers())
        raise RankError(
            f"{name!r} has other values on rank {rank} than on rank 0: "
            + (
                "give all ranks rank 0's buffers, as DistributedDataParallel does before each of "
                "its forward passes (for b in model.buffers(): torch.distributed.broadcast(b, 0))"
                if buffer
                else "expected the same weights on every rank; load them from the same file, or "
                "torch.distributed.broadcast those of rank 0"
            )
        )


def _refuse_parts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor
            raise ArgumentError(
                f"the parameter {name!r} is sharded over processes: each needs whole ones; measure "
                "a model that is loaded from a full checkpoint"
            )


def require_same_arguments(
    team: Team,
    model: nn.Module,
    *,
    loss: Any,
    parameters: Parameters = None,
    **others: object,
) -> None:
    """Raise RankError on every rank unless all ask for the same.

    Of a callable loss the name is compared, and of torch's losses the options, too.

    Example:
        >>> require_same_arguments(Team(), nn.Linear(2, 2), loss="mse", seed=0)
    """
    if team.world == 1:
        return

    def described() -> dict[str, str]:
        selected = floating_parameters(model, parameters)
        plain = isinstance(loss, str) or type(loss).__module__.startswith("torch.")
        return {
            "loss": loss_text(loss) if plain else loss_name(loss),
            **{f"the parameter {name!r}": str(tuple(p.shape)) for name, p in selected.items()},
            **{name: repr(value) for name, value in others.items()},
        }

    team.require_same(described)
