"""Independent work items: in this process, in worker processes, or on a Ray cluster.

Knows nothing of zoos, runs or measures.
"""

from sharpkit.workers.items import run_items
from sharpkit.workers.outcome import Failure, error_message
from sharpkit.workers.settings import Backend, Workers, as_workers, on_one_thread

__all__ = [
    "Backend",
    "Failure",
    "Workers",
    "as_workers",
    "error_message",
    "on_one_thread",
    "run_items",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
