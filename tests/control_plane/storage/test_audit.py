"""The audit chain: whatever is done to stored events with a plain database tool, it shows."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightship.home import Home
from lightship.storage import audit
from lightship_agent.contract.codes import StorageError

EVENTS = 6  # besides the one that made the home


@pytest.fixture
def chained(home: Home) -> Home:
    with home.database.write() as session:
        for i in range(EVENTS):
            audit.append(session, actor="user:ann", verb="device.assign", subject=f"pump-{i}", detail={"seq": i})
    return home


def verify(home: Home) -> int:
    with home.database.read() as session:
        return audit.verify(session)


def tamper(home: Home, *statements: str) -> None:
    """As somebody with the file and a database tool would."""
    with closing(sqlite3.connect(home.path / "lightship.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_an_untouched_chain_is_whole_from_the_first_event(chained: Home) -> None:
    assert verify(chained) == EVENTS + 1


def test_a_log_cut_off_at_its_end_verifies_but_its_head_is_another(chained: Home) -> None:
    with chained.database.read() as session:
        noted = audit.head(session)
    tamper(chained, f"delete from audit_events where seq = {EVENTS + 1}")
    assert verify(chained) == EVENTS
    with chained.database.read() as session:
        assert audit.head(session) != noted


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
    ],
)
def test_a_changed_or_removed_event_is_found(chained: Home, statement: str) -> None:
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
