"""Release: what a change of keys, thresholds or releases asks to be signed. Pure.

Rules:
* a change is a set of whole documents, the next version of each role it touches, that come into force together;
* root must be signed by the threshold of the keys in force and of the new ones, targets by the keys that root names,
  releases by those that targets names;
* what a change does not touch must still verify under what it changes, or it is part of the change;
* every role keeps at least as many keys as its threshold, and no online key is also an offline one.

Source: The Update Framework specification 1.0, 6.1 key management and migration.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from securesystemslib.signer import SSlibKey
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, Targets

from lightship_agent.contract.codes import ReleaseError

from .keys import OFFLINE_ROLES, ONLINE_ROLES, ROLES
from .metadata import RELEASES, Signed, expiry
from .signing import Delegator, check_keys, signed_by, verifies

TOP: Final = ("root", "targets", "snapshot", "timestamp")
_PATHS: Final = {
    RELEASES: ["bundles/*/*", "deltas/*/*"],
    # A key holder only: it signs assignments, and no path is ever looked up in it.
    "director": ["-director-/-/-"],
}


_PATH: Final = re.compile(r"(bundles|deltas)/[A-Za-z0-9._-]{1,200}/[A-Za-z0-9._-]{1,200}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RoleKeys:
    """Who signs for a role."""

    keys: tuple[SSlibKey, ...]
    threshold: int = 1

    @classmethod
    def of(cls, keys: Sequence[Any], threshold: int = 1) -> RoleKeys:
        """Of public keys."""
        return cls(tuple(keys), threshold)

    @property
    def keyids(self) -> frozenset[str]:
        """Their ids."""
        return frozenset(k.keyid for k in self.keys)


@dataclass(frozen=True)
class Need:
    """Signatures that a document of a change must have."""

    document: str
    whose: str  # in words
    threshold: int
    keyids: tuple[str, ...]
    signed: tuple[str, ...]

    @property
    def missing(self) -> int:
        """How many more."""
        return max(0, self.threshold - len(self.signed))


@dataclass(frozen=True)
class Documents:
    """Root, targets and releases: those in force, or those of a change."""

    root: Metadata[Root] | None = None
    targets: Metadata[Targets] | None = None
    releases: Metadata[Targets] | None = None

    def items(self) -> Iterator[tuple[str, Metadata[Any]]]:
        """Those that are there, by role."""
        for role in OFFLINE_ROLES:
            document = getattr(self, role)
            if document is not None:
                yield role, document

    def over(self, before: Documents) -> Documents:
        """These, and where there is none, what was before."""
        return Documents(self.root or before.root, self.targets or before.targets, self.releases or before.releases)

    def version(self, role: str) -> int:
        """The version of a role; 0 for none."""
        document = getattr(self, role)
        return 0 if document is None else int(document.signed.version)

    def same_as(self, other: Documents) -> bool:
        """Whether each of these says the same as the other's."""
        return all(
            getattr(other, role) is not None and getattr(other, role).signed_bytes == document.signed_bytes
            for role, document in self.items()
        )

    def role_keys(self, role: str) -> RoleKeys:
        """Who signs for a role."""
        delegator = (self.targets if role in _PATHS else self.root) or self.root
        assert delegator is not None
        spec = delegator.signed.get_delegated_role(role)
        keys = [delegator.signed.get_key(k) for k in spec.keyids]
        return RoleKeys.of(keys, spec.threshold)

    def needs(self, before: Documents) -> list[Need]:
        """Whose signatures these must have to come into force after `before`."""
        after, found = self.over(before), []
        if self.root is not None and before.root is not None:
            found.append(_need(before.root.signed, "root", self.root, "keys in force"))
        if self.root is not None:
            whose = "new keys" if before.root is not None else "keys"
            found.append(_need(self.root.signed, "root", self.root, whose))
        assert after.root is not None
        if self.targets is not None:
            found.append(_need(after.root.signed, "targets", self.targets, "keys"))
        if self.releases is not None:
            assert after.targets is not None
            found.append(_need(after.targets.signed, RELEASES, self.releases, "keys"))
        return found


