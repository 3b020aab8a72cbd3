"""Reports as they are stored: `lightship telemetry tail`."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from tests.control_plane.mqtt import ear
from tests.control_plane.things import add_device, envelope, heartbeat, settings_for, until

from lightship.cli import cli, main
from lightship.fleet.broker import control_plane_context, start_broker
from lightship.home import Home
from lightship.integrations import mosquitto
from lightship.integrations.mosquitto import CONTROL_PLANE_USER
from lightship.monitoring.history import DAY_MS, History, Keep, Report, open_history
from lightship.monitoring.tail import REMEMBERED, Once, as_json, line
from lightship.storage.audit import now_ms
from lightship_agent.contract import topics
from lightship_agent.contract.messages import AnyRecord, Fault, PackedMoments, Update, Window, packed
from lightship_agent.contract.moments import Moments
from lightship_agent.contract.wire import encode, pack

EPOCH = "0123456789abcdef"
DIGEST = "a" * 64


def stored(record: AnyRecord, device: str = "pump-1", *, recv: int | None = None, approx: bool = False) -> Report:
    kind = str(record.__struct_config__.tag)
    return Report(device, record.t, EPOCH, record.s, recv or record.t, kind, approx, encode(record))


def fault(s: int, *, raised: bool = True, t: int | None = None) -> Fault:
    return Fault(
        s=s, t=t or now_ms(), model="pump", digest=DIGEST, schema=DIGEST, w=3, kind="stuck", feature="flow",
        raised=raised, rate=0.5,
    )  # fmt: skip


@pytest.fixture
def history(home: Home) -> Iterator[History]:
    opened = open_history(home.path, "")
    yield opened
    opened.close()


@pytest.fixture
def fleet(home: Home) -> Home:
    for device in ("pump-1", "pump-2"):
        add_device(home, device)
    add_device(home, "press-1", group="presses")
    return home


def run(home: Home, *words: str) -> Result:
    return CliRunner().invoke(cli, ["--home", str(home.path), "telemetry", "tail", *words], catch_exceptions=False)


class Tail:
    """The command as a process of its own."""

    def __init__(self, home: Home, *words: str, stdout: int = subprocess.PIPE) -> None:
        command = [sys.executable, "-m", "lightship", "--home", str(home.path), "telemetry", "tail", *words]
        self.process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)

    def says(self, lines: int) -> list[str]:
        assert self.process.stdout is not None
        return [self.process.stdout.readline().rstrip("\n") for _ in range(lines)]

    def interrupt(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


def test_what_was_reported_since_is_shown_in_the_order_in_which_it_came(fleet: Home, history: History) -> None:
    now = now_ms()
    history.write(
        [
            stored(heartbeat(2, t=now - 1_000), recv=now - 900),
            stored(heartbeat(1, t=now - 9_000), recv=now - 800),  # it waited on the device
            stored(heartbeat(7, t=now - 500), "pump-2", recv=now - 500),
            stored(heartbeat(7, t=now - 500), "press-1", recv=now - 500),
            stored(heartbeat(5, t=now - 7_200_000)),
        ]
    )
    shown = run(fleet, "pumps", "--since", "1h", "--no-follow", "--json").output.splitlines()
    assert [(r["device"], r["seq"]) for r in map(json.loads, shown)] == [("pump-1", 2), ("pump-1", 1), ("pump-2", 7)]
    words = run(fleet, "pump-1", "--since", "1h", "--no-follow").output.splitlines()
    assert len(words) == 2
    assert "pump@1 0 rows" in words[0]
    assert "(+8 s)" in words[1]


def test_without_a_backlog_only_what_comes_is_shown(fleet: Home, history: History) -> None:
    history.write([stored(heartbeat(1, t=now_ms() - 1_000))])
    assert run(fleet, "pump-1", "--no-follow").output == ""


def test_what_is_stored_is_shown_as_it_comes_also_of_yesterday_and_ends_cleanly(fleet: Home, history: History) -> None:
    now = now_ms()
    history.write([stored(heartbeat(1, t=now - 1_000))])
    tail = Tail(fleet, "pumps", "--since", "1h", "--json")
    first = tail.says(1)
    history.write([stored(heartbeat(2, t=now - DAY_MS)), stored(heartbeat(3, t=now), "pump-2")])
    history.write([stored(heartbeat(1, t=now), "press-1"), stored(heartbeat(4, t=now + 1), "pump-2")])
    shown = [json.loads(each) for each in first + tail.says(3)]
    assert [r["seq"] for r in shown] == [1, 2, 3, 4]
    assert shown[0]["record"]["running"][0]["model"] == "pump"
    assert tail.interrupt() == (0, "")


def test_a_reader_that_has_seen_enough_is_no_error(fleet: Home, history: History) -> None:
    history.write([stored(heartbeat(n, t=now_ms() - 60_000 + n)) for n in range(1, 3_000)])
    tail = Tail(fleet, "pump-1", "--since", "1h", "--json")
    tail.says(1)
    assert tail.process.stdout is not None
    tail.process.stdout.close()
    _, said = tail.process.communicate(timeout=120)
    assert tail.process.returncode == 0
    assert said == ""


def test_colours_are_for_terminals_only(fleet: Home, history: History) -> None:
    history.write([stored(fault(1))])
    words = ("pump-1", "--since", "1h", "--no-follow")
    ours, theirs = pty.openpty()
    shown = Tail(fleet, *words, stdout=theirs)
    shown.process.communicate(timeout=120)
    os.close(theirs)
    coloured = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "\x1b[31m" in coloured
    assert "flow of pump is stuck" in coloured
    assert "\x1b" not in run(fleet, *words).output


def test_whatever_a_device_says_it_moves_nobodys_cursor(fleet: Home, history: History) -> None:
    detail = "\x1b[2J\x1b]0;owned\x07\nnext"
    update = Update(
        s=1, t=now_ms(), rollout="r", seq=1, digest=DIGEST, state="rolled-back", code="update.soak", detail=detail
    )
    history.write([stored(update)])
    output = run(fleet, "pump-1", "--since", "1h", "--no-follow").output
    assert "[update.soak]" in output
    assert "\x1b" not in output
    assert output.count("\n") == 1


def test_nobody_of_that_name_is_an_error_and_so_is_no_history(fleet: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--home", str(fleet.path), "telemetry", "tail"]
    with pytest.raises(SystemExit) as unknown:
        main([*words, "nobody"])
    monkeypatch.setenv("LIGHTSHIP_HISTORY", "off")
    with pytest.raises(SystemExit) as off:
        main([*words, "pump-1"])
    assert (unknown.value.code, off.value.code) == (25, 12)


@pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")
def test_at_the_broker_it_hears_what_passes_and_what_can_not_be_understood_does_not_end_it(fleet: Home) -> None:
    broker = start_broker(settings_for(fleet.path, broker="mosquitto"), fleet.path / "broker", fleet.ca)
    assert broker is not None
    try:
        tail = Tail(fleet, "pump-1", "--broker", "--json")
        with ear(
            broker.info.port, CONTROL_PLANE_USER, control_plane_context(fleet.path / "broker", fleet.ca)
        ) as device:
            shown: list[str] = []
            assert tail.process.stdout is not None
            os.set_blocking(tail.process.stdout.fileno(), False)

            def heard() -> bool:
                device.publish(topics.telemetry("default", "pump-1"), b"\xff")
                device.publish(topics.telemetry("default", "pump-2"), pack(envelope(heartbeat(8))))
                device.publish(topics.telemetry("default", "pump-1"), pack(envelope(heartbeat(9))))
                assert tail.process.stdout is not None
                shown.extend(filter(None, [tail.process.stdout.readline()]))
                time.sleep(0.1)
                return bool(shown)

            until(heard)
        status, said = tail.interrupt()
    finally:
        broker.stop()
    assert status == 0
    assert json.loads(shown[0])["seq"] == 9
    assert "pump-1: " in said
    assert "Traceback" not in said


# The pure part, and the arrivals ------------------------------------------------------------------------------------


def test_a_pruned_history_begins_again_and_nothing_new_is_missed(history: History) -> None:
    now = now_ms()
    history.write([stored(heartbeat(n, t=now - 9_000 + n)) for n in range(1, 20)])
    mark = history.end()
    history.prune(now, Keep(raw=1, hourly=1, daily=1, raw_bytes=10**9))
    history.write([stored(heartbeat(20, t=now))])
    _, found = history.arrivals(mark, ["pump-1"])
    assert [r.seq for r in found] == [20]


@given(parts=st.lists(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 30)), max_size=10), max_size=10))
def test_what_comes_again_is_shown_once(parts: Sequence[Sequence[tuple[str, int]]]) -> None:
    once, shown = Once(), list[tuple[str, int]]()
    for part in parts:
        shown += [(r.device, r.seq) for r in once.new(stored(heartbeat(s, t=1), device) for device, s in part)]
    everything = [each for part in parts for each in part]
    assert shown == list(dict.fromkeys(everything))


def test_what_it_remembers_is_bounded() -> None:
    once = Once()
    beat = stored(heartbeat(1, t=1))
    list(once.new(beat._replace(seq=n) for n in range(REMEMBERED + 100)))
    assert len(once._seen) == REMEMBERED


def test_a_record_of_a_later_version_is_shown_by_its_kind() -> None:
    said = line(Report("pump-1", 1, EPOCH, 1, 1, "hologram", False, encode({"k": "hologram", "s": 1, "t": 1})))
    assert (said.kind, said.grave) == ("hologram", False)
    assert "not known" in said.says


def test_faults_and_failed_updates_are_grave_and_healthy_heartbeats_minor() -> None:
    assert line(stored(fault(1))).grave
    assert not line(stored(fault(1, raised=False))).grave
    assert line(stored(heartbeat(1, t=1))).minor
    window = Window(s=1, t=1, model="pump", version=1, digest=DIGEST, schema=DIGEST, w=4, opened=1, rows=9, counts=(9,))
    assert line(stored(window)).says == "pump@1 window 4: 9 rows, 0 refused"


def test_counts_are_numbers_in_json() -> None:
    moments = PackedMoments.of(Moments(rows=9, pairs=8, sums=(-3,), squares=(900,), lags=(1,)))
    window = Window(
        s=1, t=1, model="pump", version=1, digest=DIGEST, schema=DIGEST, w=4, opened=1, rows=9,
        counts=packed((9, 0, 700)), values=(1, 2), moments=moments,
    )  # fmt: skip

    record = json.loads(as_json(stored(window)))["record"]

    assert (record["counts"], record["values"], record["moments"]) == ([9, 0, 700], [1, 2], [9, 8, [-3], [900], [1]])


def test_what_is_not_a_number_is_null_in_json(tmp_path: Path) -> None:
    beat = heartbeat(1, t=1, latency_ms=float("nan"))
    assert json.loads(as_json(stored(beat)))["record"]["running"][0]["latency_ms"] is None
