"""Couriers: at least once, in order, never for ever, and through the death of the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import select
from tests.control_plane.alerting.receivers import Posts, certificate, hooked, posts
from tests.control_plane.things import add_device, until

from lightship.alerting.channels import set_up
from lightship.alerting.courier import GIVE_UP_MS, Courier
from lightship.alerting.evaluate import Evaluator
from lightship.alerting.office import AlertOffice
from lightship.alerting.payload import Message, Told
from lightship.fleet.reconciler import Reconciler
from lightship.home import Home
from lightship.settings import Settings
from lightship.storage.audit import now_ms
from lightship.storage.models import AlertMessage, Device
from lightship_agent.contract.codes import AlertError

DAYS = 86_400_000


class Recorder:
    """A channel that takes messages, or says why not."""

    name = "webhook"
    batch = 1
    refresh_seconds = 0.0

    def __init__(self, *refusals: str) -> None:
        self.refusals = list(refusals)
        self.taken: list[str] = []
        self.tried = 0

    def send(self, messages: Sequence[Message]) -> None:
        self.tried += 1
        if self.refusals and (code := self.refusals.pop(0)):
            raise AlertError(code, "No.")
        self.taken += [m.id for m in messages]

    def refresh(self, alerts: Sequence[Told], now: int) -> None:
        raise AssertionError


def wrong(home: Home, *devices: str) -> None:
    for device in devices:
        add_device(home, device, cloned_at=5, cert_not_after=now_ms() + 96 * 3_600_000)


def right(home: Home, device: str) -> None:
    with home.database.write() as session:
        session.get_one(Device, device).cloned_at = 0


def look(home: Home, settings: Settings, times: int = 2) -> None:
    evaluator = Evaluator(home, settings, ["webhook"], 0)
    for i in range(times):
        evaluator.look(now_ms() + i)


def rows(home: Home) -> list[AlertMessage]:
    with home.database.read() as session:
        return list(session.scalars(select(AlertMessage).order_by(AlertMessage.created_at, AlertMessage.id)))


def make_due(home: Home, *, older: int = 0) -> None:
    """As if the pause were over."""
    with home.database.write() as session:
        for row in session.scalars(select(AlertMessage)):
            row.due_at = 0
            row.created_at -= older


def settings_of(home: Home, tmp_path: Path, url: str = "https://127.0.0.1:1/") -> Settings:
    return hooked(home, url, tmp_path / "s")


def test_what_was_taken_is_noted_and_not_sent_again(home: Home, tmp_path: Path) -> None:
    wrong(home, "a", "b")
    look(home, settings_of(home, tmp_path))
    channel = Recorder()
    courier = Courier(home.database, channel, 1)
    assert (courier.round(), courier.round()) == (2, 0)

    assert sorted(channel.taken) == sorted(r.id for r in rows(home))
    assert {(r.state, r.attempts, r.code) for r in rows(home)} == {("sent", 1, "")}


def test_what_was_refused_keeps_its_code_and_is_tried_again_after_a_pause(home: Home, tmp_path: Path) -> None:
    wrong(home, "a")
    look(home, settings_of(home, tmp_path))
    channel = Recorder("alert.status", "alert.slow")
    courier = Courier(home.database, channel, 1, draw=lambda: 0.5)
    before = now_ms()
    assert (courier.round(), courier.round(), channel.tried) == (0, 0, 1)  # the pause is not over
    (row,) = rows(home)
    assert (row.state, row.code, row.detail, row.attempts) == ("queued", "alert.status", "No.", 1)
    assert 1_500 < row.due_at - before < 4_000
    for expected in (0, 1):
        make_due(home)
        assert courier.round() == expected

    (row,) = rows(home)
    assert (row.state, row.code, row.attempts, channel.taken) == ("sent", "", 3, [row.id])


def test_the_end_of_an_alert_waits_for_its_beginning(home: Home, tmp_path: Path) -> None:
    wrong(home, "a")
    settings = settings_of(home, tmp_path)
    look(home, settings)
    channel = Recorder("alert.slow")
    courier = Courier(home.database, channel, 1, draw=lambda: 0.99)
    courier.round()
    right(home, "a")
    look(home, settings)
    assert courier.round() == 0
    make_due(home)
    assert courier.round() == 2

    assert [i[-2:] for i in channel.taken] == [".1", ".2"]


def test_one_failure_ends_the_round(home: Home, tmp_path: Path) -> None:
    wrong(home, *"abcd")
    look(home, settings_of(home, tmp_path))
    channel = Recorder(*["alert.unreachable"] * 9)
    assert Courier(home.database, channel, 1).round() == 0
    assert channel.tried == 1


def test_what_nobody_took_for_three_days_is_given_up_and_holds_nothing_up(home: Home, tmp_path: Path) -> None:
    wrong(home, "a")
    settings = settings_of(home, tmp_path)
    look(home, settings)
    right(home, "a")
    look(home, settings)
    make_due(home, older=GIVE_UP_MS + 1)
    channel = Recorder("alert.login")
    courier = Courier(home.database, channel, 1)
    courier.round()
    make_due(home)
    courier.round()

    first, second = sorted(rows(home), key=lambda r: r.number)
    assert (first.state, first.code, "alert.login" in first.detail) == ("given-up", "alert.given-up", True)
    assert (second.state, channel.taken) == ("sent", [second.id])


def test_two_couriers_do_not_send_the_same_message(home: Home, tmp_path: Path) -> None:
    wrong(home, "a")
    look(home, settings_of(home, tmp_path))
    one, other = Courier(home.database, Recorder(), 1), Courier(home.database, Recorder(), 1)
    claimed = one._claim()
    assert (len(claimed), other.round()) == (1, 0)


def test_a_fault_of_the_channel_itself_stops_nobody(home: Home, tmp_path: Path) -> None:
    wrong(home, "a")
    look(home, settings_of(home, tmp_path))

    class Broken(Recorder):
        def send(self, messages: Sequence[Message]) -> None:
            raise ZeroDivisionError

    assert Courier(home.database, Broken(), 1).round() == 0
    assert [r.code for r in rows(home)] == ["alert.protocol"]


def test_a_receiver_that_hangs_keeps_the_reconciler_waiting_for_nothing(home: Home, tmp_path: Path) -> None:
    wrong(home, "a")
    with posts(tmp_path / "posts", certificate(home, tmp_path / "tls")) as receiver:
        receiver.mood("hang")
        settings = hooked(home, receiver.url, tmp_path / "s", alert_timeout_seconds=14)
        office = AlertOffice(home, settings)
        office.start()
        reconciler = Reconciler(home, settings, lambda _: None, look=office.tick)
        try:
            reconciler.tick()
            until(lambda: receiver.got)
            took = []
            for _ in range(3):
                began = time.monotonic()
                assert reconciler.tick()
                took.append(time.monotonic() - began)
            assert max(took) < 10
        finally:
            receiver.mood("204")
            office.stop()


def test_a_receiver_that_comes_back_gets_all_of_it(home: Home, tmp_path: Path) -> None:
    wrong(home, "a", "b", "c")
    with posts(tmp_path / "posts", certificate(home, tmp_path / "tls")) as receiver:
        receiver.mood("500")
        settings = hooked(home, receiver.url, tmp_path / "s")
        look(home, settings)
        (channel,) = set_up(settings)
        courier = Courier(home.database, channel, 1)
        courier.round()
        receiver.mood("204")
        make_due(home)
        assert courier.round() == 3
        taken = [m["id"] for m in receiver.messages[1:]]

    assert sorted(taken) == sorted(r.id for r in rows(home))


def run_up(home: Path, folder: Path, settings: Settings, fail_point: str = "") -> subprocess.Popen[bytes]:
    """`lightship up`, as a process that may die where it is told to."""
    ready = folder / "ready"
    ready.unlink(missing_ok=True)
    flags = {
        "ready-file": str(ready),
        "broker": "none", "api-port": "0", "device-port": "0", "history": "off",
        "reconcile-seconds": "0.1", "alert-seconds": "0.1", "alert-group-seconds": "0", "alert-clear-seconds": "0",
        "alert-timeout-seconds": "4", "alert-ca": settings.alert_ca,
        "alert-webhook-url": settings.alert_webhook_url, "alert-webhook-secret": settings.alert_webhook_secret,
    }  # fmt: skip
    command = [sys.executable, "-m", "lightship", "--home", str(home), "up"]
    command += [word for name, value in flags.items() for word in (f"--{name}", value)]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, env={**os.environ, "LIGHTSHIP_FAIL_POINT": fail_point}, stderr=log, stdout=log)


@pytest.mark.slow
@pytest.mark.parametrize(("point", "times"), [("alerting(webhook)", 1), ("alerted(webhook)", 2)])
def test_killed_between_storing_and_sending_nothing_is_lost_and_what_is_repeated_has_the_same_id(
    home: Home, tmp_path: Path, point: str, times: int
) -> None:
    wrong(home, "a")
    with posts(tmp_path / "posts", certificate(home, tmp_path / "tls")) as receiver:
        settings = hooked(home, receiver.url, tmp_path / "s")
        first = run_up(home.path, tmp_path, settings, point)
        assert first.wait(timeout=60) == -signal.SIGKILL
        assert len(receiver.got) == times - 1
        assert [(r.state, r.attempts) for r in rows(home)] == [("queued", 1)]

        second = run_up(home.path, tmp_path, settings)
        try:
            until(lambda: [r.state for r in rows(home)] == ["sent"], 120)
            right(home, "a")
            until(lambda: [r.state for r in rows(home)] == ["sent", "sent"], 120)
        finally:
            second.send_signal(signal.SIGTERM)
            second.wait(timeout=60)
        assert heard(receiver) == [*[("open", 1)] * times, ("resolve", 2)]
        third = run_up(home.path, tmp_path, settings)
        try:
            until((tmp_path / "ready").exists, 180)
            time.sleep(2)  # some twenty looks
        finally:
            third.send_signal(signal.SIGTERM)
            assert third.wait(timeout=60) == 0
        assert len(receiver.got) == times + 1  # a restart says nothing again


def heard(receiver: Posts) -> list[tuple[str, int]]:
    """Events in the order in which they came, with the number of the notice."""
    ids = [g["headers"]["webhook-id"] for g in receiver.got]
    assert [m["id"] for m in receiver.messages] == ids
    return [(m["event"], int(m["id"].split(".")[1])) for m in receiver.messages]
