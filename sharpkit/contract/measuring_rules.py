"""The rules that measurements follow, so that values of different rules never stand in one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharpkit.contract.precision import current_precision
from sharpkit.errors import RunError

# one more with every release in which the same call gives another number
RULES = 2

_CHANGED = (
    "frozen parameters are left out unless they are named, float32 is computed in full instead of "
    "with TF32, and losses with a normaliser of their own are averaged by weight"
)


def measuring_rules() -> dict[str, Any]:
    """What a run notes of the rules that its values follow.

    Example:
        >>> sorted(measuring_rules())
        ['precision', 'rules']
    """
    return {"rules": RULES, "precision": current_precision()}


def refuse_other_rules(noted: Mapping[str, Any], where: str | Path | None) -> None:
    """Refuse to go on with a run whose values follow other rules; the precision is not compared.

    Runs of old have noted nothing.

    Raises:
        RunError: If the rules are others.

    Example:
        >>> refuse_other_rules(measuring_rules(), "runs/mine")
    """
    found = noted.get("rules", 1)
    if found == RULES:
        return
    if not isinstance(found, int) or found > RULES:
        raise RunError(
            f"{where}: holds values measured by rules {found}, this version of sharpkit measures "
            f"by rules {RULES}: choose another directory, or go on with the version that began it"
        )
    raise RunError(
        f"{where}: holds values measured by rules {found}, now rules {RULES} apply: {_CHANGED}. "
        "The two do not mix: choose another directory, or go on with the version of sharpkit that "
        "began it. What is stored can still be read and evaluated"
    )
