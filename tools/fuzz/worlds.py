"""Fuzz: what some parsers need around them: a repository, a database, an authority, a model that serves."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import httpx
import msgspec
import numpy as np
from cryptography import x509
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata, Root
from tuf.ngclient import FetcherInterface

from crash_test import bundles
from lightship.fleet import ca, director
from lightship.home import Home
from lightship.monitoring.ingest import Incoming, Receipt, acknowledged, receive, receive_all
from lightship.storage.audit import now_ms
from lightship.storage.models import Device
from lightship_agent.contract import messages
from lightship_agent.contract.assignment import Assignment, assignment_bytes
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import LightshipError
from lightship_agent.contract.device_api import ACKED_HEADER, EnrolReply, Paths
from lightship_agent.contract.media import MediaWriter, assignment_name, member_order, target_name
from lightship_agent.contract.moments import Moments, Products
from lightship_agent.contract.quality import QualityCount
from lightship_agent.contract.wire import encode, pack, sha256_hex
from lightship_agent.link import client, enrol, identity
from lightship_agent.link.identity import certificate_request, new_key
from lightship_agent.runtime.model import load_model
from lightship_agent.serving.connections import Reply, Request
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import create_app
from lightship_agent.serving.oip import decode_infer
from lightship_agent.update.clock import date_of
from lightship_agent.update.releases import Releases

Run = Callable[[bytes], object]
World = Iterator[tuple[list[bytes], Run]]
DEVICE = "press-1"
_NEIGHBOUR = "press-2"
EPOCH = "0123456789abcdef"


@cache
def bundle(version: int) -> bytes:
    """A real bundle."""
    return bundles.build(version, brittle=version == 9)


def envelope(*records: messages.AnyRecord) -> messages.Envelope:
    """One publish."""
    return messages.Envelope(e=EPOCH, b=1, us=1, lo=1, r=records)


def records() -> list[messages.AnyRecord]:
    """One record of each kind."""
    digest, schema = "a" * 64, "b" * 64
    running = messages.Running(model="pump", version=1, digest=digest, since=1)
    return [
        messages.Heartbeat(s=1, t=1, running=(running,), health={"disk_free_mb": 9.0}, degraded=("storage.full",)),
        messages.Window(s=2, t=1, model="pump", version=1, digest=digest, schema=schema, w=0, opened=1, rows=3,
                        counts=messages.packed((1, 2, 300)), distances=(1, 2), values=messages.packed((3,)),
                        quality=(QualityCount("stuck", 0, 1),),
                        moments=messages.PackedMoments.of(
                            Moments(rows=3, pairs=2, sums=(1, -1), squares=(2, 70_000), lags=(0, -2)))),
        messages.Together(s=6, t=1, model="pump", digest=digest, schema=schema, first=0, w=7,
                          products=Products(rows=3, sums=(2, -1, 2))),
        messages.Fault(s=7, t=1, model="pump", digest=digest, schema=schema, w=0, kind="stuck", feature="speed",
                       raised=True, rate=1.0),
        messages.Labels(s=3, t=1, model="pump", digest=digest, schema=schema, w=0, labelled=2, errors=1),
        messages.Update(s=4, t=1, rollout="ro", seq=1, digest=digest, state="failed", code="update.golden"),
        messages.LabelledRows(s=5, t=1, model="pump", digest=digest, schema=schema, x=((1.0, None),), y=("a",)),
    ]  # fmt: skip


def assignment() -> Assignment:
    """One for this device."""
    data, now = bundle(1), int(time.time())
    return Assignment(
        device=DEVICE, seq=1, issued=now, expires=now + 86_400, model="pump", version=1, path="bundles/pump/1.tar",
        sha256=sha256_hex(data), length=len(data),
    )  # fmt: skip


def assignments() -> list[bytes]:
    """The payload that is signed."""
    return [assignment_bytes(assignment())]


def media() -> list[bytes]:
    """A file that is carried to a device; small, for what is in it is others' business."""
    from io import BytesIO

    file = BytesIO()
    writer = MediaWriter(file)
    names = ("timestamp", "1.root", "1.snapshot", "1.targets", "1.releases")
    members = {f"metadata/{name}.json": b'{"signed":{}}' for name in names}
    members |= {assignment_name(DEVICE): b"{}" * 200, target_name("a" * 64): b"x" * 700}
    for name in sorted(members, key=member_order):
        writer.add(name, len(members[name]), [members[name]])
    writer.finish()
    return [file.getvalue()]


