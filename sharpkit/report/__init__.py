"""A run as one self-contained HTML page."""

from sharpkit.report.page import write_report

__all__ = ["write_report"]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
