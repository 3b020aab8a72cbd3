"""Registry: releasing and revoking a version, in an order that a crash can't spoil.

Rules: the signed repository is written first and the database after it; publishing the same bytes again is no
change, and neither is de-listing what is not listed, so what was cut in between is finished by repeating it. Where the
keys here are too few, a ceremony is begun instead, and nothing is in force before `ceremonies.finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import msgspec
from securesystemslib.signer import Signer
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lightship.home import Home
from lightship.release import ceremony
from lightship.release.ceremony import Ceremony
from lightship.release.changes import Documents
from lightship.release.deltas import Base, choose_bases, make_deltas
from lightship.release.metadata import RELEASES
from lightship.storage import audit
from lightship.storage.models import Device, ModelVersion, RolloutRow
from lightship_agent.contract.transport import pack_transport

from . import versions
from .rules import State, next_state

#: Told in words what takes long.
Progress = Callable[[str], None]


def _silent(_text: str) -> None:
    """Tell nobody."""


def release(
    home: Home,
    reference: str,
    *,
    actor: str,
    signers: Sequence[Signer] = (),
    deltas: bool = True,
    progress: Progress = _silent,
) -> ModelVersion:
    """Sign and publish a version's bundle, with the patches that lead to it.

    Args:
        home: of the control plane.
        reference: the version.
        actor: who releases it.
        signers: keys of the release list that are not in the home.
        deltas: whether patches are made, which takes a while for large bundles.
        progress: told in words what takes long.

    Raises:
        RegistryError: registry.unknown-version, registry.state.
        ReleaseError: release.exists, release.keys.
        StorageError: storage.full, storage.corrupt.
    """
    row = _may(home, reference, "release")
    bundle = home.artifacts.get(row.digest)
    if _listed(home, row):
        home.releases.publish(row.path, bundle, signers=signers)  # no change, or refused
    else:
        packed, extra = _pack(home, row, bundle, deltas=deltas, progress=progress)
        home.releases.publish(row.path, bundle, packed=packed, extra=extra, signers=signers)
    with home.database.write() as session:
        stored = versions.get(session, row.model, row.version)
        if stored.state == "revoked":
            # Somebody revoked it while we published: the last word is theirs.
            home.releases.revoke(row.path, signers=signers)
            next_state("revoked", "release")
        mark_released(session, stored, actor=actor)
    return stored


def revoke(home: Home, reference: str, *, actor: str, reason: str, signers: Sequence[Signer] = ()) -> ModelVersion:
    """De-list a version: no device accepts it from its next refresh on.

    Raises:
        RegistryError: registry.unknown-version, registry.state.
        ReleaseError: release.keys.
    """
    row = _may(home, reference, "revoke")
    if _listed(home, row):
        home.releases.revoke(row.path, signers=signers)
    with home.database.write() as session:
        stored = versions.get(session, row.model, row.version)
        mark_revoked(session, stored, actor=actor, reason=reason)
    return stored


def propose_release(
    home: Home,
    reference: str,
    *,
    signers: Sequence[Signer] = (),
    deltas: bool = True,
    progress: Progress = _silent,
) -> Ceremony:
    """The release of a version as a ceremony, signed by the keys that are here or given.

    Raises:
        RegistryError: registry.unknown-version, registry.state.
        ReleaseError: release.exists, release.keys.
        StorageError: storage.full, storage.corrupt.
    """
    row = _may(home, reference, "release")
    before = home.releases.in_force()
    bundle = home.artifacts.get(row.digest)
    packed, extra = _pack(home, row, bundle, deltas=deltas, progress=progress)
    drafted = home.releases.draft(add={row.path: bundle}, packed={row.path: packed}, extra=extra)
    after, name = Documents(releases=drafted), f"{row.model}@{row.version}"
    return _begun(home, ceremony.begin(f"Release {name}", before, after, releases=[name]), signers)


def propose_revocation(home: Home, reference: str, *, reason: str, signers: Sequence[Signer] = ()) -> Ceremony:
    """The revocation of a version as a ceremony, signed by the keys that are here or given.

    Raises:
        RegistryError: registry.unknown-version, registry.state.
        ReleaseError: release.unknown, release.keys.
        StorageError: storage.full.
    """
    row = _may(home, reference, "revoke")
    before = home.releases.in_force()
    after = Documents(releases=home.releases.draft(remove=[row.path]))
    name = f"{row.model}@{row.version}"
    return _begun(home, ceremony.begin(f"Revoke {name}", before, after, reason=reason, revokes=[name]), signers)


def mark_released(session: Session, version: ModelVersion, *, actor: str) -> None:
    """Note that a version is in the signed list."""
    if version.state == "released":
        return
    version.state, version.released_at = next_state(cast("State", version.state), "release"), audit.now_ms()
    detail, subject = {"digest": version.digest, "path": version.path}, f"{version.model}@{version.version}"
    audit.append(session, actor=actor, verb="model.release", subject=subject, detail=detail)


def mark_revoked(session: Session, version: ModelVersion, *, actor: str, reason: str) -> None:
    """Note that a version is no longer in the signed list; what it was champion of falls back to who was before it."""
    if version.state == "revoked":
        return
    version.state = next_state(cast("State", version.state), "revoke")
    detail, subject = {"digest": version.digest, "reason": reason}, f"{version.model}@{version.version}"
    audit.append(session, actor=actor, verb="model.revoke", subject=subject, detail=detail)
    for alias in versions.aliases(session, version.model).get(version.version, []):
        before = _champion_before(session, version) if alias == "champion" else 0
        if before:
            versions.set_alias(session, version.model, alias, before, actor=actor)
        else:
            versions.drop_alias(session, version.model, alias, version.version, actor=actor)


def _champion_before(session: Session, version: ModelVersion) -> int:
    """What the rollout that made it champion would have gone back to, if that is still released; else 0."""
    query = select(RolloutRow).where(
        RolloutRow.model == version.model, RolloutRow.version == version.version, RolloutRow.status == "completed"
    )
    row = session.scalars(query.order_by(RolloutRow.updated_at.desc())).first()
    before = msgspec.convert(row.plan.get("previous_version", 0), int) if row is not None else 0
    known = session.get(ModelVersion, (version.model, before)) if before else None
    return before if known is not None and known.state == "released" else 0


def _may(home: Home, reference: str, act: Literal["release", "revoke"]) -> ModelVersion:
    with home.database.read() as session:
        row = versions.resolve(session, reference)
        next_state(cast("State", row.state), act)
    return row


def _listed(home: Home, row: ModelVersion) -> bool:
    return row.path in {r.path for r in home.releases.released()}


def _begun(home: Home, begun: Ceremony, signers: Sequence[Signer]) -> Ceremony:
    ceremony.sign_if(begun, [*signers, *home.keys.signers(RELEASES, home.releases.trusted(RELEASES))[0]])
    return begun


def _pack(
    home: Home, row: ModelVersion, bundle: bytes, *, deltas: bool, progress: Progress
) -> tuple[bytes, dict[str, bytes]]:
    """A bundle as it travels, and the patches that lead to it."""
    progress("pack the bundle")
    packed = pack_transport(bundle)
    return packed, _deltas(home, row, bundle, len(packed), progress) if deltas else {}


def _deltas(
    home: Home, row: ModelVersion, bundle: bytes, transport_length: int, progress: Progress
) -> dict[str, bytes]:
    """Patches to a version from what devices have."""
    with home.database.read() as session:
        candidates = _bases(session, row.model)
    bases = choose_bases(candidates, digest=row.digest, length=row.length)
    olds = ((base, home.artifacts.get(base.digest)) for base in bases)
    return make_deltas(row.model, bundle, transport_length, olds, progress=progress)


def _bases(session: Session, model: str) -> list[Base]:
    """The released versions of a model, with who runs them."""
    counted = (
        select(Device.running_digest, func.count()).where(Device.state == "active").group_by(Device.running_digest)
    )
    running = dict(session.execute(counted).all())
    champion = versions.aliased(session, model, "champion")
    released = select(ModelVersion).where(ModelVersion.model == model, ModelVersion.state == "released")
    return [
        Base(v.version, v.digest, v.length, devices=running.get(v.digest, 0), champion=v.version == champion)
        for v in session.scalars(released)
    ]
