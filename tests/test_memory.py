"""What glibc is told while measurements run."""

import ctypes

import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit import memory

KEPT, AFTERWARDS = 2**30, 2**26


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Calls of mallopt instead of the C library's own."""
    calls: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            calls.append((option, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(memory, "_is_glibc", lambda: True)
    for name in (*memory._TOLD, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return calls


def thresholds(calls: list[tuple[int, int]]) -> list[int]:
    return [value for option, value in calls if option == -1]


def test_the_outermost_alone_tells_the_allocator(told: list[tuple[int, int]]) -> None:
    with memory.freed_memory_kept():
        with memory.freed_memory_kept():
            assert thresholds(told) == [KEPT]
        assert thresholds(told) == [KEPT]
    assert thresholds(told) == [KEPT, AFTERWARDS]


def test_a_limited_process_keeps_an_eighth(
    told: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(memory._allowed, "cpu", 2**31)
    with memory.freed_memory_kept():
        assert thresholds(told) == [2**28]


def test_after_an_error_as_well(told: list[tuple[int, int]]) -> None:
    with pytest.raises(KeyError), memory.freed_memory_kept():
        raise KeyError
    assert thresholds(told) == [KEPT, AFTERWARDS]


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")],
)
def test_what_the_environment_says_stays(
    told: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with memory.freed_memory_kept():
        pass
    assert told == []


def test_another_c_library_is_left_alone(
    told: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_is_glibc", lambda: False)
    with memory.freed_memory_kept():
        pass
    assert told == []


def test_measurements_and_training_do_so(told: list[tuple[int, int]]) -> None:
    data, seen = (torch.randn(8, 3), torch.arange(8) % 2), set()
    model = nn.Linear(3, 2)
    model.register_forward_pre_hook(lambda *_: seen.add(thresholds(told)[-1]))
    sk.m_sharpness(model, data, m=2, rho=0.1)
    assert seen == {KEPT}
    assert thresholds(told)[-1] == AFTERWARDS
    sk.fit(model, data, optimizer="sam", rho=0.1, epochs=1, batch_size=4, progress=False)
    assert seen == {KEPT}
    assert thresholds(told)[-1] == AFTERWARDS
