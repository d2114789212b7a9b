"""sharpkit measures why trained networks generalize."""

from sharpkit import measures, plot
from sharpkit.contract.precision import precision
from sharpkit.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    SpectralDensity,
    frobenius_norm,
    layer_spectra,
    spectral_density,
    top_eigenvalues,
    trace,
)
from sharpkit.data import load_dataset
from sharpkit.evaluation import conditional_mutual_information
from sharpkit.measures import MSharpness
from sharpkit.report import write_report
from sharpkit.runs import Scores, combine, evaluate, score_models, score_zoo, selection_regret
from sharpkit.runs.checkpoints import load_checkpoint
from sharpkit.runs.figure3 import Figure3, figure3
from sharpkit.sharpness import SharpnessResult, m_sharpness
from sharpkit.sharpness.comparison import ModelComparison, compare_models
from sharpkit.training import SAM, FitResult, build_architecture, fit, m_sam_gradient
from sharpkit.zoo import (
    ModelEntry,
    Task,
    Zoo,
    ZooWriter,
    embedded_zoo,
    fetch_zoo,
    load_zoo,
    write_zoo,
    zoo_info,
)
from sharpkit.zoo.training import TrainingReport, train_zoo

__version__ = "0.1.0"

__all__ = [
    "SAM",
    "Figure3",
    "FisherOperator",
    "FitResult",
    "GaussNewtonOperator",
    "HessianOperator",
    "MSharpness",
    "ModelComparison",
    "ModelEntry",
    "Scores",
    "SharpnessResult",
    "SpectralDensity",
    "Task",
    "TrainingReport",
    "Zoo",
    "ZooWriter",
    "build_architecture",
    "combine",
    "compare_models",
    "conditional_mutual_information",
    "embedded_zoo",
    "evaluate",
    "fetch_zoo",
    "figure3",
    "fit",
    "frobenius_norm",
    "layer_spectra",
    "load_checkpoint",
    "load_dataset",
    "load_zoo",
    "m_sam_gradient",
    "m_sharpness",
    "measures",
    "plot",
    "precision",
    "score_models",
    "score_zoo",
    "selection_regret",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "train_zoo",
    "write_report",
    "write_zoo",
    "zoo_info",
]


def __dir__() -> list[str]:
    """The public names alone; submodules such as `sharpkit.evaluation` can be imported as well."""
    return sorted([*__all__, "__version__"])
