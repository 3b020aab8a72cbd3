"""CLI: asking a device something, and what it answered."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from lightship.home import Home, operator

from .console import emit, json_option, say, stamp, table, with_home

_LOOK_SECONDS = 0.5


@click.command()
@click.argument("device_id", metavar="DEVICE")
@click.argument("verb", type=click.Choice(["rebirth", "loglevel", "snapshot"]))
@click.option("--level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", help="Of loglevel.")
@click.option("--for", "seconds", type=click.IntRange(1, 86_400), default=900, show_default=True, help="Of it: s.")
@click.option("--valid", type=click.IntRange(1, 86_400), default=300, show_default=True, help="Seconds to be heard in.")
@click.option("--wait", type=click.FloatRange(0, 3_600), default=30.0, show_default=True, help="Wait so long (s).")
@json_option
@with_home
def ask(
    home: Home, device_id: str, verb: str, level: str, seconds: int, valid: int, wait: float, as_json: bool
) -> None:
    """Ask a device to report anew, to log more for a while, or how it is.

    `lightship up` sends it over MQTT, or with the answer to the device's next poll. rebirth: say again who and how it
    is. loglevel: log at --level, --for so long. snapshot: its state without secrets, and its latest log lines.
    """
    from lightship.fleet import asks
    from lightship.storage.audit import now_ms

    with home.database.write() as session:
        made = asks.ask(session, device_id, verb, actor=operator(), level=level, seconds=seconds, valid=valid)
        ident = made.id
    ends = time.monotonic() + wait
    while True:
        with home.database.read() as session:
            facts = asks.facts(asks.get(session, ident), now_ms())
        left = ends - time.monotonic()
        if facts["answered_at"] or left <= 0:
            break
        time.sleep(min(_LOOK_SECONDS, left))
    if as_json:
        emit(facts)
    else:
        _say(facts)


@click.command()
@click.argument("device_id", metavar="DEVICE")
@click.option("--id", "ident", help="One of them, with its whole answer.")
@json_option
@with_home
def asked(home: Home, device_id: str, ident: str | None, as_json: bool) -> None:
    """What a device was asked, and what it answered."""
    from lightship.fleet import asks
    from lightship.storage.audit import now_ms

    now = now_ms()
    with home.database.read() as session:
        rows = [asks.get(session, ident)] if ident else asks.of_device(session, device_id)
        found = [asks.facts(row, now) for row in rows if row.device == device_id]
    if as_json:
        emit(found)
    elif ident:
        for facts in found:
            _say(facts)
    else:
        cells = [
            (f["id"], stamp(f["asked_at"]), f["verb"], f["asked_by"], f["state"], stamp(f["answered_at"]), f["code"])
            for f in found
        ]
        table("Asked", ("id", "asked", "verb", "by", "state", "answered", "code"), cells)


def _say(facts: dict[str, Any]) -> None:
    if facts["code"]:
        say(f"{facts['device']} will not: {facts['code']}: {facts['detail']}")
    elif facts["answered_at"]:
        click.echo(json.dumps(facts["answer"], indent=2, ensure_ascii=False))
    else:
        until = stamp(facts["expires_at"])
        say(f"{facts['device']} has not answered yet ({facts['state']}); it may hear it until {until}.")
        say(f"See `lightship device asked {facts['device']} --id {facts['id']}`.")
