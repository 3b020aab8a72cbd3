"""The decider of what runs beside: every way in, and every way out."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.assignment import Beside
from lightship_agent.update import beside as b
from lightship_agent.update.machine import PENALTY_SECONDS

NOW = 1_000_000.0
CODES = ("update.golden", "update.swap", "link.slow", "update.deferred", "trust.not-released", "storage.full")


def companion(experiment: str = "e1", digest: str = "b", **how: object) -> Beside:
    facts = {"experiment": experiment, "model": "pump", "version": 2, "path": "p", "sha256": digest * 64, "length": 9}
    return msgspec.convert({**facts, **how}, Beside)


def seen(**how: object) -> b.Seen:
    return b.Seen(**{"serving": "a" * 64, "within_reach": frozenset({"e1", "e2"}), **how})  # type: ignore[arg-type]


def wanting(*companions: Beside) -> b.BesideState:
    return b.wants(b.BesideState(), companions, 4)


def test_what_is_wanted_is_fetched_then_tried_then_loaded_and_then_there_is_peace() -> None:
    one = companion()
    state = wanting(one)
    assert b.next_action(state, seen(), NOW) == b.Fetch(one)
    held = frozenset({one.sha256})
    assert b.next_action(state, seen(held=held), NOW) == b.Try(one)
    state = b.proven(b.begun(state, "e1"), one)
    assert b.next_action(state, seen(held=held), NOW) == b.Load(one)

    assert b.next_action(b.begun(state, "e1"), seen(held=held, up={"e1": one}), NOW) is None


def test_what_nobody_wants_any_more_is_dropped() -> None:
    assert b.next_action(wanting(), seen(up={"e1": companion()}), NOW) == b.Drop(companion())


def test_what_serves_needs_no_companion_of_itself() -> None:
    one = companion()

    assert b.next_action(wanting(one), seen(serving=one.sha256), NOW) is None
    assert b.next_action(wanting(one), seen(serving=one.sha256, up={"e1": one}), NOW) == b.Drop(one)


def test_another_bundle_under_the_same_experiment_replaces_the_old_one() -> None:
    old, new = companion(), companion(digest="c")

    assert b.next_action(wanting(new), seen(up={"e1": old}), NOW) == b.Drop(old)


def test_another_share_needs_no_other_trial() -> None:
    old, new = companion(share=0.1, mode="ab"), companion(share=0.5, mode="ab")

    assert b.next_action(wanting(new), seen(up={"e1": old}), NOW) == b.Load(new)


def test_what_can_not_be_fetched_waits_and_the_others_do_not() -> None:
    far, near = companion(), companion("e2", "c")
    state = b.proven(wanting(far, near), near)

    found = b.next_action(state, seen(held=frozenset({near.sha256}), within_reach=frozenset()), NOW)

    assert found == b.Load(near)


def test_what_is_no_longer_released_goes_out_though_it_ran() -> None:
    one = companion()

    assert b.next_action(wanting(one), seen(up={"e1": one}, refused=frozenset({"e1"})), NOW) == b.Drop(one)


def test_three_failures_keep_it_out_for_a_day_and_another_experiment_begins_anew() -> None:
    one, state = companion(), wanting(companion())
    for i in range(3):
        assert b.next_action(state, seen(), NOW + i) is not None
        state = b.failed(b.begun(state, "e1"), "e1", "update.golden", NOW + i)

    assert b.next_action(state, seen(), NOW + 60) is None
    assert b.next_action(state, seen(), NOW + PENALTY_SECONDS + 3) == b.Fetch(one)
    again = companion("e2")
    assert b.next_action(b.wants(state, (again,), 5), seen(), NOW + 60) == b.Fetch(again)


def test_what_is_not_its_fault_costs_it_nothing() -> None:
    state = wanting(companion())
    for code in ("link.unreachable", "update.deferred", "media.incomplete", "update.interrupted"):
        state = b.failed(b.begun(state, "e1"), "e1", code, NOW)

    assert (state.penalties, state.trying) == ({}, ())


def test_a_cut_while_it_is_on_trial_may_be_its_fault_and_it_is_tried_anew() -> None:
    one, state = companion(), b.proven(wanting(companion()), companion())
    held = frozenset({one.sha256})

    cut = b.started(b.begun(state, "e1"), NOW)

    assert len(cut.penalties["e1"].failed_at) == 1
    assert b.next_action(cut, seen(held=held), NOW) == b.Try(one)


def test_a_companion_that_takes_the_process_down_is_given_up_after_three_starts() -> None:
    one, starts = companion(), 0
    state, held = b.proven(wanting(one), one), frozenset({companion().sha256})
    while b.next_action(state, seen(held=held), NOW + starts) is not None:
        state = b.started(b.begun(b.proven(state, one), "e1"), NOW + starts)
        starts += 1

    assert starts == 3


def test_a_stop_in_good_order_and_a_cut_later_on_blame_nobody() -> None:
    trial = b.begun(wanting(companion()), "e1")

    assert b.started(b.stopped(trial), NOW).penalties == {}
    assert b.started(b.settled(trial, "e1"), NOW).penalties == {}


def test_it_is_looked_for_again_until_it_runs_or_must_wait() -> None:
    one = companion()
    state = wanting(one)
    assert b.open_until(state, seen(), NOW) is None
    assert b.open_until(state, seen(up={"e1": one}), NOW) == float("inf")
    for i in range(3):
        state = b.failed(state, "e1", "update.golden", NOW + i)

    assert b.open_until(state, seen(), NOW + 3) == NOW + 2 + PENALTY_SECONDS


EVENTS = st.lists(
    st.tuples(st.sampled_from(["fail", "prove", "begin", "settle", "start", "stop", "want", "act"]),
              st.sampled_from(["e1", "e2"]), st.sampled_from(CODES)),
    max_size=30,
)  # fmt: skip


class World:
    """What a shell does of it, without doing it."""

    companions = {"e1": companion(), "e2": companion("e2", "c")}  # noqa: RUF012 - read only

    def __init__(self) -> None:
        self.state, self.now = b.BesideState(), NOW
        self.up: dict[str, Beside] = {}
        self.held: set[str] = set()

    def happen(self, what: str, experiment: str, code: str) -> None:
        self.now += 1
        events = {
            "fail": lambda: b.failed(self.state, experiment, code, self.now),
            "prove": lambda: b.proven(self.state, self.companions[experiment]),
            "begin": lambda: b.begun(self.state, experiment),
            "settle": lambda: b.settled(self.state, experiment),
            "start": lambda: b.started(self.state, self.now),
            "stop": lambda: b.stopped(self.state),
            "want": lambda: b.wants(self.state, (self.companions[experiment],), 1),
            "act": lambda: self.state,
        }
        self.state = events[what]()
        if what == "start":
            self.up.clear()
        if what == "act":
            self.act()

    def next(self) -> b.Action | None:
        return b.next_action(self.state, seen(up=dict(self.up), held=frozenset(self.held)), self.now)

    def act(self) -> None:
        for _ in range(20):
            match self.next():
                case b.Fetch(x):
                    self.held.add(x.sha256)
                case b.Try(x):
                    self.state = b.proven(b.begun(self.state, x.experiment), x)
                case b.Load(x):
                    assert x in self.state.wanted
                    assert x.sha256 in self.state.proven
                    self.up[x.experiment] = x
                case b.Drop(x):
                    del self.up[x.experiment]


@given(EVENTS)
def test_whatever_happens_actions_end_and_only_what_is_wanted_and_was_tried_is_loaded(
    events: list[tuple[str, str, str]],
) -> None:
    world = World()
    for event in events:
        world.happen(*event)

    world.act()

    assert world.next() is None
    assert set(world.up.values()) <= set(world.state.wanted)
