"""Groups side by side if the model allows it, one after the other if not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import nn

from sharpkit.contract.checks import reason
from sharpkit.errors import ArgumentError, ModelError, SharpkitError

Engine: TypeAlias = Literal["auto", "vectorized", "loop"]
T = TypeVar("T")


def vectorised_or_loop(
    engine: Engine,
    vectorised: Callable[[], T],
    loop: Callable[[], T],
    model: nn.Module,
    again: Callable[[], object] = lambda: None,
    what: str = "groups",
) -> tuple[T, bool]:
    """What `vectorised` gives or, whatever goes wrong there, what `loop` gives.

    "vectorized" never takes the loop, "loop" takes nothing else. `again` puts the random state back
    before the second try; `what` stands side by side. Returns the result, and whether it was
    vectorised.

    Raises:
        ModelError: If both fail, with the cause of the first failure; or the first fails and the
            engine is "vectorized".
        SharpkitError: Whatever either raises of this kind.
    """
    if engine == "loop":
        return loop(), False
    with strict_vmap():
        found, failure = _tried(vectorised)
    if failure is None:
        return found[0], True
    cause = reason(failure, model)
    if engine == "vectorized":
        raise ModelError(f"{cause}: {what} cannot be vectorised, use engine='loop'") from failure
    again()
    found, again_failed = _tried(loop)
    if again_failed is not None:
        raise ModelError(f"the model cannot be measured: {cause}") from failure
    warnings.warn(
        f"{what} are evaluated one after the other, which is slower, because side by side {cause} "
        "(engine='loop' does so without this warning)",
        stacklevel=4,
    )
    return found[0], False


def first_that_works(first: Callable[[], T], second: Callable[[], T]) -> T:
    """What `first` gives or, if it fails for another reason than memory, what `second` gives.

    Raises:
        SharpkitError: Whatever either raises of this kind.
    """
    found, failure = _tried(first)
    if failure is None:
        return found[0]
    del failure  # its frames hold tensors
    return second()


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU.

    Example:
        >>> out_of_memory(MemoryError())
        True
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def in_memory(measure: Callable[[int], T], chunk: int) -> T:
    """What `measure` gives for a chunk, or for half of it as often as memory runs out.

    Raises:
        ArgumentError: If a single example at a time does not fit.
    """
    while True:
        try:
            return measure(chunk)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if chunk == 1:
                raise ArgumentError(
                    "memory ran out even with one example at a time: measure fewer parameters, "
                    f"or use a device with more memory ({str(error).splitlines()[0]})"
                ) from error
        chunk //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Disagreement(Exception):
    """Groups side by side gave other numbers than one after the other."""


def _tried(run: Callable[[], T]) -> tuple[list[T], Exception | None]:
    """What it gives, in a list, or why it failed; errors of ours and of memory are raised."""
    try:
        return [run()], None
    except SharpkitError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        return [], error


@contextmanager
def strict_vmap() -> Iterator[None]:
    """Make an error of the warning that vmap falls back to a slow loop of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule for.*")
        yield
