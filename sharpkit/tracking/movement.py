"""How the weights have moved: their distance from the start, and whether they turn round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Movement:
    """Distances between the weights at measurements, kept as three vectors of their size.

    Example:
        >>> moved = Movement()
        >>> [moved.to(torch.tensor(w)) for w in ([0.0, 0.0], [3.0, 4.0], [3.0, 3.0])]
        [(0.0, nan), (5.0, nan), (4.2426..., -0.8)]
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._last: Tensor | None = None
        self._step: Tensor | None = None

    def to(self, weights: Tensor) -> tuple[float, float]:
        """The distance from the first weights, and the cosine of the last two movements.

        Args:
            weights: Shape (P,).

        Returns:
            ‖w − w₀‖₂; and cos of the angle between w − w' and w' − w'', with w' and w'' those of
            the two calls before. It is near 1 on a straight way, −1 where weights jump to and fro,
            NaN in the first two calls and where weights did not move.
        """
        weights = weights.detach().clone()
        if self._first is None or self._last is None:
            self._first = self._last = weights
            return 0.0, float("nan")
        step = weights - self._last.to(weights.device)
        cosine = float("nan") if self._step is None else _cosine(step, self._step)
        self._last, self._step = weights, step
        return _norm(weights - self._first.to(weights.device)), cosine

    def state_dict(self) -> dict[str, Any]:
        """Copies on the CPU."""
        vectors = {"first": self._first, "last": self._last, "step": self._step}
        return {k: None if v is None else v.cpu().clone() for k, v in vectors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._first, self._last, self._step = (state[k] for k in ("first", "last", "step"))


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _cosine(a: Tensor, b: Tensor) -> float:
    b = b.to(a.device)
    norms = _norm(a) * _norm(b)
    return float(a.double() @ b.double()) / norms if norms else float("nan")
