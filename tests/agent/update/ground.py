"""A device with an old model before a release repository that belongs to an attacker, or to nobody in particular."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner
from tests.conformance.simulator import Repository, running

from lightship_agent.contract.assignment import PAYLOAD_TYPE, Assignment, assignment_bytes
from lightship_agent.contract.codes import LightshipError
from lightship_agent.contract.transport import TRANSPORT_SUFFIX
from lightship_agent.link.identity import IdentityFile, key_pem, new_key, store_identity
from lightship_agent.update.check import CheckReply, CheckRequest, ServerSource, check

DEVICE = "press-1"
OLD, NEW = "bundles/pump/1.tar", "bundles/pump/2.tar"


class Ground:
    """Its `repository` has the roles of a real one, and its device serves bundle 1."""

    def __init__(self, folder: Path, repository: Repository, url: str) -> None:
        self.folder = folder
        self.repository = repository
        self.url = f"{url}/metadata/"
        self.seq = 1
        repository.delegate("targets", "releases", terminating=True, paths=["bundles/*/*", "deltas/*/*"])
        repository.delegate("targets", "director", terminating=True, paths=["-director-/-/-"])
        self.release(OLD, b"old")
        repository.update("releases")
        _enrol(folder, repository.published["root"][0][1])
        (folder / "bundles").mkdir()
        (folder / "bundles" / "old.tar").write_bytes(b"old")
        (folder / "update.json").write_bytes(b'{"floor":1}')

    def release(self, path: str, bundle: bytes) -> None:
        """List a bundle; the caller publishes."""
        self.repository.add(path, bundle, "releases")
        self.repository.add(path + TRANSPORT_SUFFIX, b"packed " + bundle, "releases")

    def publish_new(self) -> None:
        """Release bundle 2, as it should be."""
        self.release(NEW, b"new")
        self.repository.publish("releases", "snapshot", "timestamp")

    def assignment(self, path: str = NEW, bundle: bytes = b"new", **changes: Any) -> Assignment:
        self.seq += 1
        facts: dict[str, Any] = {
            "device": DEVICE, "seq": self.seq, "issued": int(time.time()), "expires": int(time.time()) + 10 * 86_400,
            "model": "pump", "version": 2, "path": path, "sha256": hashlib.sha256(bundle).hexdigest(),
            "length": len(bundle),
        }  # fmt: skip
        return Assignment(**{**facts, **changes})

    def sign(self, assignment: Assignment, signer: CryptoSigner | None = None) -> bytes:
        """In an envelope, signed by the director unless somebody else is named."""
        envelope = Envelope(assignment_bytes(assignment), PAYLOAD_TYPE, {})
        envelope.sign(signer or self.repository.signers["director"][0])
        return json.dumps(envelope.to_dict()).encode()

    def request(self, envelope: bytes | None = None, **changes: Any) -> CheckRequest:
        """What the agent asks: by default the director's assignment of bundle 2."""
        made = CheckRequest(
            state_dir=str(self.folder),
            device=DEVICE,
            envelope=self.sign(self.assignment()) if envelope is None else envelope,
            floor=1,
            now=time.time(),
            source=ServerSource(metadata_url=self.url),
        )
        return msgspec.structs.replace(made, **changes)

    def accepted(self, envelope: bytes | None = None, **changes: Any) -> CheckReply:
        return check(self.request(envelope, **changes))

    def refused(
        self,
        envelope: bytes | None = None,
        *,
        by: Callable[[CheckRequest], CheckReply] = check,
        **changes: Any,
    ) -> str:
        """The code of the refusal; nothing but the metadata cache has changed on disk."""
        before = self.on_disk()
        try:
            by(self.request(envelope, **changes))
        except LightshipError as e:
            assert self.on_disk() == before
            return e.code
        raise AssertionError("It was accepted.")

    def on_disk(self) -> dict[str, bytes]:
        """Every file of the device but its metadata cache."""
        found = (p for p in self.folder.rglob("*") if p.is_file() and self.folder / "tuf" not in p.parents)
        return {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in found}


@contextmanager
def open_ground(folder: Path) -> Iterator[Ground]:
    """A ground of its own for one test."""
    with running() as server:
        repository = Repository()
        yield Ground(folder, repository, server.serve(repository))


def _enrol(folder: Path, root: bytes) -> None:
    """An identity of a device whose control plane is nowhere: only its root of trust matters here."""
    key, name = new_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, DEVICE)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM)
    info = IdentityFile(device=DEVICE, tenant="default", server="https://127.0.0.1:1")
    files = {
        "ca.pem": pem, "cert.pem": pem, "key.pem": key_pem(key), "tuf-root.json": root,
        "identity.json": msgspec.json.encode(info),
    }  # fmt: skip
    store_identity(folder, files)
