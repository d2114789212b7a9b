"""Orders in which the values of a measure are dealt out anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sharpkit.evaluation.compared_pairs import Compared
from sharpkit.evaluation.grid import Floats, Ints

# a statistic of measures as they are (measures,) and shuffled (orders, measures)
Chance: TypeAlias = tuple[Floats, Floats]

_ENTRIES = 2_000_000  # of the orders drawn at a time


@dataclass(frozen=True)
class Shuffles:
    """Orders of the models, and which of them are compared."""

    compared: Compared
    orders: Ints  # (orders, models)

    @property
    def gap(self) -> Floats:
        """Of the models (models,)."""
        return self.compared.grid.gap

    @property
    def itself(self) -> Ints:
        """The models as they are (1, models)."""
        return np.arange(self.orders.shape[1])[None]


def random_orders(strata: Ints, permutations: int, seed: int) -> Ints:
    """Orders of the models (permutations, models) that keep each model in its stratum."""
    generator, n = np.random.default_rng(seed), len(strata)
    orders = np.empty((permutations, n), dtype=np.int64)
    places = np.argsort(strata, kind="stable")
    step = max(1, _ENTRIES // n)
    for start in range(0, permutations, step):
        part = orders[start : start + step]
        part[:, places] = np.argsort(strata + generator.random(part.shape), axis=1)
    return orders
