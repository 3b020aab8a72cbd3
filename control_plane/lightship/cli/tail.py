"""CLI: `lightship telemetry tail`: reports as they are stored, or as the broker passes them on."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import click

from lightship.home import Home
from lightship.settings import Settings
from lightship_agent.contract.codes import FleetError, SettingsError, WireError

from .console import json_option, opened, plain, say, stamp
from .moments import moment

LOOK_SECONDS: Final = 0.5
#: Devices join and leave a group while somebody looks.
MEMBERS_SECONDS: Final = 10.0
#: As a worker that is hardly ever there.
_SEAT: Final = 13


@click.command()
@click.argument("whom", metavar="DEVICE|GROUP")
@click.option(
    "--since", callback=moment, default="0s", help="First what was reported since: a span ago, or a date (UTC)."
)
@click.option("--no-follow", is_flag=True, help="End after that.")
@click.option("--broker", is_flag=True, help="Listen at the broker of `lightship up`, and not to what is stored.")
@json_option
@click.pass_obj
def tail(settings: Settings, /, whom: str, since: int, *, no_follow: bool, broker: bool, as_json: bool) -> None:
    """Show what a device, or the devices of a group, report, as it is stored; a line each, until Ctrl-C.

    `--json`: a JSON document on each line. It reads the database, and needs no access to the broker.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    show = _json_line if as_json else _line
    try:
        with opened(settings) as home:
            lines = _heard(home, whom) if broker else _stored(home, settings, whom, since, follow=not no_follow)
            for report in lines:
                show(report)
    except KeyboardInterrupt:
        return  # that is how it ends
    except BrokenPipeError:
        sys.stderr.close()  # whoever read has seen enough


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _members(home: Home, whom: str) -> tuple[str, ...]:
    from sqlalchemy import select

    from lightship.storage.models import Device

    with home.database.read() as session:
        if session.get(Device, whom) is not None:
            return (whom,)
        return tuple(session.scalars(select(Device.id).where(Device.group == whom)))


def _known(home: Home, whom: str) -> tuple[str, ...]:
    members = _members(home, whom)
    if not members:
        remedy = "`lightship device list` has them."
        raise FleetError("fleet.unknown-device", f"No device and no group {whom!r}.", remedy=remedy)
    return members


def _stored(home: Home, settings: Settings, whom: str, since: int, *, follow: bool) -> Iterator[Any]:
    from lightship.monitoring.history import open_history
    from lightship.monitoring.ingest import FUTURE_MS
    from lightship.monitoring.tail import Once

    if settings.history == "off":
        remedy = "Use --broker, or keep a history."
        raise SettingsError("settings.missing", "history = off: what is reported is kept nowhere.", remedy=remedy)
    members, once = _known(home, whom), Once()
    looked = time.monotonic()
    history = open_history(home.path, settings.history)
    try:
        mark = history.end()
        until = int(time.time() * 1_000) + FUTURE_MS
        backlog = [r for device in members for r in history.read(since, until, device)] if since < until else []
        yield from once.new(sorted(backlog, key=lambda r: (r.recv, r.device, r.seq)))
        while follow:
            mark, came = history.arrivals(mark, members)
            yield from once.new(came)
            if came:
                continue
            time.sleep(LOOK_SECONDS)
            if time.monotonic() - looked > MEMBERS_SECONDS:
                members, looked = _members(home, whom) or members, time.monotonic()
    finally:
        history.close()


def _heard(home: Home, whom: str) -> Iterator[Any]:
    from lightship.fleet.broker import control_plane_context, known_broker, worker_name
    from lightship.fleet.broker_seat import Credential, Seat, pump
    from lightship.monitoring.tail import Once, reports_in
    from lightship_agent.contract import topics

    members, once = set(_known(home, whom)), Once()
    folder = home.path / "broker"
    info = known_broker(folder)
    tls = control_plane_context(folder, home.ca, worker_name(_SEAT))
    who = Credential(tls, info.control_username, info.control_password)
    seat = Seat(info.host, info.port, who, f"lightship-tail-{time.time_ns():x}", v5=True).open()
    try:
        seat.subscribe(topics.telemetry("+", "+"), topics.event("+", "+"))
        while seat.lost is None:
            pump([seat], lambda: bool(seat.heard) or seat.lost is not None, 1.0)
            heard, seat.heard = seat.heard, []
            for message in heard:
                address = topics.parse(message.topic)
                if address is None or address.device not in members:
                    continue
                try:
                    found = reports_in(address.device, message.payload, int(time.time() * 1_000))
                except WireError as e:
                    say(f"{address.device}: {e}")
                    continue
                yield from once.new(found)
        say("The broker has ended the connection.")
    finally:
        seat.close()


def _line(report: Any) -> None:
    from lightship.monitoring.tail import LATE_MS, line

    said = line(report)
    late = f" (+{said.late_ms / 1_000:.0f} s)" if said.late_ms > LATE_MS else ""
    text = plain(f"{stamp(said.at)}  {said.device:<16} {said.kind:<10} {said.says}{late}").replace("\n", " ")
    # Colours are dropped by `echo` where nobody sees them.
    click.echo(click.style(text, fg="red" if said.grave else None, dim=said.minor or None))
    sys.stdout.flush()


def _json_line(report: Any) -> None:
    from lightship.monitoring.tail import as_json

    click.echo(as_json(report).decode())
    sys.stdout.flush()
