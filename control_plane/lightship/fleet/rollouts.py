"""Fleet: rollouts as operators and the reconciler handle them; the shell around the decider.

Rules:
* operators write intentions (a new row, a pause); only the reconciler assigns devices;
* facts come from the devices' own reports, evidence from windows of the same time;
* one rollout of a model at a time on a device.
"""

from __future__ import annotations

import secrets
from typing import Any

import msgspec
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lightship.monitoring.canary import (
    CanarySettings,
    CanaryVerdict,
    Change,
    GroupEvidence,
    combine,
    due_look,
    judge_canary,
    judge_first,
)
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.watch import BundleOf
from lightship.registry import versions
from lightship.release.keys import KeyFolder
from lightship.storage import audit
from lightship.storage.models import AssignmentRow, Device, DeviceEpoch, Exposure, RolloutRow, UpdateStep, WindowRow
from lightship_agent.contract.codes import FleetError, RegistryError
from lightship_agent.fail_points import fail_point

from . import director
from . import rollout as r

ACTOR = "lightship:reconciler"
#: Windows before a canary that say what its devices predicted until then: two weeks of hours.
_PAST_WINDOWS = 336


class Selector(msgspec.Struct, frozen=True, kw_only=True):
    """Which devices: a group ("" = all), and labels that must match."""

    group: str = ""
    labels: dict[str, str] = {}


def select_devices(session: Session, selector: Selector) -> list[Device]:
    """Active devices that match, in the order of their ids."""
    query = select(Device).where(Device.state == "active").order_by(Device.id)
    if selector.group:
        query = query.where(Device.group == selector.group)
    wanted = selector.labels.items()
    return [d for d in session.scalars(query) if all(d.labels.get(k) == v for k, v in wanted)]


def make_plan(
    session: Session,
    *,
    model: str,
    version: int,
    selector: Selector,
    waves: tuple[r.WaveSpec, ...],
    rules: r.Rules,
) -> r.Plan:
    """The plan a rollout would have now; canaries are taken from devices that are well and were seen lately.

    The deal is by the version's name, so that what is planned is what is started, and each version has its own canary.

    Raises:
        RegistryError: registry.unknown-version, registry.state.
        FleetError: fleet.rollout-spec.
    """
    target = versions.get(session, model, version)
    if target.state != "released":
        message = f"{model}@{version} is {target.state}; only released versions can be rolled out."
        raise RegistryError("registry.state", message, remedy=f"Run `lightship release {model}@{version}`.")
    if rules.require_labels and "r2" in target.metrics:
        message = f"{model} predicts numbers, and labels are compared for classes only: the gate would never open."
        raise FleetError("fleet.rollout-spec", message, remedy="Add --no-labels: rows and server errors decide.")
    devices = select_devices(session, selector)
    now = audit.now_ms()
    fit = [d.id for d in devices if not d.quarantined and now - d.last_seen < rules.offline_after * 1_000]
    rest = [d.id for d in devices if d.id not in fit]
    dealt = r.make_waves(fit or rest, waves, seed=f"{model}@{version}")
    if fit and rest:
        dealt = (*dealt[:-1], (*dealt[-1], *rest)) if len(dealt) > 1 or len(waves) == 1 else (*dealt, tuple(rest))
    champion = versions.aliased(session, model, "champion")
    previous = champion if champion is not None and champion != version else 0
    return r.Plan(
        model=model,
        version=version,
        digest=target.digest,
        previous_version=previous,
        waves=dealt,
        wave_specs=waves[: len(dealt)],
        rules=rules,
    )


