"""From a run directory to one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import warnings
from collections.abc import Mapping
from contextlib import closing
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation.arguments import check_resampling
from sharpkit.evaluation.grid import listed
from sharpkit.files import atomic_path
from sharpkit.report.labels import number
from sharpkit.report.limits import NAMES
from sharpkit.runs import Scores, evaluate
from sharpkit.runs.measure_values import measure_values

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

    from sharpkit.report.content import Results

_NEEDED = ("plotly", "jinja2")


def write_report(
    run: str | Path,
    out: str | Path | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
    test_size: int | None = None,
) -> Path:
    """Write the results of a run as one self-contained, interactive HTML page.

    The ranking of the measures with intervals, predictive power against m, each with what a measure
    without information has; the table of models and measures; each measure against the gap,
    coloured by any hyperparameter; mutual information by conditioning set, correlations between
    measures, the measures combined, failures, and what it takes to reproduce the run. What a run
    does not have is left out, and below twelve models the table of models stands first.

    Args:
        run: Directory of a run.
        out: The file; None for report.html in the run's directory.
        resamples: Bootstrap resamples over models; the permutations are ten times as many.
        seed: Of both.
        test_size: Examples behind each test accuracy, for the sign-errors; see `evaluate`.

    Returns:
        Path: The file written.

    Raises:
        RunError: If the directory holds no run.
        ArgumentError: If plotly or jinja2 is not installed, or an argument is out of range.

    Example:
        >>> import sharpkit as sk, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> measure = sk.measures.make_measure("output_margin")
        >>> _ = sk.score_zoo(sk.embedded_zoo(), measure, out=folder, n=16, limit=20)
        >>> write_report(folder, resamples=9).name
        'report.html'
    """
    require_extra("a report")
    run = Path(run)
    path = Path(out) if out is not None else run / "report.html"
    with closing(Scores.open(run)) as scores:
        text = _render(run, scores, resamples, seed, test_size)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def _render(run: Path, scores: Scores, resamples: int, seed: int, test_size: int | None) -> str:
    from sharpkit.report.content import task_content
    from sharpkit.report.reproduce import environments, score_command, versions

    check_resampling(resamples)
    results = _results(scores, resamples, seed, test_size)
    tasks = [
        task_content(name, found, resamples=resamples, seed=seed) for name, found in results.items()
    ]
    provenance = scores.provenance()
    command = ["sharpkit", "report", str(run), "--resamples", str(resamples), "--seed", str(seed)]
    command += [] if test_size is None else ["--test-size", str(test_size)]
    return rendered(
        "template.html",
        title=run.resolve().name,
        tasks=tasks,
        failures=_failures(scores.failures),
        seconds=_seconds(provenance),
        command=shlex.join(command),
        score_command=score_command(scores.config, run),
        config=json.dumps(scores.config, indent=2, ensure_ascii=False),
        environments=environments(provenance),
        hashes=_hashes(provenance),
        versions=versions(),
        resamples=resamples,
        seed=seed,
        test_size=test_size,
        run_seed=scores.config.get("seed"),
        n=scores.config.get("n"),
    )


def require_extra(what: str) -> None:
    """Raise ArgumentError unless all that a page is made with is installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ArgumentError(f"{what} needs {' and '.join(missing)}: pip install 'sharpkit[report]'")


def rendered(template: str, **content: Any) -> str:
    """A page of its own template, with the style and scripts that all pages have."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    plotly, script, style = get_plotlyjs(), _file("page.js"), _file("style.css")
    environment = Environment(
        loader=PackageLoader("sharpkit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"json_script": _json_script, "breakable": _breakable}
    return environment.get_template(template).render(
        **content,
        style=Markup(style),
        plotly=Markup(plotly),
        script=Markup(script),
        policy=" ".join(_hash(text) for text in (plotly, script)),
    )


def _results(
    scores: Scores, resamples: int, seed: int, test_size: int | None
) -> dict[str, Results]:
    """What the run has of each task."""
    import pandas as pd

    from sharpkit.report.content import Results

    frame, failures = scores.frame(), scores.failures
    table, unrated = None, ""
    try:
        table = evaluate(scores, resamples=resamples, seed=seed, test_size=test_size)
    except ScoreError as error:  # the page says it, and shows what there is
        unrated = str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluation has told
        tables = {} if frame.empty else measure_values(scores)
    nothing = pd.DataFrame({"measure": []}), pd.DataFrame()
    results = {}
    for name, configs in scores.model_configs.items():
        keys, values = tables.get(name, nothing)
        rows = None if table is None else table[table["task"] == name]
        results[name] = Results(
            keys=keys,
            values=values,
            errors=_std_errors(frame[frame["task"] == name], keys, values),
            failures=failures[failures["task"] == name],
            configs=configs,
            table=None if rows is None or rows.empty else rows,
            setting=_setting(scores.config),
            unrated=unrated,
        )
    return results


def _std_errors(results: pd.DataFrame, keys: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Standard errors in the shape of the values."""
    if values.empty:
        return values
    columns = results.merge(keys.assign(column=keys.index), on=list(keys.columns))
    errors = columns.pivot(index="model", columns="column", values="std_error")
    return errors.reindex(index=values.index, columns=values.columns)


def _setting(config: Mapping[str, Any]) -> str:
    """Which examples the measures saw."""
    n = config.get("n")
    examples = "all training examples" if n is None else f"n = {n} training examples"
    return f"{examples}, seed {config.get('seed')}"


def _file(name: str) -> str:
    return files("sharpkit.report").joinpath(name).read_text(encoding="utf-8")


def _json_script(value: Any) -> Markup:
    """JSON to stand inside a script element: no character of it can end the element.

    A string is taken as JSON already.
    """
    from markupsafe import Markup

    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _breakable(name: str) -> Markup:
    """A long name that may be broken after an underscore."""
    from markupsafe import Markup, escape

    return escape(name).replace("_", Markup("_<wbr>"))


def _hash(script: str) -> str:
    """A source of the content security policy that allows this script and no other."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _failures(failures: pd.DataFrame) -> list[dict[str, Any]]:
    """Failures with the same cause in one row."""
    by = failures.groupby(["task", "measure", "error"], sort=False)["model"]
    return [
        {"task": task, "measure": measure, "error": error, "models": listed(list(models), NAMES)}
        for (task, measure, error), models in by
    ]


def _seconds(provenance: pd.DataFrame) -> list[tuple[str, str, int]]:
    """Measure, mean seconds per model and number of models, the slowest first."""
    means = provenance.groupby("measure")["seconds"].agg(["mean", "count"])
    means = means.sort_values("mean", ascending=False)
    return [(str(m), number(r["mean"], 2), int(r["count"])) for m, r in means.iterrows()]


def _hashes(provenance: pd.DataFrame) -> dict[str, str]:
    """SHA-256 of the training data of each task."""
    if "data_hash" not in provenance:
        return {}
    known = provenance.dropna(subset=["data_hash"]).drop_duplicates("task")
    return dict(zip(known["task"], known["data_hash"], strict=True))
