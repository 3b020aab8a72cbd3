"""Demo: what the spectator sees: short lines, a spinner with a live word, times; no wall of logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


@dataclass
class Step:
    """One step of the story, as it goes into the report."""

    name: str
    expected: str
    happened: str = ""
    seconds: float = 0.0
    passed: bool = False


@dataclass
class Narrator:
    """Speaks, times, and keeps the steps."""

    console: Console = field(
        default_factory=lambda: Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    )
    steps: list[Step] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, expected: str) -> Iterator[Step]:
        """A step: announced, timed, kept; a failure is kept too, and raised."""
        step = Step(name, expected)
        self.steps.append(step)
        self.console.print(f"\n[bold]{len(self.steps)}. {name}[/bold]  [dim]{expected}[/dim]")
        began = time.monotonic()
        try:
            yield step
            step.passed = True
        except BaseException as e:
            step.happened = step.happened or f"{type(e).__name__}: {e}"
            raise
        finally:
            step.seconds = round(time.monotonic() - began, 1)
            mark = "[green]✓[/green]" if step.passed else "[red]✗[/red]"
            self.console.print(f"   {mark} {_escape(step.happened)} [dim]({step.seconds:.1f} s)[/dim]")

    def say(self, text: str) -> None:
        """A line within a step."""
        self.console.print(f"   {_escape(text)}")

    @contextmanager
    def progress(self, text: str, total: float | None = None) -> Iterator[Bar]:
        """A spinner, or a bar where the total is known, on a terminal; one line elsewhere."""
        if not self.console.is_terminal:
            self.say(f"{text} …")
            yield Bar(None, 0)
            return
        columns = (
            TextColumn("  "),
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(24),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as shown:
            yield Bar(shown, shown.add_task(text, total=total))

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A small table."""
        out = Table(title=title, title_justify="left", header_style="bold", show_edge=False)
        for column in columns:
            out.add_column(column)
        for row in rows:
            out.add_row(*(_escape(str(cell)) for cell in row))
        self.console.print(out)


@dataclass
class Bar:
    """A progress bar that may not be there."""

    shown: Progress | None
    task: Any

    def update(self, done: float | None = None, text: str | None = None) -> None:
        """Move it, or change its words."""
        if self.shown is not None:
            changes: dict[str, Any] = {}
            if done is not None:
                changes["completed"] = done
            if text is not None:
                changes["description"] = text
            self.shown.update(self.task, **changes)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
