"""A run as one self-contained HTML page."""

from sharpkit.report.page import write_report

__all__ = ["write_report"]