# Trust ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _home() -> Iterator[Home]:
    """A control plane that has released a bundle; in memory where there is a place for that."""
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=place) as folder:
        home = Home.create(Path(folder) / "home")
        home.releases.publish("bundles/pump/1.tar", bundle(1))
        try:
            yield home
        finally:
            home.close()


class _Repository(FetcherInterface):
    """The repository's files; one of them is another."""

    def __init__(self, folder: Path) -> None:
        self.files = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".json"}

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rpartition("/")[2]
        if name not in self.files:
            message = f"no {name}"
            raise DownloadHTTPError(message, 404)
        return iter([self.files[name]])


@contextmanager
def envelopes() -> World:
    """What the director signs: only what he signed is opened, and it says what he said."""
    with _home() as home, tempfile.TemporaryDirectory() as cache_folder:
        root = home.releases.root_bytes()
        releases = Releases(Path(cache_folder), _Repository(home.releases.metadata), "tuf://x/", root)
        said = assignment()

        def run(data: bytes) -> None:
            assert releases.open_assignment(data) == said, "an unsigned assignment was believed"

        yield [director.sign(home.keys, said)], run


@contextmanager
def metadata(role: str) -> World:
    """A whole look at a repository of which one file is foreign: what is believed says what was signed."""
    with _home() as home:
        root = home.releases.root_bytes()
        repository = _Repository(home.releases.metadata)
        if role == "root":
            repository.files["2.root.json"] = _next_root(home)
        names = {"timestamp": "timestamp.json", "root": "2.root.json"}
        newest = max((n for n in repository.files if n.endswith(f".{role}.json")), default="")
        name = names.get(role, newest)
        genuine = repository.files[name]
        signed = Metadata.from_bytes(genuine).signed
        folder = home.path / "cache"

        def run(data: bytes) -> None:
            repository.files[name] = data
            shutil.rmtree(folder, ignore_errors=True)
            Releases(folder, repository, "tuf://x/", root).find("bundles/pump/1.tar")
            assert Metadata.from_bytes(data).signed == signed, "unsigned metadata was believed"

        yield [genuine], run


def _next_root(home: Home) -> bytes:
    found: Metadata[Root] = Metadata.from_bytes(home.releases.root_bytes())
    found.signed.version = 2
    found.sign(home.keys.signer("root"))
    return found.to_bytes()


# What servers answer --------------------------------------------------------------------------------------------------


@contextmanager
def answers() -> World:
    """A refusal, with its headers, as the agent reads every one."""

    def run(data: bytes) -> None:
        headers = httpx.Headers([(ACKED_HEADER.encode(), data[:200])])
        reply = client.Reply("https://x/", 400, headers, data)
        assert all(seq >= 0 for _, seq in reply.acknowledged)
        date_of(data[:200].decode("latin-1"))
        assert isinstance(reply.refusal(), LightshipError)
        assert len(reply.said) <= 500

    yield [b'{"code":"enrol.token","error":"no"}', EPOCH.encode() + b":17", b"Wed, 25 Nov 2026 10:00:00 GMT"], run


@contextmanager
def enrolments() -> World:
    """The answer to a request to enrol."""
    with _home() as home:
        state = home.path / "device"
        key = new_key()
        issued = home.ca.issue_device(certificate_request(key, DEVICE).decode(), DEVICE)
        whole = EnrolReply(
            device=DEVICE, tenant="default", chain=issued.chain.decode(), tuf_root=home.releases.root_bytes().decode()
        )
        authority = home.ca.certificate_pem()

        def run(data: bytes) -> None:
            reply = client.Reply("https://x/", 200, httpx.Headers(), data)
            with (
                mock.patch.object(enrol, "ask", return_value=reply),
                mock.patch.object(enrol, "server_ca", return_value=authority),
                mock.patch.object(identity, "new_key", return_value=key),
            ):
                shutil.rmtree(state, ignore_errors=True)
                enrol.enrol(state, server="https://x", token=f"a.b.{'c' * 64}", device=DEVICE)

        yield [msgspec.json.encode(whole)], run


@contextmanager
def authorities() -> World:
    """The CA certificate, over a connection that is not yet trusted: only the pinned one is taken."""
    with _home() as home:
        genuine = home.ca.certificate_pem()
        authority = x509.load_pem_x509_certificate(genuine).public_key()
        context = ssl.create_default_context()

        def run(data: bytes) -> None:
            reply = client.Reply(f"https://x{Paths.CA}", 200, httpx.Headers(), data)
            with (
                mock.patch.object(client, "ask", return_value=reply),
                mock.patch.object(ssl, "create_default_context", return_value=context),
            ):
                taken = x509.load_pem_x509_certificate(client.server_ca("https://x", home.ca.pin()))
                assert taken.public_key() == authority, "another authority was taken"

        yield [genuine], run


