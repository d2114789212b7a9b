"""The Hessian spectra behind the left panel, one work item each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sharpkit.curvature.density import SpectralDensity
from sharpkit.runs.checkpoints import load_checkpoint
from sharpkit.runs.figure3.plan import Plan
from sharpkit.runs.figure3.trainings import ArrayExamples, Run, build, training_set
from sharpkit.runs.spectrum import spectrum

_COLUMNS = (
    "lambda_max",
    "lambda_max_over_lambda_5",
    "lambda_min",
    "trace",
    "trace_std_error",
    "loss",
    "seconds",
)


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
