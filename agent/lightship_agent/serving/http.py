"""Serving: the HTTP face, a plain ASGI application.

Rules:
* codes become statuses here and nowhere else; every error has the protocol's shape;
* bodies are bounded while they arrive, one by one and together; a slow sender is given up;
* a small request to a fast model is answered where it is read, since a thread would cost more than the model;
  anything heavier goes to a thread, so that health never waits behind inference.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from lightship_agent.contract.codes import ServingError

from .dataplane import DataPlane
from .metrics import CONTENT_TYPE as METRICS_TYPE
from .oip import MAX_BODY, decode_infer, encode_error, encode_infer, model_metadata, server_metadata

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

STATUS: Final[dict[str, int]] = {
    "serving.malformed": 400,
    "serving.input": 400,
    "serving.output": 400,
    "serving.unknown-model": 404,
    "serving.unknown-prediction": 404,
    "serving.not-found": 404,
    "serving.method": 405,
    "serving.too-large": 413,
    "serving.runtime": 500,
    "serving.no-model": 503,
    "serving.overloaded": 503,
}
RETRY_AFTER: Final[dict[str, bytes]] = {"serving.overloaded": b"1", "serving.no-model": b"10"}  # seconds

MAX_BUFFERED: Final = 4 * MAX_BODY  # bytes of all bodies that are arriving at once
_BODY_SECONDS: Final = 30.0
_INLINE_BODY: Final = 64 * 1024  # bytes
_INLINE_ROW_MS: Final = 1.0
_MAX_LABELS: Final = 10_000  # in one feedback request
_LOG: Final = logging.getLogger("lightship.serving")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer before it is sent."""

    body: bytes
    status: int = 200
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A request that found its route."""

    headers: Mapping[bytes, bytes]
    receive: Receive
    model: str = ""
    version: str | None = None


class _Label(msgspec.Struct):
    id: str
    label: str | int | float | bool


class _Index(msgspec.Struct):
    ready: bool = False


class _Gone(Exception):  # noqa: N818 - nothing went wrong: the client left
    """The client went away before its request was complete."""


Handler = Callable[[Call], Awaitable[Reply]]


@dataclass(slots=True)
class HttpApp:
    """The ASGI application; see `create_app`."""

    plane: DataPlane
    status: Callable[[], dict[str, Any]]
    metrics: Callable[[], str]
    _buffered: int = 0
    _routes: tuple[tuple[re.Pattern[str], str, Handler], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Compile the route table; the hot path stands first."""
        model = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
        table: tuple[tuple[str, str, Handler], ...] = (
            (model + "/infer", "POST", self._infer),
            (r"/v2/health/live", "GET", self._live),
            (r"/v2/health/ready", "GET", self._ready),
            (r"/v2/health", "GET", self._health),
            (r"/metrics", "GET", self._metrics),
            (model + "/ready", "GET", self._model_ready),
            (model + "/stats", "GET", self._stats),
            (model, "GET", self._model),
            (r"/v2/models/(?P<model>[^/]+)/feedback", "POST", self._feedback),
            (r"/v2/repository/index", "POST", self._index),
            (r"/v2/?", "GET", self._server),
        )
        self._routes = tuple((re.compile(path), method, handler) for path, method, handler in table)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request."""
        if scope["type"] != "http":
            return
        try:
            reply = await self._reply(scope, receive)
        except ServingError as e:
            reply = _error(e)
        except _Gone:
            return
        except Exception:  # noqa: BLE001 - the last fence: the client gets the protocol's error, the log the traceback
            _LOG.exception("A request failed in a way nobody foresaw.")
            self.plane.count_error("serving.runtime")
            reply = _error(ServingError("serving.runtime", "The agent failed to answer; its log says more."))
        headers = [(b"content-type", reply.content_type), (b"content-length", b"%d" % len(reply.body)), *reply.headers]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})

    async def _reply(self, scope: Scope, receive: Receive) -> Reply:
        path, method = scope["path"], scope["method"]
        for pattern, allowed, handler in self._routes:
            found = pattern.fullmatch(path)
            if not found:
                continue
            if method != allowed:
                self.plane.count_error("serving.method")
                message = f"Expected {allowed} on this path, found {method}."
                reply = _error(ServingError("serving.method", message))
                return Reply(reply.body, reply.status, headers=((b"allow", allowed.encode()),))
            return await handler(Call(dict(scope["headers"]), receive, **found.groupdict()))
        self.plane.count_error("serving.not-found")
        raise ServingError("serving.not-found", f"No such path: {path[:120]!r}.")

    async def _infer(self, call: Call) -> Reply:
        try:
            header_length = _header_length(call.headers)
            body = await self._body(call)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise

        def answer() -> Reply:
            return self._answer(call, body, header_length)

        with self.plane.admission:
            if len(body) <= _INLINE_BODY and self._is_fast(call.model):
                return answer()
            return await asyncio.get_running_loop().run_in_executor(None, answer)

    def _answer(self, call: Call, body: bytes, header_length: int | None) -> Reply:
        try:
            request, encoding = decode_infer(body, header_length=header_length, model=call.model, version=call.version)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise
        text, length = encode_infer(self.plane.answer(request), encoding)
        if length is None:
            return Reply(text)
        headers = ((b"inference-header-content-length", b"%d" % length),)
        return Reply(text, content_type=b"application/octet-stream", headers=headers)

    def _is_fast(self, name: str) -> bool:
        try:
            return self.plane.get(name).row_ms <= _INLINE_ROW_MS
        except ServingError:
            return True  # refused in a moment

    async def _live(self, _call: Call) -> Reply:
        return _json({"live": True})

    async def _ready(self, _call: Call) -> Reply:
        if not self.plane.models():
            raise ServingError("serving.no-model", "This device has no model yet.", remedy="Assign it one.")
        return _json({"ready": True})

    async def _health(self, _call: Call) -> Reply:
        return _json(await asyncio.to_thread(self.status))

    async def _metrics(self, _call: Call) -> Reply:
        text = await asyncio.to_thread(self.metrics)
        return Reply(text.encode(), content_type=METRICS_TYPE.encode())

    async def _server(self, _call: Call) -> Reply:
        return _json(server_metadata())

    async def _model(self, call: Call) -> Reply:
        return _json(model_metadata(self.plane.get(call.model, call.version)))

    async def _model_ready(self, call: Call) -> Reply:
        model = self.plane.get(call.model, call.version)
        return _json({"name": model.name, "ready": True})

    async def _stats(self, call: Call) -> Reply:
        self.plane.get(call.model, call.version)
        return _json({"model_stats": [_stat(s) for s in self.plane.stats(call.model)]})

    async def _index(self, call: Call) -> Reply:
        _decode(await self._body(call) or b"{}", _Index)  # everything listed is ready, so `ready` changes nothing
        rows = [
            {"name": m.name, "version": str(m.version), "state": "READY", "reason": ""} for m in self.plane.models()
        ]
        return _json(rows)

    async def _feedback(self, call: Call) -> Reply:
        body = await self._body(call)
        if not body.lstrip().startswith(b"["):
            return await asyncio.to_thread(self._take_label, call.model, _decode(body, _Label))
        labels = _decode(body, list[_Label])
        if len(labels) > _MAX_LABELS:
            message = f"Expected at most {_MAX_LABELS} labels, found {len(labels)}."
            raise ServingError("serving.too-large", message)
        return await asyncio.to_thread(self._take_labels, call.model, labels)

    def _take_label(self, model: str, told: _Label) -> Reply:
        counted = self.plane.feedback(model, told.id, _label_text(told.label))
        return _json({"counted": int(counted), "duplicates": int(not counted), "refused": []})

    def _take_labels(self, model: str, labels: list[_Label]) -> Reply:
        """Many labels at once: each stands for itself, and the refused ones come back with their reason."""
        self.plane.get(model)
        counted = duplicates = 0
        refused: list[dict[str, str]] = []
        for told in labels:
            try:
                if self.plane.feedback(model, told.id, _label_text(told.label)):
                    counted += 1
                else:
                    duplicates += 1
            except ServingError as e:
                refused.append({"id": told.id, "error": str(e), "code": e.code})
        return _json({"counted": counted, "duplicates": duplicates, "refused": refused})

    async def _body(self, call: Call) -> bytes:
        """The whole body, bounded in bytes and time.

        Raises:
            ServingError: serving.too-large, serving.overloaded, serving.malformed.
        """
        if call.headers.get(b"content-encoding", b"identity") != b"identity":
            raise ServingError("serving.malformed", "A content encoding is not supported; send the body as it is.")
        declared = call.headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > MAX_BODY:
            raise ServingError("serving.too-large", f"Expected at most {MAX_BODY} bytes, {int(declared)} announced.")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                more = True
                while more:
                    part, more = await self._part(call.receive)
                    size += len(part)
                    self._buffered += len(part)
                    parts.append(part)
                    if size > MAX_BODY:
                        raise ServingError("serving.too-large", f"Expected at most {MAX_BODY} bytes, found more.")
                    if self._buffered > MAX_BUFFERED:
                        raise ServingError("serving.overloaded", "Too many large requests are arriving at once.")
        except TimeoutError as e:
            message = f"The body did not arrive within {_BODY_SECONDS:g} s."
            raise ServingError("serving.malformed", message) from e
        finally:
            self._buffered -= size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _part(self, receive: Receive) -> tuple[bytes, bool]:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        return message.get("body", b""), message.get("more_body", False)


def create_app(plane: DataPlane, *, status: Callable[[], dict[str, Any]], metrics: Callable[[], str]) -> HttpApp:
    """The HTTP face of `plane`.

    Args:
        plane: what answers.
        status: the agent's degraded modes, as plain data for JSON.
        metrics: the Prometheus text.
    """
    return HttpApp(plane, status, metrics)


def _json(value: object) -> Reply:
    return Reply(msgspec.json.encode(value))


def _error(error: ServingError) -> Reply:
    retry = RETRY_AFTER.get(error.code)
    headers = ((b"retry-after", retry),) if retry else ()
    return Reply(encode_error(error.code, str(error)), STATUS[error.code], headers=headers)


def _header_length(headers: Mapping[bytes, bytes]) -> int | None:
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 10:
        raise ServingError("serving.malformed", "Inference-Header-Content-Length: expected a number of bytes.")
    return int(text)


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise ServingError("serving.malformed", f"The body is not what this path expects: {e}.") from e


def _label_text(label: str | float) -> str:
    return label if isinstance(label, str) else msgspec.json.encode(label).decode()


def _stat(stats: Any) -> dict[str, Any]:
    return {
        "name": stats.model.name,
        "version": str(stats.model.version),
        "inference_count": stats.rows,
        "execution_count": stats.requests,
        "inference_stats": {
            "success": {"count": stats.requests, "ns": round(stats.seconds * 1e9)},
            "fail": {"count": stats.failures, "ns": 0},
        },
        "latency_ms": {"p50": stats.p50_ms, "p95": stats.p95_ms},
        "errors": dict(stats.errors),
        "digest": stats.model.digest,
        "since_ms": stats.model.since_ms,
    }
