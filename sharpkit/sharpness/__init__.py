"""m-sharpness of any module (Foret et al. 2021, section 4.1)."""

from sharpkit.sharpness.m_sharpness import SharpnessResult, m_sharpness

__all__ = ["SharpnessResult", "m_sharpness"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
