"""The lease: one holder at a time, a higher epoch for whoever takes over."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightship.fleet import lease
from lightship.home import Home
from lightship.storage.models import Lease


def ask(home: Home, holder: str, now: int) -> int | None:
    with home.database.write() as session:
        return lease.acquire(session, "work", holder, now)


def test_a_lease_is_renewed_by_its_holder_and_refused_to_others(home: Home) -> None:
    assert [ask(home, "a", 0), ask(home, "a", 5_000), ask(home, "b", 9_000)] == [1, 1, None]
    assert ask(home, "b", 14_999) is None  # the renewal counts from when it was made
    assert ask(home, "b", 15_000) == 2
    assert ask(home, "a", 15_001) is None


def test_a_lease_given_back_is_free_at_once_but_only_its_holder_can_give_it(home: Home) -> None:
    ask(home, "a", 0)
    with home.database.write() as session:
        lease.release(session, "work", "b")
    assert ask(home, "b", 1) is None
    with home.database.write() as session:
        lease.release(session, "work", "a")
        lease.release(session, "never-taken", "a")
    assert ask(home, "b", 1) == 2


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 15_000)), min_size=1, max_size=12))
def test_no_two_hold_it_at_once_and_a_change_of_hands_raises_the_epoch(home: Home, asks: list[tuple[str, int]]) -> None:
    with home.database.write() as session:
        row = session.get(Lease, "work")
        if row is not None:
            session.delete(row)
    now, held, epochs = 0, ("", 0), [("", 0)]
    for holder, later in asks:
        now += later
        epoch = ask(home, holder, now)
        if epoch is None:
            assert held[0] != holder
            assert held[1] > now
            continue
        assert held[0] in ("", holder) or held[1] <= now
        before = epochs[-1]
        assert epoch == before[1] + (before[0] != holder)
        held = (holder, now + lease.TTL_MS)
        epochs.append((holder, epoch))
