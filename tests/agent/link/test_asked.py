"""What is asked of a device is done once, in its time, and answered; by MQTT or with a poll."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightship_agent.contract.codes import LinkError
from lightship_agent.contract.messages import Command, Reply
from lightship_agent.link.asked import FILE, Asked, LogLevel

NOW = 1_800_000_000


class Device:
    """The part of an agent that hears and answers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.reachable = folder, float(NOW), True
        self.done: list[str] = []
        self.answers: list[Reply] = []
        self.start()

    def start(self) -> None:
        self.asked = Asked(self.folder, {"snapshot": self._act}, self._deliver, lambda: self.now)

    def hear(self, ident: str = "a", *, expires: int = NOW + 60, verb: str = "snapshot") -> None:
        self.asked.hear(verb, Command(id=ident, expires=expires))
        self.asked.work()

    def _act(self, command: Command) -> dict[str, Any]:
        self.done.append(command.id)
        return {"well": True}

    def _deliver(self, reply: Reply) -> bool:
        if self.reachable:
            self.answers.append(reply)
        return self.reachable


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_a_command_is_done_and_answered_under_its_id(device: Device) -> None:
    device.hear("a")

    assert device.answers == [Reply(id="a", verb="snapshot", at=NOW * 1_000, body=b'{"well":true}')]


def test_a_command_that_comes_again_is_dropped_also_after_a_restart(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.hear("a")
    device.hear("a")
    device.start()
    device.hear("a")

    assert (device.done, len(device.answers)) == (["a"], 1)
    assert caplog.text.count("link.replayed-command") == 2


@pytest.mark.parametrize("expires", [0, NOW - 1, NOW, NOW + 86_401, 2**53])
def test_a_command_out_of_its_time_is_dropped_and_leaves_nothing(
    device: Device, expires: int, caplog: pytest.LogCaptureFixture
) -> None:
    device.hear("a", expires=expires)

    assert (device.done, device.answers, (device.folder / FILE).exists()) == ([], [], False)
    assert "link.expired-command" in caplog.text


def test_a_verb_that_nobody_knows_is_answered_with_a_code(device: Device) -> None:
    device.hear("a", verb="reboot")

    (answer,) = device.answers
    assert (answer.code, answer.body, device.done) == ("link.unknown-command", b"", [])


def test_an_answer_waits_until_it_can_be_handed_over(device: Device) -> None:
    device.reachable = False
    device.hear("a")
    device.hear("b")
    device.reachable = True
    device.asked.work()

    assert [answer.id for answer in device.answers] == ["a", "b"]
    assert device.done == ["a", "b"]


def test_a_server_that_can_not_be_reached_loses_no_answer(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_reply: Reply) -> bool:
        raise LinkError("link.unreachable", "no route")

    device.asked._deliver = unreachable
    with pytest.raises(LinkError):
        device.hear("a")
    device.asked._deliver = device._deliver
    device.asked.work()

    assert [answer.id for answer in device.answers] == ["a"]


def test_more_than_can_wait_is_dropped_and_not_kept(device: Device) -> None:
    heard = [device.asked.hear("snapshot", Command(id=f"n{i}", expires=NOW + 60)) for i in range(100)]
    device.asked.work()

    assert (sum(heard), len(device.done)) == (32, 32)


def test_what_is_remembered_is_bounded_and_forgotten_when_it_has_expired(device: Device) -> None:
    for i in range(520):
        device.hear(f"n{i}", expires=NOW + 60 + i)
    assert len(device.asked._read()) == 500

    device.now = NOW + 5_000.0
    device.hear("last", expires=NOW + 6_000)

    assert device.asked._read() == {"last": NOW + 6_000}


@pytest.fixture
def root_level() -> Iterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


@pytest.mark.usefixtures("root_level")
def test_the_log_is_at_another_level_for_a_while() -> None:
    root, now = logging.getLogger(), [0.0]
    root.setLevel(logging.INFO)
    level = LogLevel(lambda: now[0])

    said = level.change(Command(id="a", expires=1, level="debug", seconds=60))
    level.change(Command(id="b", expires=1, level="error", seconds=90))
    assert (said, root.level) == ({"level": "debug", "seconds": 60, "then": "info"}, logging.ERROR)

    now[0] = 89.0
    level.tick()
    assert root.level == logging.ERROR
    now[0] = 90.0
    level.tick()
    assert root.level == logging.INFO


@pytest.mark.usefixtures("root_level")
@pytest.mark.parametrize(("word", "seconds"), [("loud", 60), ("", 60), ("debug", 86_401)])
def test_a_level_that_is_none_changes_nothing(word: str, seconds: int) -> None:
    before = logging.getLogger().level

    with pytest.raises(Exception, match="Expected one of debug") as refused:
        LogLevel().change(Command(id="a", expires=1, level=word, seconds=seconds))

    assert (getattr(refused.value, "code", ""), logging.getLogger().level) == ("settings.invalid", before)
