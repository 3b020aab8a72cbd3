"""Monitoring: do the devices with a label drift, and the others not?

Rules of this room:
* pure: verdicts and labels in, segments that drift out, and what follows from them;
* a segment is a label and a value that at least `segment_devices` judged devices have. It drifts when the fleet's own
  condition holds within it (half of them, in one stream, beyond chance), at a level shared among all segments, and when
  more of them do so than of the others (Fisher's exact test): what all drift in is the fleet's;
* a few devices of many that drift in one stream more often than chance explains are a company, with or without a label
  that tells them apart: a bad batch, a firmware, a place that nobody wrote down. It alarms as a segment does;
* one event, one alarm: it opens when a segment drifts at two looks in a row, and closes after `recovery` looks at which
  it didn't. A look counts when one of its devices has a window that was not judged before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from .drift_settings import DriftSettings
from .fleet import FleetVerdict, drifts_in, few_p, has_alarm
from .groups import more_drift_p
from .tails import binom_sf
from .verdict import Verdict

#: How unlikely it must be that the segment only happens to drift more than the others.
UNLIKE_OTHERS: Final = 0.05
#: Fewer devices than this are sick one by one.
_COMPANY: Final = 3
#: Looks in a row at which a segment must drift.
_LASTING: Final = 2


class SegmentVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """A segment whose devices drift, unlike the others."""

    name: str  # label=value
    devices: tuple[str, ...]  # that drift
    size: int  # devices of the segment that were judged
    others: int  # judged devices outside
    others_drifting: int
    shared: tuple[str, ...]  # streams
    p_value: float  # of so many drifting devices if each were healthy
    sentence: str


class Lasting(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a segment that has drifted."""

    windows: dict[str, int]  # of its devices, at the last look
    seen: int = 1  # looks in a row at which it drifted
    clean: int = 0  # and at which it didn't
    open: bool = False


class SegmentAlarm(msgspec.Struct, frozen=True, kw_only=True, tag="segment-alarm"):
    """A segment drifts, and did at the look before."""

    found: SegmentVerdict


class SegmentWell(msgspec.Struct, frozen=True, kw_only=True, tag="segment-well"):
    """A segment has recovered."""

    name: str


def judge_segments(
    verdicts: Mapping[str, Verdict], labels: Mapping[str, Mapping[str, str]], settings: DriftSettings
) -> tuple[SegmentVerdict, ...]:
    """The segments that drift, by name.

    Args:
        verdicts: the latest verdict per device, all of one bundle.
        labels: of each device.
        settings: `segments` names the labels.
    """
    voting = {d: v for d, v in sorted(verdicts.items()) if v.p_value is not None}
    groups: dict[str, list[str]] = {}
    for key in settings.segments:
        for device in voting:
            if key in labels.get(device, {}):
                groups.setdefault(f"{key}={labels[device][key]}", []).append(device)
    groups = {n: g for n, g in sorted(groups.items()) if settings.segment_devices <= len(g) < len(voting)}
    drifting = {d: drifts_in(v, settings) for d, v in voting.items()}
    found = (_judge(name, group, drifting, verdicts, len(groups), settings) for name, group in groups.items())
    return tuple(f for f in found if f is not None)


def _judge(
    name: str,
    group: Sequence[str],
    drifting: Mapping[str, frozenset[str]],
    verdicts: Mapping[str, Verdict],
    segments: int,
    settings: DriftSettings,
) -> SegmentVerdict | None:
    outside = [d for d in drifting if d not in set(group)]
    inside = Counter(stream for d in group for stream in drifting[d])
    elsewhere = Counter(stream for d in outside for stream in drifting[d])
    charged = any(has_alarm(verdicts[d]) for d in group)
    line = (settings.fleet_alpha if charged else settings.budget / settings.horizon_windows) / segments
    need = max(2, math.ceil(settings.fleet_share * len(group)))

    def shares(stream: str, count: int) -> bool:
        beyond_chance = binom_sf(count - 1, len(group), settings.device_alpha) < line
        return beyond_chance and more_drift_p(count, len(group), elsewhere[stream], len(outside)) < UNLIKE_OTHERS

    ranked = sorted(inside.items(), key=lambda item: (-item[1], item[0]))
    shared = tuple(stream for stream, count in ranked if count >= need and shares(stream, count))
    if not shared:
        return None
    members = tuple(d for d in group if not drifting[d].isdisjoint(shared))
    too = sum(not drifting[d].isdisjoint(shared) for d in outside)
    return SegmentVerdict(
        name=name,
        devices=members,
        size=len(group),
        others=len(outside),
        others_drifting=too,
        shared=shared,
        p_value=binom_sf(len(members) - 1, len(group), settings.device_alpha),
        sentence=_sentence(name, len(members), len(group), shared, too, len(outside)),
    )


