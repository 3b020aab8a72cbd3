"""Monitoring: have all devices moved together, each less than it may alone?

Rules of this room:
* pure; counts per device and what is remembered in, what follows out;
* a look compares every device's newest windows with its own past (`groups`), stream by stream. Each window is in one
  look. It is taken when nearly all devices have a window that no look has seen, and does not wait for those that stay
  away;
* what moves all devices at once need not be a drift: nights, weekends, weather do. So looks are measured by the looks
  before them, as a device's windows are by its own: two weeks are learnt in which nothing is said, then a common shift
  must be beyond the line by Hotelling's test and by the moments of those looks (F tail), the conformal alarm of record
  must stand, and the shift must be larger than `common_floor`, after its noise is taken off;
* weather lasts: looks that resemble the one before them count for fewer, (1 − ρ)/(1 + ρ) each, ρ their correlation, so
  that what wanders slowly is known to be known badly;
* it is a warning, and critical where it is above what a single device may shift: then the fleet has left the training
  data, although no device could show it;
* one event, one alarm; the alarm of a fleet that was found by counting devices comes first, and is not repeated here.

Sources: Hotelling 1931 (the paired test); the others are those of `calibration` and `conformal`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DriftError

from . import conformal
from .drift_settings import DriftSettings
from .groups import Paired, paired
from .layout import Block, Layout
from .memory import Memory, pack, unpack

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: Fewer devices say nothing: Hotelling's test needs nine of them for its four cells.
LEAST: Final = 10
#: The share of the devices that must have something new.
_NEARLY_ALL: Final = 0.8
#: No more looks are taken at once than this.
MOST: Final = 64
#: Looks are learnt for so many times the weeks in which nothing is said: a quarter of a year.
_LONGER: Final = 6
#: Windows by which devices may run ahead of the others before a look is taken without those.
_AHEAD: Final = 4

Level = Literal["warning", "critical"]


def looks_due(pending: Mapping[str, int], took_part: Collection[str]) -> int:
    """How many looks can be taken now.

    One for each window that four in five devices have to offer. Where some stay away, one as soon as as many devices
    have two windows as have none, or half of those that have any have four.

    Args:
        pending: per device, judged windows that no look has seen.
        took_part: devices of the last look.
    """
    have = sorted((n for n in pending.values() if n > 0), reverse=True)
    if len(have) < LEAST:
        return 0
    devices = len({d for d, n in pending.items() if n > 0} | set(took_part))
    need = math.ceil(_NEARLY_ALL * devices)
    if len(have) >= need:
        return min(have[need - 1], MOST)
    ahead = sum(n >= 2 for n in have) >= devices - len(have)
    return int(ahead or 2 * sum(n >= _AHEAD for n in have) >= len(have))


class Look(NamedTuple):
    """What all devices together show, stream by stream."""

    streams: tuple[Paired, ...]
    devices: tuple[str, ...]  # that were looked at


def look(devices: Sequence[str], now: Floats, baseline: Floats, usable: Bools) -> Look:
    """Compare every device with its own past.

    Args:
        devices: their names.
        now: counts of their newest windows, `[devices, streams, cells]`.
        baseline: counts of their own past, of the same hours where a stream has a season; the same shape.
        usable: what has rows enough, and a past, `[devices, streams]`.
    """
    some = usable[:, :, None]
    fit_now, fit_past = np.where(some, now, 0.0), np.where(some, baseline, 0.0)
    streams = tuple(paired(fit_now[:, s], fit_past[:, s]) for s in range(now.shape[1]))
    return Look(streams, tuple(devices))


class Shift(msgspec.Struct, frozen=True, kw_only=True):
    """A stream in the last look."""

    name: str
    effect: float  # w² of the common shift, less its noise
    p_value: float  # the larger of Hotelling's, and that by the looks before
    devices: int
    evidence: float  # of the alarm of record, relative to its line
    beyond: bool  # all conditions hold


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A common shift that stands."""

    names: tuple[str, ...]
    level: Level
    clean: int = 0  # looks in a row that don't show it


