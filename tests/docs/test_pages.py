"""What the pages show is true: code is executed by the build, commands exist, names are listed."""

from __future__ import annotations

import inspect
import re

import click
import pytest
from markdown_blocks import PAGES, README, ROOT, blocks, sharpkit_commands

import sharpkit as sk
from sharpkit.cli import main

# shows other libraries' code beside its own
PEERS = ROOT / "docs" / "coming-from.md"
EXECUTED = "{code-cell}"
SPELLINGS = ("python", "py", "python3", "ipython", "ipython3", "pycon", "{code-block}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_on_a_page_is_executed_by_the_build(page):
    idle = [b.place for b in blocks(page) if b.language.partition(" ")[0].lower() in SPELLINGS]
    assert page == PEERS or not idle, f"not executed: use {EXECUTED} in {idle}"


def test_pages_with_cells_are_notebooks():
    """Without its front matter a page's cells would be shown and not run."""
    for page in PAGES:
        has_cells = any(block.language.startswith(EXECUTED) for block in blocks(page))
        head = page.read_text(encoding="utf-8").split("\n---", 1)[0]
        assert has_cells == ("file_format: mystnb" in head), page


COMMANDS = [c for page in [README, *PAGES] for c in sharpkit_commands(page)]


@pytest.mark.parametrize(("place", "arguments"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_commands_exist_and_take_these_arguments(place, arguments):
    command, names = main, []
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        assert name in command.commands, f"{place}: no command {name!r}"
        command, names = command.commands[name], [*names, name]
    if isinstance(command, click.Group):
        assert arguments, f"{place}: {' '.join(names)} alone does nothing"
        return
    command.make_context(" ".join(names), list(arguments))  # raises for what it does not take


def test_commands_in_the_text_of_the_readme_exist():
    named = re.findall(r"`sharpkit ((?:zoo )?[a-z0-9]+)", README.read_text(encoding="utf-8"))
    assert named
    for name in named:
        command = main
        for word in name.split():
            assert word in command.commands, f"README.md: no command {name!r}"
            command = command.commands[word]


def test_api_reference_lists_every_public_name():
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    index = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    listed = {name.split(".")[-1] for name in re.findall(r"^   ([\w.]+)$", index, re.MULTILINE)}
    modules = [sk, sk.measures, sk.plot, sk.evaluation, sk.curvature]
    public = {
        name
        for module in modules
        for name in module.__all__
        if inspect.isclass(getattr(module, name)) or inspect.isroutine(getattr(module, name))
        if not inspect.isabstract(getattr(module, name))
    }
    assert public <= listed, sorted(public - listed)
