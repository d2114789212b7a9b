"""Sharpness while training happens: the tracker, and callbacks that call it."""

from sharpkit.tracking.tracker import Tracker

__all__ = ["Tracker"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
