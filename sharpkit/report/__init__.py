"""A run, or a landscape, as one self-contained HTML page."""

from sharpkit.report.landscape_page import write_landscape
from sharpkit.report.page import write_report

__all__ = ["write_landscape", "write_report"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