def create(
    session: Session, plan: r.Plan, *, selector: Selector, rollout: str, actor: str, reason: str = ""
) -> RolloutRow:
    """Store a rollout; the reconciler begins it.

    Raises:
        FleetError: fleet.group-busy.
    """
    mine = {d for wave in plan.waves for d in wave}
    for other in active(session):
        theirs = {d for wave in plan_of(other).waves for d in wave}
        if other.model == plan.model and mine & theirs:
            message = f"Rollout {other.id} of {other.model} is {other.status} on {len(mine & theirs)} of these devices."
            raise FleetError("fleet.group-busy", message, remedy="Wait for it, or abort it.")
    now = audit.now_ms()
    row = RolloutRow(
        id=rollout,
        model=plan.model,
        version=plan.version,
        status="running",
        reason=reason,
        selector=msgspec.to_builtins(selector),
        plan=msgspec.to_builtins(plan),
        state=msgspec.to_builtins(r.RolloutState()),
        gate={},
        created_by=actor,
        created_at=now,
        updated_at=now,
    )
    session.add(row)
    detail = {"model": plan.model, "version": plan.version, "waves": [list(w) for w in plan.waves], "reason": reason}
    audit.append(session, actor=actor, verb="rollout.start", subject=rollout, detail=detail)
    return row


def new_id() -> str:
    """An id for a rollout."""
    return secrets.token_hex(4)


def get(session: Session, rollout: str) -> RolloutRow:
    """The rollout of that id.

    Raises:
        FleetError: fleet.unknown-rollout.
    """
    row = session.get(RolloutRow, rollout)
    if row is None:
        raise FleetError("fleet.unknown-rollout", f"No rollout {rollout!r}.", remedy="See `lightship rollout status`.")
    return row


def active(session: Session) -> list[RolloutRow]:
    """Rollouts that are not over."""
    over = tuple(r.TERMINAL_STATUSES)
    return list(
        session.scalars(select(RolloutRow).where(RolloutRow.status.not_in(over)).order_by(RolloutRow.created_at))
    )


def plan_of(row: RolloutRow) -> r.Plan:
    """The stored plan."""
    return msgspec.convert(row.plan, r.Plan)


def state_of(row: RolloutRow) -> r.RolloutState:
    """The stored state of the decider."""
    return msgspec.convert(row.state, r.RolloutState)


def statuses(session: Session, row: RolloutRow) -> dict[str, r.DeviceStatus]:
    """The status of every device assigned so far."""
    plan = plan_of(row)
    return r.device_statuses(plan, state_of(row), facts(session, row.id, plan), audit.now_ms() / 1_000)


def intervene(session: Session, rollout: str, what: str, *, actor: str, reason: str, revert: bool = True) -> RolloutRow:
    """Pause, resume or abort.

    Raises:
        FleetError: fleet.unknown-rollout, fleet.rollout-state.
    """
    row = get(session, rollout)
    plan, state, now = plan_of(row), state_of(row), audit.now_ms() / 1_000
    if what == "pause":
        result = r.pause(state, reason or "Paused by hand.")
    elif what == "resume":
        result = r.resume(plan, state, facts(session, rollout, plan), now)
    else:
        result = r.abort(plan, state, revert=revert, reason=reason or "Aborted by hand.", now=now)
    # The actions of an abort are carried out by the reconciler, which assigns; it finds them by the state.
    _store(row, result[0])
    audit.append(session, actor=actor, verb=f"rollout.{what}", subject=rollout, detail={"reason": reason})
    return row


def running(session: Session, digest: str) -> list[str]:
    """Active devices that report that they serve this bundle."""
    query = select(Device).where(Device.state == "active").order_by(Device.id)
    return [d.id for d in session.scalars(query) if any(x.get("digest") == digest for x in d.running)]


def take_back(session: Session, model: str, digest: str, reason: str) -> None:
    """Abort, with the way back, every rollout under way of a bundle that monitoring has found worse."""
    for row in active(session):
        plan = plan_of(row)
        if (plan.model, plan.digest) == (model, digest) and row.status in ("running", "paused"):
            intervene(session, row.id, "abort", actor=ACTOR, reason=reason, revert=True)


def pause_version(session: Session, model: str, version: int, *, actor: str, reason: str) -> tuple[str, ...]:
    """Pause every running rollout of a version, until it is decided what becomes of it; their ids."""
    mine = [row for row in active(session) if (row.model, row.version, row.status) == (model, version, "running")]
    for row in mine:
        intervene(session, row.id, "pause", actor=actor, reason=reason)
    return tuple(row.id for row in mine)


