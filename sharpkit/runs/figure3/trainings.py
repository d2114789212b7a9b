"""The trainings behind the left and the middle panel, and their spectra: one work item each."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import TensorDataset

from sharpkit.contract.examples import standard_tensor
from sharpkit.curvature.density import SpectralDensity
from sharpkit.errors import RunError
from sharpkit.runs.checkpoints import load_checkpoint
from sharpkit.runs.figure3.plan import Plan
from sharpkit.runs.spectrum import spectrum
from sharpkit.training import build_architecture, fit
from sharpkit.training.augmentation import noisy_labels

if TYPE_CHECKING:
    import pandas as pd


_COLUMNS = (
    "lambda_max", "lambda_max_over_lambda_5", "lambda_min", "trace", "trace_std_error", "loss",
    "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training."""

    optimizer: str  # "sgd" or "sam"
    m: int | None  # SAM's group size
    rho: float | None  # SAM's radius
    lr: float  # first learning rate
    seed: int  # of weights and training

    @property
    def name(self) -> str:
        """The name of its directory."""
        sam = f"-m{self.m}-rho{self.rho:g}" if self.optimizer == "sam" else ""
        return f"{self.optimizer}{sam}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class ArrayExamples:
    """Training and test data as arrays, which pass between processes by value."""

    train: tuple[Any, Any]  # inputs (n, ...) and labels (n,)
    test: tuple[Any, Any]  # the same

    @classmethod
    def of(cls, train: TensorDataset, test: TensorDataset) -> ArrayExamples:
        """From data sets of tensors."""
        (x, y), (test_x, test_y) = (tuple(t.numpy() for t in d.tensors) for d in (train, test))
        return cls((x, y), (test_x, test_y))

    def datasets(self) -> tuple[TensorDataset, TensorDataset]:
        """As data sets of tensors, in the standard layout."""
        train, test = (
            TensorDataset(*map(standard_tensor, arrays)) for arrays in (self.train, self.test)
        )
        return train, test


def sgd_runs(plan: Plan) -> list[Run]:
    """The trainings with SGD."""
    training = plan.training
    return [Run("sgd", None, None, lr, seed) for lr in training.lr for seed in training.seeds]


def sam_runs(plan: Plan, lr: float) -> list[Run]:
    """The trainings with SAM of the middle panel."""
    training = plan.training
    return [
        Run("sam", m, rho, lr, seed)
        for m in training.m
        for rho in training.rho
        for seed in training.seeds
    ]


def spectrum_runs(plan: Plan, lr: float) -> list[Run]:
    """The trainings of the left panel, with SGD and with SAM."""
    spectra = plan.spectra
    seeds = plan.training.seeds[: spectra.seeds]
    return [
        *(Run("sgd", None, None, lr, seed) for seed in seeds),
        *(Run("sam", spectra.m, spectra.rho, lr, seed) for seed in seeds),
    ]


def train(
    plan: Plan, examples: ArrayExamples, root: Path, kept: frozenset[Run], run: Run, device: str
) -> dict[str, Any]:
    """Train a network, or read back one that is trained; its row of trainings.csv.

    Of the trainings in `kept`, the weights at the epochs of the left panel are kept.
    """
    result = fit(
        build(plan, examples, run.seed),
        *examples.datasets(),
        **plan.training.settings(**asdict(run) | {"rho": run.rho or 0.0}).asdict(),
        out=root / "trainings" / run.name,
        keep=plan.spectra.epochs if run in kept else (),
        evaluate_every=plan.training.epochs,
        device=device,
        progress=False,
    )
    last = result.history.iloc[-1]
    return {
        **asdict(run),
        "test_error": 1 - last["test_accuracy"],
        "train_error": 1 - last["train_accuracy"],
        "train_loss": last["train_loss"],
        "seconds": result.history["seconds"].sum(),
    }


def build(plan: Plan, examples: ArrayExamples, seed: int) -> nn.Module:
    """The untrained network."""
    inputs, labels = examples.train
    classes = int(labels.max()) + 1
    return build_architecture(plan.training.architecture, inputs.shape[1:], classes, seed=seed)


def training_set(plan: Plan, examples: ArrayExamples, seed: int) -> TensorDataset:
    """What a training of a seed was made on, wrong labels included."""
    inputs, labels = examples.datasets()[0].tensors
    return TensorDataset(inputs, noisy_labels(labels, plan.training.label_noise, seed))


def best_lr(trainings: pd.DataFrame, seeds: int) -> float:
    """The learning rate with SGD's lowest mean test error, of those at which no seed failed.

    Raises:
        RunError: If at every learning rate a training failed.
    """
    sgd = trainings[trainings["optimizer"] == "sgd"].groupby("lr")["test_error"]
    complete = sgd.mean()[sgd.count() == seeds]
    if complete.empty:
        raise RunError("with SGD, a training failed at every learning rate; add a smaller one")
    return float(str(complete.idxmin()))


def summary(trainings: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: the mean over seeds, and the standard error of test error and loss."""
    import pandas as pd

    by = ["optimizer", "m", "rho", "lr"]
    rows = []
    for key, group in trainings.groupby(by, sort=False, dropna=False):
        count = len(group)
        rows.append(
            {
                **dict(zip(by, key, strict=True)),
                "seeds": count,
                "test_error": group["test_error"].mean(),
                "std_error": group["test_error"].std() / math.sqrt(count),
                "train_error": group["train_error"].mean(),
                "train_loss": group["train_loss"].mean(),
                "train_loss_std_error": group["train_loss"].std() / math.sqrt(count),
            }
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Snapshot:
    """A training at an epoch."""

    run: Run
    epoch: int  # after which the weights were kept

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.run.name}-epoch{self.epoch}"


def measure(
    plan: Plan, examples: ArrayExamples, root: Path, snapshot: Snapshot, device: str
) -> tuple[SpectralDensity, dict[str, Any]]:
    """The spectral density of the training loss at a snapshot, and its row of spectra.csv."""
    run, wanted = snapshot.run, plan.spectra
    weights = root / "trainings" / run.name / f"epoch-{snapshot.epoch}.safetensors"
    result = spectrum(
        {"model": partial(load_checkpoint, weights, partial(build, plan, examples, run.seed))},
        training_set(plan, examples, run.seed),
        root / "spectra" / snapshot.name,
        n=wanted.n,
        steps=wanted.steps,
        probes=wanted.probes,
        device=device,
        progress=False,
    )
    numbers = result.summary["model"]
    row = {**asdict(run), "epoch": snapshot.epoch, **{name: numbers[name] for name in _COLUMNS}}
    return result.densities["model"], row
