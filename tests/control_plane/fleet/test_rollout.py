"""The rollout decider: worked tables of what it must do, and properties of everything it may do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.fleet.rollout import (
    TERMINAL_STATUSES,
    Assign,
    DeviceFact,
    Plan,
    Promote,
    Revert,
    RolloutState,
    Rules,
    Status,
    Verdict,
    WaveSpec,
    abort,
    device_statuses,
    make_waves,
    pause,
    resume,
    step,
)
from lightship_agent.contract.codes import FleetError

NEW, OLD = "b" * 64, "a" * 64
RULES = Rules(device_timeout=600.0, offline_after=180.0, gate_timeout=3_600.0)
PASS = Verdict(outcome="pass", sentence="As it should be.")
FAIL = Verdict(outcome="fail", sentence="The canary errs more.")
UNSURE = Verdict(outcome="inconclusive", sentence="Too few labels.")


def plan_for(*waves: tuple[str, ...], rules: Rules = RULES, gates: tuple[bool, ...] = (), previous: int = 1) -> Plan:
    gates = gates or tuple(i < len(waves) - 1 for i in range(len(waves)))
    specs = tuple(WaveSpec(name=f"wave {i}", count=1, gate=g) for i, g in enumerate(gates))
    return Plan(
        model="pump", version=2, digest=NEW, previous_version=previous, waves=waves, wave_specs=specs, rules=rules
    )


class Fleet:
    """Devices that report, and a rollout that looks at them."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.state, self.now = plan, RolloutState(), 1_000.0
        self.facts: dict[str, DeviceFact] = {}
        self.actions: list[object] = []
        for device in (d for wave in plan.waves for d in wave):
            self.report(device, OLD)

    def report(self, *devices_and_digest: str, committed: bool = True, failed: bool = False) -> None:
        *devices, digest = devices_and_digest
        for device in devices:
            self.facts[device] = DeviceFact(digest=digest, committed=committed, failed=failed, last_seen=self.now)

    def silent(self, *devices: str, since: float = 100_000.0) -> None:
        """They were last seen so long ago."""
        for device in devices:
            self.facts[device] = msgspec.structs.replace(self.facts[device], last_seen=self.now - since)

    def look(self, verdict: Verdict | None = None) -> str:
        self.state, actions = step(self.plan, self.state, self.facts, verdict, self.now)
        self.actions.extend(actions)
        return self.state.status

    def wait(self, seconds: float, *silent: str) -> None:
        """Time passes; all but the silent ones go on reporting what they reported last."""
        self.now += seconds
        for device, fact in self.facts.items():
            if device not in silent and fact.last_seen > 0:
                self.facts[device] = msgspec.structs.replace(fact, last_seen=self.now)

    @property
    def statuses(self) -> dict[str, str]:
        return {**device_statuses(self.plan, self.state, self.facts, self.now)}

    @property
    def assigned(self) -> list[tuple[str, ...]]:
        return [a.devices for a in self.actions if isinstance(a, Assign)]

    @property
    def promoted(self) -> bool:
        return any(isinstance(a, Promote) for a in self.actions)


# The ordinary story ---------------------------------------------------------------------------------------------------


def test_a_rollout_goes_canary_gate_rest_and_promotes_once_everyone_runs_it() -> None:
    fleet = Fleet(plan_for(("a",), ("b", "c")))
    assert (fleet.look(), fleet.assigned) == ("running", [("a",)])
    fleet.report("a", NEW, committed=False)
    fleet.look(PASS)
    assert fleet.statuses == {"a": "pending"}  # it runs it, and has not committed it
    fleet.report("a", NEW)
    fleet.look(UNSURE)
    assert (fleet.state.wave, fleet.state.reason) == (0, "Holding: Too few labels.")
    fleet.look(PASS)
    assert fleet.assigned == [("a",), ("b", "c")]
    assert not fleet.promoted
    fleet.report("b", NEW)
    assert fleet.look(PASS) == "running"
    fleet.report("c", NEW)
    assert fleet.look(PASS) == "completed"
    assert [a for a in fleet.actions if isinstance(a, Promote)] == [Promote()]


def test_a_single_wave_is_assigned_at_once_and_needs_no_verdict() -> None:
    fleet = Fleet(plan_for(("a", "b"), gates=(False,)))
    fleet.look()
    fleet.report("a", "b", NEW)
    assert fleet.look() == "completed"


