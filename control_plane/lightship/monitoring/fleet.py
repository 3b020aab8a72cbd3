"""Monitoring: one sick device, or a changed world?

Rules of this room:
* pure: the latest verdict of every device in, one sentence about the fleet out;
* devices are compared by how many drift in the same way, not by pooled counts: every device has its own offset, and
  pooled counts alarm on those;
* a device without a testable window has no vote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec

from .drift_settings import DriftSettings
from .tails import binom_sf
from .verdict import Verdict

#: At which devices' p-values are counted.
_LEVELS: Final = (1e-2, 1e-3, 1e-4, 1e-6)

FleetKind = Literal["none", "local", "fleet"]


class FleetVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the devices say together."""

    kind: FleetKind
    devices: tuple[str, ...]  # that drift: with the fleet, or each on its own
    judged: int  # devices that had a vote
    shared: tuple[str, ...]  # streams that enough devices share; empty unless the kind is fleet
    p_value: float  # of so many drifting devices if each were healthy
    own: dict[str, tuple[str, ...]]  # per device, features with a confirmed alarm in which no other device drifts
    sentence: str
    within: dict[str, str] = {}  # per device, the segment (label=value) with which it drifts


def judge_fleet(verdicts: Mapping[str, Verdict], settings: DriftSettings) -> FleetVerdict:
    """Tell drift of the fleet from drift of some of its devices.

    A device drifts in a stream when that stream is in its evidence and the device as a whole has p < `device_alpha`
    (0.01), or when it has an alarm. With D devices judged, it is the fleet when, for some stream,

    1. at least max(2, ⌈`fleet_share`·D⌉) devices drift in it: half of them, and never a single one;
    2. so many have a binomial tail P(Bin(D, 0.01) ≥ k) below a line. The line is `fleet_alpha` (0.001) when some
       device has crossed its own alarm line, because the budget has then been charged already and the question is
       only whose drift it is; otherwise it is the budget per window, budget/horizon.

    So 2 of 2, 2 of 3, 2 of 4 or 3 of 5 devices are a fleet (tails 1e-4, 3e-4, 6e-4, 1e-5); 1 of anything isn't, and
    a device that is alone can't tell a sick sensor from a changed world: that stays local, for a person to decide.
    Two devices that drift in different streams are two sick devices. Where there is no fleet drift, devices with an
    alarm are local: named, so that they can be quarantined. `own` names what a device shows alone, also while the
    fleet drifts in something else.

    Args:
        verdicts: the latest verdict per device, all of one bundle.
        settings: shares and levels.
    """
    voting = {d: v for d, v in sorted(verdicts.items()) if v.p_value is not None}
    drifting = {d: names for d, v in voting.items() if (names := drifts_in(v, settings))}
    alarmed = tuple(d for d, v in sorted(verdicts.items()) if has_alarm(v))
    need = max(2, math.ceil(settings.fleet_share * len(voting)))
    count = Counter(name for names in drifting.values() for name in names)
    line = settings.fleet_alpha if alarmed else settings.budget / settings.horizon_windows
    shared = tuple(
        name
        for name, k in sorted(count.items(), key=lambda item: (-item[1], item[0]))
        if k >= need and binom_sf(k - 1, len(voting), settings.device_alpha) < line
    )
    p = few_p([v.p_value for v in voting.values() if v.p_value is not None])
    leaning = Counter(name for v in voting.values() for name in v.leaning)
    own = {d: alone for d, v in voting.items() if (alone := _own(v, count, leaning, len(voting)))}
    if shared:
        members = tuple(d for d, names in drifting.items() if not names.isdisjoint(shared))
        verdict = _fleet(members, len(voting), shared, p)
    else:
        verdict = _local(alarmed, len(voting), p)
    return msgspec.structs.replace(verdict, own=own)


def few_p(p_values: Sequence[float]) -> float:
    """How unlikely so many small p-values of devices are, if every device were healthy.

    Devices below each of `_LEVELS` are counted: many that drift a little show at the first, a few that drift far at the
    last ones. The smallest binomial tail counts, times the number of levels.

    Args:
        p_values: of the devices, each of one device as a whole.
    """
    n = len(p_values)
    tails = [binom_sf(sum(p < level for p in p_values) - 1, n, level) for level in _LEVELS]
    return min(1.0, len(_LEVELS) * min(tails, default=1.0))


def has_alarm(verdict: Verdict) -> bool:
    """Whether a test of the device's latest blocks is beyond its alarm line."""
    return verdict.level != "ok" or bool(verdict.quality) or any(e.alarm for e in verdict.evidence)


def drifts_in(verdict: Verdict, settings: DriftSettings) -> frozenset[str]:
    """The names of the streams in which a device drifts."""
    names = {f.name for f in verdict.quality} | {a.name for a in verdict.alarms}
    significant = verdict.p_value is not None and verdict.p_value < settings.device_alpha
    names |= {e.name for e in verdict.evidence if e.alarm or significant}
    return frozenset(names)


def _own(verdict: Verdict, count: Counter[str], leaning: Counter[str], judged: int) -> tuple[str, ...]:
    """Features with a confirmed alarm that only this device shows; what the model makes of them isn't a fault.

    What half of the others lean towards, it only shows first.
    """
    features = {f.name for f in verdict.quality} | {e.name for e in verdict.evidence if e.kind == "feature"}
    confirmed = {a.name for a in verdict.alarms if a.confirmed}
    alone = {n for n in features & confirmed if count[n] <= 1}
    return tuple(sorted(n for n in alone if 2 * (leaning[n] - (n in verdict.leaning)) < max(judged - 1, 1)))


def _fleet(devices: tuple[str, ...], judged: int, shared: tuple[str, ...], p: float) -> FleetVerdict:
    what = ", ".join(shared[:3]) + (f" and {len(shared) - 3} more" if len(shared) > 3 else "")
    return FleetVerdict(
        kind="fleet",
        devices=devices,
        judged=judged,
        shared=shared,
        p_value=p,
        own={},
        sentence=f"{len(devices)} of {judged} devices drift together in {what} (p = {p:.1e}): the world changed.",
    )


def _local(devices: tuple[str, ...], judged: int, p: float) -> FleetVerdict:
    if not devices:
        none = f"None of {judged} devices drifts." if judged else "No device has enough rows to be judged."
        return FleetVerdict(kind="none", devices=(), judged=judged, shared=(), p_value=p, own={}, sentence=none)
    named = ", ".join(devices[:5]) + (f" and {len(devices) - 5} more" if len(devices) > 5 else "")
    verb = "drifts" if len(devices) == 1 else "drift"
    if judged <= 1:
        sentence = f"{named} {verb}; a single device can't tell a sick sensor from a changed world."
    else:
        sentence = f"{named} {verb}, unlike the fleet of {judged} devices: a local fault."
    return FleetVerdict(kind="local", devices=devices, judged=judged, shared=(), p_value=p, own={}, sentence=sentence)
