"""The audit chain: whatever is done to stored events with a plain database tool, it shows."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import AuditEvent
from lightship_agent.contract.codes import StorageError

EVENTS = 6  # besides the one that made the home


@pytest.fixture
def chained(home: Home) -> Home:
    with home.database.write() as session:
        for i in range(EVENTS):
            audit.append(session, actor="user:ann", verb="device.assign", subject=f"pump-{i}", detail={"seq": i})
    return home


def verify(home: Home, noted: str = "") -> int:
    with home.database.read() as session:
        return audit.verify(session, noted).events


def head(home: Home) -> str:
    with home.database.read() as session:
        return audit.head(session)


def tamper(home: Home, *statements: str) -> None:
    """As somebody with the file and a database tool would."""
    with closing(sqlite3.connect(home.path / "lightship.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_an_untouched_chain_is_whole_from_the_first_event(chained: Home) -> None:
    assert verify(chained) == EVENTS + 1


def test_a_log_cut_off_at_its_end_is_found_by_the_head_that_was_noted(chained: Home) -> None:
    noted = head(chained)
    assert verify(chained, noted) == EVENTS + 1
    tamper(chained, f"delete from audit_events where seq = {EVENTS + 1}")
    assert verify(chained) == EVENTS
    with pytest.raises(StorageError, match="cut off") as e:
        verify(chained, noted)
    assert e.value.code == "storage.corrupt"


def test_a_log_that_went_on_after_its_head_was_noted_is_whole_and_says_how_far_it_went(chained: Home) -> None:
    noted = head(chained)
    with chained.database.write() as session:
        audit.append(session, actor="user:ann", verb="x", subject="y")
        audit.append(session, actor="user:ann", verb="x", subject="z")
    with chained.database.read() as session:
        found = audit.verify(session, noted)
        assert audit.verify(session, audit.GENESIS).since == found.events
    assert (found.events, found.since) == (EVENTS + 3, 2)


def test_a_log_that_was_emptied_fits_in_itself_and_is_found_by_the_head(chained: Home) -> None:
    noted = head(chained)
    tamper(chained, "delete from audit_events")
    assert verify(chained) == 0
    with pytest.raises(StorageError, match="cut off, or it was made anew"):
        verify(chained, noted)


def test_a_chain_made_anew_fits_in_itself_and_is_found_by_the_head(chained: Home) -> None:
    """Who can write the database can do this; that is why a head is noted elsewhere."""
    noted = head(chained)
    with chained.database.write() as session:
        events = list(session.scalars(select(AuditEvent).order_by(AuditEvent.seq)))
        previous = audit.GENESIS
        for event in events:
            event.actor = "user:innocent"
            event.previous, event.digest = previous, ""
            previous = event.digest = audit._digest(event)
    assert verify(chained) == EVENTS + 1
    with pytest.raises(StorageError, match="made anew"):
        verify(chained, noted)


def test_where_an_act_came_from_is_written_and_chained(home: Home) -> None:
    with audit.coming_from("203.0.113.9"), home.database.write() as session:
        audit.append(session, actor="token:ci", verb="x", subject="y")
    with home.database.write() as session:
        audit.append(session, actor="lightship:reconciler", verb="x", subject="z")
    with home.database.read() as session:
        found = [e.origin for e in session.scalars(select(AuditEvent).order_by(AuditEvent.seq.desc()).limit(2))]
    assert found == ["", "203.0.113.9"]
    assert verify(home) == 3
    for forged in ("''", "'198.51.100.1'"):
        tamper(home, f"update audit_events set origin = {forged} where seq = 2")
        with pytest.raises(StorageError, match="content was changed"):
            verify(home)


@pytest.mark.parametrize(
    "statement",
    [
        "update audit_events set actor = 'user:eve' where seq = 4",
        "update audit_events set verb = 'device.revoke' where seq = 4",
        "update audit_events set subject = 'pump-9' where seq = 4",
        "update audit_events set detail = '{\"seq\": 99}' where seq = 4",
        "update audit_events set at = at + 1 where seq = 4",
        "update audit_events set digest = previous where seq = 4",
        "delete from audit_events where seq = 4",
        "delete from audit_events where seq = 1",
        "insert into audit_events values (0, 1, 'user:eve', 'x', 'y', '{}', '', '', '')",
        "insert into audit_events values (8, 1, 'user:eve', 'x', 'y', '{}', '', '', '')",
    ],
)
def test_a_changed_removed_or_inserted_event_is_found(chained: Home, statement: str) -> None:
    tamper(chained, statement)
    with pytest.raises(StorageError, match="does not fit the chain") as e:
        verify(chained)
    assert e.value.code == "storage.corrupt"


def test_two_events_that_change_places_are_found(chained: Home) -> None:
    tamper(
        chained,
        "update audit_events set seq = -1 where seq = 3",
        "update audit_events set seq = 3 where seq = 4",
        "update audit_events set seq = 4 where seq = -1",
    )
    with pytest.raises(StorageError, match="place 3"):
        verify(chained)


def test_a_removed_event_is_found_even_when_the_rest_is_renumbered(chained: Home) -> None:
    tamper(chained, "delete from audit_events where seq = 3", "update audit_events set seq = seq - 1 where seq > 3")
    with pytest.raises(StorageError):
        verify(chained)


def test_an_event_put_into_the_middle_is_found_even_when_the_rest_is_renumbered(chained: Home) -> None:
    tamper(
        chained,
        "update audit_events set seq = -seq - 1 where seq > 3",
        "update audit_events set seq = -seq where seq < 0",
        "insert into audit_events select 4, at, 'user:eve', verb, subject, detail, digest, digest, origin "
        "from audit_events where seq = 3",
    )
    with pytest.raises(StorageError, match="event 4 does not fit"):
        verify(chained)


def test_an_exported_log_verifies_line_by_line_and_a_changed_line_does_not(chained: Home) -> None:
    with chained.database.read() as session:
        lines = list(audit.lines(session))
    noted = head(chained)
    assert audit.check(map(audit.read_line, lines), noted).events == EVENTS + 1
    for wrong in (lines[1:], lines[:3] + lines[4:], [lines[1], lines[0], *lines[2:]], lines[:2] + lines[1:]):
        with pytest.raises(StorageError, match="does not fit"):
            audit.check(map(audit.read_line, wrong))
    with pytest.raises(StorageError, match="does not fit"):
        audit.check(map(audit.read_line, [line.replace("pump-3", "pump-4") for line in lines]))
    with pytest.raises(StorageError, match="cut off"):
        audit.check(map(audit.read_line, lines[:-1]), noted)
    with pytest.raises(StorageError, match="Not a line"):
        audit.read_line('{"seq": 1}')


def test_an_act_that_fails_leaves_no_event(home: Home) -> None:
    def act() -> None:
        with home.database.write() as session:
            audit.append(session, actor="user:ann", verb="model.release", subject="pump@1")
            raise KeyError

    before = verify(home)
    with pytest.raises(KeyError):
        act()
    assert verify(home) == before


details = st.dictionaries(
    st.text(max_size=8),
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12) | st.lists(st.integers(0, 9), max_size=3),
    max_size=4,
)  # fmt: skip


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(detail=details)
def test_any_detail_that_json_can_say_verifies_after_it_was_stored(home: Home, detail: dict[str, object]) -> None:
    with home.database.write() as session:
        event = audit.append(session, actor="user:ann", verb="x", subject="y", detail=detail)
    assert verify(home) == event.seq
    with closing(sqlite3.connect(home.path / "lightship.db")) as connection:
        (stored,) = connection.execute("select detail from audit_events where seq = ?", (event.seq,)).fetchone()
    assert json.loads(stored) == detail
