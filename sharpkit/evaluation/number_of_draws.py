"""How many resamples and shuffles a zoo of a given size gets.

A draw of n models costs some n log n operations per measure and conditioning set, so many models
get fewer draws: their statistics vary less, and a table of them is to be done in minutes. The rule
knows nothing but the number of models, so that equal zoos get equal tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sharpkit.evaluation.sorted_pairs import MANY

if TYPE_CHECKING:
    import pandas as pd

_RESAMPLED = 500_000  # models times resamples
_SHUFFLED = 10_000_000  # models times permutations
_LEAST_RESAMPLES = 100  # their standard deviation is then known to 7 %
_LEAST_PERMUTATIONS = 1000


@dataclass(frozen=True)
class Sampling:
    """How many resamples and shuffles, at which confidence, from which seed."""

    resamples: int = 1000
    permutations: int = 10_000
    confidence: float = 0.95
    seed: int = 0

    def of(self, models: int) -> Sampling:
        """The same with as many draws as so many models get; up to 512, those asked for.

        Returns:
            Sampling: At most 500,000 / models resamples, though not below 100, and at most
            10,000,000 / models permutations, though not below 1,000; never more than asked for.

        Example:
            >>> [Sampling().of(n).resamples for n in (96, 512, 1000, 5000)]
            [1000, 1000, 500, 100]
            >>> [Sampling().of(n).permutations for n in (96, 512, 1000, 5000)]
            [10000, 10000, 10000, 2000]
        """
        if models <= MANY:
            return self
        resamples = max(_LEAST_RESAMPLES, _RESAMPLED // models)
        permutations = max(_LEAST_PERMUTATIONS, _SHUFFLED // models)
        return replace(
            self,
            resamples=min(self.resamples, resamples),
            permutations=min(self.permutations, permutations),
        )


def draws_note(table: pd.DataFrame) -> str:
    """What the table's rows of many models rest on, in one line; empty if there are none.

    Example:
        >>> import pandas as pd
        >>> row = {"models": 5000, "resamples": 100, "permutations": 2000}
        >>> draws_note(pd.DataFrame([row]))
        'draws: 100 resamples and null shuffles, 2,000 permutations (5,000 models)'
    """
    if not {"models", "resamples", "permutations"} <= set(table.columns):
        return ""
    many = table[(table["models"] > MANY) & table["resamples"].notna()]
    if many.empty:
        return ""
    row = many.sort_values("models").iloc[-1]
    return (
        f"draws: {int(row['resamples']):,} resamples and null shuffles, "
        f"{int(row['permutations']):,} permutations ({int(row['models']):,} models)"
    )
