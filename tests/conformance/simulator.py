"""A TUF repository in memory, behind a real HTTP server, that may be told to lie in any way.

It knows no more of a client than the specification: what is asked for, and what it answers.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

TOP = ("root", "timestamp", "snapshot", "targets")
_POOLS: dict[str, list[CryptoSigner]] = {}
_MAKE: dict[str, Callable[[], CryptoSigner]] = {
    "ed25519": CryptoSigner.generate_ed25519,
    "ecdsa": CryptoSigner.generate_ecdsa,
    "rsa": CryptoSigner.generate_rsa,
    "rsa-pkcs1v15": lambda: CryptoSigner.generate_rsa(scheme="rsa-pkcs1v15-sha256"),
}


@dataclass
class Answer:
    """What is sent instead of the truth. `stream` writes a body as it likes, after the headers."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stream: Callable[[Any], None] | None = None


class Repository:
    """Keys, metadata and targets; every role is at version 1 from the start."""

    def __init__(self, *, consistent: bool = True, hashes: bool = False, kind: str = "ed25519") -> None:
        self.hashes = hashes
        self.kind = kind
        self.life = timedelta(days=30)
        self.signers: dict[str, list[CryptoSigner]] = {}
        self.published: dict[str, list[tuple[int, bytes]]] = {}
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.lies: list[tuple[re.Pattern[str], Answer]] = []
        self._used = dict.fromkeys(_MAKE, 0)
        self.metadata: dict[str, Metadata[Any]] = {
            "root": Metadata(Root(expires=self.expiry(), consistent_snapshot=consistent)),
            "timestamp": Metadata(Timestamp(expires=self.expiry())),
            "snapshot": Metadata(Snapshot(expires=self.expiry())),
            "targets": Metadata(Targets(expires=self.expiry())),
        }
        for role in TOP:
            self.grant(role, self.new_signer())
        self.publish("root", "targets", "snapshot", "timestamp")

    # Keys ---------------------------------------------------------------------------------------------------------

    def new_signer(self, kind: str = "") -> CryptoSigner:
        """A key of its own for this repository; keys are made once, for making them takes long."""
        kind = kind or self.kind
        pool, at = _POOLS.setdefault(kind, []), self._used[kind]
        self._used[kind] += 1
        if at == len(pool):
            pool.append(_MAKE[kind]())
        # A public key is part of the metadata that tests change.
        return CryptoSigner(pool[at]._private_key, deepcopy(pool[at].public_key))

    def grant(self, role: str, signer: CryptoSigner) -> None:
        """Let a key sign for a top-level role, and have it sign from now on."""
        self.root.add_key(signer.public_key, role)
        self.signers.setdefault(role, []).append(signer)

    def rotate(self, *roles: str) -> None:
        """New keys in place of all old ones, and a new root that says so."""
        for role in roles:
            old = self.signers[role]
            self.root.roles[role].keyids.clear()
            self.signers[role] = []
            for _ in old:
                self.grant(role, self.new_signer())
        self.publish("root")

    def bind(self, role: str, keys: Iterable[CryptoSigner], threshold: int, signers: Iterable[CryptoSigner]) -> None:
        """Exactly these keys and that threshold for a top-level role; `signers` are those that sign from now on."""
        self.root.roles[role].keyids.clear()
        for key in keys:
            self.root.add_key(key.public_key, role)
        self.root.roles[role].threshold = threshold
        self.signers[role] = list(signers)

    # Metadata -----------------------------------------------------------------------------------------------------

    @property
    def root(self) -> Root:
        signed = self.metadata["root"].signed
        assert isinstance(signed, Root)
        return signed

    @property
    def timestamp(self) -> Timestamp:
        signed = self.metadata["timestamp"].signed
        assert isinstance(signed, Timestamp)
        return signed

    @property
    def snapshot(self) -> Snapshot:
        signed = self.metadata["snapshot"].signed
        assert isinstance(signed, Snapshot)
        return signed

    def targets(self, role: str = "targets") -> Targets:
        signed = self.metadata[role].signed
        assert isinstance(signed, Targets)
        return signed

    def expiry(self) -> datetime:
        return datetime.now(UTC).replace(microsecond=0) + self.life

    def publish(self, *roles: str, version: int | None = None) -> None:
        """Sign the next version of each role, or that version, and serve it; what lists it lists it from now on."""
        for role in roles:
            metadata = self.metadata[role]
            if version is not None:
                metadata.signed.version = version
            elif role in self.published:
                metadata.signed.version += 1
            metadata.signatures.clear()
            for signer in self.signers[role]:
                metadata.sign(signer, append=True)
            data = metadata.to_bytes()
            self.published.setdefault(role, []).append((metadata.signed.version, data))
            self._list(role, metadata.signed.version, data)

    def update(self, *delegated: str) -> None:
        """Publish targets, these delegated roles, snapshot and timestamp."""
        self.publish(*delegated, "targets", "snapshot", "timestamp")

    def _list(self, role: str, version: int, data: bytes) -> None:
        facts = (len(data), {"sha256": sha256(data).hexdigest()}) if self.hashes else (None, None)
        if role == "snapshot":
            self.timestamp.snapshot_meta = MetaFile(version, *facts)
        elif role not in {"root", "timestamp"}:
            self.snapshot.meta[f"{role}.json"] = MetaFile(version, *facts)

    def version(self, role: str) -> int:
        return int(self.metadata[role].signed.version)

    # Targets ------------------------------------------------------------------------------------------------------

    def add(self, path: str, data: bytes, role: str = "targets") -> None:
        """List a target; to be published by the caller."""
        self.targets(role).targets[path] = TargetFile.from_data(path, data, ["sha256"])
        self.files[path] = data

    def delegate(self, parent: str, role: str, **how: Any) -> None:
        """A delegated role with a key of its own; both roles are to be published by the caller."""
        delegator = self.targets(parent)
        if delegator.delegations is None:
            delegator.delegations = Delegations({}, {})
        assert delegator.delegations.roles is not None
        how = {"threshold": 1, "terminating": False, "paths": ["*"], **how}
        delegator.delegations.roles[role] = DelegatedRole(role, [], **how)
        if role not in self.metadata:
            self.metadata[role] = Metadata(Targets(expires=self.expiry()))
            self.signers[role] = [self.new_signer()]
        for signer in self.signers[role]:
            delegator.add_key(signer.public_key, role)

    def bins(self, parent: str, bits: int, prefix: str) -> list[str]:
        """Succinct hash bins below a role, all of one key; their names."""
        signer = self.new_signer()
        succinct = SuccinctRoles([], 1, bits, prefix)
        self.targets(parent).delegations = Delegations({}, None, succinct)
        self.targets(parent).add_key(signer.public_key)
        names = list(succinct.get_roles())
        for name in names:
            self.metadata[name] = Metadata(Targets(expires=self.expiry()))
            self.signers[name] = [signer]
        return names

    # Answers ------------------------------------------------------------------------------------------------------

    def lie(self, pattern: str, answer: Answer) -> None:
        """Answer matching paths (below the repository) like that."""
        self.lies.append((re.compile(pattern), answer))

    def answer(self, path: str) -> Answer:
        """What a client gets that asks for `path`, as `metadata/…` or `targets/…`."""
        kind, _, name = path.partition("/")
        self.asked.append(name)
        for pattern, lie in self.lies:
            if pattern.search(path):
                return lie
        body = self._metadata(name) if kind == "metadata" else self._target(unquote(name))
        return Answer(404) if body is None else Answer(200, body)

    def _metadata(self, name: str) -> bytes | None:
        stem = name.removesuffix(".json")
        number, _, role = stem.partition(".")
        if stem != "timestamp" and (self.root.consistent_snapshot or role == "root") and number.isdecimal():
            versions = [data for v, data in self.published.get(unquote(role), []) if v == int(number)]
            return versions[-1] if versions else None
        return self.published[unquote(stem)][-1][1] if unquote(stem) in self.published else None

    def _target(self, name: str) -> bytes | None:
        if not self.root.consistent_snapshot:
            return self.files.get(name)
        folder, slash, base = name.rpartition("/")
        digest, _, plain = base.partition(".")
        path = f"{folder}{slash}{plain}"
        roles = [m.signed for m in self.metadata.values() if isinstance(m.signed, Targets)]
        known = {digest for r in roles if path in r.targets for digest in r.targets[path].hashes.values()}
        return self.files.get(path) if digest in known else None


class Server(ThreadingHTTPServer):
    """Every test's repository, below a number of its own."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: list[Repository] = []

    def serve(self, repository: Repository) -> str:
        """Serve it too; its address."""
        self.repositories.append(repository)
        return f"http://127.0.0.1:{self.server_address[1]}/{len(self.repositories) - 1}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        number, _, path = self.path.lstrip("/").partition("/")
        answer = self.server.repositories[int(number)].answer(path)
        self.send_response(answer.status)
        if answer.stream is None:
            self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            if answer.stream is None:
                self.wfile.write(answer.body)
            else:
                answer.stream(self.wfile)
        except OSError:
            pass  # a client that has had enough

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Silence."""


@contextmanager
def running() -> Iterator[Server]:
    """A server on a free port."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="repository")
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