def propose(before: Documents, wanted: Mapping[str, RoleKeys], renew: Collection[str] = ()) -> Documents:
    """The unsigned documents that give roles these keys, and a new life to the roles in `renew`.

    Args:
        before: what is in force; nothing for the first ceremony.
        wanted: by role, all of its keys and its threshold; roles that are not named keep theirs.
        renew: offline roles to be signed anew though nothing else changes in them.

    Raises:
        ReleaseError: release.ceremony, when it can't work or changes nothing.
    """
    if before.root is None:
        return first_documents(wanted)
    assert before.targets is not None
    assert before.releases is not None
    changed = {role: keys for role, keys in wanted.items() if not _same(before.role_keys(role), keys)}
    made = Documents()
    if "root" in renew or changed.keys() & set(TOP):
        made = replace(made, root=_next_root(before.root, changed))
    root = made.root or before.root
    moved = {role: keys for role, keys in changed.items() if role in _PATHS}
    if "targets" in renew or moved or not verifies(root.signed, "targets", before.targets):
        made = replace(made, targets=_next_targets(before.targets, moved))
    targets = made.targets or before.targets
    if RELEASES in renew or not verifies(targets.signed, RELEASES, before.releases):
        made = replace(made, releases=_next(before.releases, RELEASES))
    if not list(made.items()):
        raise ReleaseError("release.ceremony", "That changes nothing: these keys and thresholds are in force.")
    check_roles(made.over(before))
    return made


def first_documents(wanted: Mapping[str, RoleKeys]) -> Documents:
    """The unsigned first version of root, targets and releases.

    Raises:
        ReleaseError: release.ceremony.
    """
    missing = [role for role in ROLES if role not in wanted]
    if missing:
        raise ReleaseError("release.ceremony", f"The first ceremony needs the keys of {', '.join(missing)}, too.")
    root = Root(expires=expiry("root"), consistent_snapshot=True)
    for role in TOP:
        for key in wanted[role].keys:
            root.add_key(key, role)
        root.roles[role].threshold = wanted[role].threshold
    delegations = Delegations({}, {})
    targets = Targets(expires=expiry("targets"), delegations=delegations)
    for role, paths in _PATHS.items():
        assert delegations.roles is not None
        delegations.roles[role] = DelegatedRole(role, [], wanted[role].threshold, terminating=True, paths=paths)
        for key in wanted[role].keys:
            targets.add_key(key, role)
    made = Documents(Metadata(root), Metadata(targets), Metadata(Targets(expires=expiry(RELEASES))))
    check_roles(made)
    return made


def check(made: Documents, before: Documents) -> None:
    """Whether these may come into force after `before`: the next versions, well formed, signed by all who must.

    Raises:
        ReleaseError: release.stale, release.ceremony, release.threshold.
    """
    check_follows(made, before)
    after = made.over(before)
    check_roles(after)
    check_list(made.releases)
    short = [need for need in made.needs(before) if need.missing]
    if short:
        words = "; ".join(
            f"{n.document} has {len(n.signed)} of {n.threshold} signatures of the {n.whose}" for n in short
        )
        remedy = "Have it signed by more keys: `lightship keys ceremony status FILE` names them."
        raise ReleaseError("release.threshold", f"Not signed by enough keys: {words}.", remedy=remedy)
    assert after.root is not None
    assert after.targets is not None
    assert after.releases is not None
    for delegator, role, document in (
        (after.root.signed, "targets", after.targets),
        (after.targets.signed, RELEASES, after.releases),
    ):
        if not verifies(delegator, role, document):
            raise ReleaseError("release.ceremony", f"With these keys, the {role} in force would not verify any more.")


def check_follows(made: Documents, before: Documents) -> None:
    """Whether these are the very next versions of what is in force.

    Raises:
        ReleaseError: release.stale, release.ceremony.
    """
    for role, document in made.items():
        expected, found = before.version(role) + 1, document.signed.version
        if found != expected:
            message = f"{role} version {found} was made to follow {found - 1}, but {expected - 1} is in force."
            remedy = "Something else was signed meanwhile: begin anew from what is in force."
            raise ReleaseError("release.stale", message, remedy=remedy)
        if document.signed.is_expired():
            message = f"{role} version {found} expired on {document.signed.expires:%Y-%m-%d}."
            raise ReleaseError("release.stale", message, remedy="Begin anew.")
    if before.root is None and len(list(made.items())) < len(OFFLINE_ROLES):
        raise ReleaseError("release.ceremony", f"The first ceremony must hold {', '.join(OFFLINE_ROLES)}.")


