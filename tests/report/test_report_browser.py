"""The page in a browser: it loads, its selectors work, and it fits narrow screens and paper."""

from __future__ import annotations

import base64
import json
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from browser import chromium, resize
from report_runs import DEPTH, MEASURE, VALUES, WIDTH, hostile_run

from sharpkit.report import write_report

pytest.importorskip("plotly", reason="the extra `report` is not installed")


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("browser")
    with chromium(folder / "profile") as driver:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = write_report(hostile_run(folder), folder / "report.html", resamples=20)
        resize(driver, 1200)
        driver.get_log("performance")  # what the browser asked for on its own
        driver.get(path.as_uri())
        yield driver


def js(chrome: Any, script: str, *arguments: Any) -> Any:
    return chrome.execute_script(script, *arguments)


def choose(chrome: Any, select: str, label: str) -> None:
    js(
        chrome,
        "const s = document.querySelector(arguments[0]);"
        "s.value = [...s.options].find(o => o.text === arguments[1]).value;"
        "s.dispatchEvent(new Event('change'));",
        select,
        label,
    )


def traces(chrome: Any, plot: str) -> list[dict[str, Any]]:
    return js(
        chrome,
        "return document.getElementById(arguments[0]).data"
        ".map(t => ({name: t.name, x: t.x, y: t.y, z: t.z}));",
        plot,
    )


def drawn(chrome: Any, plot: str) -> list[str]:
    """Fill of every point that is really on the screen."""
    return js(
        chrome,
        "return [...document.querySelectorAll('#' + arguments[0] + ' .scatterlayer .point')]"
        ".map(p => getComputedStyle(p).fill);",
        plot,
    )


def test_it_loads_without_a_word_on_the_console_and_without_the_network(chrome: Any) -> None:
    assert [entry["message"] for entry in chrome.get_log("browser")] == []
    events = [json.loads(e["message"])["message"] for e in chrome.get_log("performance")]
    asked = {
        e["params"]["request"]["url"].partition(":")[0]
        for e in events
        if e["method"] == "Network.requestWillBeSent"
    }
    assert asked <= {"file", "data", "blob"}
    assert js(chrome, "return window.hacked") is None
    assert "sharpkit report" in chrome.title


def test_every_figure_is_drawn(chrome: Any) -> None:
    plots = js(chrome, "return [...document.querySelectorAll('.plot')].map(p => p.id)")
    assert plots == ["ranking-0", "m-0", "scatter-0", "sets-0", "correlations-0"]
    for plot in plots:
        assert (
            js(chrome, f"return document.querySelector('#{plot} svg.main-svg').clientHeight") > 200
        )
    assert len(drawn(chrome, "scatter-0")) == 8


def test_the_selectors_change_points_and_colours(chrome: Any) -> None:
    by_width = drawn(chrome, "scatter-0")
    names = [t["name"] for t in traces(chrome, "scatter-0")]
    assert len(names) == len(set(by_width)) == 2
    choose(chrome, "#scatter-0-colour", DEPTH)
    by_depth = drawn(chrome, "scatter-0")
    assert sorted(by_depth) == sorted(by_width)  # as many of each, on other models
    changed = [t["name"] for t in traces(chrome, "scatter-0")]
    assert not set(changed) & set(names)
    assert {c.partition(" = ")[2] for c in changed} == {
        v.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        for v in map(str, VALUES[DEPTH])
    }
    before = sorted(x for t in traces(chrome, "scatter-0") for x in t["x"])
    choose(chrome, "#scatter-0-measure", MEASURE)
    after = traces(chrome, "scatter-0")
    assert sorted(x for t in after for x in t["x"]) != before
    assert sum(len(t["y"]) for t in after) == 8
    choose(chrome, "#scatter-0-measure", "failing")
    assert 0 < len(drawn(chrome, "scatter-0")) < 8


def test_legends_and_titles_show_names_as_they_are(chrome: Any) -> None:
    choose(chrome, "#scatter-0-colour", WIDTH)
    choose(chrome, "#scatter-0-measure", MEASURE)
    legend = js(
        chrome,
        "return [...document.querySelectorAll('#scatter-0 .legendtext')].map(t => t.textContent)",
    )
    assert legend == [f"{WIDTH} = 4", f"{WIDTH} = 8"]
    title = js(chrome, "return document.querySelector('#scatter-0 .xtitle').textContent")
    assert title.split() == MEASURE.split()
    assert (
        js(chrome, "return document.querySelectorAll('.plot img, .plot a, .plot script').length")
        == 0
    )
    assert js(chrome, "return window.hacked") is None


def test_pointing_at_a_model_names_it(chrome: Any) -> None:
    js(chrome, "Plotly.Fx.hover('scatter-0', [{curveNumber: 0, pointNumber: 0}])")
    text = js(chrome, "return document.querySelector('#scatter-0 .hoverlayer').textContent")
    assert "model 3" in text
    assert f"{WIDTH} = 4" in text
    js(chrome, "Plotly.Fx.unhover('scatter-0')")


@pytest.mark.parametrize("plot", ["ranking-0", "m-0", "sets-0"])
def test_the_other_figures_have_their_own_selector(chrome: Any, plot: str) -> None:
    select = f'select[data-choice="{plot}"]'
    labels = js(chrome, f"return [...document.querySelector('{select}').options].map(o => o.text)")
    assert len(labels) >= 2
    first = traces(chrome, plot)
    choose(chrome, select, labels[-1])
    assert traces(chrome, plot) != first
    choose(chrome, select, labels[0])
    assert traces(chrome, plot) == first


def test_the_table_is_sorted_by_a_click_on_a_column(chrome: Any) -> None:
    read = (
        "const t = document.querySelector('table.ranking');"
        "return [...t.tBodies[0].rows].map(r => r.cells[arguments[0]].textContent.trim())"
    )
    column = js(
        chrome,
        "return [...document.querySelectorAll('table.ranking thead th')]"
        ".findIndex(h => h.textContent.startsWith('Kendall'))",
    )
    click = f"document.querySelectorAll('table.ranking th button')[{column}].click()"

    def values() -> list[float]:
        order = (
            "return [...document.querySelector('table.ranking').tBodies[0].rows]"
            ".map(r => Number(r.cells[arguments[0]].dataset.value))"
        )
        return js(chrome, order, column)

    js(chrome, click)
    assert values() == sorted(values(), reverse=True)
    js(chrome, click)
    assert values() == sorted(values())
    assert js(chrome, "return document.querySelectorAll('th[aria-sort]').length") == 1
    js(chrome, "document.querySelector('table.ranking th button').click()")
    names = js(chrome, read, 0)
    order = "return [...arguments[0]].sort((a, b) => a.localeCompare(b, 'en', {numeric: true}))"
    assert names == js(chrome, order, names)
    assert len(set(names)) == 13


@pytest.mark.parametrize("width", [1200, 400])
def test_it_fits_wide_and_narrow_screens(chrome: Any, width: int) -> None:
    resize(chrome, width)
    deadline = time.monotonic() + 5  # the figures follow a little later
    while js(chrome, "return document.documentElement.scrollWidth") > width:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    image = base64.b64decode(chrome.get_screenshot_as_base64())
    assert len(image) > 10_000
    resize(chrome, 1200)


def test_it_prints(chrome: Any) -> None:
    pdf = base64.b64decode(chrome.execute_cdp_cmd("Page.printToPDF", {"landscape": True})["data"])
    assert pdf.startswith(b"%PDF")
    assert [entry["message"] for entry in chrome.get_log("browser")] == []
