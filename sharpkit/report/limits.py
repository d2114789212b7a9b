"""What the page shows of a large run: no more than an eye can see, and it says so."""

from __future__ import annotations

import numpy as np

from sharpkit.evaluation.grid import Bools, Ints

POINTS = 1000  # models in a scatter plot
ROWS = 200  # of the table of models at a time
CELLS = 400_000  # of the table of models that the page holds
MEASURES = 60  # in a heat map
COMPARED = 512  # models whose pairs are looked at for changing places
NAMES = 50  # of models with the same failure


def drawn(candidates: Bools, most: int, seed: int = 0) -> Ints:
    """Rows of at most so many of the candidates (models,), at random, in their order.

    Example:
        >>> drawn(np.array([True, False, True, True]), 3).tolist()
        [0, 2, 3]
        >>> len(drawn(np.ones(50, dtype=bool), 10))
        10
    """
    rows = np.flatnonzero(candidates)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    return rows


def said(shown: int, of: int, what: str, how: str) -> str:
    """How many of what are shown, as a sentence; empty if all are.

    Example:
        >>> said(1000, 5000, "models", "drawn at random")
        'Shown are 1,000 of 5,000 models, drawn at random.'
        >>> said(96, 96, "models", "drawn at random")
        ''
    """
    return f"Shown are {shown:,} of {of:,} {what}, {how}." if shown < of else ""
