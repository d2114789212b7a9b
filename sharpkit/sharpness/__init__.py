"""m-sharpness of any module (Foret et al. 2021, section 4.1)."""

from sharpkit.sharpness.ascent_rules import ASCENT_RULES, AscentRule, one_step_along
from sharpkit.sharpness.ball import Ball
from sharpkit.sharpness.m_sharpness import SharpnessResult, m_sharpness
from sharpkit.sharpness.stacked import m_sharpness_stacked

__all__ = [
    "ASCENT_RULES", "AscentRule", "Ball", "SharpnessResult", "m_sharpness", "m_sharpness_stacked",
    "one_step_along",
]  # fmt: skip

__dir__ = __all__.copy  # submodules can be imported, but are not listed
