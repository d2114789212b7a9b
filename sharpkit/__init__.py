"""sharpkit measures why trained networks generalize."""

from sharpkit import measures, plot
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
from sharpkit.evaluation import conditional_mutual_information
from sharpkit.measures import MSharpness
from sharpkit.runs import Scores, evaluate, score_zoo
from sharpkit.sharpness import SharpnessResult, m_sharpness
from sharpkit.training import SAM, m_sam_gradient
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

__version__ = "0.1.0"

__all__ = [
    "SAM",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "MSharpness",
    "ModelEntry",
    "Scores",
    "SharpnessResult",
    "SpectralDensity",
    "Task",
    "Zoo",
    "ZooWriter",
    "conditional_mutual_information",
    "embedded_zoo",
    "evaluate",
    "fetch_zoo",
    "frobenius_norm",
    "layer_spectra",
    "load_zoo",
    "m_sam_gradient",
    "m_sharpness",
    "measures",
    "plot",
    "score_zoo",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "write_zoo",
    "zoo_info",
]
