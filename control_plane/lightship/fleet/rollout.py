"""Fleet: the pure rollout decider, what the fleet does next.

    running ──last wave done──▶ completed
       │  ▲ resume
       │  └─────────── paused ◀── too many failures, or no verdict in time
       └──canary worse than control──▶ rolling-back ──▶ rolled-back        abort ──▶ rolling-back or aborted

Rules:
* no I/O and no clock: `step(plan, state, facts, now, …)` gives the next state and the actions;
* a device is done only when its own report says that it runs the digest and has committed it; never because an
  install said so; a device that was done and runs something else again counts as failed (a local fallback);
* a device that falls silent after its assignment times out and counts as failed: the model may be the reason; a
  device that was not seen since never blocks a wave, and its time begins when it comes back;
* a wave closes when every live device is terminal; it succeeds with done/terminal ≥ success_share;
  the halt rule, failed/assigned > halt_share with at least min_sample terminal, is judged at every step, for all
  waves so far; then the rollout pauses, and resuming acknowledges the failures already seen;
* an all-terminal wave below the threshold pauses; it never slides on;
* a gated wave moves on only with the verdict "pass"; "fail" rolls back; "inconclusive" holds, and pauses when the
  hold lasts longer than gate_timeout; a wave of which no device runs it can't be judged, and holds;
* nothing is promoted that no device has run;
* going back ends too: a device that still runs the digest after device_timeout is named, and the rollout is over.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from lightship_agent.contract.codes import FleetError

Status = Literal["running", "paused", "rolling-back", "completed", "rolled-back", "aborted"]
DeviceStatus = Literal["pending", "done", "failed", "timed-out", "offline"]
TERMINAL_STATUSES: frozenset[Status] = frozenset({"completed", "rolled-back", "aborted"})


class WaveSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One wave: a count or a share of what remains; the last wave always takes the rest."""

    name: str
    count: int = 0
    share: float = 0.0  # 0..1 of all selected devices
    gate: bool = True


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Thresholds; durations in seconds."""

    success_share: float = 0.95
    halt_share: float = 0.2
    min_sample: int = 1
    device_timeout: float = 1_800.0  # for a device that was seen, to be done or to say that it failed
    offline_after: float = 900.0  # unseen for so long: offline
    gate_timeout: float = 86_400.0
    require_labels: bool = True


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided when the rollout was created: which device is in which wave."""

    model: str
    version: int
    digest: str
    previous_version: int  # 0: nothing to go back to
    waves: tuple[tuple[str, ...], ...]
    wave_specs: tuple[WaveSpec, ...]
    rules: Rules = Rules()


class RolloutState(msgspec.Struct, frozen=True, kw_only=True):
    """The decider's memory."""

    status: Status = "running"
    wave: int = -1  # the wave under way; -1 before the first
    assigned_at: dict[str, float] = {}
    seen_at: dict[str, float] = {}  # device -> when it was first online since its assignment
    done: tuple[str, ...] = ()  # devices seen running the digest, committed
    closed_at: dict[str, float] = {}  # wave number -> when all its live devices were terminal
    acknowledged: tuple[str, ...] = ()  # failures an operator has seen and resumed over
    reverting_since: float = 0.0  # 0: it is not rolling back
    reason: str = ""


class DeviceFact(msgspec.Struct, frozen=True, kw_only=True):
    """What a device has reported, and nothing that we merely hope."""

    digest: str  # running
    committed: bool  # its update machine rests
    failed: bool  # it reported failure or refusal for this rollout
    last_seen: float  # Unix seconds


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The gate's word on the wave under way."""

    outcome: Literal["pass", "fail", "inconclusive"]
    sentence: str = ""


class Assign(msgspec.Struct, frozen=True):
    """Tell these devices to run the rollout's version."""

    devices: tuple[str, ...]


class Revert(msgspec.Struct, frozen=True):
    """Tell these devices to run the previous version again."""

    devices: tuple[str, ...]


class Promote(msgspec.Struct, frozen=True):
    """Make the version the champion."""


Action = Assign | Revert | Promote
Result = tuple[RolloutState, tuple[Action, ...]]


