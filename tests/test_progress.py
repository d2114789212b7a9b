"""Progress on a terminal, in a notebook and in a log, by a clock that the tests move."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import sharpkit
from sharpkit.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """The time that bars see, in seconds: `clock.now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    return clock


def test_a_terminal_has_a_bar_that_is_drawn_over(monkeypatch, clock):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(progress=True, total=2, desc="score") as bar:
        clock.now += 1
        bar.update()
    assert terminal.getvalue().count("\r") > 1
    assert "50%" in terminal.getvalue()


@pytest.mark.filterwarnings("ignore:IProgress not found")
def test_a_notebook_has_a_bar(monkeypatch):
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with progress_bar(progress=True, total=2) as bar:
        assert not bar.disable
    assert progress_bar(progress=False, total=2).disable


def test_a_log_has_a_line_every_thirty_seconds(clock, capsys):
    with progress_bar(progress=True, total=100, desc="score", unit="model") as bar:
        for _ in range(100):
            clock.now += 1
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("|")[0] for line in lines] == [
        "score:  30%",
        "score:  60%",
        "score:  90%",
        "score: 100%",
    ]
    assert "30/100" in lines[0] and "1.00model/s" in lines[0]


def test_a_log_has_its_lines_also_where_the_pace_changes(clock, capsys):
    with progress_bar(progress=True, total=850) as bar:
        for step in range(850):
            clock.now += 0.125 if step < 800 else 40
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 + 50 + 1  # of 100 s, of 50 steps each longer than 30 s, and at the end


def test_a_log_has_nothing_of_what_is_done_soon_or_is_silent(clock, capsys):
    with progress_bar(progress=True, total=2) as bar:
        clock.now += 29
        bar.update(2)
    with progress_bar(progress=False, total=2) as bar:
        clock.now += 100
        bar.update(2)
    assert list(progress_bar(progress=False, iterable=range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_bars_inside_each_other_and_another_name_leave_a_log_plain(clock, capsys):
    with progress_bar(progress=True, total=2, desc="outer") as outer:
        outer.set_postfix_str("first")
        assert capsys.readouterr().err == ""
        for _ in progress_bar(progress=True, iterable=range(4), desc="inner", leave=False, delay=2):
            clock.now += 20
        outer.update()
    text = capsys.readouterr().err
    assert "".join(text.splitlines()).isprintable()
    names = [line.split(":")[0] for line in text.splitlines()]
    assert names == ["inner", "inner", "outer", "outer"]


def test_every_bar_of_the_package_is_one_of_these():
    root = Path(sharpkit.__file__).parent
    own = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tqdm"
    }
    assert own == {"progress.py"}
