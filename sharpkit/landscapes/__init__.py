"""The loss around a model and between models.

The room is not called `landscape`: a module of that name would hide the function of the package.
"""

from sharpkit.landscapes.barrier import Barrier, barrier
from sharpkit.landscapes.landscape import landscape
from sharpkit.landscapes.result import Landscape

__all__ = ["Barrier", "Landscape", "barrier", "landscape"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
