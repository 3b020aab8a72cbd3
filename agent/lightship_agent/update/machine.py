"""Update: the pure state machine, what this device does next.

    idle ──assigned──▶ fetching ──fetched──▶ trying ──tried──▶ swapped ──soaked──▶ reaching ──reached──▶ idle
      ▲                   │                    │                  │                   │
      └──── failed ◀──────┴────────────────────┴──────────────────┴───────────────────┘   the previous model serves on

Rules:
* no I/O, no clock: `step(state, event, now)` gives the next state and the actions; the shell makes the state
  durable first and then carries the actions out;
* `current` is committed and `previous` the one before it; a candidate becomes current only by commit;
* until commit, every failure and every restart leads back to `current`;
* an assignment below the accepted `seq` never gets here (contract.assignment checks it), but equal ones do:
  the same assignment again is no news, unless its candidate failed and its penalty is over;
* that floor belongs to the director's keys: new ones recover from whoever drove it to the sky with a stolen key, and
  from a control plane that was restored from an old backup;
* three failures of one digest, or five of any within 180 s, put it in the penalty box for 24 h;
* link errors, a damaged stick, a graceful stop, a newer assignment and "not now" are not the bundle's fault: they end
  the attempt without a penalty; a cut while trying or soaking might be, so it counts;
* "not now" is reported once, and not at every look that finds it still so;
* what was carried here by hand is not asked to reach a server;
* who stands before the device may go back to the version before; the one he left then waits a day, whoever assigns it,
  unless the control plane signs that it shall be tried again.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from lightship_agent.contract.assignment import Assignment

MAX_TRIES: Final = 3
BURST_TRIES: Final = 5
BURST_SECONDS: Final = 180.0
PENALTY_SECONDS: Final = 86_400.0
DEFERRED: Final = "update.deferred"
_BLAMELESS: Final = {DEFERRED, "update.interrupted", "update.superseded"}

Phase = Literal["idle", "fetching", "trying", "swapped", "reaching"]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle this device was told to run."""

    model: str
    version: int
    path: str
    sha256: str
    length: int
    seq: int
    rollout: str
    offline: bool = False  # whether it was carried here, past a network that may not be there
    retry: bool = False  # whether its earlier failures are to be forgotten

    @classmethod
    def of(cls, assignment: Assignment, *, offline: bool = False) -> Target:
        """The target an accepted assignment names."""
        return cls(
            model=assignment.model,
            version=assignment.version,
            path=assignment.path,
            sha256=assignment.sha256,
            length=assignment.length,
            seq=assignment.seq,
            rollout=assignment.rollout,
            offline=offline,
            retry=assignment.retry,
        )


class Penalty(msgspec.Struct, frozen=True, kw_only=True):
    """Failures of one digest, at Unix seconds, and until when it must wait."""

    failed_at: tuple[float, ...] = ()
    until: float = 0.0


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle that may not be fetched or installed now, and the reason that was reported."""

    sha256: str
    reason: str


class UpdateState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that survives a power cut."""

    phase: Phase = "idle"
    floor: int = 0
    director: str = ""  # the key set whose `seq` the floor is; "": any
    current: Target | None = None
    previous: Target | None = None
    candidate: Target | None = None
    penalties: dict[str, Penalty] = {}
    waiting: Waiting | None = None
    last_code: str = ""
    schema: int = 1


# Events -------------------------------------------------------------------------------------------------------------


class Assigned(msgspec.Struct, frozen=True):
    """A verified assignment, and the director's key set that signed it."""

    target: Target
    director: str = ""


class Advanced(msgspec.Struct, frozen=True):
    """The action of the present phase succeeded: fetched, tried, swapped and soaked, or reached."""


class Failed(msgspec.Struct, frozen=True):
    """The action of the present phase failed, with an error code and words."""

    code: str
    detail: str = ""


class Started(msgspec.Struct, frozen=True):
    """The agent has (re)started; whatever it was doing was cut. `absent` are digests the store no longer holds."""

    absent: tuple[str, ...] = ()


class PenaltyCleared(msgspec.Struct, frozen=True):
    """An operator emptied the penalty box."""


class WentBack(msgspec.Struct, frozen=True):
    """Somebody who stands before the device wants the version before, and says why."""

    reason: str


