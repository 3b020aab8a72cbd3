"""Fleet: the director, which signs what each device shall run.

Rules: one row and one rising `seq` per device; only released versions can be assigned; the signed envelope is what
the device gets, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from securesystemslib.dsse import Envelope
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from lightship.release.keys import KeyFolder
from lightship.storage import audit
from lightship.storage.models import AssignmentRow, Device, ModelVersion
from lightship_agent.contract.assignment import PAYLOAD_TYPE, Assignment, assignment_bytes
from lightship_agent.contract.codes import FleetError, RegistryError
from lightship_agent.fail_points import fail_point

from .beside import companions, mark

#: Long enough for a device that sleeps over the holidays; re-issued at half of it, and whenever something changes.
LIFE_SECONDS: Final = 90 * 86_400


def assign(
    session: Session,
    keys: KeyFolder,
    *,
    device: str,
    version: ModelVersion,
    rollout: str,
    actor: str,
    retry: bool = False,
) -> int:
    """Sign a new assignment of `version` for `device`; its seq. With `retry` the device forgets that it failed there.

    Raises:
        RegistryError: registry.state unless the version is released.
        ReleaseError: release.keys.
    """
    if version.state != "released":
        message = f"{version.model}@{version.version} is {version.state}; only released versions can be assigned."
        raise RegistryError("registry.state", message, remedy="Run `lightship release`.")
    fail_point("assigning", device)
    row = session.get(AssignmentRow, device)
    issued = audit.now_ms() // 1_000
    known = session.get(Device, device)
    beside = companions(session, known, version) if known is not None else ()
    payload = Assignment(
        device=device,
        seq=row.seq + 1 if row else 1,
        issued=issued,
        expires=issued + LIFE_SECONDS,
        model=version.model,
        version=version.version,
        path=version.path,
        sha256=version.digest,
        length=version.length,
        rollout=rollout,
        retry=retry,
        beside=beside,
    )
    if row is None:
        row = AssignmentRow(device=device)
        session.add(row)
    row.seq, row.model, row.version, row.digest = payload.seq, payload.model, payload.version, payload.sha256
    row.rollout, row.issued_at, row.expires_at = rollout, payload.issued * 1_000, payload.expires * 1_000
    row.envelope, row.beside = sign(keys, payload), mark(beside)
    detail: dict[str, Any] = {
        "model": version.model,
        "version": version.version,
        "seq": payload.seq,
        "rollout": rollout,
    }
    if retry:
        detail["retry"] = True
    if beside:
        detail["beside"] = [b.experiment for b in beside]
    audit.append(session, actor=actor, verb="device.assign", subject=device, detail=detail)
    return payload.seq


def retry(session: Session, keys: KeyFolder, *, device: str, actor: str) -> int:
    """Sign the device's assignment anew, with the word that its failures there are to be forgotten; its seq.

    Raises:
        FleetError: fleet.unknown-device, also for one that nothing is assigned to.
        RegistryError: registry.state.
        ReleaseError: release.keys.
    """
    row = session.get(AssignmentRow, device)
    version = session.get(ModelVersion, (row.model, row.version)) if row else None
    if row is None or version is None:
        message = f"Nothing is assigned to a device {device!r}."
        raise FleetError("fleet.unknown-device", message, remedy="See `lightship device list`.")
    return assign(session, keys, device=device, version=version, rollout=row.rollout, actor=actor, retry=True)


def renew(session: Session, keys: KeyFolder, *, actor: str, most: int = 100) -> tuple[str, ...]:
    """Sign anew what is past half of its life, so that whoever comes back late finds one that is valid; the devices.

    Raises:
        ReleaseError: release.keys.
    """
    due = audit.now_ms() + LIFE_SECONDS * 1_000 // 2
    query = _renewable().where(AssignmentRow.expires_at < due).order_by(AssignmentRow.expires_at)
    found = [(row, version) for row, version in session.execute(query.limit(most))]
    return _assign_anew(session, keys, found, actor)


def resign(session: Session, keys: KeyFolder, *, actor: str, most: int = 100) -> tuple[str, ...]:
    """Sign anew what another key than the one in force signed, as it is after a rotation; the devices.

    Raises:
        ReleaseError: release.keys.
    """
    mine = keys.signer("director").public_key.keyid.encode()
    everything = session.execute(_renewable().order_by(AssignmentRow.device))
    found = [(row, version) for row, version in everything if mine not in row.envelope]
    return _assign_anew(session, keys, found[:most], actor)


def _renewable() -> Select[AssignmentRow, ModelVersion]:
    """Assignments of released versions to active devices."""
    of_device = AssignmentRow.device == Device.id
    of_version = (AssignmentRow.model == ModelVersion.model) & (AssignmentRow.version == ModelVersion.version)
    query = select(AssignmentRow, ModelVersion).join(Device, of_device).join(ModelVersion, of_version)
    return query.where(Device.state == "active", ModelVersion.state == "released")


def _assign_anew(
    session: Session, keys: KeyFolder, found: Sequence[tuple[AssignmentRow, ModelVersion]], actor: str
) -> tuple[str, ...]:
    for row, version in found:
        assign(session, keys, device=row.device, version=version, rollout=row.rollout, actor=actor)
    return tuple(row.device for row, _ in found)


def sign(keys: KeyFolder, assignment: Assignment) -> bytes:
    """The DSSE envelope of an assignment."""
    envelope = Envelope(assignment_bytes(assignment), PAYLOAD_TYPE, {})
    envelope.sign(keys.signer("director"))
    return json.dumps(envelope.to_dict(), separators=(",", ":")).encode()
