"""Sharpness while training happens: the tracker, and callbacks that call it."""

from sharpkit.tracking.hugging_face import hugging_face_callback
from sharpkit.tracking.lightning import lightning_callback
from sharpkit.tracking.tracker import Tracker

__all__ = ["Tracker", "hugging_face_callback", "lightning_callback"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
