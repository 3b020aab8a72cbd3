"""CLI: rollouts."""

from __future__ import annotations

import time
from typing import Any

import click

from lightship.home import Home, operator
from lightship_agent.contract.codes import FleetError

from .console import emit, json_option, say, stamp, table, with_home


@click.group()
def rollout() -> None:
    """Rollouts: plan, start, watch, pause, resume, abort, status."""


def _plan_options(command: Any) -> Any:
    options = (
        click.option("--group", default="", help="Only devices of this group."),
        click.option("--label", multiple=True, metavar="KEY=VALUE", help="Only devices with this label."),
        click.option(
            "--canary", type=click.IntRange(1), default=1, show_default=True, help="Devices in the first wave."
        ),
        click.option(
            "--wave",
            multiple=True,
            type=float,
            metavar="SHARE",
            help="More waves, as shares of the devices (0.1 = 10 %).",
        ),
        click.option("--labels/--no-labels", "require_labels", default=True, show_default=True, help="Gate on labels."),
        click.option(
            "--gate-timeout", type=float, default=86_400.0, show_default=True, help="Seconds to hold for a verdict."
        ),
        click.option(
            "--device-timeout", type=float, default=1_800.0, show_default=True, help="Seconds a device may take."
        ),
        click.option("--offline-after", type=float, default=900.0, show_default=True, help="Unseen so long: offline."),
        click.option(
            "--halt-share", type=float, default=0.2, show_default=True, help="Pause above this share of failures."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@rollout.command()
@click.argument("reference")
@_plan_options
@json_option
@with_home
def plan(home: Home, reference: str, as_json: bool, **options: Any) -> None:
    """Which device would be in which wave. Changes nothing."""
    from lightship.fleet import planning

    with home.database.read() as session:
        made = planning.plan(session, _wish(reference, options))
    if as_json:
        import msgspec

        emit(msgspec.to_builtins(made))
        return
    cells = [
        (i + 1, s.name, "yes" if s.gate else "no", w)
        for i, (s, w) in enumerate(zip(made.wave_specs, made.waves, strict=True))
    ]
    back = f"back to version {made.previous_version}" if made.previous_version else "nothing to go back to"
    table(f"{made.model}@{made.version} ({back})", ("wave", "name", "gated", "devices"), cells)


@rollout.command()
@click.argument("reference")
@_plan_options
@click.option("--reason", default="", help="Why; it is audited.")
@json_option
@with_home
def start(home: Home, reference: str, reason: str, as_json: bool, **options: Any) -> None:
    """Start a rollout; `lightship up` carries it out."""
    from lightship.fleet import planning, rollouts

    with home.database.write() as session:
        row = planning.start(session, _wish(reference, options), actor=operator(), reason=reason)
        seen = rollouts.view(session, row)
    if as_json:
        emit(seen)
    else:
        say(f"Rollout {row.id} of {row.model}@{row.version} begins.")
        say(f"Watch it: lightship rollout watch {row.id}")


@rollout.command()
@click.argument("rollout_id", metavar="ROLLOUT")
@click.option("--timeout", type=float, default=0.0, help="Give up after so many seconds; 0: never.")
@json_option
@with_home
def watch(home: Home, rollout_id: str, timeout: float, as_json: bool) -> None:
    """Follow a rollout until it is over; exits non-zero unless it completed."""
    from lightship.fleet import rollouts
    from lightship.fleet.rollout import TERMINAL_STATUSES

    began, last = time.monotonic(), ""
    while True:
        with home.database.read() as session:
            seen = rollouts.view(session, rollouts.get(session, rollout_id))
        line = _line(seen)
        if line != last:
            say(line)
            last = line
        if seen["status"] in TERMINAL_STATUSES:
            break
        if timeout and time.monotonic() - began > timeout:
            raise FleetError("fleet.rollout-state", f"Rollout {rollout_id} is still {seen['status']}: {seen['reason']}")
        time.sleep(1.0)
    if as_json:
        emit(seen)
    if seen["status"] != "completed":
        raise FleetError("fleet.rollout-state", f"Rollout {rollout_id} is {seen['status']}: {seen['reason']}")


@rollout.command()
@click.argument("rollout_id", metavar="ROLLOUT")
@click.option("--reason", default="", help="Why; it is audited.")
@json_option
@with_home
def pause(home: Home, rollout_id: str, reason: str, as_json: bool) -> None:
    """Hold a rollout; devices under way finish."""
    _intervene(home, rollout_id, "pause", reason, as_json=as_json)


@rollout.command()
@click.argument("rollout_id", metavar="ROLLOUT")
@click.option("--reason", default="", help="Why; it is audited.")
@json_option
@with_home
def resume(home: Home, rollout_id: str, reason: str, as_json: bool) -> None:
    """Go on; acknowledges the failures seen so far."""
    _intervene(home, rollout_id, "resume", reason, as_json=as_json)


@rollout.command()
@click.argument("rollout_id", metavar="ROLLOUT")
@click.option("--revert/--keep", default=True, show_default=True, help="Take assigned devices back, or leave them.")
@click.option("--reason", default="", help="Why; it is audited.")
@json_option
@with_home
def abort(home: Home, rollout_id: str, revert: bool, reason: str, as_json: bool) -> None:
    """End a rollout."""
    _intervene(home, rollout_id, "abort", reason, as_json=as_json, revert=revert)


@rollout.command()
@click.argument("rollout_id", metavar="[ROLLOUT]", default="")
@json_option
@with_home
def status(home: Home, rollout_id: str, as_json: bool) -> None:
    """One rollout in detail, or all of them."""
    from lightship.api import views
    from lightship.fleet import rollouts

    with home.database.read() as session:
        if rollout_id:
            rows = [rollouts.view(session, rollouts.get(session, rollout_id))]
        else:
            rows = views.rollout_list(session)
    if as_json:
        emit(rows[0] if rollout_id else rows)
        return
    cells = [
        (
            r["id"],
            f"{r['model']}@{r['version']}",
            r["status"],
            f"{r['wave']}/{len(r['waves'])}",
            stamp(r["created_at"]),
            r["reason"],
        )
        for r in rows
    ]
    table("Rollouts", ("id", "version", "status", "wave", "started", "says"), cells)
    if rollout_id:
        table("Devices", ("device", "status"), sorted(rows[0]["devices"].items(), key=lambda x: (x[1] == "done", x)))
        for check in (rows[0]["gate"] or {}).get("checks", []):
            say(f"gate {check['outcome']:<13} {check['name']:<12} {check['sentence']}")


def _intervene(home: Home, rollout_id: str, what: str, reason: str, *, as_json: bool, revert: bool = True) -> None:
    from lightship.fleet import rollouts

    with home.database.write() as session:
        row = rollouts.intervene(session, rollout_id, what, actor=operator(), reason=reason, revert=revert)
        seen = rollouts.view(session, row)
    if as_json:
        emit(seen)
    else:
        say(_line(seen))


def _wish(reference: str, options: dict[str, Any]) -> Any:
    from lightship.fleet.planning import Wish
    from lightship.fleet.rollout import Rules

    rules = Rules(
        require_labels=options["require_labels"],
        gate_timeout=options["gate_timeout"],
        device_timeout=options["device_timeout"],
        offline_after=options["offline_after"],
        halt_share=options["halt_share"],
    )
    return Wish(
        reference=reference,
        group=options["group"],
        labels=dict(text.partition("=")[::2] for text in options["label"]),
        canary=options["canary"],
        waves=tuple(options["wave"]),
        rules=rules,
    )


def _line(seen: dict[str, Any]) -> str:
    counts: dict[str, int] = {}
    for state in seen["devices"].values():
        counts[state] = counts.get(state, 0) + 1
    said = ", ".join(f"{n} {s}" for s, n in sorted(counts.items()))
    where = f"{seen['model']}@{seen['version']} {seen['status']}, wave {seen['wave']}/{len(seen['waves'])}"
    return f"{where}: {said} {seen['reason']}"