def test_having_installed_it_is_not_running_it() -> None:
    fleet = Fleet(plan_for(("a",)))
    fleet.look()
    fleet.report("a", OLD)  # committed, but to what it ran before
    assert fleet.look(PASS) == "running"
    assert fleet.statuses == {"a": "pending"}


# The holes that others have -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("done", "failed", "share", "status"),
    [
        (10, 0, 0.95, "completed"),
        (19, 1, 0.95, "completed"),  # exactly at the threshold is enough
        (18, 2, 0.95, "paused"),  # all are terminal, below the threshold: hawkBit would slide on
        (5, 5, 0.95, "paused"),
        (5, 5, 0.50, "completed"),
        (0, 4, 0.95, "paused"),
        (7, 93, 0.07, "completed"),  # 0.07 × 100 is more than 7 in floating point
        (55, 45, 0.55, "completed"),
    ],
)
def test_a_wave_that_is_all_terminal_below_the_threshold_pauses(
    done: int, failed: int, share: float, status: str
) -> None:
    devices = tuple(f"d{i}" for i in range(done + failed))
    rules = msgspec.structs.replace(RULES, success_share=share, halt_share=1.0)
    fleet = Fleet(plan_for(devices, rules=rules, gates=(False,)))
    fleet.look()
    for i, device in enumerate(devices):
        fleet.report(device, NEW if i < done else OLD, failed=i >= done)
    assert fleet.look() == status
    assert fleet.promoted == (status == "completed")


@pytest.mark.parametrize(
    ("failed", "of", "share", "status"),
    [
        (1, 5, 0.2, "running"),  # equal is not greater
        (2, 5, 0.2, "paused"),
        (1, 4, 0.2, "paused"),
        (29, 100, 0.29, "running"),  # 0.29 × 100 is less than 29 in floating point
        (30, 100, 0.29, "paused"),
        (0, 5, 0.0, "running"),
        (1, 100, 0.0, "paused"),
    ],
)
def test_the_halt_is_strictly_above_its_share_and_does_not_wait_for_the_wave(
    failed: int, of: int, share: float, status: str
) -> None:
    devices = tuple(f"d{i}" for i in range(of))
    fleet = Fleet(plan_for(devices, rules=msgspec.structs.replace(RULES, halt_share=share)))
    fleet.look()
    for device in devices[:failed]:
        fleet.report(device, OLD, failed=True)
    assert fleet.look() == status


def test_too_few_terminal_devices_halt_nothing_yet() -> None:
    fleet = Fleet(plan_for(("a", "b", "c", "d"), rules=msgspec.structs.replace(RULES, min_sample=3)))
    fleet.look()
    fleet.report("a", "b", OLD, failed=True)
    assert fleet.look() == "running"
    fleet.report("c", NEW)
    assert fleet.look() == "paused"


def test_failures_of_earlier_waves_count_too() -> None:
    fleet = Fleet(plan_for(("a",), ("b", "c"), ("d",), rules=msgspec.structs.replace(RULES, halt_share=0.3)))
    fleet.look()
    fleet.report("a", NEW)
    fleet.look(PASS)
    fleet.report("a", OLD)  # it fell back by itself
    fleet.report("b", NEW)
    assert fleet.look(PASS) == "paused"
    assert "a" in fleet.state.reason


def test_a_device_that_falls_silent_after_its_assignment_times_out_and_counts_as_failed() -> None:
    fleet = Fleet(plan_for(("a", "b", "c")))
    fleet.look()
    fleet.look()
    fleet.report("a", "b", NEW)
    fleet.wait(599, "c")  # unseen for far longer than offline_after
    assert (fleet.look(), fleet.statuses["c"]) == ("running", "pending")
    fleet.wait(2, "c")
    assert fleet.look() == "paused"
    assert (fleet.statuses["c"], "c" in fleet.state.reason) == ("timed-out", True)


def test_a_device_that_is_online_and_does_nothing_times_out_as_well() -> None:
    fleet = Fleet(plan_for(("a",)))
    fleet.look()
    fleet.look()
    fleet.wait(601)
    assert fleet.look() == "paused"
    assert fleet.statuses == {"a": "timed-out"}


