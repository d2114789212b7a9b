"""The page as a document: complete, self-contained, and deaf to hostile names."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from report_runs import (
    DEPTH,
    ERROR,
    MEASURE,
    TASK,
    VALUES,
    WIDTH,
    hostile_run,
    lost_run,
    own_run,
    two_run,
)
from zoos import write_small_zoo

import sharpkit.report.page
from sharpkit.cli import main
from sharpkit.errors import ArgumentError, RunError
from sharpkit.measures import MSharpness, make_measure
from sharpkit.measures.measure import describe
from sharpkit.report import write_report
from sharpkit.report.reproduce import score_command
from sharpkit.runs import Scores, evaluate, score_zoo
from sharpkit.zoo import load_zoo

plotly = pytest.importorskip("plotly", reason="the extra `report` is not installed")


class Page(HTMLParser):
    """The elements of a page, the text of each cell, and what is inside its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self._script: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._script = dict(attrs)
            self.scripts.append((self._script, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text.append(data)
        else:
            self.scripts[-1] = (self._script, self.scripts[-1][1] + data)

    @property
    def whole_text(self) -> str:
        return " ".join("".join(self.text).split())

    def json(self, name: str) -> Any:
        return json.loads(next(t for a, t in self.scripts if a.get("id") == name))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_run(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write_report(run, resamples=20)
    return Page(path.read_text(encoding="utf-8"))


def test_names_from_files_are_text_and_nothing_else(page: Page) -> None:
    known = {"html", "head", "meta", "title", "style", "body", "header", "main", "article", "nav"}
    known |= {"section", "p", "h1", "h2", "h3", "a", "b", "div", "dl", "dt", "dd", "span", "label"}
    known |= {"select", "option", "table", "thead", "tbody", "tr", "th", "td", "small", "button"}
    known |= {"script", "noscript", "pre", "code", "details", "summary", "wbr"}
    assert {tag for tag, _ in page.tags} <= known
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    executed = [text for attributes, text in page.scripts if not attributes]
    assert len(executed) == 3  # the style, plotly and the page's own
    assert not [text for text in executed if "hacked" in text]
    for name in (TASK, WIDTH, DEPTH, ERROR, *map(str, VALUES[DEPTH])):
        assert " ".join(name.split()) in page.whole_text
    assert " ".join(MEASURE.split()) in page.whole_text


def test_data_inside_scripts_cannot_end_them(run: Path, page: Page) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert len(blocks) > 20
    for block in blocks:
        assert not set("<>&\u2028\u2029") & set(block)
        json.loads(block)
    data = page.json("scatter-0-data")
    assert [h["name"] for h in data["hyperparameters"]] == list(VALUES)
    assert MEASURE in [m["label"] for m in data["measures"]]


def test_labels_of_figures_are_not_markup(page: Page) -> None:
    """Plotly's labels know some HTML, so there every name is escaped once more."""
    figure = page.json("ranking-0-kendall_tau")
    labels = figure["layout"]["yaxis"]["ticktext"]
    assert any("&lt;i&gt;loss&lt;/i&gt;" in label for label in labels)
    sets = page.json("sets-0-jiang")["data"][0]["x"]
    assert not [name for name in sets if "<" in name]
    assert any("&lt;img src=x" in name for name in sets)


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"src", "srcset", "data", "poster", "action"}, tag
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy
    style = next(text for a, text in page.scripts if not a)
    assert "url(" not in style and "@import" not in style


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_ranking_has_every_row_of_the_evaluation(run: Path, page: Page) -> None:
    table = evaluate(Scores.open(run), resamples=20)
    text = page.whole_text
    assert len(page.json("scatter-0-data")["measures"]) == len(table) == 6 + 1 + 5 + 1
    taus = {f"{v:.2f}".replace("-", "−") for v in table["kendall_tau"]}
    assert all(tau in text for tau in taus)
    rows = re.findall(r"m_sharpness, m = (\d+), rho = ([\d.]+) 8 ", text)
    assert {(int(m), float(rho)) for m, rho in rows} == {
        (m, rho) for m in (1, 4, 24) for rho in (0.05, 0.1)
    }
    figure = page.json("m-0-kendall_tau")
    lines = [line for line in figure["data"] if line.get("mode") == "lines+markers"]
    assert [line["name"] for line in lines] == ["m_sharpness, ρ = 0.05", "m_sharpness, ρ = 0.1"]
    assert "8 models, all training examples, seed 0" in figure["layout"]["xaxis"]["title"]["text"]
    first = table[table["rho"] == 0.05].sort_values("m")["kendall_tau"]
    assert lines[0]["y"] == pytest.approx(first.tolist())


def test_the_scatter_has_every_model_and_no_value_for_failures(run: Path, page: Page) -> None:
    data, scores = page.json("scatter-0-data"), Scores.open(run)
    frame, failures = scores.frame(), scores.failures
    assert data["models"] == [str(2 * i + 3) for i in range(8)]
    assert data["gaps"] == pytest.approx([9 + 3 * i for i in range(8)])  # per cent
    failing = next(m for m in data["measures"] if m["label"] == "failing")
    values = frame[frame["measure"] == "failing"].set_index("model")["value"]
    for name, value in zip(data["models"], failing["values"], strict=True):
        assert value == pytest.approx(values[name]) if name in values else value is None
    assert failing["values"].count(None) == len(failures) > 0


def test_failures_of_one_cause_share_a_row(run: Path, page: Page) -> None:
    models = Scores.open(run).failures["model"]
    cells = "".join(page.text)
    assert f"failingValueError: {ERROR}{', '.join(models)}" in cells


def test_the_page_says_how_to_get_it_again(run: Path, page: Page) -> None:
    text = page.whole_text
    assert f"sharpkit report {run} --resamples 20 --seed 0" in text
    assert "measures or settings that the command line does not know" in text  # Failing
    assert f"plotly {plotly.__version__}" in text
    assert f"torch {torch.__version__}" in text
    config = json.dumps(Scores.open(run).config, indent=2, ensure_ascii=False)
    assert config in "".join(page.text)
    assert "SHA-256" in text


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_zoo(tmp_path_factory.mktemp("zoo"), tasks=("first", "second"))


@pytest.mark.parametrize("own", [[MSharpness(m=[1, 4], rho=[0.1], adaptive=True)], []])
def test_the_command_of_a_run_computes_the_same_numbers(
    zoo: Path, tmp_path: Path, own: list[Any]
) -> None:
    measures = [*own, make_measure("output_margin")]
    run = tmp_path / "a run"
    score_zoo(load_zoo(zoo), measures, out=run, n=20, seed=3, progress=False).close()
    config = Scores.open(run).config
    command = score_command(config, tmp_path / "again")
    assert command is not None
    words = shlex.split(command)
    assert words[0] == "sharpkit"
    result = CliRunner().invoke(main, [*words[1:], "--backend", "inline"])
    assert result.exit_code == 0, result.output
    again = Scores.open(tmp_path / "again")
    pd.testing.assert_frame_equal(again.frame(), Scores.open(run).frame())
    assert again.config == config


def test_settings_without_an_option_have_no_command() -> None:
    def config(measure: Any) -> dict[str, Any]:
        name, settings = describe(measure)
        measures = json.loads(json.dumps({name: settings}))
        return {
            "measures": measures,
            "tasks": {"t": "/zoo/t"},
            "n": None,
            "seed": 0,
            "device": "cpu",
        }

    assert score_command(config(make_measure("path_norm")), Path("r")) is not None
    assert score_command(config(MSharpness(m=1, rho=0.1, ascent="pgd")), Path("r")) is not None
    assert score_command(config(MSharpness(m=1, rho=0.1, average=True)), Path("r")) is None
    assert score_command(config(make_measure("output_margin", percentile=5)), Path("r")) is None
    assert score_command({}, Path("r")) is None


def test_the_command_line_writes_the_page_of_several_tasks(zoo: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "pages" / "all.html"
    score_zoo(load_zoo(zoo), make_measure("output_margin"), out=run, progress=False).close()
    result = CliRunner().invoke(
        main, ["report", str(run), "--out", str(out), "--resamples", "9", "--test-size", "50"]
    )
    assert result.exit_code == 0, result.output
    assert str(out) in result.output
    page = Page(out.read_text(encoding="utf-8"))
    assert [a["href"] for t, a in page.tags if t == "a"][:2] == ["#task-0", "#task-1"]
    assert "Predictive power against m" not in page.whole_text  # there is no m
    assert [p.name for p in out.parent.iterdir()] == ["all.html"]


def test_what_cannot_be_reported_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        write_report(tmp_path)
    run = two_run(tmp_path)
    monkeypatch.setattr(sharpkit.report.page, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"plotly and jinja2: pip install 'sharpkit\[report\]'"):
        write_report(run)


def test_numbers_that_are_not_finite_are_left_blank(tmp_path: Path, zoo: Path) -> None:
    class Constant:
        name = "constant"

        def __call__(self, model: Any, data: Any, *, seed: int) -> float:
            return 1.0

    run = tmp_path / "run"
    score_zoo(load_zoo(zoo)["first"], Constant(), out=run, progress=False).close()
    page = Page(write_report(run, resamples=9).read_text(encoding="utf-8"))
    assert "NaN" not in "".join(text for a, text in page.scripts if a)
    assert "–" in page.whole_text


def written(run: Path) -> Page:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Page(write_report(run, resamples=20).read_text(encoding="utf-8"))


def table_of(path: Path, name: str) -> list[list[str]]:
    """The cells of a table, the name of the row first."""
    text = path.read_text(encoding="utf-8")
    body = re.search(rf'<table class="{name} sortable">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    assert body is not None
    rows = re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL)
    plain = [re.sub(r"<small>.*?</small>", "", row) for row in rows]
    return [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
        for row in plain
    ]


def test_own_models_open_on_their_table_the_flattest_first(tmp_path: Path) -> None:
    run = own_run(tmp_path)
    page = written(run)
    ids = [a["id"] for tag, a in page.tags if tag == "section"]
    assert ids == [
        *(f"{s}-0-section" for s in ("models", "scatter", "ranking", "m", "correlations")),
        "reproduce",
    ]
    scores = Scores.open(run)
    frame, facts = scores.frame(), scores.metrics().set_index("model")
    sharpest = frame[frame["m"] == 1].set_index("model")["value"].sort_values()
    rows = table_of(run / "report.html", "models")
    assert [row[0] for row in rows] == list(sharpest.index)
    for row, (name, value) in zip(rows, sharpest.items(), strict=True):
        gap = 100 * facts["generalization_gap"][name]
        assert float(row[1].replace("−", "-")) == pytest.approx(gap, abs=0.005)
        assert float(row[2].replace("−", "-")) == pytest.approx(value, rel=5e-4)


def test_own_models_are_told_that_they_are_few_and_see_nothing_infinite(tmp_path: Path) -> None:
    page = written(own_run(tmp_path))
    text = page.whole_text
    assert "Only 5 models, 10 pairs: too few for intervals" in text
    assert "once in 120 times" in text
    assert "No hyperparameter varies" in text
    assert "Across architectures the order by sharpness may reverse" in text
    assert "No interval (fewer than 12 models)" in text
    assert "Conditioning sets" not in text
    assert "Infinity" not in "".join(text for a, text in page.scripts if a)
    figures = [str(a["id"]) for a, _ in page.scripts if "id" in a]
    assert "ranking-0-kendall_tau" in figures
    assert "ranking-0-cmi_pgdl" not in figures
    assert page.json("scatter-0-data")["hyperparameters"] == []


def test_a_model_that_failed_is_told_first_and_has_no_number(tmp_path: Path) -> None:
    run = two_run(tmp_path)
    page = written(run)
    text = page.whole_text
    assert text.index("1 of 2 models could not be scored: broken (FileNotFoundError") < text.index(
        "1 model has a value and a gap: too few for any statistic"
    )
    rows = table_of(run / "report.html", "models")
    assert [row[0] for row in rows] == ["whole", "broken"]
    assert rows[1][1:3] == ["–", "failed"]
    ids = [a["id"] for tag, a in page.tags if tag == "section"]
    assert ids == ["models-0-section", "failures", "reproduce"]


@pytest.mark.filterwarnings("ignore:nothing could be scored:UserWarning")
def test_a_run_in_which_everything_failed_says_so_first(tmp_path: Path) -> None:
    text = written(lost_run(tmp_path)).whole_text
    said = text.index("No model could be scored: broken (FileNotFoundError: no such checkpoint")
    assert said < text.index("Models and measures", text.index("Reproduce"))
