"""CLI: the audit log."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lightship.home import Home
from lightship.settings import Settings
from lightship_agent.contract.codes import StorageError
from lightship_agent.files import write_durably

from .console import emit, json_option, opened, say, stamp, table, with_home


@click.group(invoke_without_command=True)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@click.option("--subject", default="", help="Only events about this device, model, rollout …")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@click.pass_context
def audit(context: click.Context, limit: int, subject: str, as_json: bool) -> None:
    """Who did what: every mutating act, hash-chained."""
    if context.invoked_subcommand is None:
        _list(limit, subject, as_json)


@with_home
def _list(home: Home, limit: int, subject: str, as_json: bool) -> None:
    from lightship.api import views

    with home.database.read() as session:
        rows = views.audit_events(session, limit, subject)
    if as_json:
        emit(rows)
        return
    cells = [
        (r["seq"], stamp(r["at"]), r["actor"], r["origin"], r["verb"], r["subject"], str(r["detail"])[:70])
        for r in rows
    ]
    table("Audit log", ("seq", "at", "actor", "from", "verb", "subject", "detail"), cells)


@audit.command()
@click.option("--head", "noted", default="", metavar="DIGEST", help="A head noted earlier: the chain must hold it.")
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, readable=True),
    help="Check an exported log instead of the home's; it has to begin with the first event.",
)
@json_option
@click.pass_obj
def verify(settings: Settings, noted: str, path: Path | None, as_json: bool) -> None:
    """Check the chain: no event was changed, inserted, removed or reordered; exits with 26 if one was.

    Note the head elsewhere, and give it back with --head: only so does a cut at the end show, or a chain made anew.
    """
    from lightship.storage import audit as log

    if path is not None:
        found = log.check((log.read_line(line) for line in _lines(path)), noted)
    else:
        with opened(settings) as home, home.database.read() as session:
            found = log.verify(session, noted)
    if as_json:
        emit({"events": found.events, "head": found.head, "since": found.since if noted else None, "whole": True})
        return
    say(f"{found.events} events, the chain is whole. Its head is {found.head}.")
    if noted:
        say(f"The noted head is in it; {found.since} events have followed.")


@audit.command()
@click.option("--after", type=click.IntRange(0), default=0, show_default=True, help="Only events after this number.")
@click.option("--out", type=click.Path(path_type=Path), help="Write to a file (0600) instead of standard output.")
@json_option
@with_home
def export(home: Home, after: int, out: Path | None, as_json: bool) -> None:
    """The log as JSON lines, the oldest event first, with the digests that `audit verify --file` checks."""
    from lightship.storage import audit as log

    with home.database.read() as session:
        found = list(log.lines(session, after))
    text = "".join(f"{line}\n" for line in found)
    if out is None:
        sys.stdout.write(text)
        return
    write_durably(out, text.encode(), mode=0o600)
    if as_json:
        emit({"events": len(found), "path": str(out)})
    else:
        say(f"{len(found)} events in {out}.")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise StorageError("storage.corrupt", f"{path} can't be read as an exported audit log: {e}.") from e
