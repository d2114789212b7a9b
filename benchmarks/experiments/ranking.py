"""Records what docs/ranking.md ranks: the values of a run over the embedded zoo, a row per measure.

sharpkit score embedded --n 600 --m 1,16,256 --rho 0.1 --measures NAMES --out RUN1
python benchmarks/experiments/ranking.py RUN1 [RUN2 ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from sharpkit.runs import Scores
from sharpkit.runs.measure_values import measure_values

RECORDED = Path(__file__).parent / "results" / "embedded_measures.csv"
KEYS = ["measure", "form", "m", "rho", "seconds"]


def rows(run: str) -> pd.DataFrame:
    """One row per measure and setting: what it is, its time per model, its value of each model."""
    scores = Scores.open(run)
    seconds = scores.provenance().groupby("measure")["seconds"].median()
    ((keys, values),) = measure_values(scores).values()
    models = values.T
    keys = keys.reindex(columns=KEYS[:-1]).assign(seconds=keys["measure"].map(seconds))
    return pd.concat([keys, models[sorted(models, key=int)].reset_index(drop=True)], axis=1)


if __name__ == "__main__":
    table = pd.concat([rows(run) for run in sys.argv[1:]], ignore_index=True)
    table.to_csv(RECORDED, index=False, float_format="%.7g")
    print(f"{len(table)} rows: {RECORDED}")
