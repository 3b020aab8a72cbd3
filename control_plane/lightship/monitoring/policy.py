"""Monitoring: what follows from the verdicts.

Rules of this room:
* pure: state and facts in, next state and actions out; the caller carries the actions out, and stores the state;
* one event, one alarm: an event opens with the first alarm of a stream, is confirmed at most once, and closes after
  `recovery` clean evaluations that could have seen what opened it;
* handing in the same verdict again, or an older one, changes nothing;
* everything is keyed by (device, bundle digest): another model is another stream, and starts afresh;
* errors and broken data of most devices take back a version that is being rolled out; a shift of the inputs never does;
* one sick device is quarantined, not learned from; a retrain is proposed when the fleet drifts and keeps drifting,
  once per fleet event, and never rolls anything back: covariate drift is no proof of a worse model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from lightship_agent.contract.codes import SettingsError

from .fleet import FleetVerdict
from .segments import Lasting
from .verdict import Alarm, Verdict

#: A device that drifted longer than this before the fleet did was sick on its own.
FOLLOW_WINDOWS: Final = 3
#: A member of the fleet that shows something besides is not sick before the others had so many windows to show it too.
BESIDES_WINDOWS: Final = 6

_BROKEN: Final = ("missing", "range", "stuck")

Severity = Literal["warning", "critical"]


class StreamKey(NamedTuple):
    """One device serving one bundle."""

    device: str
    digest: str


class PolicySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator may set."""

    recovery: int = 3  # clean evaluations that close an event
    quarantine: bool = True
    propose: bool = True  # whether a proposal is acted on by itself is the caller's setting

    def __post_init__(self) -> None:
        """Refuse what can't work.

        Raises:
            SettingsError: settings.invalid.
        """
        if self.recovery < 1:
            raise SettingsError(
                "settings.invalid", f"Policy: expected a recovery of at least 1, found {self.recovery}."
            )


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An open alarm of one stream."""

    opened: float  # Unix seconds
    window: int  # that opened it
    last_window: int  # the last one that alarmed
    level_windows: int  # the shortest block that alarmed: only a test as long can give the all-clear
    names: tuple[str, ...]  # streams that have alarmed, in order of appearance
    confirmed: bool = False  # it has been critical
    clean: int = 0  # clean evaluations in a row
    others: int = 0  # windows of other streams that had been judged when it opened
    besides: dict[str, int] = {}  # the same when a stream was first shown by this device alone


class Track(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of one stream."""

    window: int  # the last one judged
    event: Event | None = None
    spoken_for: int = -1  # windows up to here belong to an event that is closed
    judged: int = 0  # windows, since it is remembered


class FleetEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A drift that devices share."""

    opened: float
    seen: dict[StreamKey, int]  # members, and the window in which each was first seen drifting with the fleet
    shared: tuple[str, ...]
    alarmed: bool = False
    proposed: bool = False


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """All that is remembered of one model."""

    tracks: dict[StreamKey, Track] = {}
    quarantined: dict[StreamKey, tuple[str, ...]] = {}  # and the streams it was quarantined for
    fleet: FleetEvent | None = None
    judged: int = 0  # windows of all streams
    segments: dict[str, Lasting] = {}  # of devices with a label, kept by `segments.follow`


class OpenAlarm(msgspec.Struct, frozen=True, kw_only=True, tag="open-alarm"):
    """A stream has begun to alarm."""

    key: StreamKey
    at: float
    window: int
    severity: Severity
    names: tuple[str, ...]


class ConfirmAlarm(msgspec.Struct, frozen=True, kw_only=True, tag="confirm-alarm"):
    """An open warning has become critical."""

    key: StreamKey
    at: float
    window: int
    names: tuple[str, ...]


class CloseAlarm(msgspec.Struct, frozen=True, kw_only=True, tag="close-alarm"):
    """An event is over."""

    key: StreamKey
    at: float
    reason: Literal["recovered", "model-changed"]


class Quarantine(msgspec.Struct, frozen=True, kw_only=True, tag="quarantine"):
    """Learn nothing from this device."""

    key: StreamKey
    at: float
    names: tuple[str, ...]
    reason: str


class ReleaseQuarantine(msgspec.Struct, frozen=True, kw_only=True, tag="release-quarantine"):
    """The device may be learned from again."""

    key: StreamKey
    at: float
    reason: Literal["recovered", "model-changed", "fleet"]


class FleetAlarm(msgspec.Struct, frozen=True, kw_only=True, tag="fleet-alarm"):
    """The fleet drifts, and still did when it was looked at again."""

    model: str
    at: float
    devices: tuple[str, ...]
    names: tuple[str, ...]
    sentence: str


class ProposeRetrain(msgspec.Struct, frozen=True, kw_only=True, tag="propose-retrain"):
    """Train a new version on what `devices` see now."""

    model: str
    at: float
    reason: str
    devices: tuple[str, ...]
    excluded: tuple[str, ...]  # quarantined


class RollBack(msgspec.Struct, frozen=True, kw_only=True, tag="roll-back"):
    """Most devices with a bundle err more than they may, or get broken data: take it back where it is rolled out."""

    digest: str
    at: float
    devices: tuple[str, ...]
    reason: str


Action = OpenAlarm | ConfirmAlarm | CloseAlarm | Quarantine | ReleaseQuarantine | FleetAlarm | ProposeRetrain | RollBack


def decide(
    state: PolicyState,
    verdicts: Mapping[StreamKey, Verdict],
    fleet: FleetVerdict,
    *,
    model: str,
    now: float,
    settings: PolicySettings,
) -> tuple[PolicyState, tuple[Action, ...]]:
    """The next state of one model's monitoring, and what to do.

    Args:
        state: as returned by the last call; `PolicyState()` at first.
        verdicts: the latest verdict of each stream. A device that is silent may be left out; one that appears under
            another digest has changed its model.
        fleet: `judge_fleet` of the same verdicts.
        model: its name, for the proposal.
        now: Unix seconds, for the record only; nothing is decided by the clock.
        settings: dwell and switches.
    """
    actions: list[Action] = []
    tracks, quarantined = _drop_replaced(state, verdicts, now, actions)
    judged = state.judged
    for key in sorted(verdicts):
        before = tracks.get(key) or Track(window=-1)
        tracks[key], followed = _advance(before, key, verdicts[key], now, settings.recovery)
        actions.extend(followed)
        judged += tracks[key].judged - before.judged
        if before.event and not tracks[key].event and quarantined.pop(key, None) is not None:
            actions.append(ReleaseQuarantine(key=key, at=now, reason="recovered"))
    for key in {a.key for a in actions if isinstance(a, OpenAlarm)}:
        tracks[key] = _opened_beside(tracks[key], judged)
    actions.extend(_roll_back(verdicts, actions, now))
    for key in [k for k in tracks if k.device in fleet.own]:
        tracks[key] = _shown_besides(tracks[key], fleet.own[key.device], judged)
    event = _fleet_event(state.fleet, tracks, fleet, now)
    if settings.quarantine:
        actions.extend(_quarantine(verdicts, tracks, quarantined, fleet, event, judged, now))
    if event and fleet.kind == "fleet":
        excluded = sorted({k.device for k in quarantined})
        event, shared = _fleet_actions(event, tracks, excluded, fleet, model=model, now=now)
        actions.extend(a for a in shared if settings.propose or isinstance(a, FleetAlarm))
    after = msgspec.structs.replace(state, tracks=tracks, quarantined=quarantined, fleet=event, judged=judged)
    return after, tuple(actions)


def _drop_replaced(
    state: PolicyState, verdicts: Mapping[StreamKey, Verdict], now: float, actions: list[Action]
) -> tuple[dict[StreamKey, Track], dict[StreamKey, tuple[str, ...]]]:
    """Forget streams whose device now serves another bundle."""
    serving: dict[str, set[str]] = {}
    for device, digest in verdicts:
        serving.setdefault(device, set()).add(digest)
    tracks, quarantined = dict(state.tracks), dict(state.quarantined)
    for key in sorted(state.tracks):
        if key.digest in serving.get(key.device, {key.digest}):
            continue
        if tracks.pop(key).event:
            actions.append(CloseAlarm(key=key, at=now, reason="model-changed"))
        if quarantined.pop(key, None) is not None:
            actions.append(ReleaseQuarantine(key=key, at=now, reason="model-changed"))
    return tracks, quarantined


def _advance(track: Track, key: StreamKey, verdict: Verdict, now: float, recovery: int) -> tuple[Track, list[Action]]:
    """One stream, one verdict."""
    if verdict.window <= track.window:
        return track, []
    # A long block that still holds windows of a closed event tells nothing new.
    alarms = [a for a in verdict.alarms if a.first_window > track.spoken_for]
    event = track.event
    if alarms:
        event, actions = _alarmed(event, alarms, key, verdict.window, now)
        return msgspec.structs.replace(track, window=verdict.window, event=event, judged=track.judged + 1), actions
    if event and max(verdict.tested, default=0) >= event.level_windows:
        event = msgspec.structs.replace(event, clean=event.clean + 1)
        if event.clean >= recovery:
            closed = CloseAlarm(key=key, at=now, reason="recovered")
            return Track(window=verdict.window, spoken_for=event.last_window, judged=track.judged + 1), [closed]
    return msgspec.structs.replace(track, window=verdict.window, event=event, judged=track.judged + 1), []


def _alarmed(
    event: Event | None, alarms: Sequence[Alarm], key: StreamKey, window: int, now: float
) -> tuple[Event, list[Action]]:
    """Open an event, or carry an open one on."""
    names = tuple(dict.fromkeys([*(event.names if event else ()), *(a.name for a in alarms)]))
    shortest = min(a.level_windows for a in alarms)
    critical = any(a.confirmed for a in alarms)
    if event is None:
        severity: Severity = "critical" if critical else "warning"
        opened = Event(
            opened=now, window=window, last_window=window, level_windows=shortest, names=names, confirmed=critical
        )
        return opened, [OpenAlarm(key=key, at=now, window=window, severity=severity, names=names)]
    carried = msgspec.structs.replace(
        event,
        last_window=window,
        level_windows=min(shortest, event.level_windows),
        names=names,
        confirmed=critical or event.confirmed,
        clean=0,
    )
    if critical and not event.confirmed:
        return carried, [ConfirmAlarm(key=key, at=now, window=window, names=names)]
    return carried, []


def _roll_back(verdicts: Mapping[StreamKey, Verdict], actions: Sequence[Action], now: float) -> list[Action]:
    """Errors and broken data of at least two, and half, of a bundle's devices. One alone is a sick device."""
    fresh = {a.key.digest for a in actions if isinstance(a, OpenAlarm | ConfirmAlarm)}
    found: list[Action] = []
    for digest in sorted(fresh):
        serving = {k.device: v for k, v in sorted(verdicts.items()) if k.digest == digest}
        for kinds, words in ((("performance",), "err more than they may"), (_BROKEN, "get data that is broken")):
            worse = tuple(d for d, v in serving.items() if any(a.confirmed and a.kind in kinds for a in v.alarms))
            if len(worse) >= max(2, math.ceil(len(serving) / 2)):
                reason = f"{len(worse)} of {len(serving)} devices that serve this version {words}."
                found.append(RollBack(digest=digest, at=now, devices=worse, reason=reason))
    return found


