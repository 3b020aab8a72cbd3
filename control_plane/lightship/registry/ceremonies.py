"""Registry: changes of keys and of the release list that more than one person signs, with the audit log around them.

Rules: what comes into force is decided by the signed documents alone; the registry is brought to what they say
afterwards, and repeating `finish` does what a crash left undone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from securesystemslib.signer import Signer

from lightship.home import Home
from lightship.release import ceremony
from lightship.release.ceremony import Ceremony
from lightship.release.changes import Documents, RoleKeys, propose
from lightship.release.keys import OFFLINE_ROLES
from lightship.storage import audit

from . import versions
from .release import mark_released, mark_revoked


def begin(
    home: Home,
    title: str,
    wanted: Mapping[str, RoleKeys],
    *,
    actor: str,
    renew: Collection[str] = (),
    reason: str = "",
    signers: Sequence[Signer] = (),
) -> Ceremony:
    """A change of keys, signed by those that are here or given; the caller writes it to a file, or finishes it.

    Raises:
        ReleaseError: release.ceremony, release.keys, release.unknown.
    """
    before = home.releases.in_force() if home.releases.exists else Documents()
    begun = ceremony.begin(title, before, propose(before, wanted, renew), reason=reason)
    ceremony.sign_if(begun, [*signers, *_here(home, begun)])
    detail = {"fingerprint": begun.fingerprint, "reason": reason}
    with home.database.write() as session:
        audit.append(session, actor=actor, verb="keys.propose", subject=title, detail=detail)
    return begun


def finish(home: Home, copies: Sequence[Ceremony], *, actor: str) -> list[str]:
    """Put a ceremony into force that enough keys have signed; the roles that changed, none if it was in force already.

    Raises:
        ReleaseError: release.threshold, release.stale, release.ceremony, release.keys; nothing has changed.
        StorageError: storage.full, storage.unwritable; repeat it.
    """
    done = ceremony.merge(copies)
    changed = home.releases.change(done.after)
    listed = {r.path: r.sha256 for r in home.releases.released()}
    with home.database.write() as session:
        if changed:
            signed = {need.document: list(need.signed) for need in done.needs}
            detail = {"roles": changed, "fingerprint": done.fingerprint, "signed": signed, "reason": done.reason}
            audit.append(session, actor=actor, verb="keys.finish", subject=done.title, detail=detail)
        # What the file says that it releases is only where to look: the signed list says what is so.
        for name in done.releases:
            row = versions.resolve(session, name)
            if listed.get(row.path) == row.digest:
                mark_released(session, row, actor=actor)
        for name in done.revokes:
            row = versions.resolve(session, name)
            if row.path not in listed:
                mark_revoked(session, row, actor=actor, reason=done.reason)
    return changed


def _here(home: Home, begun: Ceremony) -> list[Signer]:
    """The keys of this home that have a say."""
    wanted = {keyid for need in begun.needs for keyid in need.keyids}
    return [signer for role in OFFLINE_ROLES for signer in home.keys.signers(role, wanted)[0]]
