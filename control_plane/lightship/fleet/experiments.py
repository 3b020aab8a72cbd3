"""Fleet: experiments, a version beside the champion on the devices of a group: in its shadow, or for a share of keys.

Rules:
* operators write what they want; only the reconciler has devices told, by signing their assignments anew;
* only what is released, and can be asked the same rows as the champion, may run beside it;
* nothing of an experiment changes but its end: another share is another experiment, with keys dealt anew;
* it ends by itself when its version is revoked, or becomes the champion;
* on a group there is one A/B of a model at a time, for two would be answered by each other's arms.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from lightship.monitoring.watch import BundleOf
from lightship.registry import versions
from lightship.release.keys import KeyFolder
from lightship.storage import audit
from lightship.storage.models import AssignmentRow, Device, ExperimentRow, ModelVersion
from lightship_agent.contract.assignment import MAX_BESIDE
from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import FleetError, RegistryError
from lightship_agent.contract.experiment import Shape, unlike
from lightship_agent.contract.names import check_name

from . import director
from .beside import companions, mark, running

ACTOR = "lightship:reconciler"
_AT_A_TIME = 100  # devices that are told in one transaction


@dataclass(frozen=True)
class Wish:
    """An experiment as an operator asks for it."""

    group: str
    reference: str
    mode: str  # shadow | ab
    share: float = 1.0
    per_request: bool = False
    name: str = ""
    reason: str = ""


def start(session: Session, wish: Wish, bundle_of: BundleOf, *, actor: str) -> ExperimentRow:
    """Store an experiment; the reconciler has the devices told.

    Raises:
        RegistryError: registry.unknown-model, registry.unknown-version, registry.state.
        FleetError: fleet.experiment-spec, fleet.group-busy.
        InvalidNameError: name.invalid.
    """
    version = versions.resolve(session, wish.reference)
    if version.state != "released":
        message = f"{version.model}@{version.version} is {version.state}; only released versions run on devices."
        raise RegistryError("registry.state", message, remedy="Run `lightship release publish` first.")
    if wish.name:
        check_name("experiment name", wish.name)
    _check(session, wish, version, bundle_of)
    now = audit.now_ms()
    row = ExperimentRow(
        id=secrets.token_hex(4),
        name=wish.name,
        group=wish.group,
        model=version.model,
        version=version.version,
        digest=version.digest,
        mode=wish.mode,
        share=wish.share,
        per_request=wish.per_request,
        status="running",
        reason=wish.reason,
        ended_because="",
        created_by=actor,
        created_at=now,
        ended_at=None,
    )
    session.add(row)
    detail = {
        "group": wish.group,
        "model": version.model,
        "version": version.version,
        "mode": wish.mode,
        "share": wish.share,
        "per_request": wish.per_request,
        "reason": wish.reason,
    }
    audit.append(session, actor=actor, verb="experiment.start", subject=row.id, detail=detail)
    return row


def _check(session: Session, wish: Wish, version: ModelVersion, bundle_of: BundleOf) -> None:
    """Raise what speaks against it: FleetError fleet.experiment-spec, fleet.group-busy."""
    if wish.mode not in ("shadow", "ab") or not 0 < wish.share <= 1:
        message = f"Expected a shadow, or a share above 0 and at most 1; found {wish.mode!r} and {wish.share}."
        raise FleetError("fleet.experiment-spec", message)
    if wish.mode == "shadow" and wish.per_request:
        raise FleetError("fleet.experiment-spec", "A shadow answers nobody: single requests can't be dealt to it.")
    if wish.mode == "shadow" and _shape(bundle_of(version.digest)).tensors is not None:
        message = f"{version.model} takes tensors, and those are not mirrored yet: only rows are."
        raise FleetError("fleet.experiment-spec", message, remedy="Try it by A/B, or in a rollout's first wave.")
    told = _told(session, [wish.group], version.model)
    if not told:
        message = f"No device of the group {wish.group!r} was told to run a version of {version.model}."
        raise FleetError("fleet.experiment-spec", message, remedy="Roll a version out there first.")
    for champion in {(row.version, row.digest) for row, _ in told if row.version != version.version}:
        why = unlike(_shape(bundle_of(champion[1])), _shape(bundle_of(version.digest)))
        if why:
            message = f"{version.model}@{version.version} can't run beside version {champion[0]}: {why}"
            raise FleetError("fleet.experiment-spec", message)
    if all(row.version == version.version for row, _ in told):
        message = f"The devices of {wish.group!r} run {version.model}@{version.version} already."
        raise FleetError("fleet.experiment-spec", message, remedy="Choose another version.")
    there = [x for x in running(session, version.model) if x.group == wish.group]
    busy = next((x for x in there if x.mode == wish.mode == "ab" or x.version == version.version), None)
    if busy is not None or len(there) >= MAX_BESIDE:
        which = f"Experiment {busy.id} is" if busy is not None else f"{len(there)} experiments are"
        message = f"{which} running there."
        raise FleetError("fleet.group-busy", message, remedy="Stop one with `lightship experiment stop`.")


def stop(session: Session, experiment: str, *, actor: str, reason: str) -> ExperimentRow:
    """End an experiment; the reconciler has the devices told.

    Raises:
        FleetError: fleet.unknown-experiment, fleet.experiment-state.
    """
    row = get(session, experiment)
    if row.status != "running":
        raise FleetError("fleet.experiment-state", f"Experiment {row.id} has ended: {row.ended_because}")
    _end(session, row, reason or "Stopped by hand.", actor=actor)
    return row


def _end(session: Session, row: ExperimentRow, because: str, *, actor: str) -> None:
    row.status, row.ended_because, row.ended_at = "stopped", because, audit.now_ms()
    audit.append(session, actor=actor, verb="experiment.stop", subject=row.id, detail={"reason": because})


def get(session: Session, experiment: str) -> ExperimentRow:
    """The experiment of that id, or the newest of that name.

    Raises:
        FleetError: fleet.unknown-experiment.
    """
    named = select(ExperimentRow).where(ExperimentRow.name == experiment, ExperimentRow.name != "")
    row = session.get(ExperimentRow, experiment)
    row = row or session.scalars(named.order_by(ExperimentRow.created_at.desc()).limit(1)).first()
    if row is None:
        message = f"No experiment {experiment!r}."
        raise FleetError("fleet.unknown-experiment", message, remedy="See `lightship experiment list`.")
    return row


def newest(session: Session, limit: int = 100) -> list[ExperimentRow]:
    """The newest experiments, ended or not."""
    return list(session.scalars(select(ExperimentRow).order_by(ExperimentRow.created_at.desc()).limit(limit)))


# What devices are told ------------------------------------------------------------------------------------------------


def reconcile(session: Session, keys: KeyFolder) -> tuple[str, ...]:
    """End what can't go on, and sign anew what names other companions than it should; the devices to poke.

    Raises:
        ReleaseError: release.keys.
    """
    for row in running(session):
        why = _why_over(session, row)
        if why:
            _end(session, row, why, actor=ACTOR)
    session.flush()
    going_on = running(session)
    poked: list[str] = []
    groups = {row.group for row in going_on}
    for told, device in _told(session, sorted(groups)):
        version = session.get(ModelVersion, (told.model, told.version))
        if version is None or version.state != "released" or len(poked) >= _AT_A_TIME:
            continue
        if mark(companions(session, device, version, going_on)) != told.beside:
            director.assign(session, keys, device=device.id, version=version, rollout=told.rollout, actor=ACTOR)
            poked.append(device.id)
    return tuple(poked)


def _why_over(session: Session, row: ExperimentRow) -> str:
    if versions.get(session, row.model, row.version).state != "released":
        return f"{row.model}@{row.version} was revoked."
    if versions.aliased(session, row.model, "champion") == row.version:
        return f"{row.model}@{row.version} became the champion."
    return ""


def _told(session: Session, groups: Sequence[str], model: str = "") -> list[tuple[AssignmentRow, Device]]:
    """Assignments of active devices in those groups, of one model; without a model, and of whoever has companions."""
    query = select(AssignmentRow, Device).join(Device, AssignmentRow.device == Device.id)
    query = query.where(Device.state == "active").order_by(Device.id)
    if model:
        query = query.where(Device.group.in_(groups), AssignmentRow.model == model)
    else:
        query = query.where(or_(Device.group.in_(groups), AssignmentRow.beside != ""))
    return [(row, device) for row, device in session.execute(query)]


def _shape(bundle: Bundle) -> Shape:
    manifest = bundle.manifest
    return Shape(manifest.model, manifest.input_schema, manifest.outputs, manifest.tensors or None)
