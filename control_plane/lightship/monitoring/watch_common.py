"""Monitoring: the shell around `common_shift`. It brings the devices' newest windows together, and writes what follows.

Rules:
* it follows the judging of windows, and like it reads and counts outside any write transaction; what is written is
  written only if nobody has taken the same look meanwhile;
* the devices are those that serve the bundle which most of a model's devices serve; quarantined ones are left out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.database import Database
from lightship.storage.models import Alarm, CommonMemory, Device, PolicyRow, StreamMemory, WindowRow
from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import LightshipError
from lightship_agent.contract.profile import empty_counts, only_fitting

from . import common_shift as c
from . import policy as p
from .common_shift import Common
from .ingest import FUTURE_MS
from .layout import Layout
from .memory import Memory
from .season import hours_of
from .watch import ACTOR, Watch, fitting, insert_alarm, propose, recall, window_counts

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]


class _Taken(NamedTuple):
    """A look that can be taken: what each device contributes."""

    found: c.Look
    windows: dict[str, int]


def watch_common(database: Database, watch: Watch, model: str) -> int:
    """Take the looks at all devices of `model` together that are due; how many."""
    with database.read() as session:
        digest, devices = _devices(session, model)
        if len(devices) < c.LEAST:
            return 0
        layout = _layout(watch, watch.bundle_of(digest))
        before = _remembered(session, model, digest, layout, watch)
        taken = list(_looks(session, watch, layout, before, digest, devices))
    if taken:
        with database.write() as session:
            _write(session, watch, model, layout, before, taken)
    return len(taken)


def remembered(session: Session, model: str) -> Common | None:
    """What is remembered of a model's devices together; None where there is nothing, or nothing readable."""
    row = session.get(CommonMemory, model)
    if row is None:
        return None
    try:
        return c.from_bytes(row.state)
    except LightshipError as e:
        log.warning("monitoring of %s together: %s: %s", model, e.code, e)
        return None


