"""Independent work items: in this process, in worker processes, or on a Ray cluster.

Knows nothing of zoos, runs or measures.
"""

from sharpkit.workers.items import (
    Backend,
    Failure,
    attempt,
    check_limits,
    default_backend,
    error_message,
    run_items,
)

__all__ = [
    "Backend",
    "Failure",
    "attempt",
    "check_limits",
    "default_backend",
    "error_message",
    "run_items",
]

__dir__ = __all__.copy  # submodules can be imported, but are not listed
