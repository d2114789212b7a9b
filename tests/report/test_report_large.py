"""The page of a large run: bounded, usable, and honest about what it leaves out."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, chromium
from report_runs import ERROR, large_run

from sharpkit.evaluation import number_of_draws
from sharpkit.report import content, write_report
from sharpkit.report.limits import POINTS, ROWS
from sharpkit.runs import Scores

plotly = pytest.importorskip("plotly", reason="the extra `report` is not installed")

MODELS, SETTINGS, SHOWN = 1100, 8, 5  # of the measures in a heat map, 5 instead of 60


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page; three draws are enough for what is tested here."""
    run = large_run(tmp_path_factory.mktemp("large"), MODELS, SETTINGS)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("_LEAST_RESAMPLES", "_LEAST_PERMUTATIONS"):
            patch.setattr(number_of_draws, name, 3)
        for name in ("_RESAMPLED", "_SHUFFLED"):
            patch.setattr(number_of_draws, name, 0)
        patch.setattr(content, "MEASURES", SHOWN)
        return write_report(run)


@pytest.fixture(scope="module")
def text(large: Path) -> str:
    return large.read_text(encoding="utf-8")


def embedded(text: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text)
    assert found is not None
    return json.loads(found[1])


def test_points_are_drawn_and_the_page_says_how_many(large: Path, text: str) -> None:
    data = embedded(text, "scatter-0-data")
    assert len(data["models"]) == len(data["gaps"]) == POINTS
    assert data["sample"] == f"Shown are 1,000 of {MODELS:,} models, drawn at random."
    assert f"One point is a model; point at it for its name. {data['sample']}" in text
    assert "7" not in data["models"]  # it has no value
    frame = Scores.open(large.parent).frame()
    values = frame[frame["m"] == 3].set_index("model")["value"]
    shown = next(m for m in data["measures"] if m["label"] == "m_sharpness, m = 3, rho = 0.1")
    expected = [values[name] for name in data["models"]]
    assert shown["values"] == pytest.approx(expected, rel=1e-5)
    assert all(len(h["values"]) == POINTS for h in data["hyperparameters"])


def test_heat_maps_have_the_best_measures_and_say_so(text: str) -> None:
    for name in ("sets-0-pgdl", "correlations-0-data"):
        assert len(embedded(text, name)["data"][0]["y"]) == SHOWN
    said = f"Shown are {SHOWN} of {SETTINGS} measures, the best of the ranking."
    assert text.count(said) == 2


def test_the_table_of_models_has_a_page_of_rows_and_the_others_in_brief(text: str) -> None:
    body = re.search(r'<table class="models sortable".*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    assert body is not None
    assert body[1].count("<tr>") == ROWS
    rows = embedded(text, "models-0-rows")
    assert len(rows) == MODELS
    names = re.findall(r'<th scope="row" class="name">(.*?)</th>', body[1])
    assert names == [row[0] for row in rows[:ROWS]]
    first = [float(row[2][0].replace("−", "-")) for row in rows[:-1]]
    assert first == sorted(first)
    assert rows[-1][0] == "7"
    assert rows[-1][2] == ["failed", "", ERROR]


def test_draws_and_pairs_that_were_not_all_are_told(text: str) -> None:
    assert "3 resamples and null shuffles, 3 permutations (1,099 models)" in text
    assert re.search(r"Here \d+ of 130816 pairs of 512 models drawn change places", text)


@pytest.fixture(scope="module")
def browser(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser") / "profile") as found:
        found.open(large.as_uri())
        yield found


def first_cells(browser: Browser) -> list[str]:
    return browser.js(
        "return [...document.querySelector('table.models').tBodies[0].rows]"
        ".map(r => r.cells[0].textContent)"
    )


def test_all_models_are_reached_page_by_page_and_sorted_together(
    browser: Browser, text: str
) -> None:
    assert browser.console == []
    rows = [row[0] for row in embedded(text, "models-0-rows")]
    pages = [first_cells(browser)]
    click = "document.querySelectorAll('#models-0-pager button')[arguments[0]].click()"
    for _ in range(5):
        browser.js(click, 1)
        pages.append(first_cells(browser))
    assert [name for page in pages for name in page] == rows
    assert "rows 1,001 to 1,100 of 1,100" in browser.js(
        "return document.querySelector('#models-0-pager').textContent"
    )
    sort = "document.querySelectorAll('table.models th button')[arguments[0]].click()"
    browser.js(sort, 0)
    assert first_cells(browser) == [str(k) for k in range(ROWS)]
    browser.js(sort, 3)  # the second setting, the least first
    ascending = browser.js(
        "return [...document.querySelector('table.models').tBodies[0].rows]"
        ".map(r => Number(r.cells[3].firstChild.textContent.replace('−', '-')))"
    )
    assert ascending == sorted(ascending)
    browser.js(sort, 3)
    assert first_cells(browser)[0] != "7"  # what has no value comes last both ways
    failed = next(k for k, name in enumerate(rows) if name == "7")
    assert failed == MODELS - 1
    assert browser.js("return window.hacked") is None


def test_every_figure_of_a_large_run_is_drawn(browser: Browser) -> None:
    points = browser.js(
        "return document.querySelectorAll('#scatter-0 .scatterlayer .point').length"
    )
    assert points == POINTS
    assert np.all(
        browser.js(
            "return [...document.querySelectorAll('.plot')]"
            ".map(p => p.querySelector('svg.main-svg').clientHeight > 200)"
        )
    )