def advance(session: Session, row: RolloutRow, keys: KeyFolder, bundle_of: BundleOf) -> tuple[str, ...]:
    """One step of a rollout: judge, decide, assign; the devices to poke after commit."""
    plan, state, now = plan_of(row), state_of(row), audit.now_ms() / 1_000
    known = facts(session, row.id, plan)
    verdict = _gate(session, row, plan, state, bundle_of)
    plan = _with_a_way_back(session, plan)
    if state.status in ("running", "paused") and versions.get(session, plan.model, plan.version).state == "revoked":
        reason = f"{plan.model}@{plan.version} was revoked."
        after, actions = r.abort(plan, state, revert=True, reason=reason, now=now)
    else:
        after, actions = r.step(plan, state, known, verdict, now)
    if after != state:
        fail_point("advancing", after.status)
        _store(row, after)
    if after.status != state.status:
        detail = {"from": state.status, "to": after.status, "reason": after.reason}
        audit.append(session, actor=ACTOR, verb="rollout.transition", subject=row.id, detail=detail)
    if after.status == "rolled-back" and state.status != "rolled-back":
        # It challenged and lost.
        versions.drop_alias(session, plan.model, "challenger", plan.version, actor=ACTOR)
    poked: list[str] = []
    for action in actions:
        poked.extend(_carry_out(session, row, plan, action, keys))
    if "rolling-back" in (state.status, after.status):
        poked.extend(_revert_stragglers(session, row, plan, after, keys))
    return tuple(poked)


def _with_a_way_back(session: Session, plan: r.Plan) -> r.Plan:
    """The plan as it can be carried out: a version that was revoked meanwhile can't be gone back to."""
    if not plan.previous_version:
        return plan
    previous = versions.get(session, plan.model, plan.previous_version)
    return plan if previous.state == "released" else msgspec.structs.replace(plan, previous_version=0)


def facts(session: Session, rollout: str, plan: r.Plan) -> dict[str, r.DeviceFact]:
    """What the devices of a plan have reported."""
    failed = _failed_devices(session, rollout)
    out = {}
    ids = [d for wave in plan.waves for d in wave]
    for device in session.scalars(select(Device).where(Device.id.in_(ids))):
        digest = next((x["digest"] for x in device.running if x["model"] == plan.model), "")
        out[device.id] = r.DeviceFact(
            digest=digest,
            committed=device.phase == "idle",
            failed=device.id in failed,
            last_seen=device.last_seen / 1_000,
        )
    return out


def _failed_devices(session: Session, rollout: str) -> set[str]:
    """Devices whose last step of this rollout is a failure; order comes from sequence numbers, never from clocks."""
    same_epoch = (DeviceEpoch.device == UpdateStep.device) & (DeviceEpoch.epoch == UpdateStep.epoch)
    query = select(UpdateStep).outerjoin(DeviceEpoch, same_epoch).where(UpdateStep.rollout == rollout)
    newest: dict[str, UpdateStep] = {}
    for step in session.scalars(query.order_by(DeviceEpoch.updated_at, UpdateStep.s)):
        newest[step.device] = step
    return {d for d, s in newest.items() if s.state in ("failed", "refused")}


def _gate(
    session: Session, row: RolloutRow, plan: r.Plan, state: r.RolloutState, bundle_of: BundleOf
) -> r.Verdict | None:
    if state.status != "running" or state.wave < 0 or not plan.wave_specs[state.wave].gate or not state.done:
        return None
    settings = CanarySettings(require_labels=plan.rules.require_labels)
    canary, control = evidence(session, plan, state)
    taken = int(row.gate.get("taken", -1))
    compared = control.devices > 0 and bool(plan.previous_version)
    fewest = min(canary.labelled or 0, control.labelled or 0) if compared else canary.labelled
    look = due_look(fewest, settings, taken)
    if compared:
        said = judge_canary(canary, control, settings, look)
    else:
        profile = bundle_of(plan.digest).profile
        said = judge_first(canary, profile.errors, profile.labelled, settings, look)
    if look is None and row.gate.get("verdict") and said.outcome == "inconclusive":
        # Between looks errors decide nothing: what the last look said stands.
        said = _standing(row, said, settings)
    row.gate = {"taken": look if look is not None else taken, "verdict": msgspec.to_builtins(said)}
    return r.Verdict(outcome=said.outcome, sentence=said.sentence)


