"""sharpkit measures why trained networks generalize.

The public names are in `__init__.pyi`. Each is imported when it is first used.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)

__dir__ = [*__all__, "__version__"].copy  # submodules can be imported, but are not listed
