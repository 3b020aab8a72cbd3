"""Registry: releasing and revoking a version, in an order that a crash can't spoil.

Rules: the signed repository is written first and the database after it; publishing the same bytes again is no
change, and neither is de-listing what is not listed, so what was cut in between is finished by repeating it.
"""

from __future__ import annotations

from typing import cast

from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import ModelVersion

from . import versions
from .rules import State, next_state


def release(home: Home, reference: str, *, actor: str) -> ModelVersion:
    """Sign and publish a version's bundle.

    Raises:
        RegistryError: registry.unknown-version, registry.state.
        ReleaseError: release.exists, release.keys.
        StorageError: storage.full, storage.corrupt.
    """
    with home.database.read() as session:
        row = versions.resolve(session, reference)
        state = next_state(cast("State", row.state), "release")
    home.releases.publish(row.path, home.artifacts.get(row.digest))
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