@contextmanager
def certificate_requests() -> World:
    """A device's request, at the authority."""

    def run(data: bytes) -> None:
        ca.check_request(data.decode("utf-8", "surrogateescape"), DEVICE)

    yield [certificate_request(new_key(), DEVICE)], run


# Ingest ---------------------------------------------------------------------------------------------------------------


class _UndoneError(Exception):
    """Nothing of a transaction shall stay."""


def _undo() -> NoReturn:
    raise _UndoneError


def _device(name: str, now: int) -> Device:
    return Device(
        id=name, tenant="default", group="g", labels={}, state="active", spki="0" * 64, cert_serial="1",
        cert_not_after=now, enrolled_at=now, running=[], health={}, degraded=[],
    )  # fmt: skip


@contextmanager
def ingest() -> World:
    """Whatever an enrolled device reports, it is stored or buried, and the transaction goes on."""
    with _home() as home:
        now = now_ms()
        with home.database.write() as session:
            session.add(_device(DEVICE, now))

        def run(data: bytes) -> None:
            try:
                with home.database.write() as session:
                    for kind in ("tele", "state"):
                        assert isinstance(receive(session, DEVICE, kind, data, now), Receipt)
                    session.flush()
                    _undo()
            except _UndoneError:
                return

        one_by_one = [encode(envelope(msgspec.structs.replace(r, s=1))) for r in records()]
        yield [pack(envelope(*records())), encode(messages.State(on=True, n=1)), *one_by_one], run


@contextmanager
def batches() -> World:
    """Whatever one device reports, what another reports in the same batch, before and behind it, is stored."""
    with _home() as home:
        now = now_ms()
        with home.database.write() as session:
            session.add_all(_device(name, now) for name in (DEVICE, _NEIGHBOUR))
        good = [Incoming(_NEIGHBOUR, "tele", pack(envelope(messages.Heartbeat(s=s, t=now)))) for s in (1, 2)]

        def run(data: bytes) -> None:
            try:
                with home.database.write() as session:
                    foreign = [Incoming(DEVICE, kind, data, "default") for kind in ("tele", "event", "state")]
                    receipts = receive_all(session, [good[0], *foreign, good[1]], now)
                    assert [r.code for r in (receipts[0], receipts[-1])] == ["", ""]
                    assert acknowledged(session, _NEIGHBOUR) == f"{EPOCH}:2"
                    _undo()
            except _UndoneError:
                return

        one_by_one = [encode(envelope(msgspec.structs.replace(r, s=1))) for r in records()]
        yield [pack(envelope(*records())), encode(messages.State(on=True, n=1)), *one_by_one], run


# Serving --------------------------------------------------------------------------------------------------------------


@contextmanager
def requests() -> World:
    """An inference request, as JSON and with binary tensors."""

    def run(data: bytes) -> None:
        cut = data.find(b"}\x00\x00")
        decode_infer(data, header_length=cut + 1 if cut > 0 else None)

    tensor = {"name": "features", "shape": [2, 4], "datatype": "FP32", "data": [0.0] * 8}
    blob = np.zeros(8, np.float32).tobytes()
    binary = {**tensor, "parameters": {"binary_data_size": len(blob)}}
    del binary["data"]
    yield [_json({"inputs": [tensor]}), _json({"id": "a", "inputs": [binary]}) + blob], run


@contextmanager
def http() -> World:
    """A body for each route of the agent's local HTTP face: the answer is never that nobody foresaw it."""
    plane = DataPlane(lambda *_: None)
    plane.install(load_model(read_bundle(bundle(1))))
    app = create_app(plane, status=dict, metrics=str)
    paths = [b"/v2/models/pump/infer", b"/v2/models/pump/feedback", b"/v2/repository/index"]

    def run(data: bytes) -> None:
        for url in paths:
            request = Request(b"POST", url, {b"content-type": b"application/json"}, data, keep_alive=True)
            outcome = app.respond(request)
            answer = outcome if isinstance(outcome, Reply) else runner.run(_awaited(outcome))
            assert b"serving.runtime" not in answer.body, answer.body[:200]

    tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [0.0] * 4}
    with asyncio.Runner() as runner:
        yield [_json({"inputs": [tensor]}), _json([{"id": "a", "label": 1}]), _json({"ready": True})], run


async def _awaited(outcome: Awaitable[Reply]) -> Reply:
    return await outcome


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
