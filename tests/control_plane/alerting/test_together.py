"""A look at a fleet while others write: it keeps nobody waiting, and what they did is neither lost nor told twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
from sqlalchemy import func, select, update
from tests.control_plane.things import settings_for

from lightship.alerting import evaluate, store
from lightship.alerting.decide import Alert, Decision
from lightship.alerting.evaluate import Evaluator
from lightship.home import Home
from lightship.storage.audit import now_ms
from lightship.storage.models import AlertMessage, AlertRow, AuditEvent, Device
from lightship_agent.contract.codes import AlertError

HOUR = 3_600_000


def looking(home: Home, **flags: Any) -> Evaluator:
    """One that opens at once and ends at once, and groups nothing."""
    quick = {"alert_group_seconds": 0, "alert_clear_seconds": 0, "alert_group_at": 1_000_000, **flags}
    return Evaluator(home, settings_for(home.path, **quick), ["webhook"], 0)


def fleet(home: Home, n: int) -> None:
    """Devices that have been silent for ever."""
    rows = [
        Device(
            id=f"d{i:05}", tenant="default", group="g", labels={}, state="active", spki="", cert_serial="1",
            cert_not_after=now_ms() + 96 * HOUR, enrolled_at=1, last_seen=1, running=[], health={}, degraded=[],
        )
        for i in range(n)
    ]  # fmt: skip
    with home.database.write() as session:
        session.add_all(rows)


def alerts(home: Home) -> list[Alert]:
    with home.database.read() as session:
        return [store.load(row.state) for row in session.scalars(select(AlertRow).order_by(AlertRow.began))]


def messages(home: Home) -> list[tuple[str, str]]:
    with home.database.read() as session:
        return [(m.id, m.event) for m in session.scalars(select(AlertMessage).order_by(AlertMessage.id))]


def in_between(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> list[Decision]:
    """Have `act` done by another thread, once, when the next decision is made and nothing of it is written."""
    decide, made = evaluate.decider.decide, list[Decision]()

    def decided(*words: Any) -> Decision:
        made.append(decide(*words))
        if len(made) == 1:
            other = threading.Thread(target=act)
            other.start()
            other.join()  # it is not kept waiting by who looks
        return made[-1]

    monkeypatch.setattr(evaluate.decider, "decide", decided)
    return made


@contextmanager
def meanwhile(act: Callable[[int], None]) -> Iterator[None]:
    """Have `act` done again and again by another thread."""
    end = threading.Event()

    def run() -> None:
        for n in count():
            if end.wait(0.005):
                return
            act(n)

    other = threading.Thread(target=run)
    other.start()
    try:
        yield
    finally:
        end.set()
        other.join()


def test_an_acknowledgement_while_a_reminder_is_decided_holds_it_back(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet(home, 1)
    evaluator, now = looking(home, alert_remind_hours=0.1), now_ms()
    evaluator.look(now)
    (alert,) = alerts(home)

    def acknowledge() -> None:
        with home.database.write() as session:
            store.acknowledge(session, alert.id, actor="user:ann", reason="On my way.", now=now)

    made = in_between(monkeypatch, acknowledge)

    assert evaluator.look(now + 600_000) == 0
    assert [[n.event for n in d.notices] for d in made] == [["remind"], []]
    assert [a.acked_by for a in alerts(home)] == ["user:ann"]
    assert messages(home) == [(f"{alert.id}.1", "open")]


def test_a_mute_while_an_alert_is_decided_is_heard(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet(home, 1)
    now = now_ms()

    def mute() -> None:
        with home.database.write() as session:
            store.mute(session, "device:d*", until=now + 60_000, actor="user:ann", reason="Moving.", now=now)

    made = in_between(monkeypatch, mute)
    evaluator = looking(home)

    assert evaluator.look(now) == 0
    assert len(made) == 2
    assert messages(home) == []
    assert [a.status for a in alerts(home)] == ["open"]
    assert evaluator.look(now + 60_001) == 1  # what is still open at its end is told then


def test_a_device_that_comes_back_while_its_alert_is_decided_is_told_of_and_ends(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet(home, 2)
    now = now_ms()

    def comes_back() -> None:
        with home.database.write() as session:
            session.get_one(Device, "d00000").last_seen = now + HOUR

    in_between(monkeypatch, comes_back)
    evaluator = looking(home)
    told = [evaluator.look(now + n) for n in range(4)]

    assert sum(told) == 3
    ends = [(next(iter(a.members.values())).subject, a.status, a.number) for a in alerts(home)]
    assert sorted(ends) == [("d00000", "resolved", 2), ("d00001", "open", 1)]


def test_two_that_look_at_once_tell_it_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that was stopped for longer than its lease wakes up in the middle of a look."""
    fleet(home, 3)
    now = now_ms()
    other = looking(home)
    told = list[int]()
    made = in_between(monkeypatch, lambda: told.append(other.look(now)))
    told.append(looking(home).look(now))

    assert told == [3, 0]
    assert len(made) == 3
    assert len(alerts(home)) == len(messages(home)) == 3


