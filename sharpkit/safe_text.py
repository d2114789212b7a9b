"""Names and messages that come from files, made safe for terminals and spreadsheets."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]inf", re.IGNORECASE)


def printable(text: str, *, keep: str = "") -> str:
    r"""Text in which a terminal finds no command: what is not printable is spelled out.

    Escape sequences, line ends, marks that reverse the direction of writing, and bytes that are no
    UTF-8 become what Python writes for them.

    Example:
        >>> print(printable("task\x1b[2J, größer\n"))
        task\x1b[2J, größer\n
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula, with `printable` characters only.

    A quote stands before what begins as a formula does; numbers stay as they are.

    Example:
        >>> cell("=cmd|' /C calc'!A0"), cell("-0.5"), cell("vgg-4")
        ("'=cmd|' /C calc'!A0", '-0.5', 'vgg-4')
    """
    safe = printable(text)
    formula = text.lstrip()[:1] in ("=", "+", "-", "@") and not _NUMBER.fullmatch(text)
    return f"'{safe}" if formula else safe
