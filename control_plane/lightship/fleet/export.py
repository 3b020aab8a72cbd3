"""Fleet: one file that brings devices without a network what they shall run.

Rules:
* it holds what each device is assigned now, and nothing that is not signed; an assignment that would expire on the way
  is signed anew, for the same version and rollout;
* whoever can't be served is named, and then there is no file;
* it is audited before anything is signed, and appears whole, by rename, or not at all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.home import Home
from lightship.release.carried import Carried, Transport, carry, check_until
from lightship.storage import audit
from lightship.storage.models import AssignmentRow, Device, ModelVersion
from lightship_agent.contract.codes import FleetError, ReleaseError, StorageError
from lightship_agent.contract.media import MediaWriter, assignment_name, media_size, target_name
from lightship_agent.fail_points import fail_point
from lightship_agent.files import storage_error, sweep, sync_folder

from . import director

_STEP: Final = 1 << 20
_NAMED: Final = 10  # devices in one message
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    size: int  # bytes
    until: datetime
    devices: tuple[str, ...]
    bundles: tuple[str, ...]  # paths


def export(
    home: Home,
    out: Path,
    *,
    devices: Sequence[str] = (),
    group: str = "",
    life: timedelta,
    actor: str,
    progress: Progress = lambda _text: None,
) -> Exported:
    """Write a file for these devices and for all active ones of `group`.

    Args:
        home: of the control plane.
        out: the file.
        devices: named one by one.
        group: whose active devices are meant besides.
        life: for how long the file is good.
        actor: who exports.
        progress: told in words what takes long.

    Raises:
        FleetError: fleet.unknown-device, fleet.unassigned.
        ReleaseError: release.expiry, release.keys, release.unknown, release.not-begun.
        StorageError: storage.full, storage.unwritable; there is no file then.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    until = now + life
    longest = timedelta(seconds=director.LIFE_SECONDS)
    if not timedelta(0) < life <= longest:
        message = f"Expected a life above 0 and of at most {longest.days} days, as assignments have; found {life}."
        raise ReleaseError("release.expiry", message)
    _check_place(out)
    check_until(home.releases, until, now)
    with home.database.write() as session:
        wanted = _chosen(session, devices, group)
        versions = _assigned(session, wanted)
        detail = {"devices": wanted, "until": until.isoformat(), "bundles": sorted({v.path for v in versions.values()})}
        audit.append(session, actor=actor, verb="release.export", subject=group or ",".join(wanted), detail=detail)
        _sign_anew(session, home, versions, until, actor)
        envelopes = {device: _row(session, device).envelope for device in wanted}
    progress(f"sign for {len(wanted)} device{'s' if len(wanted) != 1 else ''}, until {until:%Y-%m-%d}")
    carried = carry(home.releases, detail["bundles"], until)
    size = _write(out, carried, envelopes, progress)
    return Exported(out, size, until, tuple(wanted), tuple(detail["bundles"]))


def _chosen(session: Session, devices: Sequence[str], group: str) -> list[str]:
    """The ids of the devices that are meant, in order."""
    known = dict(session.execute(select(Device.id, Device.state).where(Device.id.in_(devices))).all())
    unknown = [d for d in devices if known.get(d) != "active"]
    if unknown:
        raise FleetError("fleet.unknown-device", f"Not enrolled, or revoked: {_list(unknown)}.")
    found = set(devices)
    if group:
        members = session.scalars(select(Device.id).where(Device.group == group, Device.state == "active")).all()
        if not members:
            raise FleetError("fleet.unknown-device", f"Group {group!r} has no active device.")
        found.update(members)
    return sorted(found)


def _assigned(session: Session, devices: Sequence[str]) -> dict[str, ModelVersion]:
    """The released version that each device is assigned."""
    of_version = (AssignmentRow.model == ModelVersion.model) & (AssignmentRow.version == ModelVersion.version)
    query = select(AssignmentRow.device, ModelVersion).join(ModelVersion, of_version)
    found = {device: version for device, version in session.execute(query) if version.state == "released"}
    lacking = [d for d in devices if d not in found]
    if lacking:
        remedy = "Assign one with `lightship rollout start`, or leave them out."
        raise FleetError("fleet.unassigned", f"Nothing released is assigned to {_list(lacking)}.", remedy=remedy)
    return {d: found[d] for d in devices}


def _sign_anew(session: Session, home: Home, versions: dict[str, ModelVersion], until: datetime, actor: str) -> None:
    """See that no assignment expires before `until`."""
    for device, version in versions.items():
        row = _row(session, device)
        if row.expires_at < until.timestamp() * 1_000:
            director.assign(session, home.keys, device=device, version=version, rollout=row.rollout, actor=actor)


def _row(session: Session, device: str) -> AssignmentRow:
    row = session.get(AssignmentRow, device)
    assert row is not None, "it was found a moment ago, in the same transaction"
    return row


def _write(out: Path, carried: Carried, envelopes: dict[str, bytes], progress: Progress) -> int:
    """The file, whole and durable; its size."""
    small = {f"metadata/{name}": data for name, data in carried.metadata.items()}
    assignments = {assignment_name(device): data for device, data in envelopes.items()}
    transports = {target_name(t.sha256): t for t in carried.transports}
    size = media_size([*map(len, [*small.values(), *assignments.values()]), *(t.length for t in transports.values())])
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        sweep(out.parent)
        _check_room(out.parent, size)
        try:
            with temporary.open("wb") as f:
                fail_point("file-begun", out.name)
                writer = MediaWriter(f)
                for members in (small, assignments):
                    for name in sorted(members):
                        writer.add(name, len(members[name]), [members[name]])
                for name in sorted(transports):
                    progress(f"copy {transports[name].path}, {transports[name].length / 1e6:.2f} MB")
                    writer.add(name, transports[name].length, _verified(transports[name]))
                writer.finish()
                f.flush()
                os.fsync(f.fileno())
            fail_point("file-written", out.name)
            temporary.replace(out)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fail_point("file-renamed", out.name)
        sync_folder(out.parent)
    except OSError as e:
        raise storage_error(e, out) from e
    return size


def _verified(transport: Transport) -> Iterator[bytes]:
    """Its bytes, which must be the released ones to the last."""
    found, left = hashlib.sha256(), transport.length
    try:
        with transport.file.open("rb") as f:
            while left and (chunk := f.read(min(left, _STEP))):
                found.update(chunk)
                left -= len(chunk)
                yield chunk
    except FileNotFoundError:
        pass  # then the digest is another one, too
    if left or found.hexdigest() != transport.sha256:
        message = f"{transport.file} is not what was released."
        raise StorageError("storage.corrupt", message, remedy="Restore <home>/tuf from your backup.")


def _check_place(out: Path) -> None:
    """Before anything is signed for it: see that there can be such a file."""
    if out.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        message = f"Can't write {out}: expected a file in a folder that exists and may be written."
        raise StorageError("storage.unwritable", message)


def _check_room(folder: Path, size: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < size:
        message = f"{folder}: the file needs {size} bytes, {free} are free."
        raise StorageError("storage.full", message, remedy="Free space, or use a larger medium.")


def _list(devices: Sequence[str]) -> str:
    more = len(devices) - _NAMED
    return ", ".join(devices[:_NAMED]) + (f" and {more} more" if more > 0 else "")
