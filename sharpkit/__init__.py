"""sharpkit measures why trained networks generalize."""

__version__ = "0.1.0"