Event = Assigned | Advanced | Failed | Started | PenaltyCleared | WentBack

# Actions ------------------------------------------------------------------------------------------------------------


class Fetch(msgspec.Struct, frozen=True):
    """Get the bundle into the store, verified."""

    target: Target


class Try(msgspec.Struct, frozen=True):
    """Probe it in a process of its own: golden rows, latency, memory."""

    target: Target


class Swap(msgspec.Struct, frozen=True):
    """Make it serve, and watch it while it soaks."""

    target: Target


class Reach(msgspec.Struct, frozen=True):
    """See that the control plane can still be reached."""

    target: Target


class Restore(msgspec.Struct, frozen=True):
    """Serve this one (or nothing) again, at once."""

    target: Target | None


class CollectGarbage(msgspec.Struct, frozen=True):
    """Remove every bundle but these digests."""

    keep: tuple[str, ...]


class Report(msgspec.Struct, frozen=True):
    """Tell the control plane which step was reached."""

    target: Target
    step: str
    code: str = ""
    detail: str = ""


Action = Fetch | Try | Swap | Reach | Restore | CollectGarbage | Report
Result = tuple[UpdateState, tuple[Action, ...]]


def step(state: UpdateState, event: Event, now: float) -> Result:
    """The next state and what to do about it. `now` is Unix seconds."""
    match event:
        case Assigned(target, director):
            return _assigned(state, target, director, now)
        case Advanced():
            return _advanced(state)
        case Failed(code, detail):
            return _failed(state, code, detail, now)
        case Started(absent):
            return _started(_without(state, absent), now)
        case PenaltyCleared():
            return msgspec.structs.replace(state, penalties={}), ()
        case WentBack(reason):
            return _went_back(state, reason, now)


def floor_for(floor: int, of: str, director: str) -> int:
    """The floor that holds for what that key set of the director signs; `of` is the one whose floor it is."""
    return floor if not of or of == director else 0


def _assigned(state: UpdateState, target: Target, director: str, now: float) -> Result:
    floor = floor_for(state.floor, state.director, director)
    if state.phase != "idle" or target.seq < floor:
        return state, ()
    news = target.seq > floor
    accepted = msgspec.structs.replace(state, floor=target.seq, director=director)
    if news and target.retry:
        accepted = msgspec.structs.replace(accepted, penalties=_without_penalty(state, target.sha256))
    if state.current is not None and target.sha256 == state.current.sha256:
        current = msgspec.structs.replace(state.current, seq=target.seq, rollout=target.rollout)
        accepted = msgspec.structs.replace(accepted, current=current, waiting=None)
        # Nothing else is wanted: what a cut kept from being removed at the commit can go now.
        unwanted = CollectGarbage(kept(accepted))
        return accepted, ((Report(current, "committed"), unwanted) if news else (unwanted,))
    penalty = _dated(accepted.penalties.get(target.sha256, Penalty()), now)
    if now < penalty.until:
        accepted = msgspec.structs.replace(accepted, penalties={**accepted.penalties, target.sha256: penalty})
        said = f"failed {len(penalty.failed_at)} times; waits until {penalty.until:.0f}"
        return accepted, ((Report(target, "refused", "update.penalty", said),) if news else ())
    accepted = msgspec.structs.replace(accepted, phase="fetching", candidate=target, last_code="")
    return accepted, (Report(target, "fetching"), Fetch(target))


def _advanced(state: UpdateState) -> Result:
    target = state.candidate
    if target is None:
        return state, ()
    match state.phase:
        case "fetching":
            return msgspec.structs.replace(state, phase="trying"), (Report(target, "trying"), Try(target))
        case "trying":
            return msgspec.structs.replace(state, phase="swapped"), (Report(target, "soaking"), Swap(target))
        case "swapped" if target.offline:
            return _commit(state, target)
        case "swapped":
            return msgspec.structs.replace(state, phase="reaching"), (Reach(target),)
        case "reaching":
            return _commit(state, target)
        case "idle":
            return state, ()


def _commit(state: UpdateState, target: Target) -> Result:
    committed = msgspec.structs.replace(
        state,
        phase="idle",
        current=target,
        previous=state.current,
        candidate=None,
        penalties=_without_penalty(state, target.sha256),
        waiting=None,
    )
    return committed, (Report(target, "committed"), CollectGarbage(kept(committed)))


