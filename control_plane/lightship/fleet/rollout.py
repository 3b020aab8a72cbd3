"""Fleet: the pure rollout decider, what the fleet does next.

    running ──last wave done──▶ completed
       │  ▲ resume
       │  └─────────── paused ◀── too many failures, or no verdict in time
       └──canary worse than control──▶ rolling-back ──▶ rolled-back        abort ──▶ rolling-back or aborted

Rules:
* no I/O and no clock: `step(plan, state, facts, now, …)` gives the next state and the actions;
* a device is done only when its own report says that it runs the digest and has committed it; never because an
  install said so; a device that was done and runs something else again counts as failed (a local fallback);
* a silent device times out and counts as failed; a device offline since before its assignment never blocks a wave;
* a wave closes when every live device is terminal; it succeeds with done/terminal ≥ success_share;
  the halt rule, failed/assigned > halt_share with at least min_sample terminal, is judged at every step, for all
  waves so far; then the rollout pauses, and resuming acknowledges the failures already seen;
* an all-terminal wave below the threshold pauses; it never slides on;
* a gated wave moves on only with the verdict "pass"; "fail" rolls back; "inconclusive" holds, and pauses when the
  hold lasts longer than gate_timeout.
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
    device_timeout: float = 1_800.0  # for a device that is online and silent about its assignment
    offline_after: float = 180.0  # unseen for so long: offline
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
    done: tuple[str, ...] = ()  # devices seen running the digest, committed
    closed_at: dict[str, float] = {}  # wave number -> when all its live devices were terminal
    acknowledged: tuple[str, ...] = ()  # failures an operator has seen and resumed over
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

    Args:
        devices: device ids; those fit to be canaries first is the caller's choice by passing them apart.
        specs: the waves; the last takes what is left.
        seed: e.g. the rollout id.

    Raises:
        FleetError: fleet.rollout-spec.
    """
    if not devices:
        raise FleetError("fleet.rollout-spec", "The selector matches no device.", remedy="See `lightship device list`.")
    if not specs or any(s.count < 0 or not 0 <= s.share <= 1 for s in specs):
        raise FleetError("fleet.rollout-spec", "Waves need a count ≥ 0 or a share between 0 and 1.")
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
    statuses = device_statuses(plan, state, facts, now)
    state = msgspec.structs.replace(
        state, done=tuple(sorted({*state.done, *(d for d, s in statuses.items() if s == "done")}))
    )
    halt = _halt(plan, state, statuses)
    if halt:
        return _pause(state, halt), ()
    gated = plan.wave_specs[state.wave].gate
    if gated and verdict is not None and verdict.outcome == "fail":
        return _roll_back(plan, state, verdict.sentence)
    return _close_wave(plan, state, statuses, verdict, now)


def device_statuses(
    plan: Plan, state: RolloutState, facts: Mapping[str, DeviceFact], now: float
) -> dict[str, DeviceStatus]:
    """The status of every device that was assigned so far."""
    return {
        d: _status(plan, facts.get(d), now, assigned_at=at, was_done=d in state.done)
        for d, at in state.assigned_at.items()
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


def abort(plan: Plan, state: RolloutState, *, revert: bool, reason: str) -> Result:
    """End it: take the assigned devices back to the previous version, or leave them as they are.

    Raises:
        FleetError: fleet.rollout-state.
    """
    _require(state, "running", "paused")
    if revert:
        return _roll_back(plan, state, reason)
    return msgspec.structs.replace(state, status="aborted", reason=reason), ()


def _require(state: RolloutState, *allowed: Status) -> None:
    if state.status not in allowed:
        message = f"The rollout is {state.status}; this needs it to be {' or '.join(allowed)}."
        raise FleetError("fleet.rollout-state", message)


def _status(plan: Plan, fact: DeviceFact | None, now: float, *, assigned_at: float, was_done: bool) -> DeviceStatus:
    if fact is not None and fact.digest == plan.digest and fact.committed:
        return "done"
    if fact is not None and fact.failed:
        return "failed"
    if was_done and fact is not None and fact.digest != plan.digest:
        return "failed"
    last_seen = fact.last_seen if fact is not None else 0.0
    if now - last_seen > plan.rules.offline_after:
        return "offline"
    return "timed-out" if now - assigned_at > plan.rules.device_timeout else "pending"


def _halt(plan: Plan, state: RolloutState, statuses: Mapping[str, DeviceStatus]) -> str:
    failed = [d for d, s in statuses.items() if s in ("failed", "timed-out") and d not in state.acknowledged]
    terminal = [d for d, s in statuses.items() if s in ("done", "failed", "timed-out")]
    if len(terminal) >= plan.rules.min_sample and len(failed) > plan.rules.halt_share * len(statuses):
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
        s for d, s in zip(plan.waves[state.wave], mine, strict=True) if s != "offline" and d not in state.acknowledged
    ]
    done = live.count("done")
    if live and done < plan.rules.success_share * len(live):
        return _pause(state, f"Wave {state.wave + 1}: only {done} of {len(live)} devices succeeded."), ()
    last = state.wave == len(plan.waves) - 1
    if plan.wave_specs[state.wave].gate and not last:
        if not done:
            # Nobody in this wave can give evidence; waiting for devices to come back is all there is.
            return state, ()
        if verdict is None or verdict.outcome != "pass":
            return _hold(plan, state, verdict, now), ()
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


def _roll_back(plan: Plan, state: RolloutState, reason: str) -> Result:
    devices = tuple(sorted(state.assigned_at))
    if not plan.previous_version or not devices:
        return msgspec.structs.replace(state, status="aborted", reason=reason), ()
    return msgspec.structs.replace(state, status="rolling-back", reason=reason), (Revert(devices),)


def _finish_rollback(plan: Plan, state: RolloutState, facts: Mapping[str, DeviceFact], now: float) -> Result:
    def settled(device: str) -> bool:
        fact = facts.get(device)
        offline = fact is None or now - fact.last_seen > plan.rules.offline_after
        return offline or (fact is not None and fact.digest != plan.digest)

    if all(settled(d) for d in state.assigned_at):
        return msgspec.structs.replace(state, status="rolled-back"), ()
    return state, ()
