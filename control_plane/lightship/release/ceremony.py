"""Release: a ceremony, a proposed change as one file that is carried from signer to signer. Pure.

    begin (at the server) → sign (anywhere, with the file and a key and nothing else) → … → finish (at the server)

Rules:
* the file is foreign to everyone who reads it: bounded, typed, and nothing in it is believed but signatures;
* what a signer is shown is computed from the very bytes that are signed; the fingerprint is of those bytes, so that
  two signers who read it to each other know that they sign the same;
* what it says was in force must be signed by the keys it names: nobody else can bend it so that theirs look known;
* a key signs only the documents it has a say in; copies that were signed apart can be laid together;
* nothing is in force before `finish`, which judges by what the server holds, not by what the file says was there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, Root, Targets
from tuf.api.serialization import DeserializationError

from lightship_agent.contract.codes import ReleaseError
from lightship_agent.contract.wire import canonical_json, sha256_hex
from lightship_agent.files import write_durably

from .changes import Documents, Need, check_follows, check_list, check_roles, check_signed
from .keys import OFFLINE_ROLES, ROLES
from .signing import sign_with, signed_by

#: A release list of ten thousand bundles is about 4 MB, and a file holds two.
MAX_FILE: Final = 32 << 20
SUFFIX: Final = ".ceremony.json"
#: Of a key's id, to whoever decides by it: a key that has the first eight in common with another takes a day to find.
SHOWN: Final = 16


class _Set(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    root: msgspec.Raw = msgspec.Raw(b"null")
    targets: msgspec.Raw = msgspec.Raw(b"null")
    releases: msgspec.Raw = msgspec.Raw(b"null")


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lightship: Literal["ceremony 1"] = "ceremony 1"
    title: str
    reason: str
    begun: str
    releases: list[str]
    revokes: list[str]
    before: _Set
    after: _Set


@dataclass(frozen=True)
class Ceremony:
    """A proposed change, with the signatures so far."""

    title: str
    after: Documents
    before: Documents = field(default_factory=Documents)  # what was in force when it began
    reason: str = ""
    begun: str = ""
    releases: tuple[str, ...] = ()  # versions that this releases or revokes, as name@1
    revokes: tuple[str, ...] = ()

    @property
    def needs(self) -> list[Need]:
        """Whose signatures it must have."""
        return self.after.needs(self.before)

    @property
    def complete(self) -> bool:
        """Whether it has them all."""
        return not any(need.missing for need in self.needs)

    @property
    def fingerprint(self) -> str:
        """Of what is signed, to be read out: eight groups of four."""
        digests = {role: sha256_hex(document.signed_bytes) for role, document in self.after.items()}
        digest = sha256_hex(canonical_json(digests))
        return "-".join(digest[i : i + 4] for i in range(0, 32, 4))


def begin(
    title: str,
    before: Documents,
    after: Documents,
    *,
    reason: str = "",
    releases: Sequence[str] = (),
    revokes: Sequence[str] = (),
) -> Ceremony:
    """A ceremony that begins now; of the old documents it carries those that a signer must see."""
    shown = before if after.releases is not None else replace(before, releases=None)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Ceremony(title, after, shown, reason, now, tuple(releases), tuple(revokes))


def encode(ceremony: Ceremony) -> bytes:
    """As a file."""
    file = _File(
        title=ceremony.title,
        reason=ceremony.reason,
        begun=ceremony.begun,
        releases=list(ceremony.releases),
        revokes=list(ceremony.revokes),
        before=_pack(ceremony.before),
        after=_pack(ceremony.after),
    )
    return msgspec.json.encode(file) + b"\n"


def decode(data: bytes) -> Ceremony:
    """What a ceremony file holds: well formed, and possible.

    Raises:
        ReleaseError: release.ceremony, release.stale.
    """
    if len(data) > MAX_FILE:
        raise ReleaseError("release.ceremony", f"Expected a ceremony file of at most {MAX_FILE} bytes.")
    try:
        file = msgspec.json.decode(data, type=_File)
        before, after = _unpack(file.before), _unpack(file.after)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, DeserializationError) as e:
        message = f"This is no ceremony file: {str(e)[:300].rstrip('.')}."
        remedy = "Expected what `lightship keys ceremony begin` or `lightship release` wrote."
        raise ReleaseError("release.ceremony", message, remedy=remedy) from e
    if not list(after.items()) or (before.root is None) != (before.targets is None):
        raise ReleaseError("release.ceremony", "The ceremony file holds nothing to sign, or half of what is in force.")
    if before.releases is None and before.root is not None and after.releases is not None:
        raise ReleaseError("release.ceremony", "The ceremony file does not hold the release list in force.")
    if before.root is not None:
        check_roles(before)
        check_signed(before)
    check_follows(after, before)
    check_roles(after.over(before))
    check_list(after.releases)
    titles = (file.title, file.reason, file.begun, *file.releases, *file.revokes)
    if not all(text.isprintable() and len(text) <= 1_000 for text in titles):
        raise ReleaseError("release.ceremony", "The ceremony file has words that can't be shown.")
    return Ceremony(file.title, after, before, file.reason, file.begun, tuple(file.releases), tuple(file.revokes))


def read(path: Path) -> Ceremony:
    """The ceremony in a file.

    Raises:
        ReleaseError: release.ceremony, release.stale.
    """
    try:
        with path.open("rb") as f:
            return decode(f.read(MAX_FILE + 1))
    except OSError as e:
        raise ReleaseError("release.ceremony", f"{path} can't be read: {e.strerror or e}.") from e


def write(path: Path, ceremony: Ceremony) -> None:
    """Write it to a file.

    Raises:
        StorageError: storage.full, storage.unwritable; the old content is untouched.
    """
    write_durably(path, encode(ceremony))


def sign(ceremony: Ceremony, signer: Signer) -> tuple[str, ...]:
    """Sign every document that this key has a say in; which those are.

    Raises:
        ReleaseError: release.ceremony when it has none, release.keys.
    """
    keyid = signer.public_key.keyid
    signed = []
    for role, document in ceremony.after.items():
        if keyid not in _voices(ceremony, role):
            continue
        sign_with(document, [signer])
        if not any(keyid in signed_by(d, role, document) for d in _delegators(ceremony, role)):
            del document.signatures[keyid]
            raise ReleaseError("release.keys", f"The key {keyid[:8]} made a signature of {role} that does not verify.")
        signed.append(role)
    if not signed:
        expected = sorted({k[:8] for need in ceremony.needs for k in need.keyids})
        message = f"The key {keyid[:8]} has no say in this ceremony; expected one of {', '.join(expected)}."
        raise ReleaseError("release.ceremony", message)
    return tuple(signed)


def sign_if(ceremony: Ceremony, signers: Sequence[Signer]) -> None:
    """Sign with those of these keys that have a say.

    Raises:
        ReleaseError: release.keys.
    """
    for signer in signers:
        if any(signer.public_key.keyid in _voices(ceremony, role) for role, _ in ceremony.after.items()):
            sign(ceremony, signer)


def merge(copies: Sequence[Ceremony]) -> Ceremony:
    """One ceremony with the signatures of all its copies.

    Raises:
        ReleaseError: release.ceremony when they are not copies of one.
    """
    first, *others = copies
    for other in others:
        if other.fingerprint != first.fingerprint:
            message = f"These are different ceremonies: {first.fingerprint} and {other.fingerprint}."
            raise ReleaseError("release.ceremony", message)
        for (role, mine), (_, theirs) in zip(first.after.items(), other.after.items(), strict=True):
            # Only what holds: a bad signature in one copy must not stand in the way of the good one in another.
            good = {k for d in _delegators(first, role) for k in signed_by(d, role, theirs)}
            mine.signatures.update({k: theirs.signatures[k] for k in good})
    return first


def describe(ceremony: Ceremony) -> list[str]:
    """What would be in force that was not, line by line."""
    before, whole = ceremony.before, ceremony.after.over(ceremony.before)
    lines = []
    for role, document in ceremony.after.items():
        was, until = before.version(role) or "none", f"{document.signed.expires:%Y-%m-%d}"
        lines.append(f"{role}: version {was} → {document.signed.version}, good until {until}")
    delegators = [role for role in ("root", "targets") if getattr(ceremony.after, role) is not None]
    for role in ROLES if delegators else ():
        lines.extend(_describe_role(role, before, whole))
    if ceremony.after.releases is not None:
        lines.extend(_describe_list(before.releases, ceremony.after.releases))
    return lines


def _describe_role(role: str, before: Documents, after: Documents) -> Iterator[str]:
    now = after.role_keys(role)
    then = before.role_keys(role) if before.root is not None else None
    known = then.keyids if then is not None else frozenset()
    keys = ", ".join(f"{k[:SHOWN]}{'' if k in known else ' NEW'}" for k in sorted(now.keyids))
    gone = "".join(f"; {k[:SHOWN]} GONE" for k in sorted(known - now.keyids))
    was = f" (was {then.threshold})" if then is not None and then.threshold != now.threshold else ""
    yield f"  {role}: {now.threshold}{was} of {len(now.keyids)}: {keys}{gone}"


def _describe_list(before: Metadata[Targets] | None, after: Metadata[Targets]) -> Iterator[str]:
    old = before.signed.targets if before is not None else {}
    new = after.signed.targets
    for path in sorted(old.keys() | new.keys()):
        if path not in new:
            yield f"  - {path}"
        elif path not in old or old[path].hashes != new[path].hashes:
            sign_ = "+" if path not in old else "REPLACED"
            yield f"  {sign_} {path} {new[path].length} bytes sha256 {new[path].hashes.get('sha256', '?')}"
    yield f"  {len(new)} files listed"


def _delegators(ceremony: Ceremony, role: str) -> list[Root | Targets]:
    """Whose word says who signs a document: of what comes, and for root and targets of what is in force."""
    whole = ceremony.after.over(ceremony.before)
    sources: list[Metadata[Any] | None]
    sources = [whole.targets] if role == "releases" else [whole.root, ceremony.before.root]
    return [source.signed for source in sources if source is not None]


def _voices(ceremony: Ceremony, role: str) -> set[str]:
    return {k for d in _delegators(ceremony, role) for k in d.get_delegated_role(role).keyids}


def _pack(documents: Documents) -> _Set:
    return _Set(**{role: msgspec.Raw(document.to_bytes()) for role, document in documents.items()})


def _unpack(packed: _Set) -> Documents:
    kinds: dict[str, type[Any]] = {"root": Root, "targets": Targets, "releases": Targets}
    found: dict[str, Metadata[Any]] = {}
    for role in OFFLINE_ROLES:
        raw = bytes(getattr(packed, role))
        if raw == b"null":
            continue
        document: Metadata[Any] = Metadata.from_bytes(raw)
        if not isinstance(document.signed, kinds[role]):
            message = f"{role} is of another type"
            raise DeserializationError(message)
        found[role] = document
    return Documents(**found)
