"""Training with sharpness-aware minimization, for any group size m."""

from sharpkit.training.m_sam import m_sam_gradient
from sharpkit.training.sam import SAM

__all__ = ["SAM", "m_sam_gradient"]
