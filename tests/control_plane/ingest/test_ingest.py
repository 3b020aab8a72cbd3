"""Ingest: every report stored once, whatever the network did to it; what can't be read stops nothing."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select
from tests.control_plane.things import EPOCH, add_device, envelope, heartbeat

from lightship.api import metrics, views
from lightship.home import Home
from lightship.monitoring import ingest
from lightship.storage.models import (
    AuditEvent,
    DeadLetter,
    Device,
    DeviceEpoch,
    Exposure,
    FeedbackRow,
    HeldRecord,
    PendingLabels,
    UpdateStep,
    WindowRow,
)
from lightship_agent.contract.app_metrics import AppHistogram, AppNumbers
from lightship_agent.contract.messages import (
    AnyRecord,
    Application,
    Heartbeat,
    LabelledRows,
    Labels,
    Running,
    State,
    Update,
    Window,
)
from lightship_agent.contract.wire import encode, pack

DIGEST, OTHER = "a" * 64, "b" * 64
SCHEMA = "c" * 64
_serial = itertools.count()


@pytest.fixture
def pump(home: Home) -> Home:
    add_device(home, "pump-1", seen_ago=1_000)
    return home


def send(home: Home, message: Any, *, device: str = "pump-1", kind: str = "tele", now: int = 5_000) -> str:
    """What the ingest worker does with one message; the code of the dead letter, if it became one."""
    payload = message if isinstance(message, bytes) else encode(message) if kind == "state" else pack(message)
    with home.database.write() as session:
        return ingest.receive(session, device, kind, payload, now).code


def test_latencies_and_errors_by_code_are_kept_as_the_device_counted_them(pump: Home) -> None:
    running = Running(model="pump", version=1, digest=DIGEST, since=1, latencies=(0, 3, 1), busy_us=250)
    errors = {"serving.input": 4}

    send(pump, envelope(Heartbeat(s=1, t=5_000, running=(running,), errors=errors)))

    with pump.database.read() as session:
        seen = views.device(session.get_one(Device, "pump-1"))
    assert (seen["running"][0]["latencies"], seen["running"][0]["busy_us"]) == ([0, 3, 1], 250)
    assert (seen["errors"], seen["app"]) == (errors, {})


def test_the_applications_numbers_are_kept_and_one_that_is_none_is_a_dead_letter(pump: Home) -> None:
    cycle = AppHistogram(edges=(1.0,), counts=(2, 1), sum=4.5)
    numbers = AppNumbers(counters={"parts": 2.0}, gauges={"oven": 1.5}, histograms={"cycle": cycle})
    frame = msgspec.to_builtins(envelope(Heartbeat(s=9, t=1)))
    none = msgspec.to_builtins(Application(s=2, t=5_001, since=1, numbers=AppNumbers()))
    too_many = {f"n{i}": 1.0 for i in range(257)}

    bad = ({"gauges": {"oven": math.nan}}, {"gauges": {"Oven!": 1.0}}, {"counters": too_many})

    assert send(pump, envelope(Application(s=1, t=5_000, since=1, numbers=numbers))) == ""
    codes = [send(pump, pack({**frame, "r": [{**none, "numbers": one}]})) for one in bad]

    assert codes == ["wire.malformed"] * 3
    with pump.database.read() as session:
        app = session.get_one(Device, "pump-1").app
    assert (app["counters"], app["gauges"], app["since"]) == ({"parts": 2.0}, {"oven": 1.5}, 1)
    assert app["histograms"]["cycle"] == {"edges": [1.0], "counts": [2, 1], "sum": 4.5}


def test_that_a_device_shares_rows_is_audited_once_a_day(pump: Home) -> None:
    def share(s: int, now: int) -> None:
        record = LabelledRows(s=s, t=now, model="pump", digest=DIGEST, schema=SCHEMA, x=((1.0, None),), y=("worn",))
        send(pump, envelope(record), now=now)

    for s, now in enumerate((5_000, 6_000, 86_400_000 + 5_000), start=1):
        share(s, now)

    with pump.database.read() as session:
        events = session.scalars(select(AuditEvent).where(AuditEvent.verb == "device.share")).all()
        assert [(e.actor, e.subject, e.detail) for e in events] == [
            ("device:pump-1", "pump-1", {"model": "pump", "rows": 1})
        ] * 2
        assert session.scalar(select(func.count()).select_from(FeedbackRow)) == 3


def acked(home: Home, device: str = "pump-1") -> str:
    with home.database.read() as session:
        return ingest.acknowledged(session, device)


def lost(home: Home, device: str = "pump-1") -> int:
    with home.database.read() as session:
        return sum(session.scalars(select(DeviceEpoch.lost).where(DeviceEpoch.device == device)))


def letters(home: Home) -> list[str]:
    with home.database.read() as session:
        return list(session.scalars(select(DeadLetter.code).order_by(DeadLetter.at)))


def window(s: int, w: int = 0, **changes: Any) -> Window:
    facts: dict[str, Any] = {
        "rows": 10,
        "counts": (4, 6),
        "predictions": (3, 7),
        "opened": 1_000,
        "t": 2_000,
        **changes,
    }
    return Window(s=s, model="pump", version=1, digest=DIGEST, schema=SCHEMA, w=w, **facts)


def labels(s: int, w: int = 0, labelled: int = 5, errors: int = 1) -> Labels:
    return Labels(s=s, t=3_000, model="pump", digest=DIGEST, schema=SCHEMA, w=w, labelled=labelled, errors=errors)


def rows(s: int) -> LabelledRows:
    return LabelledRows(s=s, t=1, model="pump", digest=DIGEST, schema=SCHEMA, x=((float(s), None),), y=(f"row {s}",))


# Once, whatever the network does --------------------------------------------------------------------------------------


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int]]]:
    """How many records a device wrote, and the envelopes that arrive: (oldest held, first, last), in any order."""
    written = draw(st.integers(1, 15))
    oldest = draw(st.lists(st.integers(1, written), min_size=1, max_size=12).map(sorted))
    arriving = []
    for lo in oldest:
        first = draw(st.integers(lo, written))
        arriving.append((lo, first, draw(st.integers(first, written))))
    return written, draw(st.permutations(arriving + draw(st.lists(st.sampled_from(arriving), max_size=3))))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deliveries())
def test_duplicates_gaps_and_disorder_change_nothing(home: Home, story: tuple[int, list[tuple[int, int, int]]]) -> None:
    written, arriving = story
    device = f"pump-{next(_serial)}"
    add_device(home, device)
    step = Update(s=1, t=1, rollout=device, seq=1, digest=DIGEST, state="trying")
    kinds: list[Callable[[int], AnyRecord]] = [rows, labels, lambda s: msgspec.structs.replace(step, s=s)]
    records: list[AnyRecord] = [kinds[s % 3](s) for s in range(1, written + 1)]

    def arrives(lo: int, first: int, last: int) -> None:
        assert send(home, envelope(*records[first - 1 : last], lo=lo), device=device) == ""

    before = 0
    for lo, first, last in arriving:
        arrives(lo, first, last)
        seq = int(acked(home, device).partition(":")[2])
        assert before <= seq <= written  # never beyond what was sent, never back
        before = seq
    held = max(lo for lo, _, _ in arriving)
    arrives(held, held, written)  # in the end the device sends again what it still holds
    assert acked(home, device) == f"{EPOCH}:{written}"
    with home.database.read() as session:
        stored = [int(y.split()[1]) for y in session.scalars(select(FeedbackRow.y).where(FeedbackRow.device == device))]
        stored += session.scalars(select(UpdateStep.s).where(UpdateStep.rollout == device)).all()
        counted = session.scalars(select(PendingLabels.labelled).where(PendingLabels.device == device)).first() or 0
    assert len(stored) == len(set(stored))  # each once
    assert len(stored) + counted // 5 + lost(home, device) == written  # and none without a trace
    assert {s for s in range(held, written + 1) if s % 3 != 1} <= set(stored)  # nothing that was held is lost


def shared(home: Home) -> list[str]:
    with home.database.read() as session:
        return list(session.scalars(select(FeedbackRow.y).order_by(FeedbackRow.id)))


def test_what_came_ahead_of_a_gap_is_kept_and_taken_into_account_in_its_order(pump: Home) -> None:
    send(pump, envelope(rows(1), rows(2)))
    send(pump, envelope(rows(4), rows(6)))
    assert (acked(pump), lost(pump), shared(pump)) == (f"{EPOCH}:2", 0, ["row 1", "row 2"])
    send(pump, envelope(rows(3)))
    assert (acked(pump), shared(pump)) == (f"{EPOCH}:4", [f"row {s}" for s in range(1, 5)])
    send(pump, envelope(rows(5)))
    assert (acked(pump), shared(pump)) == (f"{EPOCH}:6", [f"row {s}" for s in range(1, 7)])
    with pump.database.read() as session:
        assert session.scalars(select(HeldRecord)).all() == []


def test_what_a_device_gave_up_is_not_waited_for_and_what_was_held_behind_it_counts(pump: Home) -> None:
    send(pump, envelope(rows(1), rows(4), rows(5)))
    send(pump, envelope(rows(8), lo=8))
    assert (acked(pump), lost(pump)) == (f"{EPOCH}:8", 4)  # 2, 3, 6 and 7
    assert shared(pump) == ["row 1", "row 4", "row 5", "row 8"]


def test_a_heartbeat_is_believed_at_once_and_an_older_one_never_after_it(pump: Home) -> None:
    send(pump, envelope(heartbeat(9, DIGEST)))
    with pump.database.read() as session:
        assert session.get_one(Device, "pump-1").running_digest == DIGEST
    send(pump, envelope(*(heartbeat(s, OTHER) for s in range(1, 9))))
    with pump.database.read() as session:
        assert session.get_one(Device, "pump-1").running_digest == DIGEST
    assert acked(pump) == f"{EPOCH}:9"


def test_a_report_under_the_topics_of_another_tenant_is_buried(pump: Home) -> None:
    message = ingest.Incoming("pump-1", "tele", pack(envelope(heartbeat(1))), "someone-else")
    with pump.database.write() as session:
        assert ingest.receive_all(session, [message], 1)[0].code == "wire.tenant"
    assert (acked(pump), letters(pump)) == ("", ["wire.tenant"])


def test_a_report_from_the_future_is_kept_and_noted_once_a_day(pump: Home) -> None:
    for s in (1, 2, 3):
        assert send(pump, envelope(heartbeat(s, t=10_000_000)), now=5_000) == ""
    assert (acked(pump), letters(pump)) == (f"{EPOCH}:3", ["wire.future"])


def test_each_of_a_devices_epochs_is_acknowledged(pump: Home) -> None:
    send(pump, envelope(rows(1), rows(2)), now=1_000)
    send(pump, envelope(rows(1), epoch="f" * 16), now=2_000)
    with pump.database.read() as session:
        assert ingest.acknowledgements(session, "pump-1") == (f"{'f' * 16}:1", f"{EPOCH}:2")


def test_a_gap_is_reported_until_it_is_filled(pump: Home) -> None:
    def gap(*numbers: int) -> ingest.Gap | None:
        with pump.database.write() as session:
            return ingest.receive(session, "pump-1", "tele", pack(envelope(*(rows(s) for s in numbers))), 5_000).gap

    def missing(*ranges: tuple[int, int]) -> ingest.Gap:
        return ingest.Gap(EPOCH, ranges)

    assert gap(1) is None
    assert gap(3) == missing((2, 2))
    assert gap(1) == missing((2, 2))
    assert gap(6, 7) == missing((2, 2), (4, 5))
    assert gap(4, 5) == missing((2, 2))
    assert gap(2) is None
    assert acked(pump) == f"{EPOCH}:7"


@pytest.mark.parametrize(("known", "expected"), [(2, 3), (0, 5)])
def test_what_the_device_had_to_drop_is_counted_and_not_waited_for(pump: Home, known: int, expected: int) -> None:
    if known:
        send(pump, envelope(*[rows(s) for s in range(1, known + 1)]))
    send(pump, envelope(rows(6), lo=6))
    assert (acked(pump), lost(pump)) == (f"{EPOCH}:6", expected)


def test_a_new_outbox_begins_at_one_again_and_is_what_is_acknowledged(pump: Home) -> None:
    send(pump, envelope(rows(1), rows(2)), now=1_000)
    send(pump, envelope(rows(1), epoch="f" * 16), now=2_000)
    assert acked(pump) == f"{'f' * 16}:1"
    with pump.database.read() as session:
        assert session.scalar(select(func.count()).select_from(FeedbackRow)) == 3


def test_nothing_heard_is_nothing_acknowledged(pump: Home) -> None:
    assert acked(pump) == ""


# Records --------------------------------------------------------------------------------------------------------------


def test_labels_that_come_before_their_window_wait_for_it(pump: Home) -> None:
    send(pump, envelope(labels(1, labelled=5, errors=2), labels(2, labelled=3, errors=1)))
    with pump.database.read() as session:
        assert session.scalars(select(WindowRow)).all() == []
    send(pump, envelope(window(3), labels(4, labelled=2, errors=9)))
    with pump.database.read() as session:
        row = session.scalars(select(WindowRow)).one()
        assert (row.rows, row.labelled, row.errors) == (10, 10, 5)  # errors are never more than labels
        assert session.scalars(select(PendingLabels)).all() == []


def test_a_window_is_closed_once(pump: Home) -> None:
    send(pump, envelope(window(1), window(2, rows=99)))
    with pump.database.read() as session:
        assert session.scalars(select(WindowRow.rows)).all() == [10]


def beats(home: Home, s: int, *running: tuple[str, int, int], t: int) -> None:
    """A heartbeat that says: these digests, since then, with so many requests."""
    served = tuple(Running(model="pump", version=1, digest=d, since=since, requests=n) for d, since, n in running)
    assert send(home, envelope(Heartbeat(s=s, t=t, running=served), lo=s)) == ""


def spans(home: Home) -> list[tuple[str, int, int | None, int]]:
    with home.database.read() as session:
        found = session.scalars(select(Exposure).order_by(Exposure.began_at))
        return [(e.digest[0], e.began_at, e.ended_at, e.requests) for e in found]


def test_an_exposure_opens_grows_and_closes_when_the_next_model_serves(pump: Home) -> None:
    beats(pump, 1, (DIGEST, 1_000, 5), t=2_000)
    beats(pump, 2, (DIGEST, 1_000, 9), t=3_000)
    assert spans(pump) == [("a", 1_000, None, 9)]
    beats(pump, 3, (OTHER, 3_500, 1), t=4_000)
    assert spans(pump) == [("a", 1_000, 3_500, 9), ("b", 3_500, None, 1)]
    beats(pump, 4, (DIGEST, 4_500, 2), t=5_000)  # back again: a span of its own
    assert spans(pump) == [("a", 1_000, 3_500, 9), ("b", 3_500, 4_500, 1), ("a", 4_500, None, 2)]
    beats(pump, 5, t=6_000)
    assert spans(pump)[-1] == ("a", 4_500, 6_000, 2)


def test_a_clock_that_was_set_back_never_makes_a_span_end_before_it_began(pump: Home) -> None:
    beats(pump, 1, (DIGEST, 9_000, 5), t=9_500)
    beats(pump, 2, (OTHER, 1_000, 1), t=1_500)
    assert ("a", 9_000, 9_000, 5) in spans(pump)


def test_what_runs_is_what_the_last_heartbeat_says(pump: Home) -> None:
    beats(pump, 1, (DIGEST, 1, 1), (OTHER, 2, 1), t=10)
    with pump.database.read() as session:
        device = session.get_one(Device, "pump-1")
        assert (device.running_digest, len(device.running), device.last_seen >= 5_000) == (DIGEST, 2, True)
    beats(pump, 2, t=20)
    with pump.database.read() as session:
        device = session.get_one(Device, "pump-1")
        assert (device.running_model, device.running_version, device.running) == ("", 0, [])


def test_a_will_of_an_earlier_boot_does_not_bury_a_living_device(pump: Home) -> None:
    send(pump, State(on=True, n=7), kind="state")
    send(pump, State(on=False, n=6), kind="state")
    with pump.database.read() as session:
        assert session.get_one(Device, "pump-1").online
    send(pump, State(on=False, n=7), kind="state")
    with pump.database.read() as session:
        assert not session.get_one(Device, "pump-1").online


def test_shared_rows_keep_their_gaps(pump: Home) -> None:
    send(pump, envelope(rows(1)))
    with pump.database.read() as session:
        row = session.scalars(select(FeedbackRow)).one()
    first, second = memoryview(row.x).cast("f")
    assert (first, math.isnan(second), row.y) == (1.0, True, "row 1")


# What can't be understood ---------------------------------------------------------------------------------------------

BOMB = zlib.compress(b"\0" * 50_000_000)
HUGE = 2**63

UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "noise": b"\xff\xfe\xfd" * 20,
    "another message": encode({"hello": "world"}),
    "a cut stream": pack(envelope(*[heartbeat(s) for s in range(1, 30)]))[:-5],
    "a bomb": BOMB,
    "deep nesting": b"\x91" * 20_000 + b"\xc0",
    "no records": encode({"e": EPOCH, "b": 1, "us": 1, "lo": 1, "r": [], "v": 1}),
    "another version": encode({**msgspec.to_builtins(envelope(heartbeat(1))), "v": 2}),
    "a negative number": encode({**msgspec.to_builtins(envelope(heartbeat(1))), "lo": -1}),
    "a sequence from nought": encode(msgspec.structs.replace(envelope(heartbeat(1)), r=(heartbeat(0),))),
    "more than a column holds": pack(envelope(heartbeat(1, version=HUGE))),
    "a window and then more than a column holds": pack(envelope(window(1), heartbeat(2, version=HUGE))),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_can_not_be_stored_is_buried_whole_and_the_next_message_is_stored(pump: Home, what: str) -> None:
    assert send(pump, UNREADABLE[what]).startswith("wire.")
    with pump.database.read() as session:
        letter = session.scalars(select(DeadLetter)).one()
        assert letter.topic == "pump-1/tele"
        assert len(letter.payload) <= ingest.MAX_DEAD_PAYLOAD
        assert letter.detail
        assert session.scalars(select(WindowRow)).all() == []
    assert acked(pump) == ""
    assert send(pump, envelope(heartbeat(1))) == ""
    assert acked(pump) == f"{EPOCH}:1"


def test_a_poisoned_message_does_not_take_its_batch_along(pump: Home) -> None:
    poison = envelope(rows(2), heartbeat(3, version=HUGE))
    with pump.database.write() as session:
        codes = [
            ingest.receive(session, "pump-1", "tele", pack(message), 1).code
            for message in (envelope(rows(1)), poison, envelope(rows(2)))
        ]
    assert codes == ["", "wire.malformed", ""]
    assert acked(pump) == f"{EPOCH}:2"


@pytest.mark.parametrize("device", ["nobody", "pump-9", "", "../etc"])
def test_a_message_of_nobody_we_know_is_buried(pump: Home, device: str) -> None:
    add_device(pump, "pump-9", state="revoked")
    assert send(pump, envelope(heartbeat(1)), device=device) == "wire.malformed"
    with pump.database.read() as session:
        assert session.scalar(select(func.count()).select_from(DeviceEpoch)) == 0


def test_what_a_message_says_about_its_sender_is_not_asked(pump: Home) -> None:
    """There is no field for it: the envelope of one device, sent by another, is the other's."""
    add_device(pump, "pump-2")
    send(pump, envelope(heartbeat(1, DIGEST)), device="pump-2")
    with pump.database.read() as session:
        assert session.get_one(Device, "pump-2").running_digest == DIGEST
        assert session.get_one(Device, "pump-1").running_digest == ""


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from(["tele", "event", "state"]))
def test_no_bytes_at_all_get_past_the_dead_letters(pump: Home, noise: bytes, kind: str) -> None:
    assert send(pump, noise, kind=kind) in ("", "wire.malformed", "wire.too-large")