def test_many_alerts_are_written_a_part_at_a_time_and_none_is_lost_or_doubled(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "PART", 20)
    fleet(home, 200)
    evaluator, now = looking(home), now_ms()
    acked, muted = dict[str, str](), list[str]()

    def write(n: int) -> None:
        with home.database.write() as session:
            if n % 3:
                standing = select(AlertRow).where(AlertRow.status == "open").order_by(func.random())
                row = session.scalars(standing.limit(1)).first()
                if row is not None:
                    store.acknowledge(session, row.id, actor=f"user:{n}", reason="", now=now)
                    acked[row.id] = f"user:{n}"
            else:
                nobody = store.mute(session, "device:nobody", until=now + HOUR, actor="user:a", reason="x", now=now)
                muted.append(nobody.id)

    with meanwhile(write):
        told, n = list[int](), 0
        while (len(acked) < 3 or n < 4) and n < 1_000:
            n += 1
            told.append(evaluator.look(now + n))
    told += [evaluator.look(now + n + 1 + k) for k in range(3)]

    assert sum(told) == 200
    assert len({m.subject for a in alerts(home) for m in a.members.values()}) == len(alerts(home)) == 200
    assert [event for _, event in messages(home)] == ["open"] * 200
    assert acked
    assert {a.id: a.acked_by for a in alerts(home) if a.acked_by} == acked
    with home.database.read() as session:
        assert len(session.scalars(select(AuditEvent.seq).where(AuditEvent.verb == "alert.mute")).all()) == len(muted)


def test_after_a_death_between_two_parts_the_rest_is_told(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "PART", 10)
    fleet(home, 50)
    now, enqueue, parts = now_ms(), store.enqueue, count()

    def dies(session: Any, some: Any) -> None:
        enqueue(session, some)
        if next(parts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "enqueue", dies)
    with pytest.raises(KeyboardInterrupt):
        looking(home).look(now)
    assert len(messages(home)) == len(alerts(home)) == 20

    assert looking(home).look(now + 1) == 30
    assert len(messages(home)) == len(alerts(home)) == 50


def test_a_crowd_that_dies_halfway_through_forgetting_who_waited_is_one_alert(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "PART", 10)
    fleet(home, 50)
    now, save, parts = now_ms(), store.save, count()
    flags = {"alert_group_seconds": 10, "alert_group_at": 5}
    looking(home, **flags).look(now)
    assert [a.status for a in alerts(home)] == ["pending"] * 50

    def dies(*words: Any) -> None:
        if next(parts) == 3:
            raise KeyboardInterrupt
        save(*words)

    with monkeypatch.context() as patch:
        patch.setattr(store, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            looking(home, **flags).look(now + 20_000)
    assert sorted(a.status for a in alerts(home)) == ["open"] + ["pending"] * 30

    assert looking(home, **flags).look(now + 20_001) == 0
    (alert,) = alerts(home)
    assert len(alert.members) == 50
    assert [event for _, event in messages(home)] == ["open"]


def test_who_writes_is_not_kept_waiting_by_a_fleet_that_falls_silent(home: Home) -> None:
    fleet(home, 5_000)
    evaluator, now, held = looking(home, alert_group_seconds=10, alert_group_at=5), now_ms(), list[float]()
    write = home.database.write

    @contextmanager
    def timed() -> Iterator[Any]:
        """How long the lock is held, in CPU of this thread: the machine may be busy."""
        with write() as session:
            began = time.thread_time()
            yield session
        held.append(time.thread_time() - began)

    home.database.write = timed  # type: ignore[method-assign]
    assert [evaluator.look(now + n * 6_000) for n in range(3)] == [0, 0, 1]
    with write() as session:
        session.execute(update(Device).values(last_seen=now + HOUR))
    evaluator.look(now + 20_000)

    assert len(held) > 10
    assert max(held) < 0.5


def test_an_unknown_alert_moves_nothing(home: Home) -> None:
    with home.database.read() as session:
        before = store.edition(session)
    with pytest.raises(AlertError), home.database.write() as session:
        store.acknowledge(session, "nothing", actor="user:ann", reason="", now=now_ms())
    with home.database.read() as session:
        assert store.edition(session) == before
