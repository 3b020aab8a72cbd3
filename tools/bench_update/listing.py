"""Bench update: release lists of any length, in the shape that the control plane writes and in hash bins.

Rules: the list is that of a real home, signed with its keys and listed by its snapshot; what is not published through
`ReleaseRepository` is only padding, or the shape that the product does not have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from securesystemslib.signer import Signer
from tuf.api.metadata import Delegations, Metadata, MetaFile, SuccinctRoles, TargetFile, Targets
from tuf.api.serialization.json import JSONSerializer

from lightship.home import Home
from lightship_agent.contract.transport import TRANSPORT_SUFFIX

RELEASES: Final = "releases"
_BIN: Final = "bin"


class Listing:
    """The release list of a home."""

    def __init__(self, home: Home, bins: int = 0) -> None:
        """In one role, or in so many bins below it: a power of two."""
        self._home = home
        self._folder = home.releases.metadata
        self._bits = bins.bit_length() - 1 if bins else 0
        self._binned: dict[str, Metadata[Targets]] = {}
        self.entries = 0

    def pad(self, bundles: int) -> None:
        """List so many bundles more, each with its transport file; nobody will ever ask for them."""
        self.add(target for n in range(bundles) for target in _padding(n))

    def add(self, targets: Iterable[TargetFile]) -> None:
        """List these targets, and sign what lists them."""
        found = list(targets)
        self.entries += len(found)
        releases = self._load(RELEASES)
        if not self._bits:
            releases.signed.targets |= {t.path: t for t in found}
            self._publish({RELEASES: releases})
            return
        if releases.signed.delegations is None:
            self._divide(releases)
        succinct = releases.signed.delegations.succinct_roles
        changed = {RELEASES: releases} if releases.signed.targets else {}
        # What was published in one role moves to the bins.
        found += releases.signed.targets.values()
        releases.signed.targets = {}
        for target in found:
            name = succinct.get_role_for_target(target.path)
            self._binned[name].signed.targets[target.path] = target
            changed[name] = self._binned[name]
        self._publish(changed)

    @property
    def roles(self) -> int:
        """How many roles the snapshot lists."""
        return len(self._load("snapshot").signed.meta)

    def _divide(self, releases: Metadata[Any]) -> None:
        signer = self._signer(RELEASES)
        key = signer.public_key
        succinct = SuccinctRoles([key.keyid], 1, self._bits, _BIN)
        releases.signed.delegations = Delegations({key.keyid: key}, None, succinct)
        self._binned = {name: Metadata(Targets(expires=_expiry())) for name in succinct.get_roles()}
        self._publish({RELEASES: releases, **self._binned})

    def _publish(self, changed: dict[str, Metadata[Any]]) -> None:
        snapshot, timestamp = self._load("snapshot"), self._load("timestamp")
        for name, metadata in changed.items():
            self._write(metadata, name)
            snapshot.signed.meta[f"{name}.json"] = MetaFile(metadata.signed.version)
        self._write(snapshot, "snapshot")
        timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
        self._write(timestamp, "timestamp")

    def _write(self, metadata: Metadata[Any], role: str) -> None:
        metadata.signed.version += 1
        metadata.signatures.clear()
        metadata.sign(self._signer(RELEASES if role.startswith(_BIN) else role))
        name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
        (self._folder / name).write_bytes(metadata.to_bytes(JSONSerializer(compact=True)))

    def _signer(self, role: str) -> Signer:
        return self._home.keys.signer(role)

    def _load(self, role: str) -> Metadata[Any]:
        """The version in force."""
        if role == "timestamp":
            return Metadata.from_file(str(self._folder / "timestamp.json"))
        if role == "snapshot":
            version = self._load("timestamp").signed.snapshot_meta.version
        else:
            version = self._load("snapshot").signed.meta[f"{role}.json"].version
        return Metadata.from_file(str(self._folder / f"{version}.{role}.json"))


def targets_of(home: Home, path: str, data: bytes, packed: bytes) -> list[TargetFile]:
    """A bundle as a target, and its transport file, which is put in its place."""
    made = [TargetFile.from_data(path, data, ["sha256"])]
    made.append(TargetFile.from_data(path + TRANSPORT_SUFFIX, packed, ["sha256"]))
    place: Path = home.releases.targets / made[1].get_prefixed_paths()[0]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(packed)
    return made


def _padding(n: int) -> list[TargetFile]:
    path = f"bundles/model-{n % 97}/{n}-{hashlib.sha256(b'name %d' % n).hexdigest()[:12]}.tar"
    digests = [hashlib.sha256(b"%s %d" % (what, n)).hexdigest() for what in (b"bundle", b"transport")]
    return [
        TargetFile(4_400_000 + n, {"sha256": digests[0]}, path),
        TargetFile(650_000 + n, {"sha256": digests[1]}, path + TRANSPORT_SUFFIX),
    ]


def _expiry() -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(days=90)
