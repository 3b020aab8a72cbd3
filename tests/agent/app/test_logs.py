"""A line is one JSON object with fields that keep their names; no secret leaves with a snapshot."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import LinkError
from lightship_agent.logs import FIELDS, JsonLines, RecentLines, redacted
from lightship_agent.settings import load_settings
from lightship_agent.snapshot import snapshot_of


def line(message: str, *arguments: object, **more: object) -> dict[str, object]:
    record = logging.LogRecord("lightship_agent.app", logging.WARNING, __file__, 1, message, arguments, None)
    for name, value in more.items():
        setattr(record, name, value)
    said: dict[str, object] = json.loads(JsonLines("lightship-agent", "press-1").format(record))
    return said


@given(st.text())
def test_an_event_is_one_line_whatever_is_in_it(message: str) -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "%s", (message,), None)
    text = JsonLines("lightship").format(record)

    assert "\n" not in text
    assert json.loads(text)["message"] == message


def test_a_line_says_who_what_and_the_code() -> None:
    said = line("report: %s: %s", "link.unreachable", "no route")

    assert set(said) <= set(FIELDS)
    assert (said["code"], said["device"], said["level"]) == ("link.unreachable", "press-1", "warning")
    assert str(said["ts"]).endswith("Z")
    assert line("x", code="storage.full", device="other")["code"] == "storage.full"
    assert line("x", device="other")["device"] == "other"
    assert "code" not in line("serving on example.org")


def test_an_errors_traceback_and_its_code_are_in_the_same_line() -> None:
    try:
        raise LinkError("link.slow", "too slow")
    except LinkError as e:
        said = line("it failed", exc_info=(type(e), e, e.__traceback__))

    assert said["code"] == "link.slow"
    assert "Traceback" in str(said["error"])


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("mqtts://ann:hunter2@broker:8883/x", "mqtts://…@broker:8883/x"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer …"),
        ("password=hunter2, next", "password=…, next"),
        (f"token is T1.s-3_cret.{'a' * 64} here", "…"),
        ("-----BEGIN PRIVATE KEY-----\nMIG\n-----END PRIVATE KEY-----", "…"),
    ],
)
def test_what_may_be_a_secret_does_not_leave(text: str, left: str) -> None:
    said = redacted(text)

    assert left in said
    assert not any(secret in said for secret in ("hunter2", "abc.def", "s-3_cret", "MIG"))


def test_the_latest_lines_are_kept_within_bounds() -> None:
    recent = RecentLines(3)
    for n in range(5):
        recent.handle(logging.LogRecord("x", logging.INFO, __file__, 1, f"line {n} {'y' * 1_000}", None, None))

    lines = recent.lines()
    assert [text.partition("line ")[2][0] for text in lines] == ["2", "3", "4"]
    assert all(len(text) <= 500 for text in lines)


def test_a_snapshot_names_no_file_of_secrets_and_no_command(tmp_path: Path) -> None:
    given = {"state_dir": str(tmp_path), "http_token_file": "/etc/tokens", "veto_command": "/opt/veto --key=1"}
    settings = load_settings({}, given)

    said = snapshot_of({"link": {"server": "https://u:p@host"}, "list": ["Bearer x"]}, settings, ["a"])

    assert (said["settings"]["http_token_file"], said["settings"]["veto_command"]) == ("set", "set")
    assert (said["settings"]["http_key_file"], said["settings"]["poll_seconds"]) == ("", 900.0)
    assert said["status"] == {"link": {"server": "https://…@host"}, "list": ["Bearer …"]}
    json.dumps(said)
