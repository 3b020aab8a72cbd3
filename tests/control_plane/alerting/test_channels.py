"""Channels against real receivers: what they take, and every way in which they fail has its code."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.control_plane.alerting.receivers import (
    SECRET,
    Letters,
    Posts,
    certificate,
    hooked,
    letters,
    mailed,
    posts,
    secret_file,
)
from tests.control_plane.things import settings_for

from lightship.alerting import signature
from lightship.alerting.channels import named, set_up
from lightship.alerting.payload import Message, Told, trial
from lightship.alerting.post import Deadline
from lightship.home import Home
from lightship_agent.contract.codes import AlertError, LightshipError, SettingsError

TRIAL = trial(1_800_000_000_000, "production", "default", "1")


def about(sentence: str, number: int = 1, event: str = "open") -> Message:
    alert = Told(
        id="1f2e", kind="silent", severity="critical", worst="critical", sentence=sentence, count=2, grouped=True,
        devices=("a", "b"), groups=("pumps",), opened_at=1_800_000_000_000, resolved_at=0, acknowledged_by="",
    )  # fmt: skip
    return Message(
        id=f"1f2e.{number}", event=event, at=1_800_000_000_000, environment="prod", tenant="default", alert=alert
    )


@pytest.fixture
def receiver(home: Home, tmp_path: Path) -> Iterator[Posts]:
    with posts(tmp_path / "posts", certificate(home, tmp_path / "tls")) as got:
        yield got


@pytest.fixture
def inbox(home: Home, tmp_path: Path) -> Iterator[Letters]:
    with letters(tmp_path / "letters", "starttls", certificate(home, tmp_path / "tls")) as got:
        yield got


def refusal(home: Home, settings: Any, name: str, *messages: Message) -> LightshipError:
    """How sending fails, which says nothing of the secret."""
    with pytest.raises(AlertError) as e:
        named(settings, name).send(messages or [TRIAL])
    assert SECRET not in str(e.value)
    assert "right" not in str(e.value)
    return e.value


def test_a_webhook_is_signed_over_its_id_its_time_and_its_body(home: Home, receiver: Posts, tmp_path: Path) -> None:
    named(hooked(home, receiver.url, tmp_path / "s"), "webhook").send([about("Gone."), about("Back.", 2, "resolve")])

    first, second = receiver.got
    assert first["path"] == "/hook?a=b"
    assert first["headers"]["content-type"] == "application/json"
    assert [g["headers"]["webhook-id"] for g in (first, second)] == ["1f2e.1", "1f2e.2"]
    for got in (first, second):
        body = got["body"].encode()
        assert signature.is_genuine(SECRET.encode(), got["headers"], body, int(time.time()))
        assert not signature.is_genuine(b"another", got["headers"], body, int(time.time()))
        assert not signature.is_genuine(SECRET.encode(), got["headers"], body, int(time.time()) + 301)
    assert receiver.messages[0] == {
        "id": "1f2e.1", "event": "open", "at": 1_800_000_000_000, "environment": "prod", "tenant": "default",
        "alert": {
            "id": "1f2e", "kind": "silent", "severity": "critical", "worst": "critical", "sentence": "Gone.",
            "count": 2, "grouped": True, "devices": ["a", "b"], "groups": ["pumps"], "opened_at": 1_800_000_000_000,
            "resolved_at": 0, "acknowledged_by": "",
        },
    }  # fmt: skip


def test_a_secret_that_was_changed_signs_the_next_message(home: Home, receiver: Posts, tmp_path: Path) -> None:
    channel = named(hooked(home, receiver.url, tmp_path / "s"), "webhook")
    secret_file(tmp_path / "s", "another one")
    channel.send([TRIAL])

    (got,) = receiver.got
    assert signature.is_genuine(b"another one", got["headers"], got["body"].encode(), int(time.time()))


@pytest.mark.parametrize("mood", ["500", "404", "301", "401", "100"])
def test_a_receiver_that_answers_otherwise_is_named_with_its_status(
    home: Home, receiver: Posts, tmp_path: Path, mood: str
) -> None:
    receiver.mood(mood)
    e = refusal(home, hooked(home, receiver.url, tmp_path / "s"), "webhook")
    assert e.code == ("alert.status" if mood != "100" else "alert.unreachable")
    assert len(receiver.got) == 1  # no redirect was followed


@pytest.mark.parametrize("mood", ["hang", "drip"])
def test_a_receiver_that_is_slow_or_drips_is_left_in_time(
    home: Home, receiver: Posts, tmp_path: Path, mood: str
) -> None:
    receiver.mood(mood)
    settings = hooked(home, receiver.url, tmp_path / "s", alert_timeout_seconds=1)
    began = time.monotonic()
    assert refusal(home, settings, "webhook").code == "alert.slow"
    assert time.monotonic() - began < 30  # either would go on for a minute and more


def test_a_receiver_that_is_not_there_is_unreachable(home: Home, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{s.getsockname()[1]}/"
        assert refusal(home, hooked(home, url, tmp_path / "s"), "webhook").code == "alert.unreachable"
    settings = hooked(home, "https://no-such-host.invalid/", tmp_path / "s")
    assert refusal(home, settings, "webhook").code == "alert.unreachable"


def test_a_certificate_of_nobody_we_know_is_refused_and_nothing_is_sent(
    home: Home, receiver: Posts, tmp_path: Path
) -> None:
    e = refusal(home, hooked(home, receiver.url, tmp_path / "s", alert_ca=""), "webhook")
    assert (e.code, receiver.got) == ("alert.certificate", [])


def test_a_certificate_for_another_name_is_refused_and_nothing_is_sent(home: Home, tmp_path: Path) -> None:
    with posts(tmp_path / "posts", certificate(home, tmp_path / "tls", "elsewhere.test")) as receiver:
        e = refusal(home, hooked(home, receiver.url, tmp_path / "s"), "webhook")
    assert (e.code, receiver.got) == ("alert.certificate", [])


def test_what_speaks_no_tls_is_named(home: Home, tmp_path: Path) -> None:
    with posts(tmp_path / "posts") as receiver:
        url = receiver.url.replace("http:", "https:")
        e = refusal(home, hooked(home, url, tmp_path / "s"), "webhook")
    assert (e.code, receiver.got) == ("alert.protocol", [])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"alert_webhook_url": "http://hooks.example.org/"}, "https://"),
        ({"alert_webhook_url": "ftp://127.0.0.1/"}, "https://HOST"),
        ({"alert_webhook_url": "https://ann:pw@127.0.0.1/"}, "without user"),
        ({"alert_webhook_url": "https://127.0.0.1:99999/"}, "https://HOST"),
        ({"alert_webhook_secret": ""}, "alert_webhook_secret"),
        ({"alert_ca": "/dev/null"}, "alert_ca"),
        ({"alert_ca": "/nowhere.pem"}, "alert_ca"),
        ({"alert_mail_server": "mail.example.org"}, "alert_mail_from"),
        ({"alert_mail_server": "mail.example.org", "alert_mail_from": "a@b.c", "alert_mail_to": "d@e.f"}, "HOST:PORT"),
        ({"alert_mail_server": "h:25", "alert_mail_from": "a@b", "alert_mail_to": "x, ;"}, "alert_mail_to"),
        ({"alert_mail_server": "h:25", "alert_mail_from": "a\nb@c", "alert_mail_to": "x@y"}, "alert_mail_from"),
        (
            {"alert_mail_server": "h:25", "alert_mail_from": "a@b", "alert_mail_to": "x@y", "alert_mail_tls": "none"},
            "alert_mail_tls",
        ),
        ({"alert_alertmanager_url": "http://am:9093", "alert_alertmanager_token": "/x"}, "alert_alertmanager_url"),
    ],
)
def test_a_channel_that_can_not_work_is_refused_by_the_name_of_its_setting(
    home: Home, tmp_path: Path, flags: dict[str, str], says: str
) -> None:
    with pytest.raises(SettingsError) as e:
        set_up(hooked(home, "https://127.0.0.1:1/", tmp_path / "s", **flags))
    assert e.value.code == "settings.invalid"
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [(SECRET, 0o640, "0640"), ("", 0o600, "one line"), ("a\nb", 0o600, "one line"), ("whsec_*", 0o600, "base64")],
)
def test_a_secret_that_is_none_or_that_others_may_read_is_refused(
    home: Home, tmp_path: Path, content: str, mode: int, says: str
) -> None:
    settings = hooked(home, "https://127.0.0.1:1/", tmp_path / "s")
    secret_file(tmp_path / "s", content, mode)
    with pytest.raises(AlertError) as e:
        set_up(settings)
    assert e.value.code == "alert.secret"
    assert says in str(e.value)
    assert not content or content not in str(e.value)


def test_a_letter_goes_over_starttls_to_all_recipients(home: Home, inbox: Letters, tmp_path: Path) -> None:
    named(mailed(home, inbox.server, tmp_path / "s"), "mail").send([about("2 devices are silent: a, b.")])

    (letter,) = inbox.got
    assert letter["X-Was"] == "tls"
    assert letter["Subject"] == "[prod] critical: 2 devices are silent: a, b."
    assert letter["To"] == "ann@example.org, bob@example.org"
    assert letter["Auto-Submitted"] == "auto-generated"
    assert letter["References"] == "<1f2e@example.org>"
    assert "lightship alert show 1f2e" in letter.get_content()


def test_many_messages_are_one_letter_and_the_same_ones_the_same_letter(
    home: Home, inbox: Letters, tmp_path: Path
) -> None:
    channel = named(mailed(home, inbox.server, tmp_path / "s"), "mail")
    many = [about(f"Number {i}.", i) for i in range(1, 4)]
    for _ in range(2):
        channel.send(many)

    first, again = inbox.got
    assert first["Message-ID"] == again["Message-ID"]
    assert first["Subject"] == "[prod] critical: Number 1. and 2 more"
    assert all(f"Number {i}." in first.get_content() for i in range(1, 4))


def test_what_a_device_calls_itself_makes_no_header(home: Home, inbox: Letters, tmp_path: Path) -> None:
    named(mailed(home, inbox.server, tmp_path / "s"), "mail").send([about("x\r\nBcc: eve@example.org\x1b[2J")])

    (letter,) = inbox.got
    assert letter["Bcc"] is None
    assert "\x1b" not in letter["Subject"]


def test_a_mail_server_that_speaks_tls_from_the_start(home: Home, tmp_path: Path) -> None:
    with letters(tmp_path / "letters", "tls", certificate(home, tmp_path / "tls")) as inbox:
        named(mailed(home, inbox.server, tmp_path / "s", alert_mail_tls="tls"), "mail").send([TRIAL])
        assert [m["Subject"] for m in inbox.got] == ["[production] test: This is a test of the alert channel."]


def test_a_wrong_password_is_named_and_not_shown(home: Home, inbox: Letters, tmp_path: Path) -> None:
    settings = mailed(home, inbox.server, tmp_path / "s")
    secret_file(tmp_path / "s", "wrong-one")
    e = refusal(home, settings, "mail")
    assert (e.code, inbox.got) == ("alert.login", [])
    assert "wrong-one" not in str(e)
    assert "535" in str(e)


def test_a_password_goes_nowhere_without_tls(home: Home, tmp_path: Path) -> None:
    with letters(tmp_path / "letters", "plain") as inbox:
        e = refusal(home, mailed(home, inbox.server, tmp_path / "s"), "mail")
        assert (e.code, inbox.got) == ("alert.protocol", [])


def test_a_mail_server_with_a_certificate_of_nobody_we_know_gets_no_password(
    home: Home, inbox: Letters, tmp_path: Path
) -> None:
    e = refusal(home, mailed(home, inbox.server, tmp_path / "s", alert_ca=""), "mail")
    assert (e.code, inbox.got) == ("alert.certificate", [])


def test_a_letter_that_nobody_may_have_is_refused(home: Home, inbox: Letters, tmp_path: Path) -> None:
    e = refusal(home, mailed(home, inbox.server, tmp_path / "s", alert_mail_to="nobody@example.org"), "mail")
    assert (e.code, inbox.got) == ("alert.refused", [])


def test_a_letter_that_somebody_has_is_taken_and_who_was_refused_is_logged(
    home: Home, inbox: Letters, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    to = "ann@example.org, nobody@example.org"
    named(mailed(home, inbox.server, tmp_path / "s", alert_mail_to=to), "mail").send([TRIAL])

    assert len(inbox.got) == 1
    assert "alert.refused" in caplog.text
    assert "1 of 2 recipients" in caplog.text


def test_a_mail_server_that_says_nothing_is_slow_and_one_that_is_none_speaks_otherwise(
    home: Home, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        assert refusal(home, mailed(home, where, tmp_path / "s", alert_timeout_seconds=1), "mail").code == "alert.slow"
    with posts(tmp_path / "posts") as web:
        where = web.url.split("/")[2]
        e = refusal(home, mailed(home, where, tmp_path / "s", alert_timeout_seconds=2), "mail")
        assert e.code in ("alert.slow", "alert.protocol")


def test_a_mail_server_that_says_nothing_is_slow_whichever_clock_strikes_first(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Deadline, "_end", lambda _: None)  # a busy machine wakes our timer after the socket's
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        assert refusal(home, mailed(home, where, tmp_path / "s", alert_timeout_seconds=1), "mail").code == "alert.slow"


def test_a_channel_that_is_not_set_up_is_unknown(home: Home) -> None:
    with pytest.raises(AlertError) as e:
        named(settings_for(home.path), "webhook")
    assert e.value.code == "alert.unknown"