def _failed(state: UpdateState, code: str, detail: str, now: float, *, blame: bool | None = None) -> Result:
    target = state.candidate
    if target is None:
        return state, ()
    back: tuple[Action, ...] = (Restore(state.current),) if state.phase in ("swapped", "reaching") else ()
    failed = msgspec.structs.replace(state, phase="idle", candidate=None, last_code=code)
    if code == DEFERRED:
        waiting = Waiting(sha256=target.sha256, reason=detail)
        said = () if waiting == state.waiting else (Report(target, "waiting", code, detail),)
        return msgspec.structs.replace(failed, waiting=waiting), (*back, *said)
    failed = msgspec.structs.replace(failed, waiting=None)
    step_name = "retry"
    if not blameless(code) if blame is None else blame:
        failed = msgspec.structs.replace(failed, penalties=_penalised(state.penalties, target.sha256, now))
        step_name = "failed"
    # No garbage collection here: a download that broke off goes on where it stopped.
    return failed, (*back, Report(target, step_name, code, detail))


def blameless(code: str) -> bool:
    """Whether a failure says nothing about the bundle."""
    return code.startswith(("link.", "media.")) or code in _BLAMELESS


def _went_back(state: UpdateState, reason: str, now: float) -> Result:
    left, back = state.current, state.previous
    if state.phase != "idle" or left is None or back is None:
        return state, ()
    times = (*state.penalties.get(left.sha256, Penalty()).failed_at, now)[-BURST_TRIES:]
    boxed = {**state.penalties, left.sha256: Penalty(failed_at=times, until=now + PENALTY_SECONDS)}
    code = "update.went-back"
    gone_back = msgspec.structs.replace(state, current=back, previous=left, penalties=boxed, last_code=code)
    return gone_back, (Restore(back), Report(left, "failed", code, reason))


def _started(state: UpdateState, now: float) -> Result:
    serve = Restore(state.current)
    if state.phase == "idle":
        return state, (serve,)
    if state.phase == "fetching" or state.candidate is None:
        # A cut while downloading blames nobody: the next look at the assignment goes on where it stopped.
        return msgspec.structs.replace(state, phase="idle", candidate=None), (serve,)
    failed, actions = _failed(state, "update.interrupted", f"cut while {state.phase}", now, blame=True)
    return failed, (serve, *(a for a in actions if not isinstance(a, Restore)))


def _without(state: UpdateState, absent: tuple[str, ...]) -> UpdateState:
    """What the store lost is neither current nor previous, so that the next look at the assignment brings it anew."""
    current, previous = (t if t is None or t.sha256 not in absent else None for t in (state.current, state.previous))
    if current is None:
        current, previous = previous, None
    return msgspec.structs.replace(state, current=current, previous=previous)


def _dated(penalty: Penalty, now: float) -> Penalty:
    """The penalty by today's clock: what failed at a time that is still to come was noted while the clock was ahead."""
    ahead = max(penalty.failed_at, default=now) - now
    if ahead <= 0:
        return penalty
    return Penalty(failed_at=tuple(t - ahead for t in penalty.failed_at), until=penalty.until - ahead)


def _penalised(penalties: dict[str, Penalty], digest: str, now: float) -> dict[str, Penalty]:
    times = (*penalties.get(digest, Penalty()).failed_at, now)[-BURST_TRIES:]
    recent = [t for p in penalties.values() for t in p.failed_at if abs(now - t) < BURST_SECONDS]
    boxed = len(times) >= MAX_TRIES or len(recent) + 1 >= BURST_TRIES
    return {**penalties, digest: Penalty(failed_at=times, until=now + PENALTY_SECONDS if boxed else now)}


def _without_penalty(state: UpdateState, digest: str) -> dict[str, Penalty]:
    return {k: v for k, v in state.penalties.items() if k != digest}


def fit(state: UpdateState) -> tuple[str, ...]:
    """Of the digests that are kept, those that may answer: not those that failed here and were not forgiven."""
    return tuple(digest for digest in kept(state) if digest not in state.penalties)


def kept(state: UpdateState) -> tuple[str, ...]:
    """The digests that the state refers to: what runs, what ran before, what is under way."""
    return tuple(t.sha256 for t in (state.current, state.previous, state.candidate) if t is not None)
