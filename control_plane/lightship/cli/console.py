"""CLI: how commands speak, and what they have in common."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from lightship.home import Home
from lightship.settings import Settings
from lightship_agent.contract.codes import LightshipError

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """Every command's `--json`."""
    option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
    return option(command)


@contextmanager
def opened(settings: Settings) -> Iterator[Home]:
    """The home, closed afterwards."""
    home = Home.open(settings.home)
    try:
        yield home
    finally:
        home.close()


def with_home(command: Callable[..., Any]) -> Callable[..., Any]:
    """Open the home of the settings and pass it as the first argument."""

    @click.pass_obj
    @functools.wraps(command)
    def wrapped(settings: Settings, *arguments: Any, **options: Any) -> Any:
        with opened(settings) as home:
            return command(home, *arguments, **options)

    return wrapped


def emit(value: Any) -> None:
    """JSON on standard output."""
    click.echo(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output."""
    out = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        out.add_column(column)
    for row in rows:
        out.add_row(*(_text(cell) for cell in row))
    console().print(out)


def console() -> Console:
    """Standard output, wide enough for tables when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """A line for people, on standard error, so that JSON stays clean."""
    click.echo(plain(text), err=True)


def ago(ms: int | None) -> str:
    """How long ago, in words."""
    if not ms:
        return "never"
    seconds = max(0, time.time() - ms / 1_000)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def stamp(ms: int | None) -> str:
    """A moment, local time of the reader."""
    return datetime.fromtimestamp(ms / 1_000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S") if ms else "–"


def fail(error: LightshipError, *, as_json: bool) -> int:
    """Say the error on standard error; the exit status."""
    if as_json:
        say(json.dumps({"code": error.code, "error": str(error)}, ensure_ascii=False))
    else:
        say(f"error [{error.code}]: {error}")
    return error.exit_status


def _text(cell: Any) -> str:
    if cell is None or cell == "":
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    if isinstance(cell, list | tuple):
        return plain(", ".join(str(c) for c in cell)) or "–"
    return plain(str(cell))


def plain(text: str) -> str:
    """Text that moves no cursor and changes no colour: devices and callers choose what some columns say."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
