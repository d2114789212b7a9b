"""How precisely float32 is computed with while something is measured, and where that is set."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, get_args

import torch

from sharpkit.errors import ArgumentError

Precision = Literal["full", "tf32"]

_chosen: ContextVar[Precision] = ContextVar("precision", default="full")


@contextmanager
def precision(kind: Precision) -> Iterator[None]:
    """Measure float32 models in full float32, or with TF32 where a GPU has it.

    PyTorch lets convolutions on NVIDIA GPUs use TF32, which keeps 10 bits of a number's mantissa
    instead of 23. Sharpness is a difference of losses that are nearly equal: m-sharpness of a
    ResNet-20 errs by 8e-5 to 4e-3 relative with TF32, and by 2e-6 to 3e-5 in full float32. All
    measuring functions therefore compute in full, whatever the flags of torch say, and leave the
    flags as they were; this is the one place to allow TF32.

    It concerns matrix products, convolutions and recurrent layers of float32 models on a GPU;
    models in float64, and all models on a CPU, give the same numbers with both. `autocast` around
    a measuring function has no effect on it; one inside a model's own forward has. The setting
    holds for the thread it is made in, and for the workers of runs started inside.

    Args:
        kind: "full", as without this function; or "tf32".

    Raises:
        ArgumentError: If `kind` is something else.

    Example:
        >>> import torch, sharpkit as sk
        >>> model, data = torch.nn.Linear(4, 3), (torch.randn(8, 4), torch.arange(8) % 3)
        >>> with precision("tf32"):
        ...     quick = sk.m_sharpness(model, data, m=4, rho=0.05)
        >>> current_precision()
        'full'
    """
    if kind not in get_args(Precision):
        raise ArgumentError(f'precision must be "full" or "tf32", got {kind!r}')
    token = _chosen.set(kind)
    try:
        yield
    finally:
        _chosen.reset(token)


def current_precision() -> Precision:
    """The precision that a measuring function called here computes with, "full" or "tf32".

    Example:
        >>> with precision("tf32"):
        ...     current_precision()
        'tf32'
    """
    return _chosen.get()


@contextmanager
def measuring_precision() -> Iterator[None]:
    """Inside, torch computes with the current precision, and the caller's autocast is off.

    All flags are put back afterwards, whichever of torch's interfaces they were set by.

    Raises:
        ArgumentError: If another thread measures with another precision: torch's flags are those
            of the process.

    Example:
        >>> before = torch.backends.cudnn.allow_tf32
        >>> with measuring_precision():
        ...     torch.backends.cudnn.allow_tf32
        False
        >>> torch.backends.cudnn.allow_tf32 == before
        True
    """
    kind = current_precision()
    _enter(kind)
    try:
        with torch._C._DisableAutocast(), _outermost_autocast():
            yield
    finally:
        _leave(kind)


# --- one set of flags for all threads ---------------------------------------------------------

_lock = threading.Lock()
_inside: list[tuple[int, Precision]] = []  # who measures, and how; the flags are those of the last
_before: list[_Flags] = []  # the caller's, while anyone measures


def _enter(kind: Precision) -> None:
    thread = threading.get_ident()
    with _lock:
        if any(other != kind and owner != thread for owner, other in _inside):
            raise ArgumentError(
                f'another thread is measuring, and not with precision "{kind}": torch has one set '
                "of flags per process. Measure one after the other, or in several processes"
            )
        if not _inside:
            _before.append(_taken_flags())
        if not _inside or _inside[-1][1] != kind:
            _compute_with(kind)
        _inside.append((thread, kind))


def _leave(kind: Precision) -> None:
    with _lock:
        _inside.remove((threading.get_ident(), kind))
        if not _inside:
            _put_back(_before.pop())
        elif _inside[-1][1] != kind:
            _compute_with(_inside[-1][1])


@contextmanager
def _outermost_autocast() -> Iterator[None]:
    """Autocast inside a model starts anew: nested, it would keep casts of weights since changed."""
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()


# --- torch's flags ----------------------------------------------------------------------------

# the interface of torch 2.9 and later; a setting is that of the operation, or else of the backend,
# or else the general one
_OPERATIONS = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")]
_SETTINGS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), *_OPERATIONS]
_get_setting: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_set_setting: Any = getattr(torch._C, "_set_fp32_precision_setter", None)


def may_use_tf32(device: torch.device) -> bool:
    """Whether products of float32 numbers on a device may keep 10 bits only, as flags are now.

    Example:
        >>> may_use_tf32(torch.device("cpu"))
        False
    """
    if device.type != "cuda":
        return False
    if _get_setting is not None:
        return any(_get_setting("cuda", op) == "tf32" for op in ("matmul", "conv", "rnn"))
    allowed: bool = torch._C._get_cublas_allow_tf32() or torch._C._get_cudnn_allow_tf32()
    return allowed


class _Switch(NamedTuple):
    """A flag of which only one interface is, and which is off while measuring."""

    get: Callable[[], Any]
    set: Callable[..., Any]

    def turn(self, value: Any) -> Any:
        """The value before; torch warns of some that are set where they have no meaning."""
        before = self.get()
        if before is not None and before != value:
            self.set(*(value if isinstance(value, tuple) else (value,)))
        return before


def _switches() -> list[_Switch]:
    names = [
        "cublas_allow_fp16_reduced_precision_reduction",
        "cublas_allow_bf16_reduced_precision_reduction",
        "cublas_allow_fp16_accumulation",
        "cpu_allow_fp16_reduced_precision_reduction",
        "math_sdp_allow_fp16_bf16_reduction",
        "onednn_allow_tf32",
    ]
    return [
        _Switch(getattr(torch._C, f"_get_{name}"), getattr(torch._C, f"_set_{name}"))
        for name in names
        if hasattr(torch._C, f"_get_{name}")
    ]


_SWITCHES = _switches()


class _Flags(NamedTuple):
    """The caller's flags: what can be read, and what torch keeps behind it."""

    settings: list[str]  # as `_SETTINGS`, none of them inherited from another
    matmul: str  # "highest", "high" or "medium", by the old interface
    cudnn: bool  # allow_tf32, by the old interface
    switches: list[Any]  # as `_SWITCHES`


