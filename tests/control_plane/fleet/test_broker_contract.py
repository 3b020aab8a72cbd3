"""What is said of a broker, from what was seen of it."""

from __future__ import annotations

import json

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from lightship.fleet.broker_contract import EXPECTATIONS, Facts, Finding, Level, Share, exit_status, judge
from lightship.fleet.broker_trials import TRIALS

GOOD = Facts(
    v5=True, v311=True, named_by_credential=False, delivered=Share(20, 20),
    carried=("content type", "response topic", "correlation data", "user property"), retained=True, cleared=True,
    will_after=0.1, will_delayed=2.1, silent_cut_after=3.5, shared_5=(30, 30, 60), shared_311=(20, 40, 60),
    redelivered=Share(5, 5), redelivered_shared=Share(5, 5), acknowledged_again=0, session_kept=True,
    session_forgotten=True, expired_delivered=False, fresh_delivered=True, largest=1_000_000, window=(5, 6),
    queued=Share(2_000, 2_000), nobody=0x10, own_topic=True, foreign_write=False, foreign_write_reason=0x87,
    foreign_read=False, anonymous=False, tls="TLSv1.3", old_tls=False, plain=(), taken_over=0x8E,
)  # fmt: skip


def finding(name: str, **changes: object) -> Finding:
    changed = msgspec.structs.replace(GOOD, **changes)
    return next(f for f in judge(changed) if f.name == name)


def test_a_broker_that_does_it_all_has_nothing_missing_and_nothing_to_be_set() -> None:
    found = judge(GOOD)
    assert {f.level for f in found} == {Level.OK}
    assert {f.loses + f.remedy for f in found} == {""}
    assert exit_status(found) == 0


def test_what_was_not_tried_is_unknown_and_never_good() -> None:
    found = judge(Facts(trouble={"acl": "no credential"}))
    assert {f.level for f in found} == {Level.UNKNOWN}
    assert {f.found for f in found} == {"not tried", "no credential"}
    assert all(f.loses and f.remedy for f in found)


def test_every_row_names_a_trial_that_is_held_what_is_lost_and_what_to_set() -> None:
    assert {row.trial for row in EXPECTATIONS} - set(TRIALS) == {"versions"}
    assert len({row.name for row in EXPECTATIONS}) == len(EXPECTATIONS)
    for row in EXPECTATIONS:
        assert row.loses, row.name
        assert row.remedy.endswith("."), row.name


def test_a_small_queue_is_missing_and_costs_no_more_than_time() -> None:
    found = finding("a queue for who is away", queued=Share(100, 2_000))
    assert (found.level, found.found) == (Level.MISSING, "100 of 2000 kept")
    assert "asked for again" in found.loses
    assert exit_status([found]) == 3


def test_a_broker_that_lets_strangers_in_is_not_to_be_used() -> None:
    assert exit_status([finding("no strangers", anonymous=True)]) == 4
    assert exit_status([finding("no device speaks in another's name", foreign_write=True)]) == 4
    assert exit_status([finding("shared subscriptions", shared_5=(0, 0, 60), shared_311=None)]) == 4


def test_a_silent_refusal_is_told_from_a_loud_one_and_from_none() -> None:
    name = "a refusal is said"
    assert finding(name).level == Level.OK
    assert finding(name, foreign_write_reason=0x00).found == "silent: the device is told 0x00"
    assert finding(name, foreign_write_reason=-1).level == Level.OK  # it hangs up
    assert finding(name, foreign_write=True).level == Level.UNKNOWN


def test_no_tls_is_tolerated_on_this_machine_alone() -> None:
    assert finding("TLS 1.2 or newer", tls="").level == Level.MISSING
    assert finding("TLS 1.2 or newer", tls="", loopback=True).level == Level.OK
    assert finding("TLS 1.2 or newer", old_tls=True).level == Level.BROKEN


def test_a_will_that_comes_before_its_time_is_broken_and_one_that_never_comes_is_missing() -> None:
    assert finding("will delay", will_delayed=0.1).level == Level.BROKEN
    assert finding("will delay", will_delayed=-1.0).level == Level.MISSING


def test_a_trial_that_kills_the_broker_is_broken_and_what_came_after_it_unknown() -> None:
    dead = Facts(died="redelivery-shared", v5=True, v311=False)
    rows = {f.name: f for f in judge(dead)}
    assert rows["the same, of a shared subscription"].level == Level.BROKEN
    assert rows["one connection for one name"].level == Level.UNKNOWN


FACTS = st.builds(
    Facts,
    v5=st.none() | st.booleans(),
    v311=st.none() | st.booleans(),
    delivered=st.none() | st.builds(Share, st.integers(0, 20), st.just(20)),
    retained=st.none() | st.booleans(),
    cleared=st.none() | st.booleans(),
    will_after=st.none() | st.floats(-1, 100),
    shared_5=st.none() | st.tuples(st.integers(0, 60), st.integers(0, 60), st.just(60)),
    window=st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20)),
    nobody=st.none() | st.integers(0, 255),
    foreign_write=st.none() | st.booleans(),
    foreign_write_reason=st.none() | st.integers(-1, 255),
    anonymous=st.none() | st.booleans(),
    tls=st.none() | st.sampled_from(["", "TLSv1.2"]),
    plain=st.none() | st.just(()) | st.just((1_883,)),
    taken_over=st.none() | st.integers(-1, 255),
)


@given(facts=FACTS)
def test_whatever_was_seen_every_row_is_judged_and_the_exit_status_is_that_of_the_worst(facts: Facts) -> None:
    found = judge(facts)
    assert [f.name for f in found] == [row.name for row in EXPECTATIONS]
    bad = [f for f in found if f.level in (Level.MISSING, Level.BROKEN)]
    assert exit_status(found) == (4 if any(f.must for f in bad) else 3 if bad else 0)
    assert all(bool(f.loses) == (f.level != Level.OK) for f in found)
    json.dumps([f.facts() for f in found])
