"""Fuzz: each parser of foreign bytes, valid inputs to begin with, and the errors it may raise.

Rules:
* a target is the code that ships, called as the programs call it; only sockets and clocks are left out;
* where something is signed, an input that is accepted must say what the signed one says: a target checks that itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, Final

from lightship_agent.contract import messages, wire
from lightship_agent.contract.assignment import parse_assignment
from lightship_agent.contract.bundle import GOLDEN, MANIFEST, MODEL, PROFILE, build_bundle, read_bundle, read_members
from lightship_agent.contract.device_api import parse_token
from lightship_agent.contract.manifest import parse_manifest
from lightship_agent.contract.media import read_index, read_member
from lightship_agent.contract.transport import apply_patch, decompress, make_patch, pack_transport
from lightship_agent.contract.wire import sha256_hex

from . import sockets, worlds

Run = Callable[[bytes], object]
Opened = AbstractContextManager[tuple[list[bytes], Run]]
MAX_MODEL: Final = 64 * 1024 * 1024  # bytes


@dataclass(frozen=True)
class Target:
    """A parser. `codes` are how the codes of its errors may begin."""

    name: str
    code: str
    codes: tuple[str, ...]
    open: Callable[[], Opened]
    before: bool = True  # whether it meets bytes before a signature on them is checked


@contextmanager
def plain(seeds: Callable[[], list[bytes]], run: Run) -> Iterator[tuple[list[bytes], Run]]:
    """A parser that needs nothing around it."""
    yield seeds(), run


# Contract -------------------------------------------------------------------------------------------------------------


def _token(data: bytes) -> None:
    parse_token(data.decode("utf-8", "replace"))


def _command(data: bytes) -> None:
    wire.decode(data, messages.Command, max_bytes=4_096)


def _report(data: bytes) -> None:
    wire.unpack(data, messages.Envelope)


def _frame(data: bytes) -> None:
    assert len(decompress(data, 100_000)) <= 100_000


def _patch(data: bytes, *, old: bytes, new: bytes) -> None:
    made = apply_patch(data, old, patch_sha256=sha256_hex(data), sha256=sha256_hex(new), length=len(new))
    assert made == new


@contextmanager
def _patches() -> Iterator[tuple[list[bytes], Run]]:
    old, new = worlds.bundle(1), worlds.bundle(2)
    yield [make_patch(old, new)], partial(_patch, old=old, new=new)


def _media(data: bytes) -> None:
    file = BytesIO(data)
    index = read_index(file)
    for name, entry in index.entries.items():
        read_member(file, index, name, max(entry.length, 1))


def _assignment(data: bytes) -> None:
    parse_assignment(data)


# Bundles --------------------------------------------------------------------------------------------------------------


def _bundle(data: bytes) -> None:
    bundle = read_bundle(data)
    assert bundle.digest == sha256_hex(data)


@contextmanager
def _members(name: str) -> Iterator[tuple[list[bytes], Run]]:
    """One member is foreign, and the manifest vouches for it: a signed bundle of somebody who had the key."""
    members = read_members(worlds.bundle(1))
    manifest = parse_manifest(members.pop(MANIFEST))

    def run(data: bytes) -> None:
        read_bundle(build_bundle(manifest, {**members, name: data}))

    yield [members[name]], run


def _manifest(data: bytes) -> None:
    parse_manifest(data)


def _graph(data: bytes) -> None:
    from lightship_agent.runtime.graph import check_graph

    check_graph(data, max_bytes=MAX_MODEL)


def _bundles() -> list[bytes]:
    return [worlds.bundle(1), worlds.bundle(2)]


def _models() -> list[bytes]:
    return [read_members(b)[MODEL] for b in (worlds.bundle(1), worlds.bundle(9))]


def _manifests() -> list[bytes]:
    return [read_members(worlds.bundle(1))[MANIFEST]]


def _reports() -> list[bytes]:
    return [wire.pack(worlds.envelope(*worlds.records())), wire.encode(worlds.envelope(worlds.records()[0]))]


def _commands() -> list[bytes]:
    return [wire.encode(messages.Command(id="c-1", expires=0)), wire.encode({"id": "x", "expires": 9, "e": "a" * 16})]


def _frames() -> list[bytes]:
    return [pack_transport(worlds.bundle(1)), pack_transport(b"a" * 100_000)]


def _tokens() -> list[bytes]:
    return [b"abcdef.0123456789abcdef." + b"a" * 64]


def _target(name: str, code: str, codes: str | tuple[str, ...], opened: Callable[[], Any], **more: Any) -> Target:
    return Target(name, code, (codes,) if isinstance(codes, str) else codes, opened, **more)


_TRUST: Final = ("trust.", "link.")
TARGETS: Final = (
    _target("DSSE envelope", "update.releases", "trust.", worlds.envelopes),
    *(
        _target(f"TUF {role}", "update.releases", _TRUST, partial(worlds.metadata, role))
        for role in ("timestamp", "snapshot", "targets", "releases", "root")
    ),
    _target("assignment", "contract.assignment", "trust.", partial(plain, worlds.assignments, _assignment)),
    _target("file on a stick", "contract.media", "media.", partial(plain, worlds.media, _media)),
    _target("bundle on the wire", "contract.transport", "bundle.", partial(plain, _frames, _frame)),
    _target("patch on the wire", "contract.transport", ("bundle.", "trust."), _patches),
    _target("answer of the control plane", "link.client", ("link.", "enrol."), worlds.answers),
    _target("enrolment answer", "link.enrol", ("link.", "enrol.", "name."), worlds.enrolments),
    _target("CA certificate", "link.client", ("link.", "enrol."), worlds.authorities),
    _target("join token", "contract.device_api", "enrol.", partial(plain, _tokens, _token)),
    _target("MQTT command", "link.mqtt", "wire.", partial(plain, _commands, _command)),
    _target("report", "contract.messages", "wire.", partial(plain, _reports, _report)),
    _target("report at ingest", "monitoring.ingest", (), worlds.ingest),
    _target("report in a batch", "monitoring.batch", (), worlds.batches),
    _target("certificate request", "fleet.ca", "enrol.", worlds.certificate_requests),
    _target("inference request", "serving.oip", "serving.", worlds.requests),
    _target("HTTP body", "serving.http", "serving.", worlds.http),
    _target("HTTP connection", "serving.http1", "serving.", sockets.connections),
    _target("bundle", "contract.bundle", "bundle.", partial(plain, _bundles, _bundle), before=False),
    _target("manifest", "contract.manifest", "bundle.", partial(plain, _manifests, _manifest), before=False),
    _target("profile in a bundle", "contract.profile", "bundle.", partial(_members, PROFILE), before=False),
    _target("golden rows in a bundle", "contract.bundle", "bundle.", partial(_members, GOLDEN), before=False),
    _target("ONNX graph", "runtime.graph", "bundle.", partial(plain, _models, _graph), before=False),
)
