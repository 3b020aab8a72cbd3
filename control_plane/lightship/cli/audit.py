"""CLI: the audit log."""

from __future__ import annotations

import click

from lightship.home import Home

from .console import emit, json_option, say, stamp, table, with_home


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
    cells = [(r["seq"], stamp(r["at"]), r["actor"], r["verb"], r["subject"], str(r["detail"])[:70]) for r in rows]
    table("Audit log", ("seq", "at", "actor", "verb", "subject", "detail"), cells)


@audit.command()
@json_option
@with_home
def verify(home: Home, as_json: bool) -> None:
    """Check the chain: no event was changed, removed or reordered. Note the head elsewhere to see a cut at the end."""
    from lightship.storage.audit import head
    from lightship.storage.audit import verify as verify_chain

    with home.database.read() as session:
        count, digest = verify_chain(session), head(session)
    if as_json:
        emit({"events": count, "head": digest, "whole": True})
    else:
        say(f"{count} events, the chain is whole. Its head is {digest}.")
