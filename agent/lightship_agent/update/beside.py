"""Update: the pure decider of what runs beside the model that serves.

    wanted ──▶ fetched ──▶ tried ──▶ loaded ──▶ settled        nobody wants it, or it fails ──▶ dropped

Rules:
* no I/O, no clock: `next_action(state, seen, now)` is the one thing to do next, None when all is as it should be;
* companions are known by their experiment; they never touch what serves, nor its state (`machine`);
* a companion is tried once on a device, in a process of its own; what was tried is only loaded after a restart;
* it counts as under trial until it has run for a while: a cut in that time may be its fault, and three of those, or
  three failures, keep it out for a day. Another experiment with the same bundle begins anew;
* what is not its fault (links, windows, a stop) costs it nothing;
* what serves already needs no companion of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from lightship_agent.contract.assignment import Beside

from .machine import MAX_TRIES, PENALTY_SECONDS, Penalty, Target, blameless


class BesideState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about companions that survives a power cut."""

    wanted: tuple[Beside, ...] = ()
    seq: int = 0  # of the assignment that wants them
    proven: tuple[str, ...] = ()  # digests that passed their trial on this device
    trying: tuple[str, ...] = ()  # experiments that a cut now may be the fault of
    penalties: dict[str, Penalty] = {}  # by experiment
    schema: int = 1


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """How things are."""

    serving: str  # digest of the bundle that serves; "": none
    held: frozenset[str] = frozenset()  # digests in the store
    up: Mapping[str, Beside] = {}  # what runs beside, by experiment
    within_reach: frozenset[str] = frozenset()  # experiments whose bundle may be fetched now
    refused: frozenset[str] = frozenset()  # experiments that have failed in this look, or may not be


class Fetch(msgspec.Struct, frozen=True):
    """Get the bundle into the store, verified."""

    beside: Beside


class Try(msgspec.Struct, frozen=True):
    """Probe it in a process of its own."""

    beside: Beside


class Load(msgspec.Struct, frozen=True):
    """Have it run beside what serves, in this mode and for this share."""

    beside: Beside


class Drop(msgspec.Struct, frozen=True):
    """Have it run no longer."""

    beside: Beside


Action = Fetch | Try | Load | Drop
_MOST_PROVEN: Final = 16


def next_action(state: BesideState, seen: Seen, now: float) -> Action | None:
    """The next thing to do. `now` is Unix seconds."""
    wanted = {b.experiment: b for b in state.wanted if not _is_out(b, state, seen, now)}
    for experiment, beside in seen.up.items():
        if experiment not in wanted or wanted[experiment].sha256 != beside.sha256:
            return Drop(beside)
    for experiment, beside in wanted.items():
        if seen.up.get(experiment) == beside:
            continue
        if experiment in seen.up:  # for another share, say: the model is there
            return Load(beside)
        if beside.sha256 not in seen.held:
            if experiment in seen.within_reach:
                return Fetch(beside)
            continue
        return Load(beside) if beside.sha256 in state.proven else Try(beside)
    return None


def _is_out(beside: Beside, state: BesideState, seen: Seen, now: float) -> bool:
    waits = now < state.penalties.get(beside.experiment, Penalty()).until
    return waits or beside.sha256 == seen.serving or beside.experiment in seen.refused


def wants(state: BesideState, wanted: tuple[Beside, ...], seq: int) -> BesideState:
    """An accepted assignment wants these, and nothing else."""
    here = {b.experiment for b in wanted}
    return msgspec.structs.replace(
        state,
        wanted=wanted,
        seq=seq if wanted else 0,
        trying=tuple(e for e in state.trying if e in here),
        penalties={e: p for e, p in state.penalties.items() if e in here},
    )


def begun(state: BesideState, experiment: str) -> BesideState:
    """What may kill this process is about to be done."""
    others = tuple(e for e in state.trying if e != experiment)
    return msgspec.structs.replace(state, trying=(*others, experiment))


def proven(state: BesideState, beside: Beside) -> BesideState:
    """It passed its trial."""
    known = tuple(d for d in state.proven if d != beside.sha256)
    tried = msgspec.structs.replace(state, proven=(*known, beside.sha256)[-_MOST_PROVEN:])
    return _without_trial(tried, beside.experiment)


def settled(state: BesideState, experiment: str) -> BesideState:
    """It has run for a while, and nothing happened."""
    penalties = {e: p for e, p in state.penalties.items() if e != experiment}
    return msgspec.structs.replace(_without_trial(state, experiment), penalties=penalties)


def failed(state: BesideState, experiment: str, code: str, now: float, *, blame: bool | None = None) -> BesideState:
    """It failed with that code; `blame` overrules what the code says of whose fault that is."""
    state = _without_trial(state, experiment)
    if blameless(code) if blame is None else not blame:
        return state
    times = (*state.penalties.get(experiment, Penalty()).failed_at, now)[-MAX_TRIES:]
    boxed = Penalty(failed_at=times, until=now + PENALTY_SECONDS if len(times) >= MAX_TRIES else now)
    # What failed once it ran is not to be loaded again without a trial.
    digests = {b.sha256 for b in state.wanted if b.experiment == experiment}
    known = tuple(d for d in state.proven if d not in digests)
    return msgspec.structs.replace(state, proven=known, penalties={**state.penalties, experiment: boxed})


def started(state: BesideState, now: float) -> BesideState:
    """The agent has (re)started: what was under trial was cut."""
    for experiment in state.trying:
        state = failed(state, experiment, "update.interrupted", now, blame=True)
    return state


def stopped(state: BesideState) -> BesideState:
    """The agent stops in good order: nobody is to blame."""
    return msgspec.structs.replace(state, trying=())


def open_until(state: BesideState, seen: Seen, now: float) -> float | None:
    """None while something wanted does not run yet and could; else when the next penalty ends, or infinity."""
    ends = float("inf")
    for beside in state.wanted:
        if seen.up.get(beside.experiment) == beside or beside.sha256 == seen.serving:
            continue
        until = state.penalties.get(beside.experiment, Penalty()).until
        if now >= until:
            return None
        ends = min(ends, until)
    return ends


def target_of(beside: Beside, seq: int) -> Target:
    """The companion as a target, to be fetched, and reported under its experiment."""
    return Target(
        model=beside.model,
        version=beside.version,
        path=beside.path,
        sha256=beside.sha256,
        length=beside.length,
        seq=seq,
        rollout=beside.experiment,
    )


def _without_trial(state: BesideState, experiment: str) -> BesideState:
    return msgspec.structs.replace(state, trying=tuple(e for e in state.trying if e != experiment))
