"""What is shipped: versions that agree, files inside the package, lower bounds below the pins."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import sharpkit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert sharpkit.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_type_checkers_and_the_demo_find_their_files_in_the_package() -> None:
    package = resources.files("sharpkit")
    for name in (
        "py.typed",
        "data/embedded_zoo.tar.xz",
        "data/embedded_zoo.sha256",
        "report/template.html",
    ):
        assert package.joinpath(name).is_file(), name


def test_the_tested_versions_are_within_the_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        _normalized(name): Version(version)
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[_normalized(requirement.name)]), text


def test_every_lower_bound_can_be_installed_as_an_exact_version() -> None:
    script = ROOT / ".ci" / "lower_bounds.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    found = {Requirement(line).name: line for line in done.stdout.splitlines()}
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert names <= set(found)
    assert re.fullmatch(r"torch==[\d.]+", found["torch"])


def test_the_command_is_installed() -> None:
    (entry,) = (e for e in metadata.entry_points(group="console_scripts") if e.name == "sharpkit")
    assert entry.load().name == "main"


def _rooms():
    """The package and its rooms that have names for users."""
    for found in pkgutil.walk_packages(sharpkit.__path__, "sharpkit."):
        if found.ispkg and hasattr(room := importlib.import_module(found.name), "__all__"):
            yield room
    yield sharpkit


@pytest.mark.parametrize("room", list(_rooms()), ids=lambda room: room.__name__)
def test_the_public_names_are_listed_and_nothing_else(room):
    further = {"__version__"} if room is sharpkit else set()
    assert dir(room) == sorted({*room.__all__, *further})
    for name in dir(room):
        getattr(room, name)


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