def test_a_device_that_was_off_all_the_time_never_blocks_a_wave() -> None:
    fleet = Fleet(plan_for(("a", "off"), ("b",)))
    fleet.silent("off")
    fleet.look()
    fleet.report("a", NEW)
    fleet.look(PASS)
    assert fleet.statuses["off"] == "offline"
    fleet.report("b", NEW)
    fleet.wait(100_000, "off")
    assert fleet.look(PASS) == "completed"


def test_a_device_that_comes_back_late_gets_its_full_time() -> None:
    fleet = Fleet(plan_for(("a", "late"), ("b",), rules=msgspec.structs.replace(RULES, halt_share=0.0)))
    fleet.silent("late")
    fleet.look()
    fleet.report("a", NEW)
    fleet.wait(50_000, "late")
    fleet.report("late", OLD)
    assert (fleet.look(), fleet.statuses["late"]) == ("running", "pending")
    fleet.wait(500)
    assert fleet.look() == "running"
    fleet.report("late", NEW)
    fleet.look(PASS)
    assert fleet.assigned == [("a", "late"), ("b",)]


def test_a_device_we_never_heard_of_is_offline() -> None:
    fleet = Fleet(plan_for(("a", "ghost")))
    del fleet.facts["ghost"]
    fleet.look()
    fleet.report("a", NEW)
    assert fleet.look() == "completed"


def test_nothing_is_promoted_that_no_device_has_run() -> None:
    fleet = Fleet(plan_for(("a", "b")))
    fleet.silent("a", "b")
    fleet.look()
    for _ in range(5):
        fleet.wait(100_000, "a", "b")
        assert fleet.look(PASS) == "running"
    assert fleet.state.reason == "Waiting: no device has run it yet."
    fleet.report("a", NEW)
    assert fleet.look() == "completed"


def test_a_device_that_was_done_and_runs_something_else_again_counts_as_failed() -> None:
    fleet = Fleet(plan_for(("a",), ("b",)))
    fleet.look()
    fleet.report("a", NEW)
    fleet.look(UNSURE)
    fleet.report("a", OLD)
    assert fleet.look(UNSURE) == "paused"
    assert fleet.statuses == {"a": "failed"}


def test_a_failure_reported_by_a_device_that_then_succeeds_is_forgotten() -> None:
    fleet = Fleet(plan_for(("a", "b", "c", "d", "e", "f")))
    fleet.look()
    fleet.report("a", OLD, failed=True)
    assert fleet.look() == "running"
    fleet.report("a", NEW, failed=True)  # its last step is old, its heartbeat is not
    assert fleet.look() == "running"
    assert fleet.statuses["a"] == "done"


# The gate -------------------------------------------------------------------------------------------------------------


def test_a_canary_that_is_worse_is_taken_back_at_once_even_while_others_are_under_way() -> None:
    fleet = Fleet(plan_for(("a", "b"), ("c",)))
    fleet.look()
    fleet.report("a", NEW)
    assert fleet.look(FAIL) == "rolling-back"
    assert fleet.actions[-1] == Revert(("a", "b"))
    assert fleet.look(FAIL) == "rolling-back"
    fleet.report("a", OLD)
    assert fleet.look() == "rolled-back"
    assert not fleet.promoted
    assert fleet.state.reason == FAIL.sentence


def test_with_nothing_to_go_back_to_a_worse_canary_ends_the_rollout() -> None:
    fleet = Fleet(plan_for(("a",), ("b",), previous=0))
    fleet.look()
    fleet.report("a", NEW)
    assert fleet.look(FAIL) == "aborted"
    assert fleet.assigned == [("a",)]


def test_without_evidence_the_wave_holds_and_then_pauses() -> None:
    fleet = Fleet(plan_for(("a",), ("b",)))
    fleet.look()
    fleet.report("a", NEW)
    for verdict in (None, UNSURE):
        assert fleet.look(verdict) == "running"
        fleet.wait(1_800)
    assert fleet.look(UNSURE) == "running"
    fleet.wait(1)
    assert fleet.look(UNSURE) == "paused"
    assert fleet.state.reason == "No verdict in time: Too few labels."
    assert fleet.assigned == [("a",)]


