"""Training: SGD, and sharpness-aware minimization for any group size m."""

from sharpkit.training.architectures import build_architecture
from sharpkit.training.fit import FitResult, fit
from sharpkit.training.m_sam import m_sam_gradient
from sharpkit.training.sam import SAM
from sharpkit.training.sam_groups import sam_groups
from sharpkit.training.settings import FitSettings
from sharpkit.training.variants import SamVariant

__all__ = [
    "SAM",
    "FitResult",
    "FitSettings",
    "SamVariant",
    "build_architecture",
    "fit",
    "m_sam_gradient",
    "sam_groups",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
