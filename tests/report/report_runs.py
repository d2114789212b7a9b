"""Small runs: one whose every name tries to break the page, and users' own models."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from sharpkit.measures import MSharpness, make_measure
from sharpkit.runs import score_models, score_zoo
from sharpkit.zoo import ZooWriter, build_model, load_zoo

TASK = "</script><script>window.hacked = 'task'</script>"
WIDTH = '<img src=x onerror="window.hacked = 1">'
DEPTH = "depth & <b>more</b> {{ 7 * 7 }} </style>"
VALUES = {
    WIDTH: [4, 8],
    DEPTH: ["<svg onload='window.hacked = 2'>", '"quoted" %{x}'],
    "seed": [0, 1],
}
MEASURE = "<i>loss</i>\u2028 --> <!-- <script>"
ERROR = "<script>window.hacked = 'error'</script> & 'so' \"on\""


class Failing:
    """A measure that has a value for some models, and an error for the others."""

    name = "failing"

    def __call__(self, model: torch.nn.Module, data: object, *, seed: int) -> float:
        total = float(sum(p.detach().sum() for p in model.parameters()))
        if total < 0:
            raise ValueError(ERROR)
        return total


def hostile_run(path: Path) -> Path:
    """Eight dense networks in a 2 x 2 x 2 grid, four measures; some models fail."""
    writer = ZooWriter(path / "zoo", shard_size=10)
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        x = torch.randn(24, 5, generator=generator)
        labels = torch.randint(0, 3, (24,), generator=generator)
        writer.write_dataset("plain", split, x, labels)
    for i, values in enumerate(itertools.product(*VALUES.values())):
        setting = dict(zip(VALUES, values, strict=True))
        config = {
            "input_shape": [5],
            "model_config": [
                {"layer_name": "Dense", "units": setting[WIDTH], "activation": "relu"},
                {"layer_name": "Dense", "units": 3},
            ],
        }
        torch.manual_seed(i)
        model = build_model(config)
        for p in model.parameters():
            p.data.normal_(0, 0.5)
        writer.write_model(
            "plain",
            2 * i + 3,
            model,
            initial=model,
            hyperparameters=setting,
            possible_values=VALUES,
            metrics={"train_acc": 0.99, "test_acc": 0.9 - 0.03 * i, "epochs": 10 + i},
        )
    task = load_zoo(path / "zoo")["plain"]
    measures = [
        MSharpness(m=[1, 4, 24], rho=[0.05, 0.1]),
        make_measure("training_loss", name=MEASURE),
        make_measure("frobenius_norms"),
        Failing(),
    ]
    run = path / "run"
    score_zoo({TASK: task}, measures, out=run, progress=False).close()
    return run


def own_run(path: Path) -> Path:
    """Five networks without hyperparameters, scored by m-sharpness and two more."""
    models = {f"model {name}": _dense(seed) for seed, name in enumerate("abcde")}
    measures = [
        MSharpness(m=[1, 4], rho=0.1),
        make_measure("training_loss"),
        make_measure("frobenius_norms"),
    ]
    return _scored(models, measures, path / "run")


def two_run(path: Path) -> Path:
    """Two networks, of which one cannot be loaded."""
    models = {"whole": _dense(0), "broken": _lost}
    return _scored(models, [MSharpness(m=1, rho=0.1)], path / "run")


def lost_run(path: Path) -> Path:
    """A network that cannot be loaded."""
    return _scored({"broken": _lost}, [MSharpness(m=1, rho=0.1)], path / "run")


def large_run(path: Path, models: int = 1100, measures: int = 8) -> Path:
    """Many models and settings of one measure, recorded without networks; one model failed."""
    from sharpkit.runs.store import Estimate, Outcome, Store

    generator = torch.Generator().manual_seed(0)
    settings = [(k % 5, k // 5 % 4) for k in range(models)]
    gaps = torch.rand(models, generator=generator) / 10
    noise = torch.randn(models, measures, generator=generator)
    run = path / "run"
    run.mkdir(parents=True)
    store = Store(run / "results.sqlite", {"n": 8, "seed": 0})
    store.add_task(
        "large",
        {
            str(k): {
                "hparams": {
                    "width": {"possible_values": list(range(5)), "current_value": a},
                    "depth": {"possible_values": list(range(4)), "current_value": b},
                },
                "metrics": {"train_acc": 1.0, "test_acc": 1.0 - float(gap)},
            }
            for k, ((a, b), gap) in enumerate(zip(settings, gaps, strict=True))
        },
    )
    for k in range(models):
        values = (10 * gaps[k] + noise[k] * torch.linspace(0.1, 9, measures)).tolist()
        found = {f"m={j + 1},rho=0.1": Estimate(v, 0.05) for j, v in enumerate(values)}
        outcome = Outcome(error=ERROR) if k == 7 else Outcome(values=found)
        store.add("large", str(k), "m_sharpness", outcome)
    store.close()
    return run


def _dense(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))


def _lost() -> torch.nn.Module:
    raise FileNotFoundError("no such checkpoint: broken.pt")


def _scored(models: dict[str, Any], measures: list[Any], run: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    train, test = (
        (
            torch.randn(24, 5, generator=generator),
            torch.randint(0, 3, (24,), generator=generator),
        )
        for _ in range(2)
    )
    score_models(models, measures, train, test, out=run, progress=False).close()
    return run