def test_a_canary_wave_that_nobody_runs_can_not_pass_whatever_the_verdict() -> None:
    fleet = Fleet(plan_for(("off",), ("b",)))
    fleet.silent("off")
    fleet.look()
    fleet.wait(10, "off")
    assert fleet.look(PASS) == "running"
    assert "none can give evidence" in fleet.state.reason
    fleet.wait(3_601, "off")
    assert fleet.look(PASS) == "paused"
    assert fleet.assigned == [("off",)]


def test_the_last_wave_is_not_held_for_a_verdict() -> None:
    fleet = Fleet(plan_for(("a",), gates=(True,)))
    fleet.look()
    fleet.report("a", NEW)
    assert fleet.look(UNSURE) == "completed"


# What operators do ----------------------------------------------------------------------------------------------------


def test_resuming_acknowledges_the_failures_seen_so_far_and_only_those() -> None:
    fleet = Fleet(plan_for(("a", "b", "c", "d"), rules=msgspec.structs.replace(RULES, halt_share=0.2)))
    fleet.look()
    fleet.report("a", OLD, failed=True)
    assert fleet.look() == "paused"
    fleet.state, actions = resume(fleet.plan, fleet.state, fleet.facts, fleet.now)
    assert (fleet.state.status, fleet.state.acknowledged, actions) == ("running", ("a",), ())
    assert fleet.look() == "running"
    fleet.report("b", OLD, failed=True)
    assert fleet.look() == "paused"
    fleet.state, _ = resume(fleet.plan, fleet.state, fleet.facts, fleet.now)
    fleet.report("c", "d", NEW)
    assert fleet.look() == "completed"


def test_resuming_over_a_rollout_that_failed_everywhere_does_not_make_it_champion() -> None:
    fleet = Fleet(plan_for(("a",)))
    fleet.look()
    fleet.report("a", OLD, failed=True)
    fleet.look()
    fleet.state, _ = resume(fleet.plan, fleet.state, fleet.facts, fleet.now)
    assert fleet.look() == "running"
    assert not fleet.promoted


def test_resuming_gives_the_gate_its_time_again() -> None:
    fleet = Fleet(plan_for(("a",), ("b",)))
    fleet.look()
    fleet.report("a", NEW)
    fleet.look(UNSURE)
    fleet.wait(3_601)
    assert fleet.look(UNSURE) == "paused"
    fleet.wait(100_000)
    fleet.state, _ = resume(fleet.plan, fleet.state, fleet.facts, fleet.now)
    assert fleet.look(UNSURE) == "running"


def test_a_paused_rollout_does_nothing_whatever_comes() -> None:
    fleet = Fleet(plan_for(("a",), ("b",)))
    fleet.look()
    fleet.state, _ = pause(fleet.state, "Lunch.")
    fleet.report("a", NEW)
    for verdict in (PASS, FAIL, None):
        assert fleet.look(verdict) == "paused"
    assert fleet.assigned == [("a",)]


def test_aborting_keeps_or_reverts() -> None:
    for revert, status, actions in ((True, "rolling-back", (Revert(("a",)),)), (False, "aborted", ())):
        fleet = Fleet(plan_for(("a",), ("b",)))
        fleet.look()
        state, found = abort(fleet.plan, fleet.state, revert=revert, reason="Enough.", now=fleet.now)
        assert (state.status, state.reason, found) == (status, "Enough.", actions)


def test_going_back_waits_for_devices_that_still_run_it_but_not_for_ever() -> None:
    fleet = Fleet(plan_for(("a", "b"), ("c",)))
    fleet.look()
    fleet.report("a", "b", NEW)
    assert fleet.look(FAIL) == "rolling-back"
    fleet.report("a", OLD)
    fleet.wait(600)
    assert fleet.look() == "rolling-back"
    fleet.wait(1)
    assert fleet.look() == "aborted"
    assert "still runs on b" in fleet.state.reason


def test_going_back_does_not_wait_for_a_device_that_is_off() -> None:
    fleet = Fleet(plan_for(("a",), ("b",)))
    fleet.look()
    fleet.report("a", NEW)
    fleet.look(FAIL)
    fleet.wait(181, "a")
    assert fleet.look() == "rolled-back"


