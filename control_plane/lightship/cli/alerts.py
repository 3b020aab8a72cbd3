"""CLI: alerts, what people are told of: list, show, mute, acknowledge, test a channel."""

from __future__ import annotations

import re
import secrets
from typing import Any, Final

import click

from lightship.home import Home, operator
from lightship.settings import Settings
from lightship.storage.audit import now_ms
from lightship_agent.contract.codes import AlertError

from .console import emit, json_option, opened, say, stamp, table, with_home

_UNITS: Final = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}


@click.group()
def alert() -> None:
    """What people are told of, and over which channel."""


@alert.command("list")
@click.option("--all", "everything", is_flag=True, help="Those that are over, too.")
@json_option
@with_home
def list_(home: Home, everything: bool, as_json: bool) -> None:
    """Open alerts, the mutes, and channels that take nothing."""
    from lightship.alerting import views

    with home.database.read() as session:
        seen = views.listing(session, now_ms(), everything=everything)
    if as_json:
        emit(seen)
        return
    cells = [
        (a["id"], a["severity"], a["kind"], stamp(a["opened_at"]), stamp(a["resolved_at"]), _state(a), a["sentence"])
        for a in seen["alerts"]
    ]
    table("Alerts", ("id", "severity", "kind", "since", "until", "", "says"), cells)
    if seen["mutes"]:
        rows = [(m["id"], m["what"], stamp(m["until"]), m["by"], m["reason"]) for m in seen["mutes"]]
        table("Mutes", ("id", "what", "until", "by", "because"), rows)
    for trouble in seen["troubles"]:
        say(f"{trouble['channel']}: {trouble['waiting']} waiting [{trouble['code']}] {trouble['detail']}")


@alert.command()
@click.argument("which", metavar="ALERT")
@json_option
@with_home
def show(home: Home, which: str, as_json: bool) -> None:
    """One alert: what is in it, and what was sent of it, when and to whom."""
    from lightship.alerting import views

    with home.database.read() as session:
        seen = views.detail(session, which, now_ms())
    if as_json:
        emit(seen)
        return
    say(f"{seen['severity']}: {seen['sentence']}")
    say(f"{seen['kind']}, {seen['status']} {_state(seen)}, since {stamp(seen['opened_at'])}")
    members = [(m["subject"], m["group"], "gone" if m["gone"] else "there") for m in seen["members"]]
    table("Of", ("what", "group", "is"), members)
    messages = [
        (m["id"], m["channel"], m["event"], m["state"], stamp(m["sent_at"]), m["attempts"], m["code"], m["detail"])
        for m in seen["messages"]
    ]
    table("Messages", ("id", "channel", "event", "state", "sent", "attempts", "code", "detail"), messages)


@alert.command()
@click.argument("what")
@click.option("--for", "duration", required=True, help="How long: 30m, 2h, 7d; at most 31d.")
@click.option("--reason", required=True, help="Why; it is audited.")
@json_option
@with_home
def mute(home: Home, what: str, duration: str, reason: str, as_json: bool) -> None:
    """Hold back what fits: a kind, `device:…`, `group:…`, `alert:…`, patterns, several with commas.

    What is still open at the end is told then.
    """
    from lightship.alerting import store

    now = now_ms()
    with home.database.write() as session:
        row = store.mute(session, what, until=now + _milliseconds(duration), actor=operator(), reason=reason, now=now)
        seen = {"id": row.id, "what": row.what, "until": row.until, "reason": row.reason}
    if as_json:
        emit(seen)
    else:
        say(f"Muted {seen['what']} until {stamp(row.until)}; to end it: lightship alert unmute {row.id} --reason …")


@alert.command()
@click.argument("which", metavar="MUTE")
@click.option("--reason", required=True, help="Why; it is audited.")
@json_option
@with_home
def unmute(home: Home, which: str, reason: str, as_json: bool) -> None:
    """End a mute now."""
    from lightship.alerting import store

    with home.database.write() as session:
        store.unmute(session, which, actor=operator(), reason=reason, now=now_ms())
    if as_json:
        emit({"id": which, "ended": True})
    else:
        say(f"The mute {which} is over.")


@alert.command()
@click.argument("which", metavar="ALERT")
@click.option("--reason", default="", help="What you do about it; it is audited.")
@json_option
@with_home
def ack(home: Home, which: str, reason: str, as_json: bool) -> None:
    """You look after it: no reminders, unless it gets worse."""
    from lightship.alerting import store

    with home.database.write() as session:
        found = store.acknowledge(session, which, actor=operator(), reason=reason, now=now_ms())
    if as_json:
        emit({"id": found.id, "acknowledged_by": found.acked_by})
    else:
        say(f"Acknowledged: {found.sentence}")


@alert.command()
@click.argument("channel")
@json_option
@click.pass_obj
def test(settings: Settings, channel: str, as_json: bool) -> None:
    """Send a test over a channel now: webhook, mail or alertmanager, as settings.toml or the environment says."""
    from lightship.alerting import channels, payload
    from lightship.storage import audit

    with opened(settings) as home:
        chosen = channels.named(settings, channel)
        message = payload.trial(now_ms(), settings.environment, settings.tenant, secrets.token_hex(6))
        with home.database.write() as session:
            audit.append(session, actor=operator(), verb="alert.test", subject=channel, detail={"id": message.id})
        chosen.send([message])
    if as_json:
        emit({"channel": channel, "id": message.id, "sent": True})
    else:
        say(f"The {channel} has taken {message.id}.")


def _state(seen: dict[str, Any]) -> str:
    if seen["status"] == "resolved":
        return "over"
    said = ["muted"] if seen["muted"] else []
    if seen["acknowledged_by"]:
        said.append(f"acknowledged by {seen['acknowledged_by']}")
    return ", ".join(said)


def _milliseconds(text: str) -> int:
    match = re.fullmatch(r"(\d{1,6})([mhd])", text.strip())
    if match is None:
        message = f"--for: expected a duration like 30m, 2h or 7d, found {text!r}."
        raise AlertError("alert.mute", message)
    return int(match[1]) * _UNITS[match[2]]