def _devices(session: Session, model: str) -> tuple[str, dict[str, int]]:
    """The bundle that most devices serve, and the last judged window of each of them."""
    active = select(Device.id, Device.running_digest).where(
        Device.running_model == model, Device.state == "active", Device.quarantined.is_(False)
    )
    serving = {d: running for d, running in session.execute(active) if running}
    if not serving:
        return "", {}
    digest = min(Counter(serving.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    judged = select(StreamMemory.device, StreamMemory.w).where(StreamMemory.digest == digest)
    return digest, {d: w for d, w in session.execute(judged) if serving.get(d) == digest}


def _layout(watch: Watch, bundle: Bundle) -> Layout:
    return Layout(bundle.profile, watch.drift, bundle.manifest.importances)


def _remembered(session: Session, model: str, digest: str, layout: Layout, watch: Watch) -> Common:
    found = remembered(session, model)
    if found is None or found.digest != digest or not found.memory.fits(layout, watch.drift):
        return Common.fresh(digest, layout, watch.drift)
    return found


def _looks(
    session: Session, watch: Watch, layout: Layout, before: Common, digest: str, devices: Mapping[str, int]
) -> Iterator[_Taken]:
    """The looks that are due, the oldest first; every device's windows are shared out among them."""
    # Who comes later begins with its newest window; at the very beginning all that is stored is looked at.
    back = 1 if before.windows else c.MOST
    seen = {d: before.windows.get(d, max(w - back, -1)) for d, w in devices.items()}
    pending = {d: w - seen[d] for d, w in devices.items()}
    due = c.looks_due(pending, before.devices)
    if not due:
        return
    pasts = {d: m for d, n in sorted(pending.items()) if n > 0 and (m := recall(session, d, digest))}
    fitted = {d: m for d, m in pasts.items() if m.fits(layout, watch.drift)}
    parts = {d: np.array_split(np.arange(seen[d] + 1, devices[d] + 1), due) for d in fitted}
    for n in range(due):
        spans = {d: part[n].tolist() for d, part in parts.items() if len(part[n])}
        told = [
            (d, *contribution)
            for d, span in spans.items()
            if (contribution := _contribution(session, watch, layout, fitted[d], d, digest, span))
        ]
        if not told:
            continue
        names, now, past, usable = zip(*told, strict=True)
        found = c.look(names, np.stack(now), np.stack(past), np.stack(usable))
        yield _Taken(found, {d: span[-1] for d, span in spans.items()})


def _contribution(
    session: Session, watch: Watch, layout: Layout, memory: Memory, device: str, digest: str, span: Sequence[int]
) -> tuple[Floats, Floats, npt.NDArray[np.bool_]] | None:
    """A device's counts in these windows, those of its own past, and in which streams there are enough of both."""
    query = select(WindowRow).where(
        WindowRow.device == device, WindowRow.digest == digest, WindowRow.w >= span[0], WindowRow.w <= span[-1]
    )
    rows = list(session.scalars(query.order_by(WindowRow.w)))
    if not rows:
        return None
    nothing = empty_counts(layout.profile)
    flat = np.stack([layout.flat(fitting(only_fitting(window_counts(r), layout.profile), nothing)) for r in rows])
    cells = layout.cells(flat)
    now = cells.sum(axis=0).astype(np.float64)
    past = memory.pooled.astype(np.float64)
    if memory.table is not None and memory.chosen.any():
        hours = hours_of([r.opened_at for r in rows], audit.now_ms() + FUTURE_MS)
        by_hour = memory.table.expected([h.slot for h in hours], cells.sum(axis=-1).astype(np.float64))
        past = np.where(memory.chosen[:, None], by_hour, past)
    enough = (now.sum(axis=-1) >= watch.drift.min_rows) & (past.sum(axis=-1) > 0)
    return now, past, enough & (memory.learnt >= watch.drift.warm_up)


def _write(session: Session, watch: Watch, model: str, layout: Layout, before: Common, taken: Sequence[_Taken]) -> None:
    """Learn the looks, unless somebody has meanwhile, and write what follows from them."""
    now = audit.now_ms()
    stored = remembered(session, model)
    if stored is not None and stored.digest == before.digest and stored.looks != before.looks:
        return
    if stored is not None and stored.digest != before.digest and stored.event is not None:
        _carry_out(session, watch, c.Close(reason="model-changed"), model, now, stored)
    row = session.get(PolicyRow, model)
    policy = msgspec.msgpack.decode(row.state, type=p.PolicyState) if row else p.PolicyState()
    fleet = policy.fleet.shared if policy.fleet else ()
    after = before
    for one in taken:
        after, actions = c.learn(
            after, layout, one.found, one.windows, watch.drift, fleet=fleet, recovery=watch.policy.recovery
        )
        for action in actions:
            _carry_out(session, watch, action, model, now, after)
    session.merge(CommonMemory(model=model, looks=after.looks, state=c.to_bytes(after)))


def _carry_out(session: Session, watch: Watch, action: c.Action, model: str, now: int, common: Common) -> None:
    match action:
        case c.Open():
            insert_alarm(
                session,
                kind="common",
                model=model,
                level=action.level,
                now=now,
                sentence=action.sentence,
                evidence=_evidence(common, action.shifts),
            )
        case c.Confirm():
            for alarm in _standing(session, model):
                alarm.level, alarm.sentence = "critical", action.sentence
                alarm.evidence = _evidence(common, action.shifts)
                audit.append(session, actor=ACTOR, verb="alarm.confirm", subject=alarm.id, detail={"at": now})
        case c.Close():
            for alarm in _standing(session, model):
                alarm.closed_at = now
                detail = {"reason": action.reason}
                audit.append(session, actor=ACTOR, verb="alarm.close", subject=alarm.id, detail=detail)
    critical = isinstance(action, c.Confirm) or (isinstance(action, c.Open) and action.level == "critical")
    if critical and watch.policy.propose:
        assert isinstance(action, c.Open | c.Confirm)
        excluded = _set_aside(session, model)
        wanted = p.ProposeRetrain(
            model=model, at=now / 1_000, reason=action.sentence, devices=common.devices, excluded=excluded
        )
        propose(session, wanted, model, now)


def _set_aside(session: Session, model: str) -> tuple[str, ...]:
    query = select(Device.id).where(Device.running_model == model, Device.quarantined.is_(True))
    return tuple(sorted(session.scalars(query)))


def _evidence(common: Common, shifts: Sequence[c.Shift]) -> dict[str, object]:
    return {
        "devices": list(common.devices),
        "names": [s.name for s in shifts],
        "shifts": [msgspec.to_builtins(s) for s in shifts],
    }


def _standing(session: Session, model: str) -> list[Alarm]:
    query = select(Alarm).where(Alarm.kind == "common", Alarm.model == model, Alarm.closed_at.is_(None))
    return list(session.scalars(query))
