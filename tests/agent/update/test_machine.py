"""The state machine under any sequence of events: what is committed changes by commit only, and all else leads back."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as a_field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship_agent.update import machine as m

DIGESTS = tuple(c * 64 for c in "abcd")
CODES = (
    "update.golden", "update.soak", "link.unreachable", "trust.digest", "storage.full", "update.interrupted",
    "update.deferred", "update.superseded",
)  # fmt: skip


def target(digest: str = DIGESTS[0], seq: int = 1, *, offline: bool = False, retry: bool = False) -> m.Target:
    return m.Target(
        model="pump", version=DIGESTS.index(digest) + 1, path=f"bundles/pump/{digest[0]}.tar", sha256=digest, length=9,
        seq=seq, rollout="ro", offline=offline, retry=retry,
    )  # fmt: skip


events = st.one_of(
    st.builds(
        m.Assigned,
        st.builds(target, st.sampled_from(DIGESTS), st.integers(0, 12), offline=st.booleans(), retry=st.booleans()),
    ),
    st.just(m.Advanced()),
    st.builds(m.Failed, st.sampled_from(CODES), st.just("words")),
    st.just(m.Started()),
    st.just(m.PenaltyCleared()),
    st.just(m.WentBack("words")),
)
#: Events and the seconds before each of them.
histories = st.lists(st.tuples(events, st.sampled_from([0.0, 1.0, 60.0, 3_600.0, 90_000.0])), max_size=60)


@dataclass
class Walk:
    """A machine, and the model of it that the promises are about."""

    state: m.UpdateState = a_field(default_factory=m.UpdateState)
    now: float = 1_000_000.0
    serving: str | None = None  # what a device that obeys the actions would serve
    failures: dict[str, list[float]] = a_field(default_factory=dict)

    def take(self, event: m.Event, wait: float = 0.0) -> tuple[m.Action, ...]:
        self.now += wait
        before = self.state
        self.state, actions = m.step(before, event, self.now)
        for action in actions:
            if isinstance(action, m.Swap):
                self.serving = action.target.sha256
            elif isinstance(action, m.Restore):
                self.serving = action.target.sha256 if action.target else None
        self.check(before, event, actions)
        return actions

    def check(self, before: m.UpdateState, event: m.Event, actions: tuple[m.Action, ...]) -> None:
        after = self.state
        now_runs, ran = _digest(after.current), _digest(before.current)
        if now_runs != ran:
            assert after.previous == before.current
            if isinstance(event, m.WentBack):
                assert (before.phase, after.current) == ("idle", before.previous)
                assert m.Restore(after.current) in actions
            else:
                assert isinstance(event, m.Advanced)
                assert before.candidate is not None
                assert before.phase == ("swapped" if before.candidate.offline else "reaching")
                assert after.current == before.candidate
        assert after.floor >= before.floor or after.director != before.director
        assert (after.candidate is None) == (after.phase == "idle")
        if isinstance(event, m.Started):
            assert after.phase == "idle"
            assert actions[0] == m.Restore(before.current)
        if isinstance(event, m.Failed) and before.phase in {"swapped", "reaching"}:
            assert m.Restore(before.current) in actions
        for action in actions:
            if isinstance(action, m.Fetch):
                waiting = before.penalties.get(action.target.sha256, m.Penalty())
                # By a clock that was set back since, the wait began now.
                ahead = max(0.0, max(waiting.failed_at, default=0.0) - self.now)
                assert self.now >= waiting.until - ahead or action.target.retry
            if isinstance(action, m.Reach):
                assert not action.target.offline
            if isinstance(action, m.CollectGarbage):
                assert {_digest(after.current), _digest(after.previous)} <= {*action.keep, None}
        if after.phase == "idle":
            assert self.serving == now_runs or not isinstance(event, m.Started | m.Failed | m.Advanced)


def _digest(found: m.Target | None) -> str | None:
    return found.sha256 if found else None


@settings(max_examples=500)
@given(history=histories)
def test_every_promise_holds_after_every_event(history: list[tuple[m.Event, float]]) -> None:
    walk = Walk()
    walk.take(m.Started())

    for event, wait in history:
        walk.take(event, wait)


@given(history=histories)
def test_at_rest_a_device_serves_what_is_committed(history: list[tuple[m.Event, float]]) -> None:
    walk = Walk()
    walk.take(m.Started())
    for event, wait in history:
        walk.take(event, wait)
        if walk.state.phase == "idle":
            assert walk.serving == _digest(walk.state.current)


@given(history=histories)
def test_the_state_survives_being_written_and_read_at_any_point(history: list[tuple[m.Event, float]]) -> None:
    walk = Walk()
    for event, wait in history:
        walk.take(event, wait)

    assert msgspec.json.decode(msgspec.json.encode(walk.state), type=m.UpdateState) == walk.state


@given(history=histories)
def test_a_restart_at_any_point_and_twice_leads_back_to_what_is_committed(history: list[tuple[m.Event, float]]) -> None:
    walk = Walk()
    for event, wait in history:
        walk.take(event, wait)
        current = walk.state.current
        once, actions = m.step(walk.state, m.Started(), walk.now)
        twice, again = m.step(once, m.Started(), walk.now)

        assert once.current == current
        assert actions[0] == again[0] == m.Restore(current)
        assert (twice.phase, twice.current, twice.floor) == ("idle", current, walk.state.floor)


@given(history=histories)
def test_no_more_than_one_thing_is_begun_at_a_time(history: list[tuple[m.Event, float]]) -> None:
    walk = Walk()
    for event, wait in history:
        begun = [a for a in walk.take(event, wait) if isinstance(a, m.Fetch | m.Try | m.Swap | m.Reach)]
        assert len(begun) <= 1


# Stories --------------------------------------------------------------------------------------------------------------


def through(walk: Walk, digest: str, seq: int, steps: int = 4) -> None:
    walk.take(m.Assigned(target(digest, seq)))
    for _ in range(steps):
        walk.take(m.Advanced())


def test_four_steps_forward_commit_and_each_is_reported() -> None:
    walk = Walk()
    said = []
    for event in (m.Assigned(target()), m.Advanced(), m.Advanced(), m.Advanced(), m.Advanced()):
        said += [a.step for a in walk.take(event) if isinstance(a, m.Report)]

    assert said == ["fetching", "trying", "soaking", "committed"]
    assert walk.state.current == target()
    assert walk.state.previous is None


@pytest.mark.parametrize("steps", range(4))
def test_a_failure_in_any_phase_leads_back(steps: int) -> None:
    walk = Walk()
    through(walk, DIGESTS[0], 1)
    through(walk, DIGESTS[1], 2, steps)

    walk.take(m.Failed("update.golden", "words"))

    assert walk.state.phase == "idle"
    assert walk.state.last_code == "update.golden"
    assert walk.serving == _digest(walk.state.current) == DIGESTS[0]


def test_an_assignment_in_the_middle_of_another_waits_for_the_next_look() -> None:
    walk = Walk()
    through(walk, DIGESTS[0], 1, 2)

    actions = walk.take(m.Assigned(target(DIGESTS[1], 2)))

    assert actions == ()
    assert walk.state.floor == 1
    assert _digest(walk.state.candidate) == DIGESTS[0]


def test_three_failures_put_a_digest_into_the_box_for_a_day() -> None:
    walk = Walk()
    for n in range(3):
        assert any(isinstance(a, m.Fetch) for a in walk.take(m.Assigned(target(seq=1)), 1_000)), n
        walk.take(m.Failed("update.golden"))

    assert walk.take(m.Assigned(target(seq=1)), m.PENALTY_SECONDS - 1) == ()
    news = walk.take(m.Assigned(target(seq=2)))
    assert [a.code for a in news if isinstance(a, m.Report)] == ["update.penalty"]
    assert any(isinstance(a, m.Fetch) for a in walk.take(m.Assigned(target(seq=2)), 2))


def test_five_failures_in_a_row_of_whatever_digests_put_the_last_into_the_box() -> None:
    walk = Walk()
    for n, digest in enumerate((DIGESTS[0], DIGESTS[1], DIGESTS[0], DIGESTS[1], DIGESTS[2])):
        walk.take(m.Assigned(target(digest, n + 1)))
        walk.take(m.Failed("update.golden"))

    assert walk.state.penalties[DIGESTS[2]].until == walk.now + m.PENALTY_SECONDS


@pytest.mark.parametrize("code", ["link.unreachable", "link.status", "link.slow", "update.interrupted"])
def test_the_network_and_a_graceful_stop_are_nobodys_fault(code: str) -> None:
    walk = Walk()
    for _ in range(10):
        walk.take(m.Assigned(target()))
        walk.take(m.Failed(code))

    assert walk.state.penalties == {}


@pytest.mark.parametrize(("steps", "blamed"), [(0, False), (1, True), (2, True), (3, True)])
def test_a_cut_while_trying_or_soaking_counts_and_one_while_downloading_does_not(steps: int, blamed: bool) -> None:
    walk = Walk()
    through(walk, DIGESTS[0], 1, steps)

    walk.take(m.Started())

    assert (DIGESTS[0] in walk.state.penalties) == blamed


def test_a_commit_forgives_what_the_bundle_did_before() -> None:
    walk = Walk()
    walk.take(m.Assigned(target()))
    walk.take(m.Failed("update.budget"))
    through(walk, DIGESTS[0], 1)

    assert walk.state.penalties == {}


def test_a_failure_that_was_noted_while_the_clock_was_a_year_ahead_holds_nothing_back_for_a_year() -> None:
    walk = Walk()
    year = 365 * 86_400.0
    walk.take(m.Assigned(target()), year)
    walk.take(m.Failed("update.soak"))

    assert any(isinstance(a, m.Fetch) for a in walk.take(m.Assigned(target()), -year))


def test_a_box_that_was_closed_while_the_clock_was_ahead_opens_a_day_after_it_was_set_right() -> None:
    walk = Walk()
    walk.take(m.Assigned(target()), 3 * 86_400.0)
    walk.take(m.Failed("update.golden"))
    for _ in range(2):
        walk.take(m.Assigned(target()))
        walk.take(m.Failed("update.golden"))

    assert walk.take(m.Assigned(target()), -3 * 86_400.0) == ()
    assert walk.take(m.Assigned(target()), m.PENALTY_SECONDS - 1) == ()
    assert any(isinstance(a, m.Fetch) for a in walk.take(m.Assigned(target()), 1))


def test_failures_that_were_noted_while_the_clock_was_ahead_are_no_burst() -> None:
    walk = Walk()
    for n in range(m.BURST_TRIES - 1):
        walk.take(m.Assigned(target(DIGESTS[n % 2], n + 1)), 86_400.0 if n == 0 else 0.0)
        walk.take(m.Failed("update.golden"))
    walk.take(m.Assigned(target(DIGESTS[2], 9)), -86_400.0)
    walk.take(m.Failed("update.golden"))

    assert any(isinstance(a, m.Fetch) for a in walk.take(m.Assigned(target(DIGESTS[2], 9))))


@pytest.mark.parametrize("phase", ["fetching", "trying", "swapped", "reaching"])
def test_a_stored_phase_without_a_candidate_is_rest(phase: m.Phase) -> None:
    state = m.UpdateState(phase=phase, current=target(DIGESTS[1]))

    after, actions = m.step(state, m.Started(), 0.0)

    assert (after.phase, after.penalties) == ("idle", {})
    assert actions == (m.Restore(state.current),)


def test_an_assignment_that_wants_nothing_new_has_the_rest_removed() -> None:
    walk = Walk()
    through(walk, DIGESTS[0], 1)

    assert walk.take(m.Assigned(target(seq=1))) == (m.CollectGarbage((DIGESTS[0],)),)


def test_an_operator_can_empty_the_box() -> None:
    walk = Walk()
    for _ in range(3):
        walk.take(m.Assigned(target()))
        walk.take(m.Failed("update.golden"))
    walk.take(m.PenaltyCleared())

    assert any(isinstance(a, m.Fetch) for a in walk.take(m.Assigned(target())))


@pytest.mark.parametrize(
    ("absent", "current", "previous"),
    [
        ((), 1, 0),
        ((DIGESTS[1],), 0, None),
        ((DIGESTS[0],), 1, None),
        ((DIGESTS[0], DIGESTS[1]), None, None),
        ((DIGESTS[3],), 1, 0),
    ],
)
def test_what_the_store_lost_is_not_served_and_may_come_again(
    absent: tuple[str, ...], current: int | None, previous: int | None
) -> None:
    walk = Walk()
    through(walk, DIGESTS[0], 1)
    through(walk, DIGESTS[1], 2)

    walk.state, actions = m.step(walk.state, m.Started(absent), walk.now)

    assert _digest(walk.state.current) == (None if current is None else DIGESTS[current])
    assert _digest(walk.state.previous) == (None if previous is None else DIGESTS[previous])
    assert actions[0] == m.Restore(walk.state.current)
    assert walk.state.floor == 2
    again = m.step(walk.state, m.Assigned(target(DIGESTS[1], 2)), walk.now)[1]
    assert any(isinstance(a, m.Fetch) for a in again) == (current != 1)


# Not now, and going back ----------------------------------------------------------------------------------------------


def deferred(reason: str) -> m.Failed:
    return m.Failed(m.DEFERRED, reason)


def test_not_now_is_reported_once_however_often_it_is_found() -> None:
    walk = Walk()
    walk.take(m.Assigned(target(seq=1)))
    first = walk.take(deferred("closed until 22:00"))
    walk.take(m.Assigned(target(seq=1)))

    again = walk.take(deferred("closed until 22:00"))
    walk.take(m.Assigned(target(seq=1)))
    other = walk.take(deferred("somebody objects"))

    assert [a.step for a in first if isinstance(a, m.Report)] == ["waiting"]
    assert again == ()
    assert [a.step for a in other if isinstance(a, m.Report)] == ["waiting"]
    assert walk.state.penalties == {}


def test_a_commit_and_a_failure_end_the_waiting() -> None:
    for end in (m.Failed("update.golden"), m.Started()):
        walk = Walk()
        walk.take(m.Assigned(target(seq=1)))
        walk.take(deferred("later"))
        assert walk.state.waiting is not None
        walk.take(m.Assigned(target(seq=1)))
        walk.take(m.Advanced())
        walk.take(end)
        assert walk.state.waiting is None


def test_what_was_carried_here_is_committed_without_reaching_anybody() -> None:
    walk = Walk()
    walk.take(m.Assigned(target(seq=1, offline=True)))
    for _ in range(2):
        walk.take(m.Advanced())

    actions = walk.take(m.Advanced())

    assert walk.state.phase == "idle"
    assert not any(isinstance(a, m.Reach) for a in actions)
    assert _digest(walk.state.current) == DIGESTS[0]


def test_going_back_twice_is_being_where_one_was() -> None:
    walk = Walk()
    for seq, digest in enumerate(DIGESTS[:2], start=1):
        walk.take(m.Assigned(target(digest, seq)))
        for _ in range(4):
            walk.take(m.Advanced())
    there = walk.state.current

    walk.take(m.WentBack("it misreads"))
    assert walk.serving == DIGESTS[0]
    assert walk.state.penalties[DIGESTS[1]].until > walk.now
    walk.take(m.WentBack("it did not"))

    assert walk.state.current == there
    assert walk.serving == DIGESTS[1]


def test_new_keys_of_the_director_start_the_floor_anew_and_nothing_else_does() -> None:
    walk = Walk()
    walk.take(m.Assigned(target(DIGESTS[0], 2**62), "1:stolen"))
    for _ in range(4):
        walk.take(m.Advanced())

    assert walk.take(m.Assigned(target(DIGESTS[1], 7), "1:stolen")) == ()
    assert (walk.state.floor, walk.state.phase) == (2**62, "idle")
    walk.take(m.Assigned(target(DIGESTS[1], 7), "1:fresh"))

    assert (walk.state.floor, walk.state.director, walk.state.phase) == (7, "1:fresh", "fetching")
    walk.take(m.Failed("link.unreachable"))
    assert walk.take(m.Assigned(target(DIGESTS[1], 6), "1:fresh")) == ()


def test_a_retry_that_is_no_news_forgives_nothing() -> None:
    walk = Walk()
    for seq in (1, 2, 3):
        walk.take(m.Assigned(target(seq=seq)))
        walk.take(m.Failed("update.golden"))
    boxed = walk.state.penalties

    walk.take(m.Assigned(target(seq=3, retry=True)))

    assert walk.state.penalties == boxed
