"""API: the face devices speak to, HTTPS with mutual TLS.

Rules:
* `/v1/ca`, `/v1/enrol` and `/v1/recover` need no certificate; everything else needs one, and the device must be active
  with that very key in the database: a certificate alone is never enough;
* answers are JSON with a stable code on every refusal; unknown metadata is 404, never a page;
* release files are immutable and served with ranges.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from lightship.fleet import asks, clones, enrolment, recovery
from lightship.fleet.broker import BrokerInfo
from lightship.home import Home
from lightship.monitoring import ingest, tallies
from lightship.storage.audit import coming_from, now_ms
from lightship.storage.models import AssignmentRow, Device
from lightship_agent.contract.codes import EnrolError, LightshipError, StorageError, WireError
from lightship_agent.contract.device_api import (
    ACKED_HEADER,
    ALSO_ACKED_HEADER,
    ASKED_HEADER,
    INSTANCE_HEADER,
    EnrolReply,
    EnrolRequest,
    Paths,
    RenewReply,
    RenewRequest,
)
from lightship_agent.contract.messages import Asking
from lightship_agent.contract.recovery import NONCE_SECONDS, NonceReply, NonceRequest, SignedProof
from lightship_agent.contract.wire import MAX_PACKED, encode, sha256_hex

from .tls_protocol import EXTENSION, Peer

log = logging.getLogger(__name__)
MAX_JSON = 64 * 1024
RECOVERY_DAYS = 90.0
_T = TypeVar("_T")
Handler = Callable[[Request], Awaitable[Response]]
_STATUS = {
    "enrol.token": 401,
    "enrol.certificate": 401,
    "enrol.proof": 401,
    "enrol.too-late": 403,
    "enrol.revoked": 403,
    "enrol.pending": 403,
    "enrol.not-listed": 403,
    "enrol.taken": 409,
    "wire.too-large": 413,
}


class DeviceApi:
    """The handlers, over one home."""

    def __init__(
        self, home: Home, tenant: str, broker: BrokerInfo | None, *, recovery_days: float = RECOVERY_DAYS
    ) -> None:
        """Serve `home`; `broker` is what newly enrolled devices are told."""
        self._home = home
        self._seal = recovery.NonceSeal(home.path / "ca" / "nonce.key")
        self._recovery_days = recovery_days
        self._tenant = tenant
        self._broker = broker

    def app(self) -> Starlette:
        """The ASGI application."""
        open_routes = [
            Route(Paths.CA, _answering(self._ca)),
            Route(Paths.ENROL, _answering(self._enrol), methods=["POST"]),
            Route(Paths.RECOVERY_NONCE, _answering(self._recovery_nonce), methods=["POST"]),
            Route(Paths.RECOVER, _answering(self._recover), methods=["POST"]),
        ]
        device_routes = [
            Route(Paths.PING, _answering(self._ping)),
            Route(Paths.RENEW, _answering(self._renew), methods=["POST"]),
            Route(Paths.ASSIGNMENT, _answering(self._assignment)),
            Route(Paths.TELEMETRY, _answering(self._telemetry), methods=["POST"]),
            Route(Paths.REPLY, _answering(self._reply), methods=["POST"]),
            Route(Paths.METADATA + "{name}", _answering(self._metadata)),
            Route(Paths.TARGETS + "{folder}/{model}/{name}", _answering(self._target)),
        ]
        return Starlette(routes=[*open_routes, *device_routes])

    async def _ca(self, _request: Request) -> Response:
        return Response(self._home.ca.certificate_pem(), media_type="application/x-pem-file")

    async def _enrol(self, request: Request) -> Response:
        body = await _json_body(request, EnrolRequest)
        return await run_in_threadpool(self._enrol_now, body)

    def _enrol_now(self, body: EnrolRequest) -> Response:
        with self._home.database.write() as session:
            device, issued = enrolment.enrol(
                session,
                self._home.ca,
                token=body.token,
                device=body.device,
                csr=body.csr,
                tenant=self._tenant,
                serial=body.serial,
            )
        broker = self._broker
        reply = EnrolReply(
            device=device.id,
            tenant=device.tenant,
            chain=issued.chain.decode(),
            tuf_root=self._home.releases.root_bytes().decode(),
            broker_host=broker.host if broker else "",
            broker_port=broker.port if broker else 0,
            broker_auth=broker.auth if broker else "",
            broker_username=broker.device_username if broker else "",
            broker_password=broker.device_password if broker else "",
        )
        return Response(msgspec.json.encode(reply), media_type="application/json")

    async def _ping(self, request: Request) -> Response:
        await run_in_threadpool(self._device, request)
        return JSONResponse({"ok": True})

    async def _renew(self, request: Request) -> Response:
        body = await _json_body(request, RenewRequest)
        return await run_in_threadpool(self._renew_now, request, body)

    def _renew_now(self, request: Request, body: RenewRequest) -> Response:
        device = self._device(request)
        with self._home.database.write() as session:
            issued = enrolment.renew(session, self._home.ca, device=device.id, csr=body.csr)
        return Response(msgspec.json.encode(RenewReply(chain=issued.chain.decode())), media_type="application/json")

    async def _recovery_nonce(self, request: Request) -> Response:
        body = await _json_body(request, NonceRequest)
        nonce = await run_in_threadpool(self._seal.make, body.device[:64])
        reply = NonceReply(nonce=nonce, expires_seconds=NONCE_SECONDS)
        return Response(msgspec.json.encode(reply), media_type="application/json")

    async def _recover(self, request: Request) -> Response:
        body = await _json_body(request, SignedProof)
        return await run_in_threadpool(self._recover_now, body)

    def _recover_now(self, body: SignedProof) -> Response:
        verified = recovery.verify(self._seal, body)
        with self._home.database.write() as session:
            device, issued = recovery.recover(session, self._home.ca, verified, days=self._recovery_days)
        log.info("%s recovered its certificate", device)
        return Response(msgspec.json.encode(RenewReply(chain=issued.chain.decode())), media_type="application/json")

    async def _assignment(self, request: Request) -> Response:
        return await run_in_threadpool(self._assignment_now, request)

    def _assignment_now(self, request: Request) -> Response:
        device = self._device(request)
        with self._home.database.read() as session:
            row = session.get(AssignmentRow, device.id)
            headers = _acked(ingest.acknowledgements(session, device.id))
            asked = asks.waiting_for(session, device.id)
        if asked:
            headers[ASKED_HEADER] = base64.urlsafe_b64encode(encode(Asking(asked=asked))).decode()
        if row is None:
            return Response(status_code=204, headers=headers)
        etag = f'"{sha256_hex(row.envelope)[:32]}"'
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(row.envelope, media_type="application/json", headers={**headers, "etag": etag})

    async def _telemetry(self, request: Request) -> Response:
        packed = await _body(request, MAX_PACKED)
        return await run_in_threadpool(self._telemetry_now, request, packed)

    def _telemetry_now(self, request: Request, packed: bytes) -> Response:
        device = self._device(request)
        with self._home.database.write() as session:
            receipt = ingest.receive(session, device.id, "tele", packed, now_ms())
            tallies.add(session, tallies.counted(session), now_ms())
            headers = _acked(ingest.acknowledgements(session, device.id))
        missing = receipt.gap.ranges if receipt.gap is not None else ()
        return JSONResponse({"code": receipt.code, "missing": missing}, status_code=202, headers=headers)

    async def _reply(self, request: Request) -> Response:
        packed = await _body(request, MAX_PACKED)
        return await run_in_threadpool(self._reply_now, request, packed)

    def _reply_now(self, request: Request, packed: bytes) -> Response:
        device = self._device(request)
        with self._home.database.write() as session:
            receipt = ingest.receive(session, device.id, "rsp", packed, now_ms())
        return JSONResponse({"code": receipt.code}, status_code=202)

    async def _metadata(self, request: Request) -> Response:
        await run_in_threadpool(self._device, request)
        name = request.path_params["name"]
        return _file(self._home.releases.metadata / name, name.endswith(".json"), "application/json")

    async def _target(self, request: Request) -> Response:
        await run_in_threadpool(self._device, request)
        parts = [request.path_params[p] for p in ("folder", "model", "name")]
        safe = not any(p.startswith(".") or "/" in p for p in parts)
        return _file(self._home.releases.targets.joinpath(*parts), safe, "application/octet-stream")

    def _device(self, request: Request) -> Device:
        peer: Peer | None = request.scope.get("extensions", {}).get(EXTENSION)
        if peer is None:
            raise EnrolError("enrol.certificate", "A client certificate is required.")
        now = now_ms()
        with self._home.database.read() as session:
            device = enrolment.active_device(session, peer.name)
        if device.spki != peer.spki:
            device = self._switch_key(device, peer, now)
        instance = clones.parse_header(request.headers.get(INSTANCE_HEADER, ""))
        is_new = instance is not None and instance.name != device.instance
        if is_new or clones.must_note_key(device, now):
            address = request.client.host if request.client else ""
            with self._home.database.write() as session:
                device = enrolment.active_device(session, peer.name)
                if instance is not None:
                    clones.heard(session, device, instance, address, now)
                if clones.must_note_key(device, now):
                    clones.note_key(session, device, now)
        return device

    def _switch_key(self, device: Device, peer: Peer, now: int) -> Device:
        """The device with the key it shows; the refusal of an old one is written down all the same."""
        with self._home.database.write() as session:
            device = enrolment.active_device(session, peer.name)
            old = clones.old_key_shown(session, device, peer.spki, now)
        if old:
            message = "The certificate's key was replaced by a renewal."
            raise EnrolError("enrol.certificate", message, remedy="Enrol anew: the state directory is an old copy.")
        with self._home.database.write() as session:
            device = enrolment.active_device(session, peer.name)
            enrolment.check_key(session, device, peer.spki)
        return device


def _answering(handler: Handler) -> Handler:
    async def answer(request: Request) -> Response:
        try:
            with coming_from(request.client.host if request.client else ""):
                return await handler(request)
        except LightshipError as e:
            log.info("%s %r: %s", request.method, request.url.path, e.code)
            # What our disk can't do now is not the device's fault: it shall come again.
            status = 503 if isinstance(e, StorageError) else _STATUS.get(e.code, 400)
            return JSONResponse({"error": str(e), "code": e.code}, status_code=status)

    return answer


async def _body(request: Request, limit: int) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise WireError("wire.too-large", f"Expected at most {limit} bytes.")
    return bytes(data)


async def _json_body(request: Request, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(await _body(request, MAX_JSON), type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise EnrolError("enrol.request", f"Expected a JSON {kind.__name__}: {e}.") from e


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # e.g. a name longer than the file system knows
        return False


def _acked(acks: ingest.Acks) -> dict[str, str]:
    also = {ALSO_ACKED_HEADER: acks.others} if acks.others else {}
    return {ACKED_HEADER: acks.newest, **also}


def _file(path: Path, allowed: bool, media_type: str) -> Response:
    if not allowed or path.name.startswith(".") or not _is_file(path):
        return JSONResponse({"error": "No such file.", "code": "release.unknown"}, status_code=404)
    return FileResponse(path, media_type=media_type)
