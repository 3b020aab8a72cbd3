"""CLI: alarms, and the retrain proposals that follow from them."""

from __future__ import annotations

import click

from lightship.home import Home, operator
from lightship.settings import Settings
from lightship.storage.audit import now_ms

from .console import emit, json_option, say, stamp, table, with_home


@click.group()
def retrain() -> None:
    """Retrain proposals: list, run, dismiss."""


@retrain.command("list")
@json_option
@with_home
def list_(home: Home, as_json: bool) -> None:
    """All proposals, the newest first, and what they wait for."""
    from lightship.api import views
    from lightship.monitoring.retrain import waits_for

    settings = click.get_current_context().find_object(Settings)
    assert settings is not None
    with home.database.read() as session:
        rows = views.proposals(session)
        why = waits_for(session, settings.retrain_min_rows, now_ms())
    for row in rows:
        row["detail"] = why.get(row["id"], row["detail"])
    if as_json:
        emit(rows)
        return
    cells = [
        (r["id"], r["model"], r["status"], stamp(r["created_at"]), r["excluded"], r["reason"], r["detail"])
        for r in rows
    ]
    table("Retrain proposals", ("id", "model", "status", "since", "excluded", "because", "detail"), cells)


@retrain.command()
@click.argument("proposal")
@json_option
@with_home
def run(home: Home, proposal: str, as_json: bool) -> None:
    """Train the challenger, gate it, release it and start its rollout."""
    from lightship.monitoring.retrain import run_proposal

    row = run_proposal(home, proposal, actor=operator())
    if as_json:
        emit({"id": row.id, "status": row.status, "version": row.version, "rollout": row.rollout})
    else:
        say(f"{row.model}@{row.version} is released; rollout {row.rollout} begins.")


@retrain.command()
@click.argument("proposal")
@click.option("--reason", required=True, help="Why; it is audited.")
@json_option
@with_home
def dismiss(home: Home, proposal: str, reason: str, as_json: bool) -> None:
    """Close a proposal without training."""
    from lightship.monitoring import retrain as retraining

    with home.database.write() as session:
        retraining.dismiss(session, proposal, actor=operator(), reason=reason)
    if as_json:
        emit({"id": proposal, "status": "dismissed"})
    else:
        say(f"{proposal} is dismissed.")


@click.group()
def alarm() -> None:
    """Alarms."""


@alarm.command("list")
@click.option("--all", "everything", is_flag=True, help="Closed ones too.")
@json_option
@with_home
def list_alarms(home: Home, everything: bool, as_json: bool) -> None:
    """Alarms, the newest first."""
    from lightship.api import views

    with home.database.read() as session:
        rows = views.alarms(session, only_open=not everything)
    if as_json:
        emit(rows)
        return
    cells = [
        (stamp(r["opened_at"]), stamp(r["closed_at"]), r["kind"], r["level"], r["device"], r["sentence"]) for r in rows
    ]
    table("Alarms", ("opened", "closed", "kind", "level", "device", "says"), cells)