def test_a_rollback_that_hangs_can_be_given_up_but_not_begun_again() -> None:
    fleet = Fleet(plan_for(("a",), ("b",)))
    fleet.look()
    fleet.report("a", NEW)
    fleet.look(FAIL)
    with pytest.raises(FleetError):
        abort(fleet.plan, fleet.state, revert=True, reason="", now=fleet.now)
    state, actions = abort(fleet.plan, fleet.state, revert=False, reason="I go there.", now=fleet.now)
    assert (state.status, actions) == ("aborted", ())


@pytest.mark.parametrize("status", ["completed", "rolled-back", "aborted"])
def test_what_is_over_is_over(status: Status) -> None:
    fleet = Fleet(plan_for(("a",)))
    over = msgspec.structs.replace(fleet.state, status=status)
    acts: list[Callable[[], object]] = [
        lambda: pause(over, ""),
        lambda: resume(fleet.plan, over, fleet.facts, 0.0),
        lambda: abort(fleet.plan, over, revert=False, reason="", now=0.0),
        lambda: abort(fleet.plan, over, revert=True, reason="", now=0.0),
    ]
    for act in acts:
        with pytest.raises(FleetError, match=status) as e:
            act()
        assert e.value.code == "fleet.rollout-state"
    assert step(fleet.plan, over, fleet.facts, FAIL, 0.0) == (over, ())


# Waves ----------------------------------------------------------------------------------------------------------------

ids = st.lists(st.from_regex(r"[a-z0-9][a-z0-9-]{1,8}", fullmatch=True), min_size=1, max_size=40, unique=True)
sized = st.one_of(
    st.builds(WaveSpec, name=st.just("n"), count=st.integers(1, 10)),
    st.builds(WaveSpec, name=st.just("s"), share=st.floats(0.01, 1.0)),
)
specs = st.lists(sized, max_size=4).map(lambda some: [*some, WaveSpec(name="rest", gate=False)])


