"""Release: what of the repository goes into a file that is carried to devices without a network.

Rules:
* every root goes along, for a device knows only the one that was in force when it was enrolled;
* the snapshot and the timestamp are signed for the file alone, and live as long as was asked for; what is online is
  beyond their versions before they leave this process, so that nobody can show them to a device that has a network;
* everything else is as it is online.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from tuf.api.metadata import Metadata, Snapshot, Targets

from lightship_agent.contract.codes import ReleaseError
from lightship_agent.contract.transport import TRANSPORT_SUFFIX

from .metadata import LIFE, RELEASES
from .repository import ReleaseRepository

#: What is not signed anew for the file, and so limits how long it lives.
KEPT_ROLES: Final = tuple(role for role in LIFE if role not in ("snapshot", "timestamp"))


@dataclass(frozen=True)
class Transport:
    """What travels of one bundle."""

    path: str  # of the bundle
    sha256: str
    length: int  # bytes
    file: Path


@dataclass(frozen=True)
class Carried:
    """Signed metadata by file name, and what it lists of the bundles that were asked for."""

    metadata: dict[str, bytes]
    transports: tuple[Transport, ...]


def check_until(releases: ReleaseRepository, until: datetime, now: datetime) -> None:
    """See that nothing that goes into a file would expire before `until`.

    Raises:
        ReleaseError: release.expiry, release.not-begun, release.unknown.
    """
    expiries = releases.expiries()
    role = min(KEPT_ROLES, key=lambda r: expiries[r])
    if expiries[role] >= until:
        return
    message = (
        f"The {role} metadata expires on {expiries[role]:%Y-%m-%d}, before the {until:%Y-%m-%d} that was asked for."
    )
    days = (expiries[role] - now).days
    remedy = f"Ask for --expires {days}d or less" if days > 0 else "No file can be exported now"
    remedy = f"{remedy}, or have the {role} metadata signed anew; `lightship keys show` says who can."
    raise ReleaseError("release.expiry", message, remedy=remedy)


def carry(releases: ReleaseRepository, paths: Sequence[str], until: datetime) -> Carried:
    """Metadata that lives until then, and what travels of the bundles at `paths`.

    Raises:
        ReleaseError: release.unknown for a bundle that is not listed; release.keys, release.not-begun.
        StorageError: storage.full, storage.unwritable; what was in force stays so.
    """
    listed = {r.path for r in releases.released()}
    absent = [path for path in paths if path not in listed]
    if absent:
        raise ReleaseError("release.unknown", f"Not released, or revoked: {', '.join(absent)}.")
    apart = releases.sign_apart(until)
    (snapshot,) = (Metadata[Snapshot].from_bytes(data) for name, data in apart.items() if "snapshot" in name)
    names = [f"{meta.version}.{role}" for role, meta in snapshot.signed.meta.items()]
    metadata = {name: _read(releases.metadata / name) for name in names}
    metadata |= {p.name: _read(p) for p in releases.metadata.glob("*.root.json")}
    (release_list,) = (metadata[name] for name in names if name.endswith(f".{RELEASES}.json"))
    targets = Metadata[Targets].from_bytes(release_list).signed
    return Carried({**metadata, **apart}, tuple(_transport(releases, targets, path) for path in paths))


def _transport(releases: ReleaseRepository, targets: Targets, path: str) -> Transport:
    target = targets.targets.get(path + TRANSPORT_SUFFIX)
    if target is None:
        raise ReleaseError("release.unknown", f"{path} was revoked meanwhile.")
    digest = target.hashes["sha256"]
    folder, _, name = (path + TRANSPORT_SUFFIX).rpartition("/")
    return Transport(path, digest, target.length, releases.targets / folder / f"{digest}.{name}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        message = f"Can't read {path}: {e.strerror}."
        raise ReleaseError("release.unknown", message, remedy="Restore <home>/tuf from your backup.") from e
