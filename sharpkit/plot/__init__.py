"""One function per figure; each returns a matplotlib Figure and can save it."""

from sharpkit.plot.figure3 import figure3
from sharpkit.plot.landscape import barrier, landscape
from sharpkit.plot.layer_spectra import layer_spectra
from sharpkit.plot.predictive_power import predictive_power
from sharpkit.plot.spectrum import spectrum
from sharpkit.plot.tracking import tracking

__all__ = [
    "barrier",
    "figure3",
    "landscape",
    "layer_spectra",
    "predictive_power",
    "spectrum",
    "tracking",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