def _taken_flags() -> _Flags:
    """The flags of now; they are to be set after this, as it leaves them changed."""
    switches = [switch.turn(_off(switch.get())) for switch in _SWITCHES]
    settings = []
    if _get_setting is not None:
        for setting in _SETTINGS:  # from the general to the special
            settings.append(_get_setting(*setting))
            # without a value, what is below does not inherit it, and shows its own
            _set_setting(*setting, "none")
    cudnn = False
    # the old interface can be read where it agrees with the new one
    _set_cudnn_settings("tf32")
    with suppress(RuntimeError):
        cudnn = torch._C._get_cudnn_allow_tf32()
    return _Flags(settings, torch.get_float32_matmul_precision(), cudnn, switches)


def _compute_with(kind: Precision) -> None:
    """Set all flags, so that both interfaces can be read and agree."""
    allowed = kind == "tf32"
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch._C._set_cudnn_allow_tf32(allowed)
    if _set_setting is not None:
        for backend, op in _SETTINGS:
            own = allowed and backend == "cuda" and op != "all"
            _set_setting(backend, op, "tf32" if own else "ieee")


def _put_back(flags: _Flags) -> None:
    # by the old interface first: it changes what the new one shows
    torch.set_float32_matmul_precision(flags.matmul)
    torch._C._set_cudnn_allow_tf32(flags.cudnn)
    for setting, value in zip(_SETTINGS, flags.settings, strict=False):
        _set_setting(*setting, value)
    for switch, value in zip(_SWITCHES, flags.switches, strict=True):
        switch.turn(value)


def _set_cudnn_settings(value: str) -> None:
    if _set_setting is not None:
        for op in ("conv", "rnn"):
            _set_setting("cuda", op, value)


def _off(value: Any) -> Any:
    """A switch turned off; of a pair, the second says how sums may be split, not how rounded."""
    return (False, value[1]) if isinstance(value, tuple) else False