def check_roles(documents: Documents) -> None:
    """Whether the roles are those of a release repository, and their keys can reach their thresholds.

    Raises:
        ReleaseError: release.ceremony.
    """
    root, targets = documents.root, documents.targets
    assert root is not None
    assert targets is not None
    check_keys(root.signed, "root")
    check_keys(targets.signed, "targets")
    delegations = targets.signed.delegations
    roles = delegations.roles if delegations is not None else None
    shape = {name: (spec.terminating, spec.paths) for name, spec in (roles or {}).items()}
    if shape != {role: (True, paths) for role, paths in _PATHS.items()} or targets.signed.targets:
        message = f"targets must delegate to {' and '.join(_PATHS)} only, for their paths, and list nothing itself."
        raise ReleaseError("release.ceremony", message, remedy="Sign nothing of this, and find out who made it.")
    if not root.signed.consistent_snapshot:
        raise ReleaseError("release.ceremony", "root must keep consistent snapshots on.")
    for role in ROLES:
        try:
            spec = documents.role_keys(role)
        except ValueError as e:
            raise ReleaseError("release.ceremony", f"{role} names a key that is not listed: {e}.") from e
        if not 1 <= spec.threshold <= len(spec.keyids):
            message = f"{role}: a threshold of {spec.threshold} can't be reached with {len(spec.keyids)} keys."
            remedy = "Add a key in its place, or lower the threshold."
            raise ReleaseError("release.ceremony", message, remedy=remedy)
    offline = {k for role in OFFLINE_ROLES for k in documents.role_keys(role).keyids}
    for role in ONLINE_ROLES:
        both = documents.role_keys(role).keyids & offline
        if both:
            message = (
                f"The {role} key {min(both)[:16]} is online; it can't be a key of root, targets or releases as well."
            )
            raise ReleaseError("release.ceremony", message)


def check_signed(documents: Documents) -> None:
    """Whether documents that are said to be in force could be: signed by the keys that they name themselves.

    Raises:
        ReleaseError: release.ceremony.
    """
    root, targets, releases = documents.root, documents.targets, documents.releases
    assert root is not None
    assert targets is not None
    for delegator, role, document in ((root, "root", root), (root, "targets", targets), (targets, RELEASES, releases)):
        if document is not None and not verifies(delegator.signed, role, document):
            message = f"The {role} that is said to be in force is not signed by the keys of {role}."
            raise ReleaseError("release.ceremony", message, remedy="Sign nothing of this, and find out who made it.")


def check_list(releases: Metadata[Targets] | None) -> None:
    """Whether a release list holds what ours hold, under names that can be shown.

    Raises:
        ReleaseError: release.ceremony.
    """
    if releases is None:
        return
    for path, target in releases.signed.targets.items():
        if not _PATH.fullmatch(path) or not _SHA256.fullmatch(target.hashes.get("sha256", "")):
            message = f"The release list has an entry that is none of ours: {path[:100]!r}."
            raise ReleaseError("release.ceremony", message, remedy="Sign nothing of this, and find out who made it.")
    if releases.signed.delegations is not None:
        raise ReleaseError("release.ceremony", "The release list delegates to others.")


def _same(a: RoleKeys, b: RoleKeys) -> bool:
    return (a.keyids, a.threshold) == (b.keyids, b.threshold)


def _need(delegator: Delegator, role: str, document: Metadata[Any], whose: str) -> Need:
    spec = delegator.get_delegated_role(role)
    return Need(role, whose, spec.threshold, tuple(spec.keyids), signed_by(delegator, role, document))


def _next(document: Metadata[Signed], role: str) -> Metadata[Signed]:
    """A copy without signatures, of the next version."""
    made = Metadata[Signed].from_bytes(document.to_bytes())
    made.signatures.clear()
    made.signed.version += 1
    made.signed.expires = expiry(role)
    return made


def _next_root(document: Metadata[Root], changed: Mapping[str, RoleKeys]) -> Metadata[Root]:
    made = _next(document, "root")
    for role, wanted in changed.items():
        if role not in TOP:
            continue
        for keyid in set(made.signed.roles[role].keyids) - wanted.keyids:
            made.signed.revoke_key(keyid, role)
        for key in wanted.keys:
            made.signed.add_key(key, role)
        made.signed.roles[role].threshold = wanted.threshold
    return made


def _next_targets(document: Metadata[Targets], changed: Mapping[str, RoleKeys]) -> Metadata[Targets]:
    made = _next(document, "targets")
    assert made.signed.delegations is not None
    assert made.signed.delegations.roles is not None
    for role, wanted in changed.items():
        spec = made.signed.delegations.roles[role]
        for keyid in set(spec.keyids) - wanted.keyids:
            made.signed.revoke_key(keyid, role)
        for key in wanted.keys:
            made.signed.add_key(key, role)
        spec.threshold = wanted.threshold
    return made
