"""What a device counts beyond bins is stored with its window, late labels are added to it, and faults are alarms."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from sqlalchemy import select
from tests.control_plane.ingest.test_ingest import DIGEST, OTHER, SCHEMA, labels, letters, send, window
from tests.control_plane.things import add_device, envelope, heartbeat

from lightship.home import Home
from lightship.monitoring import stored
from lightship.monitoring.policy import StreamKey
from lightship.monitoring.watch import _open_alarms
from lightship.storage.models import Alarm, AuditEvent, PendingLabels, WindowRow
from lightship_agent.contract.messages import AnyRecord, Fault, Heartbeat, Labels, PackedMoments, Together, packed
from lightship_agent.contract.moments import Moments, Products
from lightship_agent.contract.profile import WindowCounts
from lightship_agent.contract.quality import QualityCount

MOMENTS = Moments(rows=10, pairs=9, sums=(3, -4), squares=(160, 170), lags=(-20, 30))
PARTS: dict[str, Any] = {
    "distances": packed((0, 1_000, 0)), "values": (5, 5), "moments": PackedMoments.of(MOMENTS),
    "quality": (QualityCount("stuck", 1, 1), QualityCount("type", -1, 2)), "invalid": 2,
}  # fmt: skip


@pytest.fixture
def pump(home: Home) -> Home:
    add_device(home, "pump-1", seen_ago=1_000)
    return home


def residuals(s: int, w: int, cells: tuple[int, ...], sums: tuple[int, int]) -> Labels:
    return Labels(
        s=s, t=3_000, model="pump", digest=DIGEST, schema=SCHEMA, w=w, labelled=sum(cells), errors=1, residuals=cells,
        residual_sums=sums,
    )  # fmt: skip


def content(home: Home, w: int = 0) -> WindowCounts:
    with home.database.read() as session:
        return stored.content(session.get_one(WindowRow, ("pump-1", DIGEST, w)))


def together(s: int, first: int, w: int, *sums: int) -> Together:
    return Together(
        s=s, t=2_000, model="pump", digest=DIGEST, schema=SCHEMA, first=first, w=w,
        products=Products(rows=10, sums=sums),
    )  # fmt: skip


def test_a_time_that_is_worth_nothing_is_not_believed(pump: Home) -> None:
    assert send(pump, envelope(msgspec.structs.replace(window(1), q=0))) == ""
    with pump.database.read() as session:
        assert session.get_one(WindowRow, ("pump-1", DIGEST, 0)).opened_at == 0


def test_a_window_comes_back_as_it_was_counted(pump: Home) -> None:
    sent = window(1, **PARTS)

    assert send(pump, envelope(sent)) == ""

    assert content(pump) == sent.content()


def test_a_window_of_an_older_agent_has_none_of_it(pump: Home) -> None:
    send(pump, envelope(window(1)))

    counts = content(pump)
    assert (counts.moments, counts.distances, counts.quality) == (None, (), ())
    with pump.database.read() as session:
        assert session.get_one(WindowRow, ("pump-1", DIGEST, 0)).more == b""


@pytest.mark.parametrize("before", [True, False])
def test_residuals_find_their_window_before_it_and_after_it(pump: Home, before: bool) -> None:
    late: list[AnyRecord] = [residuals(2, 0, (1, 2, 0), (-5, 40)), residuals(3, 0, (0, 1, 1), (9, 60))]
    records: list[AnyRecord] = [window(1, **PARTS), *late]
    if before:
        records = [residuals(1, 0, (1, 2, 0), (-5, 40)), residuals(2, 0, (0, 1, 1), (9, 60)), window(3, **PARTS)]

    assert send(pump, envelope(*records)) == ""

    counts = content(pump)
    assert (counts.labelled, counts.errors) == (5, 2)
    assert (counts.residuals, counts.residual_sums) == ((1, 3, 1), (4, 100))
    assert counts.moments == MOMENTS
    with pump.database.read() as session:
        assert session.scalars(select(PendingLabels)).all() == []


def test_residuals_of_another_layout_are_left_out_and_the_labels_count(pump: Home) -> None:
    send(pump, envelope(window(1), residuals(2, 0, (1, 2), (1, 2)), residuals(3, 0, (1, 1, 1), (1, 2)), labels(4)))

    counts = content(pump)
    assert (counts.labelled, counts.residuals) == (11, (1, 2))
    assert letters(pump) == []


def test_products_are_kept_with_the_window_they_end_at_and_the_first_stand(pump: Home) -> None:
    send(pump, envelope(window(1, w=0), window(2, w=1), together(3, 0, 1, 7, 8, 9), together(4, 0, 1, 1, 1, 1)))

    with pump.database.read() as session:
        kept = stored.products(session.get_one(WindowRow, ("pump-1", DIGEST, 1)))
        assert kept == stored.StoredProducts(first=0, products=Products(rows=10, sums=(7, 8, 9)))
        assert stored.products(session.get_one(WindowRow, ("pump-1", DIGEST, 0))) is None


def test_products_of_a_window_that_was_lost_are_no_window(pump: Home) -> None:
    assert send(pump, envelope(together(1, 0, 5, 1, 2, 3), window(2, w=6))) == ""

    with pump.database.read() as session:
        assert session.scalars(select(WindowRow.w)).all() == [6]


# Faults --------------------------------------------------------------------------------------------------------------


def fault(
    s: int, feature: str = "vibration", *, raised: bool = True, kind: str = "stuck", digest: str = DIGEST
) -> Fault:
    return Fault(
        s=s, t=1_000 + s, model="pump", digest=digest, schema=SCHEMA, w=3, kind=kind, feature=feature, raised=raised,
        rate=0.75 if raised else 0.0,
    )  # fmt: skip


def alarms(home: Home) -> list[tuple[str, str, bool]]:
    with home.database.read() as session:
        rows = session.scalars(select(Alarm).order_by(Alarm.opened_at))
        return [(a.kind, a.sentence, a.closed_at is None) for a in rows]


def unwell(s: int, *codes: str) -> Heartbeat:
    return msgspec.structs.replace(heartbeat(s), degraded=codes)


SENTENCE = "pump-1: vibration does not move any more in 75% of its rows."


def test_a_fault_opens_one_alarm_and_its_end_closes_it(pump: Home) -> None:
    send(pump, envelope(fault(1), fault(2)))
    assert alarms(pump) == [("data", SENTENCE, True)]

    send(pump, envelope(fault(3, raised=False), fault(4, raised=False)))

    assert alarms(pump) == [("data", SENTENCE, False)]
    with pump.database.read() as session:
        verbs = session.scalars(select(AuditEvent.verb).where(AuditEvent.verb.startswith("alarm."))).all()
        assert list(verbs) == ["alarm.open", "alarm.close"]


def test_each_feature_and_kind_has_its_own_alarm(pump: Home) -> None:
    send(pump, envelope(fault(1), fault(2, "speed"), fault(3, kind="unit"), fault(4, digest=OTHER)))
    send(pump, envelope(fault(5, raised=False)))

    assert [still for _, _, still in alarms(pump)] == [False, True, True, True]


def test_a_device_that_speaks_of_no_fault_any_more_has_none(pump: Home) -> None:
    send(pump, envelope(fault(1), unwell(2, "data.stuck", "storage.full")))
    assert [still for _, _, still in alarms(pump)] == [True]

    send(pump, envelope(unwell(3, "storage.full")))

    assert [still for _, _, still in alarms(pump)] == [False]


@pytest.mark.parametrize("others", [0, 3, 250])
def test_it_has_none_however_many_others_have(pump: Home, others: int) -> None:
    send(pump, envelope(fault(1), unwell(2, "data.stuck")))
    with pump.database.write() as session:
        session.add_all(
            Alarm(
                id=f"other-{n}", kind="data", model="pump", digest=DIGEST, device=f"other-{n}", level="critical",
                sentence="", evidence={}, opened_at=0,
            )
            for n in range(others)
        )  # fmt: skip

    send(pump, envelope(unwell(3)))

    assert [still for _, sentence, still in alarms(pump) if sentence] == [False]
    assert [still for _, sentence, still in alarms(pump) if not sentence] == [True] * others


def test_the_alarms_of_drift_are_none_of_these(pump: Home) -> None:
    send(pump, envelope(fault(1)))

    with pump.database.read() as session:
        assert _open_alarms(session, StreamKey("pump-1", DIGEST)) == []
