"""Generalization measures: callables (model, data, *, seed) -> value, or values by setting."""

from sharpkit.measures.m_sharpness import MSharpness
from sharpkit.measures.measure import Estimate, Measure

__all__ = ["Estimate", "MSharpness", "Measure"]