@dataclass(frozen=True)
class Common:
    """What is remembered of the devices that serve a bundle, taken together."""

    digest: str
    memory: Memory
    windows: Mapping[str, int]  # per device, the last window that was in a look
    pairs: Floats  # [streams, 4]: of looks in a row, their number, sum, sum of squares and of products
    before: Floats  # [streams]: the scores of the last look
    devices: tuple[str, ...] = ()  # of the last look
    looks: int = 0
    last: tuple[Shift, ...] = ()
    event: Event | None = None

    @classmethod
    def fresh(cls, digest: str, layout: Layout, settings: DriftSettings) -> Common:
        """Nothing seen yet."""
        nothing = np.zeros((layout.streams, 4))
        return cls(digest, Memory.fresh(layout, settings), {}, nothing, np.zeros(layout.streams))

    @property
    def worth(self) -> Floats:
        """How many independent looks one of a stream amounts to, at most 1."""
        n, total, squares, products = self.pairs.T
        some = np.maximum(n, 1.0)
        mean = total / some
        with np.errstate(divide="ignore", invalid="ignore"):
            rho = (products / some - mean**2) / (squares / some - mean**2)
        # What chance makes of independent looks is taken for nothing.
        rho = np.where(np.isfinite(rho) & (rho > 2 / np.sqrt(some)), np.minimum(rho, 0.999), 0.0)
        return np.asarray((1 - rho) / (1 + rho))


class Open(msgspec.Struct, frozen=True, kw_only=True, tag="open-common"):
    """All devices have moved."""

    level: Level
    shifts: tuple[Shift, ...]
    sentence: str


class Confirm(msgspec.Struct, frozen=True, kw_only=True, tag="confirm-common"):
    """And by more than a single one may."""

    shifts: tuple[Shift, ...]
    sentence: str


class Close(msgspec.Struct, frozen=True, kw_only=True, tag="close-common"):
    """It is over."""

    reason: Literal["recovered", "model-changed"]


Action = Open | Confirm | Close


def learn(
    common: Common,
    layout: Layout,
    found: Look,
    windows: Mapping[str, int],
    settings: DriftSettings,
    *,
    fleet: Collection[str],
    recovery: int,
) -> tuple[Common, tuple[Action, ...]]:
    """With a look learnt, and what follows from it.

    Args:
        common: what is remembered.
        layout: of the bundle's streams.
        found: the look.
        windows: per device in it, its last window.
        settings: budget, floors, how much is learnt first.
        fleet: streams in which the fleet drifts already, by the count of its devices.
        recovery: looks without a shift that close an alarm.
    """
    number, learning = common.looks, common.looks < settings.baseline
    df = np.maximum((layout.reference > 0).sum(axis=-1) - 1, 1)
    scores = np.array([s.ratio for s in found.streams]) * df
    testable = scores > 0
    line = settings.record_line(layout.streams)
    memory = common.memory.ranked(number, scores, testable, f"{common.digest} together", math.inf if learning else line)
    if learning:
        memory = replace(memory, sums=np.zeros_like(memory.sums), walk=np.zeros_like(memory.walk))
    p = _p_values(memory, layout, settings, scores, found, common.worth)
    alpha = settings.budget / settings.horizon_windows / max(layout.streams, 1)
    quiet = ~testable | (p >= alpha)
    memory = memory.learn(
        {Block(number, 1): scores},
        np.zeros_like(layout.reference),
        number,
        healthy=testable & (quiet | learning),
        quiet=quiet,
        settings=msgspec.structs.replace(settings, baseline=_LONGER * settings.baseline),
    )
    effects = np.array([s.effect for s in found.streams])
    beyond = memory.active & ~quiet & (effects > settings.common_floor)
    shifts = _shifts(layout, memory, found, p, beyond, line)
    event, actions = _follow(common.event, shifts, settings, fleet, recovery)
    after = replace(
        common,
        memory=memory,
        windows={**common.windows, **windows},
        pairs=common.pairs + _pairs(common.before, scores, quiet | learning),
        before=scores,
        devices=found.devices,
        looks=number + 1,
        last=shifts,
        event=event,
    )
    return after, actions


def _pairs(before: Floats, scores: Floats, learnt: Bools) -> Floats:
    """What a look and the one before it add to the sums of their correlation."""
    both = learnt & (before > 0) & (scores > 0)
    middle = (before + scores) / 2
    step = np.stack([np.ones_like(scores), middle, (before**2 + scores**2) / 2, before * scores], axis=-1)
    return np.where(both[:, None], step, 0.0)


def _p_values(
    memory: Memory, layout: Layout, settings: DriftSettings, scores: Floats, found: Look, worth: Floats
) -> Floats:
    """Hotelling's, and never below that by the looks before; 1 while there are too few of those."""
    calibration = memory.calibration(layout, settings, seasonal=True)
    calibration = calibration._replace(blocks=np.maximum(calibration.blocks * worth, 1.0))
    own = np.where(calibration.ready, calibration.p_value(0, scores, np.zeros_like(scores)), 1.0)
    return np.asarray(np.maximum(own, np.array([s.p_value for s in found.streams])))


