"""The fenced blocks of the README and of the documentation's pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted(
    path
    for path in (ROOT / "docs").rglob("*.md")
    if not {"_build", "generated"} & set(path.relative_to(ROOT).parts)
)

_FENCE = re.compile(r"^(```+|~~~+|:::+)[ \t]*([^\n]*)\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: what stands behind the fence, its text, and where it begins."""

    language: str
    text: str
    place: str


def blocks(path: Path) -> Iterator[Block]:
    """The blocks of a Markdown file in order."""
    content = path.read_text(encoding="utf-8")
    for match in _FENCE.finditer(content):
        line = content.count("\n", 0, match.start()) + 1
        yield Block(match[2].strip(), match[3], f"{path.relative_to(ROOT)}:{line}")


def sharpkit_commands(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Place and arguments of every `sharpkit ...` line in the blocks of a file."""
    for block in blocks(path):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = _words(line)
            if words[:1] == ["sharpkit"]:
                yield block.place, words[1:]


def _words(line: str) -> list[str]:
    """The command of a shell line: without prompt, comment, pipe and redirection."""
    line = line.strip().removeprefix("$ ")
    if not line.startswith("sharpkit "):
        return []
    words = shlex.split(line, comments=True)
    ends = [i for i, word in enumerate(words) if word in {"|", ">", ">>", "2>", "&&", ";", "&"}]
    return words[: min(ends, default=len(words))]