def test_numbers_that_are_none_do_not_break_the_pages_of_all(pump: Home) -> None:
    sick = Heartbeat(
        s=1, t=1, health={"cpu_temp_c": float("nan"), "load": 0.5, "disk": float("inf")},
        running=(Running(model="pump", version=1, digest=DIGEST, since=1, latency_ms=float("nan")),),
    )  # fmt: skip
    assert send(pump, envelope(sick)) == ""
    with pump.database.read() as session:
        seen = views.overview(session)
        detail = views.device_detail(session, session.get_one(Device, "pump-1"))
    json.dumps([seen, detail], allow_nan=False)
    assert seen["devices"][0]["health"] == {"load": 0.5}


def test_what_devices_claim_can_not_break_the_metrics(pump: Home) -> None:
    most = 2**53
    for i in range(3):
        send(pump, envelope(*[window(s, w=s, rows=most) for s in range(500 * i + 1, 500 * i + 501)], lo=500 * i + 1))
    send(pump, envelope(heartbeat(1), epoch="d" * 16, lo=most))
    with pump.database.read() as session:
        assert session.scalar(select(func.count()).select_from(WindowRow)) == 1_500  # in sum more than 63 bits
    text = metrics.render(pump).decode()
    assert "\nlightship_reports_lost 9.0" in text  # almost 2**53, and not an error
