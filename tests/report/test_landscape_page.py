"""The page of a landscape: its numbers are in it, its views work, and it needs no network."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import chromium
from torch import nn

import sharpkit as sk
from sharpkit.landscapes import Landscape

pytest.importorskip("plotly", reason="the extra `report` is not installed")

from sharpkit.report import write_landscape


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def plane() -> Landscape:
    data = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    states = [network(k).state_dict() for k in range(4)]
    return sk.landscape(network(0), data, trajectory=states, points=(5, 4), progress=False)


def figures(page: Path) -> dict[str, dict]:
    text = page.read_text("utf-8")
    found = re.findall(r'id="landscape-(\w+)">(.*?)</script>', text, re.DOTALL)
    return {name: json.loads(content) for name, content in found}


def test_the_page_has_every_view_and_the_numbers(tmp_path: Path) -> None:
    result = plane()
    page = write_landscape(result, tmp_path / "page.html", title="<b>net</b>", command="sharpkit x")
    text, views = page.read_text("utf-8"), figures(page)
    assert list(views) == ["contour", "surface", "error", "accuracy"]
    shown = np.array(views["accuracy"]["data"][0]["z"])
    np.testing.assert_allclose(shown, result.accuracy.T)
    assert f"loss {result.loss[4, 0]:.4g}" in views["contour"]["data"][0]["customdata"][0][4]
    assert "<b>net</b>" not in text and "&lt;b&gt;net&lt;/b&gt;" in text
    for sentence in result.description.split("; "):
        assert sentence[1:].split("'")[0] in text
    assert text.count("<tr><td>") == 4  # checkpoints
    assert "sharpkit x" in text


def test_points_that_are_not_finite_are_told_and_left_blank(tmp_path: Path) -> None:
    result = plane()
    result.loss[1, 2] = np.inf
    page = write_landscape(result, tmp_path / "page.html")
    assert "not finite at 1 of the points" in page.read_text("utf-8")
    for name in ("contour", "surface"):
        assert figures(page)[name]["data"][0]["z"][2][1] is None


def test_views_of_a_line(tmp_path: Path) -> None:
    data = torch.randn(12, 4), torch.arange(12) % 3
    line = sk.landscape(network(0), data, to=network(1), points=5, progress=False)
    views = figures(write_landscape(line, tmp_path / "line.html"))
    assert list(views) == ["line"] and views["line"]["data"][1]["y"] == line.loss.tolist()
    one = dataclasses.replace(line, accuracy=None, std_error=np.full(5, np.nan))
    assert len(figures(write_landscape(one, tmp_path / "one.html"))["line"]["data"]) == 2


def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    page = write_landscape(plane(), tmp_path / "page.html")
    with chromium(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        browser.wait_until("document.querySelectorAll('.plot .contourlayer path').length > 5")
        change = "const s = document.querySelector('select'); s.value = arguments[0]; "
        for view, kind in (("accuracy", "contour"), ("surface", "surface")):
            browser.js(change + "s.dispatchEvent(new Event('change'))", view)
            browser.wait_until(
                f"document.getElementById('landscape')._fullData[0].type === {json.dumps(kind)}"
            )
        assert browser.requests == [page.as_uri()]
        errors = [line for line in browser.console if "Error" in line or "Refused" in line]
        assert not errors
        browser.resize(400)
        assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")