def _standing(row: RolloutRow, fresh: CanaryVerdict, settings: CanarySettings) -> CanaryVerdict:
    """The fresh verdict, with the errors check of the last look in its place."""
    last = msgspec.convert(row.gate["verdict"], CanaryVerdict)
    kept = next((c for c in last.checks if c.name == "errors" and "look" in c.numbers), None)
    checks = tuple(kept if kept is not None and c.name == "errors" else c for c in fresh.checks)
    return combine(checks, settings)


def evidence(session: Session, plan: r.Plan, state: r.RolloutState) -> tuple[GroupEvidence, GroupEvidence]:
    """What the canary has shown since it began to serve, and what the control has shown in the same time."""
    spans = list(
        session.scalars(select(Exposure).where(Exposure.device.in_(state.done), Exposure.digest == plan.digest))
    )
    began = min((s.began_at for s in spans), default=audit.now_ms())
    everyone = [d for wave in plan.waves for d in wave]
    query = select(Device).where(Device.id.in_(everyone), Device.id.not_in(list(state.assigned_at)))
    healthy = [d for d in session.scalars(query) if not d.quarantined and d.running_model == plan.model]
    controls = {d.id: d.running_digest for d in healthy if d.running_digest != plan.digest}
    canary = _group(session, dict.fromkeys(state.done, plan.digest), began, plan.model)
    return canary, _group(session, controls, began, plan.model)


def _group(session: Session, digests: dict[str, str], began: int, model: str) -> GroupEvidence:
    rows = labelled = errors = 0
    predictions: list[int] = []
    for device, digest in digests.items():
        query = select(WindowRow).where(
            WindowRow.device == device, WindowRow.digest == digest, WindowRow.opened_at >= began
        )
        for window in session.scalars(query):
            rows, labelled, errors = rows + window.rows, labelled + window.labelled, errors + window.errors
            width = max(len(predictions), len(window.predictions))
            predictions = [
                (predictions[i] if i < len(predictions) else 0)
                + (window.predictions[i] if i < len(window.predictions) else 0)
                for i in range(width)
            ]
    requests, failures = _traffic(session, digests)
    judged, drifting = _inputs(session, digests)
    return GroupEvidence(
        rows=rows,
        predictions=tuple(predictions),
        labelled=labelled,
        errors=errors,
        failures=failures,
        requests=requests,
        devices=len(digests),
        changes=_changes(session, digests, began, model),
        judged=judged,
        drifting=drifting,
    )


def _changes(session: Session, digests: dict[str, str], began: int, model: str) -> tuple[Change, ...]:
    """What each device predicted since the canary began, and in its latest windows before, whatever it served then."""
    found = []
    for device, digest in digests.items():
        mine = select(WindowRow.predictions).where(WindowRow.device == device, WindowRow.model == model)
        since = mine.where(WindowRow.digest == digest, WindowRow.opened_at >= began)
        past = mine.where(WindowRow.closed_at < began).order_by(WindowRow.closed_at.desc()).limit(_PAST_WINDOWS)
        now, before = (_summed(list(session.scalars(q))) for q in (since, past))
        if now and len(now) == len(before):
            found.append(Change(now=now, before=before))
    return tuple(found)


def _summed(counts: list[list[int]]) -> tuple[int, ...]:
    """Counts per class; none where windows are of different widths."""
    widths = {len(c) for c in counts}
    return tuple(map(sum, zip(*counts, strict=True))) if len(widths) == 1 else ()


def _inputs(session: Session, digests: dict[str, str]) -> tuple[int, int]:
    """Devices whose inputs were judged on the bundle they serve, and how many of them drift."""
    judged = drifting = 0
    for device in session.scalars(select(Device).where(Device.id.in_(list(digests)))):
        said = device.verdict.get("verdict") if device.verdict.get("digest") == digests[device.id] else None
        if said and said.get("p_value") is not None:
            judged += 1
            drifting += bool(said["p_value"] < DriftSettings().device_alpha)
    return judged, drifting


