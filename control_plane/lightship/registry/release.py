"""Registry: releasing and revoking a version, in an order that a crash can't spoil.

Rules: the signed repository is written first and the database after it; publishing the same bytes again is no
change, and neither is de-listing what is not listed, so what was cut in between is finished by repeating it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lightship.home import Home
from lightship.release.deltas import Base, choose_bases, make_deltas
from lightship.storage import audit
from lightship.storage.models import Device, ModelVersion
from lightship_agent.contract.transport import pack_transport

from . import versions
from .rules import State, next_state


def release(
    home: Home,
    reference: str,
    *,
    actor: str,
    deltas: bool = True,
    progress: Callable[[str], None] = lambda _text: None,
) -> ModelVersion:
    """Sign and publish a version's bundle, with the patches that lead to it.

    Args:
        home: of the control plane.
        reference: the version.
        actor: who releases it.
        deltas: whether patches are made, which takes a while for large bundles.
        progress: told in words what takes long.

    Raises:
        RegistryError: registry.unknown-version, registry.state.
        ReleaseError: release.exists, release.keys.
        StorageError: storage.full, storage.corrupt.
    """
    with home.database.read() as session:
        row = versions.resolve(session, reference)
        state = next_state(cast("State", row.state), "release")
    bundle = home.artifacts.get(row.digest)
    if row.path in {r.path for r in home.releases.released()}:
        home.releases.publish(row.path, bundle)  # no change, or refused
    else:
        progress("pack the bundle")
        packed = pack_transport(bundle)
        extra = _deltas(home, row, bundle, len(packed), progress) if deltas else {}
        home.releases.publish(row.path, bundle, packed=packed, extra=extra)
    with home.database.write() as session:
        stored = versions.get(session, row.model, row.version)
        if stored.state == "revoked":
            # Somebody revoked it while we published: the last word is theirs.
            home.releases.revoke(row.path)
            next_state("revoked", "release")
        if stored.state != state:
            stored.state, stored.released_at = state, audit.now_ms()
            detail = {"digest": stored.digest, "path": stored.path}
            audit.append(
                session, actor=actor, verb="model.release", subject=f"{row.model}@{row.version}", detail=detail
            )
    return stored


def _deltas(
    home: Home, row: ModelVersion, bundle: bytes, transport_length: int, progress: Callable[[str], None]
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


def revoke(home: Home, reference: str, *, actor: str, reason: str) -> ModelVersion:
    """De-list a version: no device accepts it from its next refresh on.

    Raises:
        RegistryError: registry.unknown-version, registry.state.
        ReleaseError: release.keys.
    """
    with home.database.read() as session:
        row = versions.resolve(session, reference)
        state = next_state(cast("State", row.state), "revoke")
    if row.path in {r.path for r in home.releases.released()}:
        home.releases.revoke(row.path)
    with home.database.write() as session:
        stored = versions.get(session, row.model, row.version)
        stored.state = state
        detail = {"digest": stored.digest, "reason": reason}
        audit.append(session, actor=actor, verb="model.revoke", subject=f"{row.model}@{row.version}", detail=detail)
    return stored
