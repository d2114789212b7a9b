"""Formulas of docstrings, which are plain text, as lines with indices below and powers above."""

from __future__ import annotations

import re

# a single letter, an operator or a bracket; a longer word with a line in it is a name
_BASE = r"((?<![A-Za-z])[^\W\d_]|max|min|mean|[Σ∇²ᵀ)\]‖|])"
_INDEX = re.compile(_BASE + r"_(\{[^{}]*\}|[A-Za-zα-ω0-9≠∞']{1,6}(?![A-Za-z_]))")
_POWER = re.compile(_BASE + r"\^(\{[^{}]*\}|\([^()]*\)|[A-Za-zα-ω0-9]+)")
_FORMULA = re.compile(r"^    \S.*[=≤≥Σ∑‖√‖λρσε∂∇⟨·²/].*")


def typeset(lines: list[str]) -> list[str]:
    """The lines of a docstring, its indented formulas as line blocks of the class "formula".

    A formula is an indented paragraph of the description, before the sections that end in a colon.
    """
    fields = (k for k, line in enumerate(lines) if re.match(r"(:\w+|\.\. )", line))
    end = next(fields, len(lines))
    found: list[str] = []
    k = 0
    while k < end:
        stop = k
        while stop < end and lines[stop].startswith("    "):
            stop += 1
        block = lines[k:stop]
        if block and any(map(_FORMULA.match, block)) and not any(">>>" in b for b in block):
            found += [".. container:: formula", "", *(f"   | {_marked(b[4:])}" for b in block), ""]
            k = stop
        else:
            found += lines[k : stop or k] or [lines[k]]
            k = max(stop, k + 1)
    return found + lines[end:]


def _marked(text: str) -> str:
    """Indices and powers as roles; spaces that align are kept."""
    text = re.sub(r"(?<=\S)  +", lambda m: "\u2003" * (len(m[0]) // 2), text)
    text = _INDEX.sub(lambda m: rf"{m[1]}\ :sub:`{m[2].strip('{}')}`\ ", text)
    return _POWER.sub(lambda m: rf"{m[1]}\ :sup:`{m[2].strip('{}')}`\ ", text)