def _shifts(layout: Layout, memory: Memory, found: Look, p: Floats, beyond: Bools, line: float) -> tuple[Shift, ...]:
    told = np.minimum(conformal.evidence(memory.sums) / line, 1e9)
    return tuple(
        Shift(
            name=layout.names[i],
            effect=s.effect,
            p_value=float(p[i]),
            devices=s.devices,
            evidence=float(told[i]),
            beyond=bool(beyond[i]),
        )
        for i, s in enumerate(found.streams)
    )


def _follow(
    event: Event | None, shifts: Sequence[Shift], settings: DriftSettings, fleet: Collection[str], recovery: int
) -> tuple[Event | None, tuple[Action, ...]]:
    beyond = tuple(sorted((s for s in shifts if s.beyond), key=lambda s: (-s.effect, s.name)))
    level: Level = "critical" if any(s.effect > settings.effect_floor for s in beyond) else "warning"
    if event is None:
        if not {s.name for s in beyond} - set(fleet):
            return None, ()
        names = tuple(s.name for s in beyond)
        said = sentence(beyond, settings)
        return Event(names=names, level=level), (Open(level=level, shifts=beyond, sentence=said),)
    if not beyond:
        if event.clean + 1 >= recovery:
            return None, (Close(reason="recovered"),)
        return msgspec.structs.replace(event, clean=event.clean + 1), ()
    names = tuple(dict.fromkeys([*event.names, *(s.name for s in beyond)]))
    if level == "critical" and event.level == "warning":
        after = Event(names=names, level=level)
        return after, (Confirm(shifts=beyond, sentence=sentence(beyond, settings)),)
    return msgspec.structs.replace(event, names=names, clean=0), ()


def sentence(beyond: Sequence[Shift], settings: DriftSettings) -> str:
    """Who has moved, in what, and how far."""
    first = beyond[0]
    what = ", ".join(s.name for s in beyond[:3]) + (f" and {len(beyond) - 3} more" if len(beyond) > 3 else "")
    said = f"All {first.devices} devices have moved together in {what}, each against its own past: w² = "
    said += f"{first.effect:.4f}, about {math.sqrt(first.effect):.2f} sd of {first.name} (p = {first.p_value:.1e})."
    if first.effect > settings.effect_floor:
        return f"{said} That is more than is tolerated of one device ({settings.effect_floor:g})."
    return f"{said} No single device may show it: {settings.effect_floor:g} is tolerated of each."


def facts(common: Common, settings: DriftSettings) -> str:
    """A sentence about the last look, for who asks why there was no alarm."""
    if not common.last:
        return f"Devices are compared together once {LEAST} of them have a history of their own."
    most = min(common.last, key=lambda s: s.p_value)
    said = f"Taken together, {len(common.devices)} devices were compared with their own past {common.looks} times"
    if common.looks < settings.baseline:
        return f"{said}; {settings.baseline} looks are learnt before anything is said."
    return (
        f"{said}; the most telling common shift is in {most.name}: w² = {most.effect:.4f} (p = {most.p_value:.1e}; the "
        f"alarm of record is at {most.evidence:.1%} of its line)."
    )


class _Stored(msgspec.Struct, frozen=True):
    digest: str
    memory: bytes
    windows: dict[str, int]
    pairs: bytes
    before: bytes
    devices: tuple[str, ...]
    looks: int
    last: tuple[Shift, ...]
    event: Event | None


def to_bytes(common: Common) -> bytes:
    """What is remembered, as bytes."""
    stored = _Stored(
        common.digest,
        pack(common.memory),
        dict(common.windows),
        common.pairs.astype("<f8").tobytes(),
        common.before.astype("<f8").tobytes(),
        common.devices,
        common.looks,
        common.last,
        common.event,
    )
    return msgspec.msgpack.encode(stored)


def from_bytes(data: bytes) -> Common:
    """What `to_bytes` made bytes of.

    Raises:
        DriftError: drift.unknown when the bytes are something else.
    """
    try:
        stored = msgspec.msgpack.decode(data, type=_Stored)
        memory = unpack(stored.memory)
        pairs = np.frombuffer(stored.pairs, "<f8").reshape(len(memory.names), 4)
        before = np.frombuffer(stored.before, "<f8").reshape(len(memory.names))
    except (msgspec.MsgspecError, ValueError) as e:
        raise DriftError("drift.unknown", f"What is remembered of the devices together is not readable: {e}") from e
    return Common(
        digest=stored.digest,
        memory=memory,
        windows=stored.windows,
        pairs=pairs,
        before=before,
        devices=stored.devices,
        looks=stored.looks,
        last=stored.last,
        event=stored.event,
    )