def make_waves(devices: Sequence[str], specs: Sequence[WaveSpec], *, seed: str) -> tuple[tuple[str, ...], ...]:
    """Deal `devices` to waves in a hash order that is fixed by `seed`; earlier ones in `devices` are not favoured.

    Wave i is that of `specs[i]`; where devices run out, the last waves are missing.

    Args:
        devices: device ids; those fit to be canaries first is the caller's choice by passing them apart.
        specs: the waves; the last takes what is left.
        seed: e.g. the version that is rolled out.

    Raises:
        FleetError: fleet.rollout-spec.
    """
    if not devices:
        raise FleetError("fleet.rollout-spec", "The selector matches no device.", remedy="See `lightship device list`.")
    if not specs or any(s.count < 0 or not 0 <= s.share <= 1 for s in specs):
        raise FleetError("fleet.rollout-spec", "Waves need a count ≥ 0 or a share between 0 and 1.")
    if any(not s.count and not s.share for s in specs[:-1]):
        raise FleetError("fleet.rollout-spec", "Every wave but the last needs a count or a share above 0.")
    order = sorted(devices, key=lambda d: hashlib.sha256(f"{seed}:{d}".encode()).digest())
    waves, at = [], 0
    for i, spec in enumerate(specs):
        size = spec.count or math.ceil(spec.share * len(order))
        end = len(order) if i == len(specs) - 1 else min(len(order), at + size)
        waves.append(tuple(order[at:end]))
        at = end
    return tuple(w for w in waves if w)


def step(
    plan: Plan, state: RolloutState, facts: Mapping[str, DeviceFact], verdict: Verdict | None, now: float
) -> Result:
    """The next state and what to do.

    Args:
        plan: fixed at creation.
        state: the last state.
        facts: per device of the plan; a device without a fact has never reported.
        verdict: of the gate, over the devices assigned so far; None counts as inconclusive.
        now: Unix seconds.
    """
    if state.status == "rolling-back":
        return _finish_rollback(plan, state, facts, now)
    if state.status != "running":
        return state, ()
    if state.wave < 0:
        return _open_wave(plan, state, 0, now)
    state = _note_seen(plan, state, facts, now)
    statuses = device_statuses(plan, state, facts, now)
    state = msgspec.structs.replace(
        state, done=tuple(sorted({*state.done, *(d for d, s in statuses.items() if s == "done")}))
    )
    halt = _halt(plan, state, statuses)
    if halt:
        return _pause(state, halt), ()
    gated = plan.wave_specs[state.wave].gate
    if gated and verdict is not None and verdict.outcome == "fail":
        return _roll_back(plan, state, verdict.sentence, now)
    return _close_wave(plan, state, statuses, verdict, now)


def device_statuses(
    plan: Plan, state: RolloutState, facts: Mapping[str, DeviceFact], now: float
) -> dict[str, DeviceStatus]:
    """The status of every device that was assigned so far."""
    return {
        d: _status(plan, facts.get(d), now, seen_at=state.seen_at.get(d), was_done=d in state.done)
        for d in state.assigned_at
    }


def pause(state: RolloutState, reason: str) -> Result:
    """Hold everything; devices in flight finish what they do.

    Raises:
        FleetError: fleet.rollout-state.
    """
    _require(state, "running")
    return _pause(state, reason), ()


def resume(plan: Plan, state: RolloutState, facts: Mapping[str, DeviceFact], now: float) -> Result:
    """Go on, acknowledging every failure seen so far.

    Raises:
        FleetError: fleet.rollout-state.
    """
    _require(state, "paused")
    statuses = device_statuses(plan, state, facts, now)
    seen = {d for d, s in statuses.items() if s in ("failed", "timed-out")}
    closed = dict.fromkeys(state.closed_at, now)
    acknowledged = tuple(sorted({*state.acknowledged, *seen}))
    return msgspec.structs.replace(state, status="running", reason="", acknowledged=acknowledged, closed_at=closed), ()


def abort(plan: Plan, state: RolloutState, *, revert: bool, reason: str, now: float) -> Result:
    """End it: take the assigned devices back to the previous version, or leave them as they are.

    One that is rolling back already can only be left as it is.

    Raises:
        FleetError: fleet.rollout-state.
    """
    if revert:
        _require(state, "running", "paused")
        return _roll_back(plan, state, reason, now)
    _require(state, "running", "paused", "rolling-back")
    return msgspec.structs.replace(state, status="aborted", reason=reason), ()


def _require(state: RolloutState, *allowed: Status) -> None:
    if state.status not in allowed:
        message = f"The rollout is {state.status}; this needs it to be {' or '.join(allowed)}."
        raise FleetError("fleet.rollout-state", message)


def _online(plan: Plan, fact: DeviceFact | None, now: float) -> bool:
    return fact is not None and now - fact.last_seen <= plan.rules.offline_after


def _note_seen(plan: Plan, state: RolloutState, facts: Mapping[str, DeviceFact], now: float) -> RolloutState:
    fresh = {d: now for d in state.assigned_at if d not in state.seen_at and _online(plan, facts.get(d), now)}
    return msgspec.structs.replace(state, seen_at={**state.seen_at, **fresh}) if fresh else state


