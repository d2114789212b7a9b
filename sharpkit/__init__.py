"""sharpkit measures why trained networks generalize."""

__version__ = "0.1.0"

from sharpkit.sharpness import SharpnessResult, m_sharpness

__all__ = ["SharpnessResult", "m_sharpness"]
