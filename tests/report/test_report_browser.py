"""The page in a browser: it loads, its selectors work, and it fits narrow screens and paper."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, chromium
from report_runs import DEPTH, MEASURE, VALUES, WIDTH, hostile_run, own_run, two_run

from sharpkit.report import write_report

pytest.importorskip("plotly", reason="the extra `report` is not installed")


def written(run: Path) -> str:
    """Address of the page of a run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_report(run, resamples=20).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(hostile_run(tmp_path_factory.mktemp("hostile")))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(own_run(tmp_path_factory.mktemp("own")))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(two_run(tmp_path_factory.mktemp("two")))


@pytest.fixture
def chrome(browser: Browser, hostile: str) -> Browser:
    """The browser at the page of the hostile run."""
    browser.resize(1280)
    browser.open(hostile)
    return browser


def js(chrome: Browser, script: str, *arguments: Any) -> Any:
    return chrome.js(script, *arguments)


def choose(chrome: Browser, select: str, label: str) -> None:
    js(
        chrome,
        "const s = document.querySelector(arguments[0]);"
        "s.value = [...s.options].find(o => o.text === arguments[1]).value;"
        "s.dispatchEvent(new Event('change'));",
        select,
        label,
    )


def traces(chrome: Browser, plot: str) -> list[dict[str, Any]]:
    return js(
        chrome,
        "return document.getElementById(arguments[0]).data"
        ".map(t => ({name: t.name, x: t.x, y: t.y, z: t.z}));",
        plot,
    )


def drawn(chrome: Browser, plot: str) -> list[str]:
    """Fill of every point that is really on the screen."""
    return js(
        chrome,
        "return [...document.querySelectorAll('#' + arguments[0] + ' .scatterlayer .point')]"
        ".map(p => getComputedStyle(p).fill);",
        plot,
    )


def test_it_loads_without_a_word_on_the_console_and_without_the_network(chrome: Browser) -> None:
    assert chrome.console == []
    assert {address.partition(":")[0] for address in chrome.requests} <= {"file", "data", "blob"}
    assert js(chrome, "return window.hacked") is None
    assert "sharpkit report" in js(chrome, "return document.title")


def test_every_figure_is_drawn(chrome: Browser) -> None:
    plots = js(chrome, "return [...document.querySelectorAll('.plot')].map(p => p.id)")
    assert plots == ["scatter-0", "ranking-0", "m-0", "sets-0", "correlations-0"]
    for plot in plots:
        assert (
            js(chrome, f"return document.querySelector('#{plot} svg.main-svg').clientHeight") > 200
        )
    assert len(drawn(chrome, "scatter-0")) == 8


def test_the_selectors_change_points_and_colours(chrome: Browser) -> None:
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


def test_legends_and_titles_show_names_as_they_are(chrome: Browser) -> None:
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


def test_pointing_at_a_model_names_it(chrome: Browser) -> None:
    js(chrome, "Plotly.Fx.hover('scatter-0', [{curveNumber: 0, pointNumber: 0}])")
    text = js(chrome, "return document.querySelector('#scatter-0 .hoverlayer').textContent")
    assert "model 3" in text
    assert f"{WIDTH} = 4" in text
    js(chrome, "Plotly.Fx.unhover('scatter-0')")


@pytest.mark.parametrize("plot", ["ranking-0", "m-0", "sets-0"])
def test_the_other_figures_have_their_own_selector(chrome: Browser, plot: str) -> None:
    select = f'select[data-choice="{plot}"]'
    labels = js(chrome, f"return [...document.querySelector('{select}').options].map(o => o.text)")
    assert len(labels) >= 2
    first = traces(chrome, plot)
    choose(chrome, select, labels[-1])
    assert traces(chrome, plot) != first
    choose(chrome, select, labels[0])
    assert traces(chrome, plot) == first


def test_the_table_is_sorted_by_a_click_on_a_column(chrome: Browser) -> None:
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
    assert js(chrome, "return document.querySelectorAll('.ranking th[aria-sort]').length") == 1
    js(chrome, "document.querySelector('table.ranking th button').click()")
    names = js(chrome, read, 0)
    order = "return [...arguments[0]].sort((a, b) => a.localeCompare(b, 'en', {numeric: true}))"
    assert names == js(chrome, order, names)
    assert len(set(names)) == 13


