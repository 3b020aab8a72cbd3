"""`lightship alert`: what it shows, what it refuses, and that no secret is in either."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import select
from tests.control_plane.alerting.receivers import SECRET, certificate, hooked, posts
from tests.control_plane.alerting.test_courier import look, wrong

from lightship.alerting import signature
from lightship.cli import cli
from lightship.cli.root import main
from lightship.home import Home
from lightship.settings import Settings
from lightship.storage.models import AlertMute, AuditEvent


def run(home: Home, *words: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(cli, ["--home", str(home.path), "alert", *words], catch_exceptions=True)


def environment(settings: Settings) -> dict[str, str]:
    names = ("alert_webhook_url", "alert_webhook_secret", "alert_ca", "alert_timeout_seconds")
    return {f"LIGHTSHIP_{n.upper()}": str(getattr(settings, n)) for n in names}


def as_json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_alert_is_listed_shown_and_acknowledged(home: Home, tmp_path: Path) -> None:
    wrong(home, "press-1")
    look(home, hooked(home, "https://127.0.0.1:1/", tmp_path / "s"))
    (alert,) = as_json(run(home, "list", "--json"))["alerts"]
    assert (alert["severity"], alert["status"], alert["devices"]) == ("critical", "open", ["press-1"])
    assert "press-1 is in use twice" in run(home, "list").stdout

    as_json(run(home, "ack", alert["id"], "--reason", "On my way.", "--json"))
    shown = as_json(run(home, "show", alert["id"], "--json"))
    assert (shown["acknowledged_by"][:5], shown["acknowledged_because"]) == ("user:", "On my way.")
    assert [(m["channel"], m["event"], m["state"]) for m in shown["messages"]] == [("webhook", "open", "queued")]
    assert "queued" in run(home, "show", alert["id"]).stdout


def test_a_mute_is_listed_until_it_is_taken_back(home: Home) -> None:
    mute = as_json(run(home, "mute", "group:pumps", "--for", "90m", "--reason", "New floor.", "--json"))
    assert [m["what"] for m in as_json(run(home, "list", "--json"))["mutes"]] == ["group:pumps"]
    as_json(run(home, "unmute", mute["id"], "--reason", "Done.", "--json"))
    assert as_json(run(home, "list", "--json"))["mutes"] == []


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (("mute", "silent", "--for", "soon", "--reason", "r"), 31, "alert.mute"),
        (("mute", "silent", "--for", "99d", "--reason", "r"), 31, "alert.mute"),
        (("mute", "silent", "--for", "2h"), 2, ""),
        (("mute", "silent", "--reason", "r"), 2, ""),
        (("ack", "nothing"), 31, "alert.unknown"),
        (("show", "nothing"), 31, "alert.unknown"),
        (("unmute", "nothing", "--reason", "r"), 31, "alert.unknown"),
        (("test", "webhook"), 31, "alert.unknown"),
    ],
)
def test_what_can_not_be_done_has_a_code_and_leaves_nothing(
    home: Home, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], status: int, code: str
) -> None:
    with home.database.read() as session:
        before = len(session.scalars(select(AuditEvent)).all())
    with pytest.raises(SystemExit) as e:
        main(["--home", str(home.path), "alert", *words])

    assert e.value.code == status
    assert code in capsys.readouterr().err
    with home.database.read() as session:
        assert session.scalars(select(AlertMute)).all() == []
        assert len(session.scalars(select(AuditEvent)).all()) == before


def test_a_test_message_arrives_signed_is_audited_and_says_no_secret(home: Home, tmp_path: Path) -> None:
    with posts(tmp_path / "posts", certificate(home, tmp_path / "tls")) as receiver:
        env = environment(hooked(home, receiver.url, tmp_path / "s"))
        done = run(home, "test", "webhook", "--json", env=env)
        (got,) = receiver.got

    assert as_json(done)["id"] == got["headers"]["webhook-id"]
    body = got["body"].encode()
    assert json.loads(body)["event"] == "test"
    assert signature.is_genuine(SECRET.encode(), got["headers"], body, int(got["headers"]["webhook-timestamp"]))
    with home.database.read() as session:
        event = session.scalars(select(AuditEvent).order_by(AuditEvent.seq.desc()).limit(1)).one()
    assert (event.verb, event.subject) == ("alert.test", "webhook")
    assert SECRET not in done.output + str(event.detail) + body.decode()


def test_a_receiver_that_fails_the_test_is_named_by_code(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with posts(tmp_path / "posts", certificate(home, tmp_path / "tls")) as receiver:
        receiver.mood("503")
        for name, value in environment(hooked(home, receiver.url, tmp_path / "s")).items():
            monkeypatch.setitem(os.environ, name, value)
        with pytest.raises(SystemExit) as e:
            main(["--home", str(home.path), "alert", "test", "webhook", "--json"])
    assert e.value.code == 31
    assert json.loads(capsys.readouterr().err)["code"] == "alert.status"
