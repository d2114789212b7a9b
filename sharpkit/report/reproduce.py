"""What it takes to get the same numbers again: command, configuration, versions, seeds."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.measures import MSharpness, standard_measures
from sharpkit.measures.measure import describe
from sharpkit.report.labels import given, records
from sharpkit.zoo import embedded_zoo
from sharpkit.zoo.folder.task import FOLDER_AND_TABLE

if TYPE_CHECKING:
    import pandas as pd

_PACKAGES = ("sharpkit", "torch", "numpy", "scipy", "scikit-learn", "pandas", "plotly")
_RECORDED = ("sharpkit", "torch", "numpy", "python", "platform", "host", "device", "dtype")


def score_command(config: Mapping[str, Any], run: Path) -> str | None:
    """The `sharpkit score` command of a run; None if only Python can express it."""
    try:
        folders = {_parent(path) for path in config["tasks"].values()}
        measures = dict(config["measures"])
        own = [name for name in measures if name.startswith("m_sharpness")]
        if len(own) > 1:
            return None
        options = _m_sharpness_options(measures.pop(own[0]) if own else None)
    except (KeyError, TypeError, ValueError):
        return None
    if any(FOLDER_AND_TABLE in path for path in config["tasks"].values()):
        return None  # how its networks are built is not in the run
    if len(folders) != 1 or options is None or config.get("precision", "full") != "full":
        return None
    standard = dict(describe(measure) for measure in standard_measures(recorded=True))
    if any(_json(standard.get(name)) != _json(own) for name, own in measures.items()):
        return None
    names = ["m_sharpness" if name in own else name for name in config["measures"]]
    words = ["sharpkit", "score", _zoo_name(folders.pop())]
    words += ["--out", str(run), "--measures", ",".join(names)]
    for task in config["tasks"]:
        words += ["--task", task]
    words += options
    for name in ("n", "seed", "device", "threads"):
        if config.get(name) is not None:
            words += [f"--{name}", str(config[name])]
    return shlex.join(words)


def _parent(path: str) -> str:
    """The zoo of a task's path or URL."""
    return path.rpartition("/")[0] if "://" in path else str(Path(path).parent)


def _zoo_name(folder: str) -> str:
    """The folder of a zoo, or the name of the one that ships with sharpkit."""
    paths = (Path(task.location or "").parent for task in embedded_zoo().values())
    return "embedded" if Path(folder) in paths else folder


def _m_sharpness_options(own: Mapping[str, Any] | None) -> list[str] | None:
    """Options of the command for m-sharpness; None if it has settings without an option."""
    if own is None:
        return []
    settings = {k: v for k, v in own.items() if k != "name"}
    listed = {k: v if isinstance(v, list | tuple) else [v] for k, v in settings.items()}
    plain = MSharpness(
        m=listed["m"], rho=listed["rho"], ascent=settings["ascent"], adaptive=settings["adaptive"]
    )
    expected = {k: v for k, v in describe(plain)[1].items() if k not in ("m", "rho")}
    if _json(expected) != _json({k: v for k, v in own.items() if k not in ("m", "rho")}):
        return None
    words = []
    for key in ("m", "rho"):
        words += [f"--{key}", ",".join(map(str, listed[key]))]
    words += ["--ascent", settings["ascent"]]
    return [*words, "--adaptive"] if settings["adaptive"] else words


def environments(provenance: pd.DataFrame) -> list[dict[str, str]]:
    """The versions and machines that the results of a run were computed with, each once."""
    columns = [name for name in _RECORDED if name in provenance]
    found = provenance[columns].dropna(how="all").drop_duplicates()
    return [
        {name: str(value) for name, value in row.items() if given(value)} for row in records(found)
    ]


def versions() -> dict[str, str]:
    """Versions in this process, which makes the page."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