@given(devices=ids, waves=specs, seed=st.text(max_size=5))
def test_waves_are_a_partition_in_an_order_that_only_the_seed_decides(
    devices: list[str], waves: list[WaveSpec], seed: str
) -> None:
    dealt = make_waves(devices, waves, seed=seed)
    assert Counter(d for wave in dealt for d in wave) == Counter(devices)
    assert all(dealt)
    assert make_waves(sorted(devices, reverse=True), waves, seed=seed) == dealt
    for wave, spec in zip(dealt[:-1], waves, strict=False):
        assert len(wave) == spec.count or len(wave) == max(1, -(-spec.share * len(devices) // 1))


def test_another_version_has_another_canary() -> None:
    devices = [f"pump-{i}" for i in range(10)]
    rest = [WaveSpec(name="canary", count=1), WaveSpec(name="rest")]
    canaries = {make_waves(devices, rest, seed=f"pump@{v}")[0] for v in range(20)}
    assert len(canaries) > 4


def test_the_canary_wave_has_as_many_devices_as_asked_for() -> None:
    devices = [f"pump-{i}" for i in range(10)]
    waves = make_waves(
        devices, [WaveSpec(name="c", count=2), WaveSpec(name="s", share=0.25), WaveSpec(name="r")], seed=""
    )
    assert [len(w) for w in waves] == [2, 3, 5]
    assert [len(w) for w in make_waves(devices[:2], [WaveSpec(name="c", count=5), WaveSpec(name="r")], seed="")] == [2]


@pytest.mark.parametrize(
    ("devices", "waves"),
    [
        ([], [WaveSpec(name="all")]),
        (["a"], []),
        (["a"], [WaveSpec(name="x", count=-1)]),
        (["a"], [WaveSpec(name="x", share=1.5)]),
        (["a"], [WaveSpec(name="x", share=float("nan")), WaveSpec(name="r")]),
        (["a"], [WaveSpec(name="nobody"), WaveSpec(name="r")]),
    ],
)
def test_a_plan_that_selects_nobody_or_makes_no_sense_is_refused(devices: list[str], waves: list[WaveSpec]) -> None:
    with pytest.raises(FleetError) as e:
        make_waves(devices, waves, seed="")
    assert e.value.code == "fleet.rollout-spec"


# Whatever happens -----------------------------------------------------------------------------------------------------

DEVICES = tuple("abcdefg")
facts = st.fixed_dictionaries(
    {},
    optional={
        d: st.builds(
            DeviceFact,
            digest=st.sampled_from([NEW, OLD, ""]),
            committed=st.booleans(),
            failed=st.booleans(),
            last_seen=st.floats(0, 20_000),
        )
        for d in DEVICES
    },
)
moments = st.lists(
    st.tuples(
        facts,
        st.sampled_from([None, PASS, FAIL, UNSURE]),
        st.floats(0, 3_000),
        st.sampled_from(["", "", "", "pause", "resume", "keep", "revert"]),
    ),
    max_size=14,
)
plans = st.builds(
    lambda cuts, previous, halt, success: plan_for(
        *[w for w in (DEVICES[: cuts[0]], DEVICES[cuts[0] : cuts[1]], DEVICES[cuts[1] :]) if w],
        previous=previous,
        rules=msgspec.structs.replace(RULES, halt_share=halt, success_share=success),
    ),
    st.tuples(st.integers(1, 6), st.integers(1, 7)).map(sorted),
    st.integers(0, 1),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from([0.5, 0.95, 1.0]),
)


def intervene(fleet: Fleet, what: str) -> None:
    try:
        if what == "pause":
            fleet.state, _ = pause(fleet.state, "by hand")
        elif what == "resume":
            fleet.state, _ = resume(fleet.plan, fleet.state, fleet.facts, fleet.now)
        elif what:
            fleet.state, actions = abort(fleet.plan, fleet.state, revert=what == "revert", reason="", now=fleet.now)
            fleet.actions.extend(actions)
    except FleetError:
        pass


def ran_at_the_end(fleet: Fleet, facts: Mapping[str, DeviceFact]) -> bool:
    return any(f.digest == NEW and f.committed for f in facts.values())


@settings(max_examples=300)
@given(plan=plans, story=moments)
def test_whatever_devices_report_and_operators_do(plan: Plan, story: list[tuple[object, ...]]) -> None:
    fleet = Fleet(plan)
    evidence = False
    for reported, verdict, later, hand in story:
        before = fleet.state
        fleet.facts, fleet.now = reported, fleet.now + later  # type: ignore[assignment, operator]
        intervene(fleet, str(hand))
        status = fleet.look(verdict)  # type: ignore[arg-type]
        evidence = evidence or ran_at_the_end(fleet, fleet.facts)
        after = fleet.state
        # Waves open one after the other, each whole, each once.
        assert before.wave <= after.wave <= before.wave + 1
        assert set(after.assigned_at) == {d for w in plan.waves[: after.wave + 1] for d in w}
        assert after.assigned_at.keys() >= before.assigned_at.keys()
        # What is over stays over; nothing else is without a reason.
        assert before.status not in TERMINAL_STATUSES or after == before
        assert status != "paused" or after.reason
        # A gate is passed by a verdict and by nothing else.
        if after.wave > before.wave >= 0 and plan.wave_specs[before.wave].gate:
            assert verdict == PASS
        # The state survives being stored.
        assert msgspec.convert(msgspec.to_builtins(after), RolloutState) == after
    assert [len(w) for w in fleet.assigned] == [len(w) for w in plan.waves[: fleet.state.wave + 1]]
    promotions = sum(isinstance(a, Promote) for a in fleet.actions)
    assert promotions == (fleet.state.status == "completed")
    assert not promotions or evidence
    assert plan.previous_version or not any(isinstance(a, Revert) for a in fleet.actions)


@settings(max_examples=150)
@given(plan=plans, failing=st.sets(st.sampled_from(DEVICES)), off=st.sets(st.sampled_from(DEVICES)))
def test_no_rollout_is_stuck_without_a_reason(plan: Plan, failing: set[str], off: set[str]) -> None:
    """Every device ends somehow: within the timeouts the rollout is over, paused, or says what it waits for."""
    fleet = Fleet(plan)
    fleet.silent(*off)
    for _ in range(60):
        if fleet.look(PASS) != "running":
            break
        for device in (d for wave in fleet.assigned for d in wave):
            if device not in off:
                fleet.report(device, OLD if device in failing else NEW, failed=device in failing)
        fleet.wait(120, *off)
    assert fleet.state.status != "running" or "aiting" in fleet.state.reason or "olding" in fleet.state.reason