def _sentence(name: str, drifting: int, size: int, shared: Sequence[str], too: int, others: int) -> str:
    who = f"All {size}" if drifting == size else f"{drifting} of {size}"
    what = ", ".join(shared[:3]) + (f" and {len(shared) - 3} more" if len(shared) > 3 else "")
    rest = f"none of the other {others} does" if not too else f"of the other {others} only {too} do"
    return f"{who} devices with {name} drift in {what}; {rest}."


def judge_company(
    verdicts: Mapping[str, Verdict], parts: Sequence[SegmentVerdict], fleet: FleetVerdict, settings: DriftSettings
) -> tuple[SegmentVerdict, ...]:
    """Devices, too few to be the fleet, that drift in the same stream: at most one company, that of the most devices.

    Three or more of them must drift in one stream, and have p-values so small that the fleet's budget of a window,
    shared among the streams in which any device drifts, does not explain them (`few_p`; all others count as healthy).

    Args:
        verdicts: the latest verdict per device, all of one bundle.
        parts: segments that drift; what they drift in is theirs.
        fleet: what all drift in is the fleet's.
        settings: budget and levels.
    """
    voting = {d: v for d, v in sorted(verdicts.items()) if v.p_value is not None}
    drifting = {d: drifts_in(v, settings) for d, v in voting.items()}
    taken = {name for p in parts for name in p.shared} | set(fleet.shared)
    count = Counter(name for names in drifting.values() for name in names if name not in taken)
    if not count:
        return ()
    stream, most = min(count.items(), key=lambda item: (-item[1], item[0]))
    told = [1.0 if v.p_value is None or stream not in drifting[d] else v.p_value for d, v in voting.items()]
    p_value = few_p(told)
    if most < _COMPANY or p_value * len(count) >= settings.budget / settings.horizon_windows:
        return ()
    members = tuple(d for d, names in drifting.items() if stream in names)
    sentence = (
        f"{most} of {len(voting)} devices drift in {stream}, which is no chance (p = {p_value:.1e}), and the fleet "
    )
    sentence += "does not: look for what they share, such as a batch, a firmware, a place."
    found = SegmentVerdict(
        name=f"drift in {stream}",
        devices=members,
        size=most,
        others=len(voting) - most,
        others_drifting=0,
        shared=(stream,),
        p_value=p_value,
        sentence=sentence,
    )
    return (found,)


def with_segments(fleet: FleetVerdict, found: Sequence[SegmentVerdict]) -> FleetVerdict:
    """The fleet's verdict, which knows who drifts in company, and whose sentence names the segments that drift."""
    fleet = msgspec.structs.replace(fleet, within={d: s.name for s in reversed(found) for d in s.devices})
    own = [s for s in found if not set(s.shared).isdisjoint(fleet.shared)]
    if fleet.kind != "fleet" or not own:
        return fleet
    return msgspec.structs.replace(fleet, sentence=" ".join([fleet.sentence, *(s.sentence for s in own)]))


def follow(
    known: Mapping[str, Lasting],
    found: Sequence[SegmentVerdict],
    windows: Mapping[str, int],
    fleet: FleetVerdict,
    recovery: int,
) -> tuple[dict[str, Lasting], tuple[SegmentAlarm | SegmentWell, ...]]:
    """What is remembered next, and what to do. Looking again at the same windows changes nothing.

    Args:
        known: as returned by the last call.
        found: the segments that drift now.
        windows: the last judged window of every device.
        fleet: what it drifts in together is its alarm, and no segment's.
        recovery: clean looks that close an alarm.
    """
    after: dict[str, Lasting] = {}
    actions: list[SegmentAlarm | SegmentWell] = []
    drifting = {s.name: s for s in found}
    for name in sorted({*known, *drifting}):
        before, now = known.get(name), drifting.get(name)
        looked = {d: w for d, w in windows.items() if d in (now.devices if now else before.windows if before else ())}
        if before is None:
            after[name] = Lasting(windows=looked)
            continue
        if not any(w > before.windows.get(d, -1) for d, w in looked.items()):
            after[name] = before
            continue
        if now is None:
            clean = before.clean + 1
            if before.open and clean < recovery:
                after[name] = msgspec.structs.replace(before, windows=looked, seen=0, clean=clean)
            elif before.open:
                actions.append(SegmentWell(name=name))
            continue
        lasting = msgspec.structs.replace(before, windows=looked, seen=before.seen + 1, clean=0)
        if not lasting.open and lasting.seen >= _LASTING and set(now.shared) - set(fleet.shared):
            lasting = msgspec.structs.replace(lasting, open=True)
            actions.append(SegmentAlarm(found=now))
        after[name] = lasting
    return after, tuple(actions)
