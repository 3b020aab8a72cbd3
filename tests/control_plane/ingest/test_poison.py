"""Poison in a batch becomes a dead letter with a code, whatever it is, and its neighbours are stored all the same."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select
from tests.control_plane.things import add_device, envelope, heartbeat

from lightship.home import Home
from lightship.monitoring import batch, dead_letters, ingest, tallies
from lightship.monitoring.ingest import Incoming
from lightship.storage.audit import now_ms
from lightship.storage.models import DeadLetter
from lightship_agent.contract.messages import Heartbeat
from lightship_agent.contract.wire import MAX_INFLATED, MAX_PACKED, encode, pack

GOOD, BAD = "pump-1", "pump-2"
WHOLE = pack(envelope(*(heartbeat(s) for s in range(1, 30))))
NAN = struct.pack(">d", float("nan"))


def health(value: bytes) -> bytes:
    """A heartbeat with a number that is written by hand."""
    said = encode(envelope(Heartbeat(s=1, t=1, health={"cpu": 0.123})))
    return said.replace(b"\xcb" + struct.pack(">d", 0.123), value)


POISON = {
    "nothing": (b"", "wire.malformed"),
    "noise": (b"\xc1" * 50, "wire.malformed"),
    "oversized": (b"\x00" * (MAX_PACKED + 1), "wire.too-large"),
    "nested": (b"\x91" * 100_000, "wire.malformed"),
    "a huge integer": (encode(envelope(heartbeat(1, version=2**63))), "wire.malformed"),
    "a number that is text": (health(b"\xa3abc"), "wire.malformed"),
    "truncated": (encode(envelope(heartbeat(1)))[:-9], "wire.malformed"),
    "a zip cut off": (WHOLE[: len(WHOLE) // 2], "wire.malformed"),
    "a zip bomb": (zlib.compress(b"\x90" * (MAX_INFLATED + 1)), "wire.too-large"),
    "bytes behind a zip": (WHOLE + b"x", "wire.malformed"),
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home.create(tmp_path / "home")
    for name in (GOOD, BAD):
        add_device(made, name)
    yield made
    made.close()


def good(seq: int) -> Incoming:
    return Incoming(GOOD, "tele", pack(envelope(heartbeat(seq))), "default")


def store(home: Home, *messages: Incoming) -> list[str]:
    with home.database.write() as session:
        return [receipt.code for receipt in ingest.receive_all(session, messages, now_ms())]


def acked(home: Home, device: str = GOOD) -> str:
    with home.database.read() as session:
        return ingest.acknowledged(session, device).rpartition(":")[2]


def letters(home: Home) -> list[str]:
    with home.database.read() as session:
        return list(session.scalars(select(DeadLetter.code).order_by(DeadLetter.at, DeadLetter.id)))


@pytest.mark.parametrize(("payload", "code"), POISON.values(), ids=POISON.keys())
def test_poison_is_buried_with_its_code_and_its_neighbours_are_stored(home: Home, payload: bytes, code: str) -> None:
    assert store(home, good(1), Incoming(BAD, "tele", payload, "default"), good(2)) == ["", code, ""]
    assert acked(home) == "2"
    assert acked(home, BAD) == ""
    assert letters(home) == [code]


def test_what_is_no_number_is_stored_and_left_out_of_what_pages_show(home: Home) -> None:
    assert store(home, good(1), Incoming(BAD, "tele", health(b"\xcb" + NAN), "default"), good(2)) == ["", "", ""]
    assert (acked(home), acked(home, BAD)) == ("2", "1")


def test_another_tenants_topic_is_not_believed(home: Home) -> None:
    stranger = Incoming(BAD, "tele", pack(envelope(heartbeat(1))), "another")
    assert store(home, good(1), stranger, good(2)) == ["", "wire.tenant", ""]
    assert (acked(home), acked(home, BAD)) == ("2", "")


def test_a_report_from_the_future_is_kept_and_noted(home: Home) -> None:
    late = Incoming(BAD, "tele", pack(envelope(heartbeat(1, t=now_ms() + 86_400_000))), "default")
    assert store(home, good(1), late, good(2)) == ["", "", ""]
    assert (acked(home), acked(home, BAD)) == ("2", "1")
    assert letters(home) == ["wire.future"]


def test_what_is_replayed_is_stored_once_and_harms_nobody(home: Home) -> None:
    again = Incoming(BAD, "tele", pack(envelope(heartbeat(1))), "default")
    assert store(home, again, good(1), again, again, good(2)) == [""] * 5
    assert store(home, again) == [""]
    assert (acked(home), acked(home, BAD)) == ("2", "1")
    assert letters(home) == []


def test_what_nobody_foresaw_costs_the_message_that_met_it_alone(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it not buried, the broker would deliver it, and what came with it, again and again."""
    facts = batch.device_facts

    def stumbles(beat: Heartbeat) -> dict[str, object]:
        if beat.health:
            raise KeyError("of a bug")
        return facts(beat)

    monkeypatch.setattr(batch, "device_facts", stumbles)
    bad = Incoming(BAD, "tele", pack(envelope(Heartbeat(s=1, t=1, health={"cpu": 1.0}))), "default")
    assert store(home, good(1), bad, good(2)) == ["", "wire.malformed", ""]
    assert (acked(home), acked(home, BAD)) == ("2", "")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_in_a_batch_the_good_ones_are_stored(home: Home, data: st.DataObject) -> None:
    noise = st.binary(max_size=300) | st.sampled_from([payload for payload, _ in POISON.values()])
    kinds = st.sampled_from(["tele", "event", "state", "rsp/snapshot"])
    foreign = data.draw(st.lists(st.builds(Incoming, st.just(BAD), kinds, noise, st.sampled_from(["default", "x"]))))
    begins = int(acked(home) or 0)
    codes = store(home, good(begins + 1), *foreign, good(begins + 2))
    assert (codes[0], codes[-1]) == ("", "")
    assert acked(home) == str(begins + 2)


@pytest.mark.parametrize("bound", [{"letters": 10}, {"most_bytes": 2_000}], ids=["letters", "bytes"])
def test_the_oldest_dead_letters_make_room_and_are_counted(home: Home, bound: dict[str, int]) -> None:
    for at in range(30):
        with home.database.write() as session:
            ingest.receive(session, BAD, "tele", bytes([0xC1, at]) * 40, at)
    with home.database.write() as session:
        gone = dead_letters.make_room(session, **bound)
        counted = tallies.counted(session)
    with home.database.read() as session:
        kept = list(session.scalars(select(DeadLetter.at).order_by(DeadLetter.at)))
        size = session.scalar(select(func.sum(func.length(DeadLetter.payload) + func.length(DeadLetter.detail)))) or 0
    assert gone == 30 - len(kept) > 0
    assert kept == list(range(gone, 30))
    assert len(kept) <= bound.get("letters", 30)
    assert size <= bound.get("most_bytes", size)
    assert counted[tallies.key(dead_letters.DROPPED)] == gone


def test_a_flood_of_poison_does_not_fill_the_disk(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters.make_room, "__kwdefaults__", {"letters": 50, "most_bytes": 10**9})
    for _ in range(5):
        store(home, *(Incoming(BAD, "tele", b"\xc1", "default") for _ in range(40)), good(1))
    assert len(letters(home)) <= 50
    assert acked(home) == "1"
