"""CLI: devices and join tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lightship.home import Home, operator
from lightship_agent.contract.codes import FleetError

from .console import ago, emit, json_option, say, stamp, table, with_home


@click.group()
def device() -> None:
    """Devices: join tokens, the list, one in detail."""


@device.command()
@click.option("--group", default="default", show_default=True, help="The group the device joins.")
@click.option("--device", "device_id", help="Bind the token to this device id.")
@click.option("--label", multiple=True, metavar="KEY=VALUE", help="A label of the device; may be repeated.")
@click.option("--uses", type=click.IntRange(1, 10_000), default=1, show_default=True)
@click.option(
    "--ttl", type=click.IntRange(60, 30 * 86_400), default=3_600, show_default=True, help="Seconds it is valid."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the token to a file (0600) instead of the screen.")
@json_option
@with_home
def token(
    home: Home,
    group: str,
    device_id: str | None,
    label: tuple[str, ...],
    uses: int,
    ttl: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Make a join token. It is shown once."""
    from lightship.fleet.enrolment import create_token
    from lightship_agent.files import write_durably

    labels = dict(text.partition("=")[::2] for text in label)
    with home.database.write() as session:
        made = create_token(
            session,
            home.ca,
            group=group,
            labels=labels,
            device=device_id,
            uses=uses,
            ttl_seconds=ttl,
            actor=operator(),
        )
    if out is not None:
        write_durably(out, made.encode(), mode=0o600)
        made = f"written to {out}"
    if as_json:
        emit({"token": made, "uses": uses, "ttl": ttl})
    else:
        click.echo(made)


@device.command("list")
@click.option("--group", default="", help="Only this group.")
@json_option
@with_home
def list_(home: Home, group: str, as_json: bool) -> None:
    """All devices: what they run, by their own reports."""
    from lightship.api import views

    with home.database.read() as session:
        rows = views.devices(session, group)
    if as_json:
        emit(rows)
        return
    table("Devices", ("device", "group", "seen", "runs", "drift", "update", "notes"), [_row(r) for r in rows])


@device.command()
@click.argument("device_id", metavar="DEVICE")
@json_option
@with_home
def show(home: Home, device_id: str, as_json: bool) -> None:
    """One device: what it runs and ran, its windows, its last update steps."""
    from lightship.api import views
    from lightship.storage.models import Device

    with home.database.read() as session:
        row = session.get(Device, device_id)
        if row is None:
            raise FleetError("fleet.unknown-device", f"No device {device_id!r}.", remedy="See `lightship device list`.")
        facts = views.device_detail(session, row)
    if as_json:
        emit(facts)
        return
    table("Device", ("device", "group", "seen", "runs", "drift", "update", "notes"), [_row(facts)])
    say("health " + ", ".join(f"{k} {v:.4g}" for k, v in sorted(facts["health"].items())))
    spans = [
        (f"{e['model']}@{e['version']}", stamp(e["began_at"]), stamp(e["ended_at"]), e["requests"])
        for e in facts["exposures"]
    ]
    table("Served", ("version", "from", "to", "rows"), spans)
    steps = [(stamp(s["at"]), s["rollout"], s["state"], s["code"], s["detail"][:80]) for s in facts["updates"]]
    table("Update steps", ("at", "rollout", "state", "code", "detail"), steps)
    if facts["verdict"]:
        worst = facts["verdict"]["evidence"][:8]
        cells = [
            (s["name"], s["psi"], f"{s['psi_low']:.3f} – {s['psi_high']:.3f}", s["p_value"], s["rows"]) for s in worst
        ]
        table(f"Drift: {facts['drift']}", ("stream", "PSI", "95 % interval", "p", "rows"), cells)


@device.command()
@click.argument("device_id", metavar="DEVICE")
@json_option
@with_home
def retry(home: Home, device_id: str, as_json: bool) -> None:
    """Let a device try its assigned bundle again, though it failed there before."""
    from lightship.fleet.director import retry as retry_on

    with home.database.write() as session:
        seq = retry_on(session, home.keys, device=device_id, actor=operator())
    if as_json:
        emit({"device": device_id, "seq": seq})
    else:
        say(f"{device_id} will try again at its next look (assignment {seq}).")


@device.command()
@click.argument("device_id", metavar="DEVICE")
@click.option("--reason", required=True, help="Why; it is audited.")
@json_option
@with_home
def revoke(home: Home, device_id: str, reason: str, as_json: bool) -> None:
    """Refuse a device from its next request on."""
    from lightship.fleet.enrolment import revoke as revoke_device

    with home.database.write() as session:
        revoke_device(session, device_id, actor=operator(), reason=reason)
    if as_json:
        emit({"device": device_id, "state": "revoked"})
    else:
        say(f"{device_id} is revoked.")


def _row(d: dict[str, Any]) -> tuple[Any, ...]:
    runs = f"{d['model']}@{d['version']}" if d["model"] else ""
    update = " ".join(t for t in (d["update"]["state"], d["update"]["code"]) if t)
    notes = [t for t, on in (("quarantined", d["quarantined"]), (d["state"], d["state"] != "active")) if on]
    notes += d["degraded"]
    return d["id"], d["group"], ago(d["last_seen"]), runs, d["drift"], update, notes