def _fleet_event(
    event: FleetEvent | None, tracks: Mapping[StreamKey, Track], fleet: FleetVerdict, now: float
) -> FleetEvent | None:
    """Open, extend or close the shared event: it is over when fewer than two of its members still alarm."""
    members = {k: t.window for k, t in sorted(tracks.items()) if fleet.kind == "fleet" and k.device in fleet.devices}
    if event is None:
        return FleetEvent(opened=now, seen=members, shared=fleet.shared) if members else None
    seen = {**members, **{k: w for k, w in event.seen.items() if k in tracks}}
    if not members and sum(tracks[k].event is not None for k in seen) < 2:
        return None
    shared = tuple(dict.fromkeys([*event.shared, *fleet.shared]))
    return msgspec.structs.replace(event, seen=seen, shared=shared)


def _quarantine(
    verdicts: Mapping[StreamKey, Verdict],
    tracks: Mapping[StreamKey, Track],
    quarantined: dict[StreamKey, tuple[str, ...]],
    fleet: FleetVerdict,
    event: FleetEvent | None,
    judged: int,
    now: float,
) -> list[Action]:
    """Set aside confirmed devices that drift on their own; let go of those whom the fleet has followed.

    Devices report at their own pace, and a faint shift shows by chance in one before the others. None is called sick
    before the others had their windows since its event opened: `FOLLOW_WINDOWS` each, on the average, or, of what a
    member shows besides, `BESIDES_WINDOWS` since it first did, and it still must.
    """
    actions: list[Action] = []
    seen = event.seen if event else {}
    shared = set(event.shared) if event else set()
    for key, track in sorted(tracks.items()):
        own = fleet.own.get(key.device, ())
        if key in seen and key not in quarantined:
            own = _lasting(track, own, judged, BESIDES_WINDOWS * (len(tracks) - 1))
        if key in quarantined:
            if key in seen and not own and shared.issuperset(quarantined[key]) and _followed(track, seen[key]):
                del quarantined[key]
                actions.append(ReleaseQuarantine(key=key, at=now, reason="fleet"))
        elif (
            track.event
            and track.event.confirmed
            and not track.event.clean
            and (own or key not in seen)
            and judged - track.judged - track.event.others >= FOLLOW_WINDOWS * (len(tracks) - 1)
        ):
            names = own or _critical(verdicts.get(key), track.event.names)
            quarantined[key] = names
            company = fleet.within.get(key.device)
            how = f"with others of {company}" if company and not own else "on its own"
            reason = f"{key.device} drifts {how} in {', '.join(names[:3])}."
            actions.append(Quarantine(key=key, at=now, names=names, reason=reason))
    return actions


