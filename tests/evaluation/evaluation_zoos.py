"""Small zoos for the tests of evaluation, and slow definitions written out as loops."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from paths import RECORDED, SHARED


def scoring_cases() -> dict[str, Any]:
    """What the competition's scoring program gave for 12 small cases, by name."""
    cases = json.loads(gzip.decompress((RECORDED / "scoring_cases.json.gz").read_bytes()))
    return {case["name"]: case for case in cases}


def recorded(name: str) -> Any:
    """A recorded file of the shared data; skips the test where there is none."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"the shared data are not on this machine: {path}")
    return json.loads(path.read_text())


def zoo(
    shape: tuple[int, ...], gaps: Any, rows: list[tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """Configurations of a complete grid (or the given rows) with hyperparameters a, b, c, ..."""
    settings = list(itertools.product(*map(range, shape))) if rows is None else rows
    return {
        str(k): {
            "hparams": {
                "abcdefgh"[i]: {"possible_values": list(range(size)), "current_value": setting[i]}
                for i, size in enumerate(shape)
            },
            "metrics": {"train_acc": float(gap), "test_acc": 0.0},
        }
        for k, (setting, gap) in enumerate(zip(settings, gaps, strict=True))
    }


def slow_pgdl(values: dict[str, float], configs: dict[str, Any]) -> float:
    """The competition's score, one pair of models at a time (values distinct as words)."""
    possible = {
        name: [str(v) for v in h["possible_values"]]
        for name, h in next(iter(configs.values()))["hparams"].items()
    }
    best = math.inf
    for one, two in itertools.permutations(possible, 2):
        choices = (possible[one], possible[one], possible[two], possible[two])
        cells: dict[tuple[str, ...], list[tuple[bool, bool]]] = {
            cell: [] for cell in itertools.product(*choices)
        }
        for i, j in itertools.product(configs, repeat=2):
            if i not in values or j not in values:
                continue
            first, second = configs[i]["hparams"], configs[j]["hparams"]
            cell = tuple(
                str(model[name]["current_value"])
                for name in (one, two)
                for model in (first, second)
            )
            if cell in cells:
                cells[cell].append((gap_of(configs[i]) > gap_of(configs[j]), values[i] > values[j]))
        information = entropy = 0.0
        for pairs in cells.values():
            information += slow_information(pairs)
            entropy += slow_gap_entropy(pairs, 1e-12)
        ratio = information / entropy if entropy else math.nan
        best = ratio if not best < ratio else best
    return best


def slow_jiang(values: dict[str, float], configs: dict[str, Any]) -> float:
    """The paper's score from its definition, by counting pairs of different models."""
    names = list(next(iter(configs.values()))["hparams"])
    scores = []
    for size in range(3):
        for chosen in itertools.combinations(names, size):
            cells: dict[Any, list[tuple[bool, bool]]] = {}
            for i, j in itertools.permutations(configs, 2):
                cell = tuple(
                    configs[m]["hparams"][name]["current_value"] for name in chosen for m in (i, j)
                )
                bits = (gap_of(configs[i]) > gap_of(configs[j]), values[i] > values[j])
                cells.setdefault(cell, []).append(bits)
            information = sum(len(p) * slow_information(p) for p in cells.values())
            entropy = sum(len(p) * slow_gap_entropy(p, 0.0) for p in cells.values())
            if entropy > 0:
                scores.append(information / entropy)
    return min(scores) if scores else math.nan


def slow_information(pairs: list[tuple[bool, bool]]) -> float:
    if not pairs:
        return math.nan
    total = len(pairs)
    information = 0.0
    for pair in set(pairs):
        joint = pairs.count(pair) / total
        gap = sum(g == pair[0] for g, _ in pairs) / total
        value = sum(v == pair[1] for _, v in pairs) / total
        information += joint * math.log2(joint / (gap * value))
    return information


def slow_gap_entropy(pairs: list[tuple[bool, bool]], inside_log: float) -> float:
    if not pairs:
        return math.nan
    shares = [sum(g == side for g, _ in pairs) / len(pairs) for side in (True, False)]
    return -sum(p * math.log2(p + inside_log) for p in shares if p + inside_log > 0)


def slow_tau(values: Any, gaps: Any) -> float:
    total = 0
    pairs = list(itertools.combinations(range(len(values)), 2))
    for i, j in pairs:
        total += int(np.sign(values[i] - values[j]) * np.sign(gaps[i] - gaps[j]))
    return total / len(pairs)


def gap_of(entry: dict[str, Any]) -> float:
    return float(entry["metrics"]["train_acc"] - entry["metrics"]["test_acc"])


def simulated(
    rng: np.random.Generator,
    alpha: float,
    rep: int = 1,
    shape: tuple[int, ...] = (3, 2, 2, 2, 2, 2),
) -> tuple[np.ndarray, Any]:
    """A zoo whose gap depends on the hyperparameters and on chance, and a measure tied to it.

    The measure is alpha times the standardised gap plus other effects of the hyperparameters and
    noise: alpha = 0 is useless, alpha = 1 perfect.
    """
    from sharpkit.evaluation.grid import Grid

    settings = np.array(list(itertools.product(*map(range, shape))))
    x = settings - settings.mean(0)
    effect = np.resize([0.8, 0.3, 0.9, 0.5, 0.2, 0.1], len(shape))
    other = np.resize([0.2, -0.8, 0.1, 0.9, 0.3, -0.5], len(shape))
    gap = x @ effect + 0.5 * rng.standard_normal(len(x))
    scale = math.sqrt((x.var(0) * effect**2).sum() + 0.25)
    nuisance = x @ other / math.sqrt((x.var(0) * other**2).sum())
    noise = 0.7 * nuisance + 0.714 * rng.standard_normal(len(x))
    values = alpha * gap / scale + math.sqrt(1 - alpha**2) * noise
    levels = tuple(tuple(map(str, range(size))) for size in shape)
    ids = tuple(map(str, range(len(x))))
    names = tuple("abcdef"[: len(shape)])
    return values, Grid(ids, names, settings.astype(np.int64), levels, levels, gap)
