"""What goes next: each record once while the server keeps up, and again only when it was lost."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from lightship_agent.contract.messages import Envelope, Heartbeat, Update, Window
from lightship_agent.contract.wire import MAX_PACKED, unpack
from lightship_agent.link.outbox import Outbox
from lightship_agent.link.sender import BATCH_RECORDS, DRAIN_RATE, FLIGHT_SECONDS, RESEND_SECONDS, Sender

PATIENCE = 915.0


class Bench:
    """A sender over a real outbox, and a clock to turn."""

    def __init__(self, folder: Path) -> None:
        self.now = 1_000.0
        self.outbox = Outbox(folder / "outbox", limit_bytes=50_000_000)
        self.events = Outbox(folder / "events", limit_bytes=1_000_000, at_once=True)
        pair = (("event", self.events), ("tele", self.outbox))
        self.sender = Sender(pair, 4, 990.0, patience=PATIENCE, clock=lambda: self.now)

    def beat(self, n: int = 1) -> None:
        self.outbox.append([Heartbeat(s=1, t=1) for _ in range(n)])

    def next(self) -> Envelope | None:
        parcel = self.sender.next_batch()
        return None if parcel is None else unpack(parcel.packed, Envelope)

    def send_all(self) -> list[int]:
        """The numbers that go out now, all of them taken by the other side."""
        gone: list[int] = []
        while (envelope := self.next()) is not None:
            gone += [r.s for r in envelope.r]
            self.sender.sent()
        return gone


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_an_envelope_says_who_sends_and_what_is_left(bench: Bench) -> None:
    bench.beat(3)
    bench.outbox.acknowledge(bench.outbox.epoch, 1)

    envelope = bench.next()

    assert envelope is not None
    assert (envelope.e, envelope.b, envelope.us, envelope.lo) == (bench.outbox.epoch, 4, 10_000, 2)
    assert [r.s for r in envelope.r] == [2, 3]


def test_what_was_handed_over_is_not_sent_again_while_we_wait(bench: Bench) -> None:
    bench.beat(2)
    assert bench.send_all() == [1, 2]
    for _ in range(60):
        bench.now += 15
        assert bench.send_all() == []
    bench.beat()
    assert bench.send_all() == [3]


def test_what_was_not_handed_over_stays_next(bench: Bench) -> None:
    bench.beat(2)
    first, again = bench.next(), bench.next()

    assert first is not None
    assert again is not None
    assert first.r == again.r


def test_without_progress_everything_unacknowledged_goes_again_and_once(bench: Bench) -> None:
    bench.beat(3)
    bench.send_all()
    bench.outbox.acknowledge(bench.outbox.epoch, 1)
    assert bench.send_all() == []

    bench.now += PATIENCE + 1

    assert bench.send_all() == [2, 3]
    assert bench.send_all() == []
    bench.now += PATIENCE + 1
    assert bench.send_all() == [2, 3]


def test_a_server_that_keeps_up_is_never_sent_anything_twice(bench: Bench) -> None:
    gone: list[int] = []
    for _ in range(50):
        bench.beat(2)
        gone += bench.send_all()
        bench.now += 300
        bench.outbox.acknowledge(bench.outbox.epoch, gone[-1] - 1)

    assert gone == list(range(1, 101))


def test_many_records_go_in_batches(bench: Bench) -> None:
    bench.beat(2 * BATCH_RECORDS + 1)
    sizes = []
    while (envelope := bench.next()) is not None:
        sizes.append(len(envelope.r))
        bench.sender.sent()

    assert sizes == [BATCH_RECORDS, BATCH_RECORDS, 1]


def test_wide_windows_go_in_smaller_batches_and_block_nothing(bench: Bench) -> None:
    chance = random.Random(5)
    windows = [
        Window(
            s=1, t=1, model="m", version=1, digest="a" * 64, schema="b" * 64, w=w, opened=1, rows=1,
            counts=tuple(chance.randrange(2**31) for _ in range(10_000)),
        )
        for w in range(20)
    ]  # fmt: skip
    bench.outbox.append(windows)

    packed, gone = [], []
    while (batch := bench.sender.next_batch()) is not None:
        packed.append(len(batch.packed))
        gone += [r.s for r in unpack(batch.packed, Envelope).r]
        bench.sender.sent()

    assert gone == list(range(1, 21))
    assert len(packed) > 1
    assert max(packed) <= MAX_PACKED


def test_windows_that_pack_well_are_still_within_what_the_server_inflates(bench: Bench) -> None:
    counts = tuple([2**40] * 90_000)
    bench.outbox.append(
        Window(s=1, t=1, model="m", version=1, digest="a" * 64, schema="b" * 64, w=w, opened=1, rows=1, counts=counts)
        for w in range(12)
    )

    assert bench.send_all() == list(range(1, 13))


def test_what_waits_in_memory_goes_first_and_what_is_on_the_disk_goes_under_its_own_numbers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.beat(3)
    disk = bench.outbox.epoch

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    bench.beat()
    monkeypatch.undo()

    gone = []
    while (envelope := bench.next()) is not None:
        gone.append((envelope.e == disk, [r.s for r in envelope.r]))
        bench.sender.sent()
    assert gone == [(False, [1]), (True, [1, 2, 3])]


def test_events_go_before_reports_and_over_a_topic_of_their_own(bench: Bench) -> None:
    bench.beat(2)
    bench.events.append([Update(s=1, t=1, rollout="r", seq=1, digest="a" * 64, state="trying")])
    kinds = []
    while (parcel := bench.sender.next_batch()) is not None:
        kinds.append(parcel.kind)
        bench.sender.sent()

    assert kinds == ["event", "tele"]


def test_after_an_outage_the_newest_goes_at_once_and_the_rest_at_its_rate(bench: Bench) -> None:
    old = 3 * int(DRAIN_RATE) * BATCH_RECORDS
    bench.beat(old)
    bench.sender.next_batch()  # nobody took it

    first = bench.send_all()
    assert first[:BATCH_RECORDS] == list(range(old - BATCH_RECORDS + 1, old + 1))
    assert len(first) == (1 + int(DRAIN_RATE)) * BATCH_RECORDS
    bench.beat(1)
    assert bench.send_all() == [old + 1]
    bench.now += 1
    assert len(bench.send_all()) == int(DRAIN_RATE) * BATCH_RECORDS
    bench.now += 1
    rest = bench.send_all()
    assert rest[-1] == old - BATCH_RECORDS
    bench.now += 1
    assert bench.send_all() == []


def test_what_was_handed_over_a_moment_ago_is_not_sent_again_because_somebody_misses_it(bench: Bench) -> None:
    bench.beat(2)
    bench.send_all()
    bench.now += FLIGHT_SECONDS + 1
    bench.beat(2)
    bench.send_all()

    bench.sender.missing(bench.outbox.epoch, [(1, 4)])

    assert bench.send_all() == [1, 2]


def test_what_the_broker_refused_goes_again_after_a_pause(bench: Bench) -> None:
    bench.beat(2)
    bench.next()
    bench.sender.sent(7)
    bench.sender.refused(8)
    bench.sender.refused(7)

    assert bench.send_all() == []
    bench.now += RESEND_SECONDS
    assert bench.send_all() == [1, 2]


def test_exactly_what_the_server_misses_goes_again(bench: Bench) -> None:
    bench.beat(5)
    bench.send_all()

    bench.now += FLIGHT_SECONDS
    bench.sender.missing(bench.outbox.epoch, [(2, 2), (4, 5)])

    assert bench.send_all() == [2, 4, 5]
    assert bench.send_all() == []


def test_a_voice_that_asks_again_and_again_is_heard_every_fifteen_seconds(bench: Bench) -> None:
    bench.beat(2)
    bench.send_all()
    gone = 0
    for _ in range(600):
        bench.sender.missing(bench.outbox.epoch, [(1, 2**53)])
        gone += len(bench.send_all())
        bench.now += 0.1

    assert gone <= 2 * (60 / RESEND_SECONDS + 1)


@pytest.mark.parametrize("first", [0, 3, 2**53])
def test_a_request_for_what_is_stored_or_was_never_sent_changes_nothing(bench: Bench, first: int) -> None:
    bench.beat(6)
    bench.send_all()
    bench.outbox.acknowledge(bench.outbox.epoch, 3)

    bench.now += FLIGHT_SECONDS
    bench.sender.missing(bench.outbox.epoch, [(first, first)])
    bench.sender.missing("f" * 16, [(4, 5)])

    assert bench.send_all() == []


def test_it_counts_how_often_nothing_was_acknowledged_and_begins_anew_when_something_is(bench: Bench) -> None:
    bench.beat(2)
    bench.send_all()
    seen = []
    for _ in range(3):
        bench.now += PATIENCE + 1
        assert bench.send_all() == [1, 2]
        seen.append((bench.sender.stalls, bench.sender.stalled))
    assert seen == [(1, 2), (2, 2), (3, 2)]
    bench.outbox.acknowledge(bench.outbox.epoch, 1)
    bench.send_all()
    assert (bench.sender.stalls, bench.sender.stalled) == (0, 0)


def test_a_device_with_nothing_to_say_waits_for_nothing(bench: Bench) -> None:
    bench.beat()
    bench.send_all()
    bench.outbox.acknowledge(bench.outbox.epoch, 1)
    for _ in range(5):
        bench.now += PATIENCE + 1
        bench.send_all()
    assert bench.sender.stalls == 0
