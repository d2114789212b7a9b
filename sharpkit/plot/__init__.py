"""One function per figure; each returns a matplotlib Figure and can save it."""

from sharpkit.plot.predictive_power import predictive_power
from sharpkit.plot.spectrum import spectrum

__all__ = ["predictive_power", "spectrum"]
