"""What every command shares: how it prints, and how it fails."""

from __future__ import annotations

import os
import sqlite3
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from sharpkit.errors import SharpkitError
from sharpkit.safe_text import printable

if TYPE_CHECKING:
    import pandas as pd


class Shell(click.Group):
    """Prints one line that tells what to do instead of a traceback; --debug shows it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", err=True)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except (SharpkitError, OSError, sqlite3.Error) as error:
            if ctx.params.get("debug"):
                raise
            say(f"error: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            say("\nstopped: finished results are saved; the same command goes on", err=True)
            sys.exit(130)


def say(text: object, *, err: bool = False) -> None:
    """Print a line; what names and messages from files might tell the terminal is spelled out."""
    click.echo(printable(str(text), keep="\n"), err=err)


def say_table(table: pd.DataFrame, digits: str = ".4g") -> None:
    """Print a table without its index, its numbers in this format."""
    say(table.to_string(index=False, float_format=lambda value: f"{value:{digits}}"))


def exit_if_any(failures: Mapping[str, str]) -> None:
    """Say what failed and why, and end with exit code 1 if anything did."""
    for name, reason in failures.items():
        say(f"failed: {name}: {reason}", err=True)
    if failures:
        sys.exit(1)