def _shown_besides(track: Track, own: Sequence[str], judged: int) -> Track:
    """With the number of windows that the other streams had when this one first showed something alone."""
    event = track.event
    if event is None:
        return track
    besides = {**dict.fromkeys(own, judged - track.judged), **event.besides}
    return msgspec.structs.replace(track, event=msgspec.structs.replace(event, besides=besides))


def _lasting(track: Track, own: Sequence[str], judged: int, windows: int) -> tuple[str, ...]:
    """Of what a member shows alone, that to which the others had so many windows to follow."""
    besides = track.event.besides if track.event else {}
    return tuple(n for n in own if judged - track.judged - besides.get(n, judged) >= windows)


def _critical(verdict: Verdict | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those in which the device is surely off. What it shows besides, once, need not come to the others too."""
    found = {a.name for a in verdict.alarms if a.confirmed} if verdict else set()
    return tuple(n for n in names if n in found) or names


def _opened_beside(track: Track, judged: int) -> Track:
    """With the number of windows that the other streams had when its event opened."""
    event = track.event and msgspec.structs.replace(track.event, others=judged - track.judged)
    return msgspec.structs.replace(track, event=event)


def _followed(track: Track, seen: int) -> bool:
    """Whether the fleet came so soon that the device was its first member, and not sick on its own before."""
    return track.event is not None and seen - track.event.window <= FOLLOW_WINDOWS


def _fleet_actions(
    event: FleetEvent,
    tracks: Mapping[StreamKey, Track],
    excluded: Sequence[str],
    fleet: FleetVerdict,
    *,
    model: str,
    now: float,
) -> tuple[FleetEvent, list[FleetAlarm | ProposeRetrain]]:
    """Alarm once it has lasted; propose once two members are critical, which takes two evaluations of each."""
    actions: list[FleetAlarm | ProposeRetrain] = []
    members = [k for k in event.seen if k.device in fleet.devices]
    again = [k for k in members if tracks[k].window > event.seen[k]]
    if not event.alarmed and 2 * len(again) >= len(members):
        event = msgspec.structs.replace(event, alarmed=True)
        actions.append(
            FleetAlarm(model=model, at=now, devices=fleet.devices, names=event.shared, sentence=fleet.sentence)
        )
    healthy = [k for k in members if k.device not in excluded]
    critical = [k for k in healthy if (e := tracks[k].event) and e.confirmed]
    if event.alarmed and not event.proposed and len(critical) >= 2:
        event = msgspec.structs.replace(event, proposed=True)
        devices = tuple(sorted({k.device for k in healthy}))
        reason = f"{fleet.sentence} {len(critical)} devices are critical."
        actions.append(ProposeRetrain(model=model, at=now, reason=reason, devices=devices, excluded=tuple(excluded)))
    return event, actions
