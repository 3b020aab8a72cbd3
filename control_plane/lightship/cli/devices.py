"""CLI: devices and join tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lightship.home import Home, operator
from lightship.settings import Settings
from lightship_agent.contract.codes import FleetError

from .asks import ask, asked
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
@click.option("--preauthorised", is_flag=True, help="Lets in only devices of `lightship device preauthorise`.")
@click.option("--approval", is_flag=True, help="Devices wait for `lightship device approve`.")
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
    preauthorised: bool,
    approval: bool,
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
            preauthorised=preauthorised,
            approval=approval,
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
@click.option("--hours", type=click.FloatRange(0.1, 24 * 90), default=24.0, show_default=True, help="How far back.")
@json_option
@with_home
def show(home: Home, device_id: str, hours: float, as_json: bool) -> None:
    """One device: how it was of late, what it runs and ran, its windows, its last update steps."""
    from lightship.api import views
    from lightship.storage.models import Device

    from .recent import recent_of, say_numbers, say_recent

    with home.database.read() as session:
        row = session.get(Device, device_id)
        if row is None:
            raise FleetError("fleet.unknown-device", f"No device {device_id!r}.", remedy="See `lightship device list`.")
        facts = views.device_detail(session, row)
    settings = click.get_current_context().find_object(Settings)
    assert settings is not None  # the root command has them loaded
    facts["recent"] = recent_of(home.path, settings, device_id, facts["windows"], hours)
    if as_json:
        emit(facts)
        return
    table("Device", ("device", "group", "seen", "runs", "drift", "update", "notes"), [_row(facts)])
    say("health " + ", ".join(f"{k} {v:.4g}" for k, v in sorted(facts["health"].items())))
    say_recent(facts["recent"])
    say_numbers(facts)
    spans = [
        (f"{e['model']}@{e['version']}", stamp(e["began_at"]), stamp(e["ended_at"]), e["requests"])
        for e in facts["exposures"]
    ]
    table("Served", ("version", "from", "to", "rows"), spans)
    if facts["cloned_at"]:
        say(f"cloned: this identity is in use twice since {stamp(facts['cloned_at'])}: {facts['clone']['why']}.")
    runs = [
        (i["instance"], i["boot"], i["address"], stamp(i["first_seen"]), stamp(i["last_seen"]), i["returns"])
        for i in facts["instances"]
    ]
    table("Runs of its agent", ("instance", "boot", "address", "first asked", "last known", "returns"), runs)
    steps = [(stamp(s["at"]), s["rollout"], s["state"], s["code"], s["detail"][:80]) for s in facts["updates"]]
    table("Update steps", ("at", "rollout", "state", "code", "detail"), steps)
    if facts["verdict"]:
        worst = facts["verdict"]["evidence"][:8]
        cells = [
            (s["name"], s["psi"], f"{s['psi_low']:.3f} – {s['psi_high']:.3f}", s["p_value"], s["rows"]) for s in worst
        ]
        table(f"Drift: {facts['drift']}", ("stream", "PSI", "95 % interval", "p", "rows"), cells)


@device.command()
@click.option(
    "--file", "file", type=click.Path(path_type=Path), help="CSV with a header of device, serial, key, group."
)
@click.option("--device", "device_id", default="", help="The id of one device.")
@click.option("--serial", default="", help="The serial of one device.")
@click.option("--key", default="", help="The digest of its key, from `lightship-agent key`: it needs no token then.")
@click.option("--group", default="", help="The group it joins; default: that of its token.")
@click.option("--label", multiple=True, metavar="KEY=VALUE", help="A label of these devices; may be repeated.")
@json_option
@with_home
def preauthorise(
    home: Home,
    file: Path | None,
    device_id: str,
    serial: str,
    key: str,
    group: str,
    label: tuple[str, ...],
    as_json: bool,
) -> None:
    """List devices that may enrol, each once: with a token made for listed devices, or for their key alone."""
    from lightship.fleet import preauthorisation

    one = preauthorisation.Entry(device=device_id, serial=serial, key=key.lower(), group=group)
    if file is not None:
        entries = preauthorisation.read_entries(_text(file))
    else:
        entries = [preauthorisation.check_entry(one)]
    labels = dict(text.partition("=")[::2] for text in label)
    with home.database.write() as session:
        rows = preauthorisation.add(session, entries, labels=labels, actor=operator())
        made = [row.id for row in rows]
    if as_json:
        emit({"entries": made})
    else:
        say(f"{len(made)} expected.")


@device.command()
@click.option("--withdraw", metavar="ENTRY", help="Take an entry back that was not used.")
@json_option
@with_home
def preauthorised(home: Home, withdraw: str | None, as_json: bool) -> None:
    """Devices that are expected, and those that came."""
    from lightship.api import views
    from lightship.fleet import preauthorisation

    if withdraw is not None:
        with home.database.write() as session:
            preauthorisation.withdraw(session, withdraw, actor=operator())
    with home.database.read() as session:
        rows = views.preauthorisations(session)
    if as_json:
        emit(rows)
        return
    cells = [(r["id"], r["device"], r["serial"], r["key"][:16], r["group"], r["used_by"]) for r in rows]
    table("Expected devices", ("entry", "device", "serial", "key", "group", "used by"), cells)


@device.command()
@click.argument("device_id", metavar="DEVICE")
@json_option
@with_home
def approve(home: Home, device_id: str, as_json: bool) -> None:
    """Let a device in that waits for it."""
    from lightship.fleet.enrolment import approve as approve_device

    with home.database.write() as session:
        approve_device(session, device_id, actor=operator())
    _said(device_id, "active", f"{device_id} is let in.", as_json=as_json)


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
    """Refuse a device from its next request on, and cut its MQTT session."""
    from lightship.fleet.enrolment import revoke as revoke_device

    with home.database.write() as session:
        revoke_device(session, device_id, actor=operator(), reason=reason)
    said = (
        f"{device_id} is revoked: its next request is refused; `lightship up` cuts its MQTT session at its next look."
    )
    _said(device_id, "revoked", said, as_json=as_json)


@device.command("clear-clone")
@click.argument("device_id", metavar="DEVICE")
@click.option("--reason", required=True, help="What was found; it is audited.")
@json_option
@with_home
def clear_clone(home: Home, device_id: str, reason: str, as_json: bool) -> None:
    """Take away the mark that an identity is in use twice."""
    from lightship.fleet import clones
    from lightship.fleet.enrolment import known_device

    with home.database.write() as session:
        row = known_device(session, device_id)
        clones.clear(session, row, actor=operator(), reason=reason)
    _said(device_id, row.state, f"{device_id} is not marked any more.", as_json=as_json)


device.add_command(ask)
device.add_command(asked)


def _said(device_id: str, state: str, words: str, *, as_json: bool) -> None:
    if as_json:
        emit({"device": device_id, "state": state})
    else:
        say(words)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise FleetError("fleet.preauthorisation", f"Can't read {path}: {e}.") from e


def _row(d: dict[str, Any]) -> tuple[Any, ...]:
    runs = f"{d['model']}@{d['version']}" if d["model"] else ""
    update = " ".join(t for t in (d["update"]["state"], d["update"]["code"]) if t)
    marks = (("cloned", d["cloned_at"]), ("quarantined", d["quarantined"]), (d["state"], d["state"] != "active"))
    notes = [t for t, on in marks if on]
    notes += d["degraded"]
    return d["id"], d["group"], ago(d["last_seen"]), runs, d["drift"], update, notes