def _status(plan: Plan, fact: DeviceFact | None, now: float, *, seen_at: float | None, was_done: bool) -> DeviceStatus:
    if fact is not None and fact.digest == plan.digest and fact.committed:
        return "done"
    if fact is not None and fact.failed:
        return "failed"
    if was_done and fact is not None and fact.digest != plan.digest:
        return "failed"
    if seen_at is None:
        return "pending" if _online(plan, fact, now) else "offline"
    return "timed-out" if now - seen_at > plan.rules.device_timeout else "pending"


def _halt(plan: Plan, state: RolloutState, statuses: Mapping[str, DeviceStatus]) -> str:
    failed = [d for d, s in statuses.items() if s in ("failed", "timed-out") and d not in state.acknowledged]
    terminal = [d for d, s in statuses.items() if s in ("done", "failed", "timed-out")]
    # Shares are compared as quotients: 0.29 × 100 is below 29 in floating point, 29 / 100 is not above 0.29.
    if statuses and len(terminal) >= plan.rules.min_sample and len(failed) / len(statuses) > plan.rules.halt_share:
        return f"{len(failed)} of {len(statuses)} devices failed: {', '.join(sorted(failed)[:5])}."
    return ""


def _close_wave(
    plan: Plan,
    state: RolloutState,
    statuses: Mapping[str, DeviceStatus],
    verdict: Verdict | None,
    now: float,
) -> Result:
    mine = [statuses[d] for d in plan.waves[state.wave]]
    if "pending" in mine:
        return state, ()
    key = str(state.wave)
    if key not in state.closed_at:
        state = msgspec.structs.replace(state, closed_at={**state.closed_at, key: now})
    live = [
        s
        for d, s in zip(plan.waves[state.wave], mine, strict=True)
        if s == "done" or (s != "offline" and d not in state.acknowledged)
    ]
    done = live.count("done")
    if live and done / len(live) < plan.rules.success_share:
        return _pause(state, f"Wave {state.wave + 1}: only {done} of {len(live)} devices succeeded."), ()
    last = state.wave == len(plan.waves) - 1
    if plan.wave_specs[state.wave].gate and not last:
        if not done:
            verdict = Verdict(
                outcome="inconclusive", sentence="no device of this wave runs it; none can give evidence."
            )
        if verdict is None or verdict.outcome != "pass":
            return _hold(plan, state, verdict, now), ()
    if last and not state.done:
        return msgspec.structs.replace(state, reason="Waiting: no device has run it yet."), ()
    if last:
        return msgspec.structs.replace(state, status="completed", reason="Every live device runs it."), (Promote(),)
    return _open_wave(plan, state, state.wave + 1, now)


def _hold(plan: Plan, state: RolloutState, verdict: Verdict | None, now: float) -> RolloutState:
    sentence = verdict.sentence if verdict is not None else "No evidence yet."
    if now - state.closed_at[str(state.wave)] > plan.rules.gate_timeout:
        return _pause(state, f"No verdict in time: {sentence}")
    return msgspec.structs.replace(state, reason=f"Holding: {sentence}")


def _open_wave(plan: Plan, state: RolloutState, wave: int, now: float) -> Result:
    devices = plan.waves[wave]
    assigned = {**state.assigned_at, **dict.fromkeys(devices, now)}
    return msgspec.structs.replace(state, wave=wave, assigned_at=assigned, reason=""), (Assign(devices),)


def _pause(state: RolloutState, reason: str) -> RolloutState:
    return msgspec.structs.replace(state, status="paused", reason=reason)


def _roll_back(plan: Plan, state: RolloutState, reason: str, now: float) -> Result:
    devices = tuple(sorted(state.assigned_at))
    if not plan.previous_version or not devices:
        return msgspec.structs.replace(state, status="aborted", reason=reason), ()
    state = msgspec.structs.replace(state, status="rolling-back", reason=reason, reverting_since=now)
    return state, (Revert(devices),)


def _finish_rollback(plan: Plan, state: RolloutState, facts: Mapping[str, DeviceFact], now: float) -> Result:
    def still_runs(device: str) -> bool:
        fact = facts.get(device)
        return fact is not None and fact.digest == plan.digest and _online(plan, fact, now)

    left = sorted(d for d in state.assigned_at if still_runs(d))
    if not left:
        return msgspec.structs.replace(state, status="rolled-back"), ()
    if now - state.reverting_since > plan.rules.device_timeout:
        reason = f"{state.reason} Not all went back in time; it still runs on {', '.join(left[:5])}."
        return msgspec.structs.replace(state, status="aborted", reason=reason), ()
    return state, ()