def _traffic(session: Session, digests: dict[str, str]) -> tuple[int, int]:
    query = select(func.coalesce(func.sum(Exposure.requests), 0), func.coalesce(func.sum(Exposure.failures), 0)).where(
        Exposure.device.in_(list(digests)), Exposure.digest.in_(list(set(digests.values())))
    )
    requests, failures = session.execute(query).one()
    return int(requests), int(failures)


def _carry_out(session: Session, row: RolloutRow, plan: r.Plan, action: r.Action, keys: KeyFolder) -> tuple[str, ...]:
    match action:
        case r.Assign(devices):
            target = versions.get(session, plan.model, plan.version)
            for device in devices:
                director.assign(session, keys, device=device, version=target, rollout=row.id, actor=ACTOR)
            return devices
        case r.Revert(devices):
            return _revert(session, row, plan, devices, keys)
        case r.Promote():
            fail_point("promoting")
            versions.set_alias(session, plan.model, "champion", plan.version, actor=ACTOR)
            versions.drop_alias(session, plan.model, "challenger", plan.version, actor=ACTOR)
    return ()


def _revert(
    session: Session, row: RolloutRow, plan: r.Plan, devices: tuple[str, ...], keys: KeyFolder
) -> tuple[str, ...]:
    previous = versions.get(session, plan.model, plan.previous_version)
    for device in devices:
        director.assign(session, keys, device=device, version=previous, rollout=f"{row.id}-revert", actor=ACTOR)
    return devices


def _revert_stragglers(
    session: Session, row: RolloutRow, plan: r.Plan, state: r.RolloutState, keys: KeyFolder
) -> tuple[str, ...]:
    """After an abort by hand: assign the previous version to devices still told to run this one, even if none does."""
    if not plan.previous_version:
        return ()
    query = select(AssignmentRow.device).where(
        AssignmentRow.device.in_(list(state.assigned_at)), AssignmentRow.rollout == row.id
    )
    told = tuple(session.scalars(query))
    return _revert(session, row, plan, told, keys) if told else ()


def _store(row: RolloutRow, state: r.RolloutState) -> None:
    row.state, row.status, row.reason = msgspec.to_builtins(state), state.status, state.reason
    row.updated_at = audit.now_ms()


def default_assignments(session: Session, keys: KeyFolder) -> tuple[str, ...]:
    """Give devices that joined after a rollout what it ended with; the devices to poke."""
    without = select(Device).where(Device.state == "active", Device.id.not_in(select(AssignmentRow.device)))
    newcomers = {d.id for d in session.scalars(without)}
    if not newcomers:
        return ()
    under_way = {d for row in active(session) for wave in plan_of(row).waves for d in wave}
    poked = []
    finished = select(RolloutRow).where(RolloutRow.status == "completed").order_by(RolloutRow.updated_at.desc())
    for row in session.scalars(finished):
        champion = versions.aliased(session, row.model, "champion")
        target = versions.get(session, row.model, champion) if champion is not None else None
        if target is None or target.state != "released":
            continue
        selected = {d.id for d in select_devices(session, msgspec.convert(row.selector, Selector))}
        for device in sorted((selected & newcomers) - under_way):
            director.assign(session, keys, device=device, version=target, rollout=row.id, actor=ACTOR)
            newcomers.discard(device)
            poked.append(device)
    return tuple(poked)


def view(session: Session, row: RolloutRow) -> dict[str, Any]:
    """A rollout as JSON for people's programs: plan, statuses, gate."""
    state = state_of(row)
    return {
        "id": row.id,
        "model": row.model,
        "version": row.version,
        "status": row.status,
        "reason": row.reason,
        "wave": state.wave + 1,
        "waves": row.plan["waves"],
        "wave_names": [spec["name"] for spec in row.plan["wave_specs"]],
        "done": list(state.done),
        "previous_version": row.plan["previous_version"],
        "devices": statuses(session, row),
        "gate": row.gate.get("verdict"),
        "created_at": row.created_at,
        "updated_at": row.updated_at,
        "created_by": row.created_by,
    }


def selector_of(row: RolloutRow) -> Selector:
    """The stored selector."""
    return msgspec.convert(row.selector, Selector)