# text or points of a figure past its own edge, or past that of the screen
_PAST_THE_EDGE = """
  const past = [...document.querySelectorAll(".plot text, .plot .point")].filter((part) => {
    const box = part.getBoundingClientRect();
    const all = part.closest("div.plot").getBoundingClientRect();
    const [left, right] = [Math.max(all.left, 0), Math.min(all.right, innerWidth)];
    return box.width > 0 && (box.right > right + 1 || box.left < left - 1);
  });
  return past.map((part) => part.textContent || part.getAttribute("class"));
"""


@pytest.mark.parametrize("page", ["hostile", "own", "two"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_wide_and_narrow_screens(
    browser: Browser, page: str, width: int, request: pytest.FixtureRequest
) -> None:
    browser.resize(width)
    browser.open(request.getfixturevalue(page))
    # the figures follow a little later
    browser.wait_until(f"document.documentElement.scrollWidth <= {width}")
    assert js(browser, _PAST_THE_EDGE) == []
    # a table that is wider than its box scrolls inside it, and its names stay
    boxes = (
        "return [...document.querySelectorAll('.table')].map(b => ["
        "b.getBoundingClientRect().right <= innerWidth, getComputedStyle(b).overflowX])"
    )
    assert js(browser, boxes)
    assert all(box == [True, "auto"] for box in js(browser, boxes))
    assert len(browser.screenshot()) > 10_000
    assert browser.console == []


@pytest.mark.parametrize("page", ["hostile", "own"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_panel_names_its_axes_and_its_legend_covers_nothing(
    browser: Browser, page: str, width: int, request: pytest.FixtureRequest
) -> None:
    browser.resize(width)
    browser.open(request.getfixturevalue(page))
    titles = js(
        browser,
        "return [...document.querySelectorAll('.plot')].map(p => [p.id,"
        "p.querySelectorAll('.xtitle, .x2title').length + p.querySelectorAll('.ytitle').length])",
    )
    # on a narrow screen the names of the rows stand in the ranking, and need no title
    assert titles
    assert all(n == 2 or (i.startswith("ranking") and width == 390) for i, n in titles), titles
    covered = js(
        browser,
        "return [...document.querySelectorAll('.plot')].filter(p => {"
        "  const legend = p.querySelector('g.legend'), area = p.querySelector('.nsewdrag');"
        "  return legend && legend.getBoundingClientRect().bottom"
        "    > area.getBoundingClientRect().top + 1;"
        "}).map(p => p.id)",
    )
    assert covered == []


def test_it_is_drawn_anew_when_the_screen_becomes_narrow_and_wide_again(chrome: Browser) -> None:
    height = "return document.querySelector('#ranking-0 svg.main-svg').clientHeight"
    wide = js(chrome, height)
    chrome.resize(390)
    assert js(chrome, height) > wide
    assert js(chrome, _PAST_THE_EDGE) == []
    chrome.resize(1280)
    assert js(chrome, height) == wide
    assert js(chrome, _PAST_THE_EDGE) == []


def test_noise_is_drawn_behind_every_score(chrome: Browser) -> None:
    for plot in ("ranking-0", "m-0"):
        choose(chrome, f'select[data-choice="{plot}"]', "Kendall’s τ")
        names = [t.get("name") for t in traces(chrome, plot)]
        assert "noise: mean, 5 % to 95 %" in names


def test_own_models_are_named_and_nothing_is_empty(browser: Browser, own: str) -> None:
    browser.resize(1280)
    browser.open(own)
    assert js(browser, "return document.querySelector('section').id") == "models-0-section"
    plots = js(browser, "return [...document.querySelectorAll('.plot')].map(p => p.id)")
    assert plots == ["scatter-0", "ranking-0", "m-0", "correlations-0"]
    labels = js(
        browser,
        "return [...document.querySelectorAll('#scatter-0 .textpoint text')]"
        ".map(t => t.textContent)",
    )
    assert sorted(labels) == sorted(f"model {k}" for k in "abcde")
    shown = "return document.querySelector('#scatter-0-colour').getClientRects().length"
    assert js(browser, shown) == 0  # there is nothing to colour by
    marks = (
        "return [...document.querySelectorAll('.plot')].map(p =>"
        "p.querySelectorAll('.point, .heatmaplayer image, .js-line').length)"
    )
    assert min(js(browser, marks)) > 0


def test_one_of_two_models_has_a_table_and_no_figures(browser: Browser, two: str) -> None:
    browser.resize(390)
    browser.open(two)
    assert js(browser, "return document.querySelectorAll('.plot').length") == 0
    first = js(browser, "return document.querySelector('.warning').textContent")
    assert first.startswith("1 of 2 models could not be scored: broken (")


def test_it_prints(chrome: Browser) -> None:
    assert chrome.pdf().startswith(b"%PDF")
    assert chrome.console == []
