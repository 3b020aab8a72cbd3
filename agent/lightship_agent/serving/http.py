"""Serving: the HTTP face: paths, methods and statuses over the data plane.

Rules:
* codes become statuses here and nowhere else; every error has the protocol's shape;
* the hot path is tried first; it answers to the byte what the long way answers;
* a small request to a fast model is answered where it is read, since a thread would cost more than the model;
  anything heavier goes to a thread, so that health never waits behind inference;
* a body may come compressed, and is bounded by what it becomes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import urllib.parse
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from lightship_agent.contract.app_metrics import MAX_TOLD, AppSample
from lightship_agent.contract.codes import ServingError
from lightship_agent.runtime.model import LoadedModel

from .compression import compressed
from .connections import Reply, Request
from .dataplane import HOT_ROW_MS, DataPlane
from .explaining import Explainer
from .feeds import image_answer, image_request
from .hot import MAX_BODY as HOT_BODY
from .hot import HotModel, HotRow
from .keys import check_keys
from .metrics import CONTENT_TYPE as METRICS_TYPE
from .oip import MAX_BODY, decode_infer, encode_error, encode_infer, model_metadata, server_metadata
from .records import answers, decode_records
from .repository import Repository
from .workers import HEADER, check_in_time, in_thread, is_in_time, time_allowed

T = TypeVar("T")

STATUS: Final[dict[str, int]] = {
    "serving.malformed": 400,
    "serving.input": 400,
    "serving.output": 400,
    "serving.handshake": 400,  # counted, and told by TLS
    "serving.token": 401,
    "serving.origin": 403,
    "serving.unknown-model": 404,
    "serving.unknown-prediction": 404,
    "serving.not-allowed": 403,
    "serving.in-use": 409,
    "serving.metric-name": 400,
    "serving.metric-kind": 409,
    "serving.metric-value": 400,
    "serving.metric-full": 507,
    "serving.no-background": 409,
    "serving.not-found": 404,
    "serving.method": 405,
    "serving.slow": 408,
    "serving.too-large": 413,
    "serving.runtime": 500,
    "serving.deadline": 504,
    "serving.no-model": 503,
    "serving.overloaded": 503,
    "serving.memory": 507,
}
RETRY_AFTER: Final[dict[str, bytes]] = {"serving.overloaded": b"1", "serving.no-model": b"10"}  # seconds

_INLINE_BODY: Final = 64 * 1024  # bytes
_MAX_LABELS: Final = 10_000  # in one feedback request
_BEFORE: Final = b"/v2/models/"
_AFTER: Final = b"/infer"
_LOG: Final = logging.getLogger("lightship.serving")


class Call(msgspec.Struct, frozen=True):
    """A request that found its route."""

    headers: Mapping[bytes, bytes]
    body: bytes
    model: str = ""
    version: str | None = None
    begun: float = 0.0  # monotonic seconds
    ends: float = math.inf  # the same: not answered with a prediction beyond it
    coding: bytes = b"identity"  # of the body


class _Label(msgspec.Struct):
    id: str
    label: str | int | float | bool


class _Index(msgspec.Struct):
    ready: bool = False


Handler = Callable[[Call], Reply | Awaitable[Reply]]


class HttpApp:
    """What answers requests; the `Face` of `http1`."""

    def __init__(
        self,
        plane: DataPlane,
        *,
        status: Callable[[], dict[str, Any]],
        metrics: Callable[[], str],
        repository: Repository,
        seconds: float = math.inf,
        told: Callable[[Sequence[AppSample]], None] | None = None,
    ) -> None:
        """Write the route table; see `create_app` for what is given."""
        self.plane, self.status, self.metrics, self.repository = plane, status, metrics, repository
        self.seconds, self.told = seconds, told
        self._light = ThreadPoolExecutor(1, thread_name_prefix="lightship-aside")
        self._explainer = Explainer(self.plane.get, self.plane.count_error, self.plane.newest)
        model = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
        # By path, and a path is compiled when it is first tried: most never are.
        self._routes: tuple[tuple[str, str, Handler], ...] = (
            (model + "/infer", "POST", self._infer),
            (model + "/predict", "POST", self._predict),
            (model + "/explain", "POST", self._give_reasons),
            (r"/v2/health/live", "GET", self._live),
            (r"/v2/health/ready", "GET", self._ready),
            (r"/v2/health", "GET", self._health),
            (r"/metrics", "GET", self._metrics),
            (r"/v2/models/stats", "GET", self._all_stats),
            (model + "/ready", "GET", self._model_ready),
            (model + "/stats", "GET", self._stats),
            (model, "GET", self._model),
            (r"/v2/models/(?P<model>[^/]+)/feedback", "POST", self._feedback),
            (r"/v2/lightship/metrics", "POST", self._tell),
            (r"/v2/repository/index", "POST", self._index),
            (r"/v2/repository/models/(?P<model>[^/]+)/load", "POST", self._load),
            (r"/v2/repository/models/(?P<model>[^/]+)/unload", "POST", self._unload),
            (r"/v2/?", "GET", self._server),
        )

    # The hot path ---------------------------------------------------------------------------------------------------

    def hot(self, request: Request) -> tuple[HotModel, HotRow] | None:
        """The model and the row, if this is one row of numbers for a fast model."""
        url = request.url
        if not (url.endswith(_AFTER) and url.startswith(_BEFORE) and request.method == b"POST" and request.keep_alive):
            return None
        model = self.plane.hot.get(url[len(_BEFORE) : -len(_AFTER)])
        headers = request.headers
        if (
            model is None
            or len(request.body) > HOT_BODY
            or b"content-encoding" in headers
            or b"inference-header-content-length" in headers
            or (HEADER in headers and not is_in_time(headers[HEADER], request.begun))
        ):
            return None
        row = model.parse(request.body)
        return None if row is None else (model, row)

    def answer_hot(self, model: HotModel, asked: list[HotRow]) -> list[bytes]:
        """The bodies of the answers; to the bit the same, however many are asked together.

        Raises:
            ServingError: serving.runtime.
        """
        return model.answer_all(asked)

    # The long way ---------------------------------------------------------------------------------------------------

    def respond(self, request: Request) -> Reply | Awaitable[Reply]:
        """The answer to any request, or what will be it."""
        try:
            outcome = self._route(request)
        except Exception as e:  # noqa: BLE001 - the last fence, see _explain
            outcome = self._explain(e)
        if not isinstance(outcome, Reply):
            return self._fenced(outcome)
        if request.method == b"HEAD":
            outcome.body = b""  # whoever asked reads none, and would take it for the next answer
        return outcome

    def refuse(self, error: ServingError) -> Reply:
        """The answer to what is no request, or too much of it; counted, unless a model has counted it."""
        if error.code != "serving.runtime":
            self.plane.count_error(error.code)
        return _error(error)

    async def _fenced(self, outcome: Awaitable[Reply]) -> Reply:
        try:
            return await outcome
        except Exception as e:  # noqa: BLE001 - the last fence, see _explain
            return self._explain(e)

    def _explain(self, e: Exception) -> Reply:
        if isinstance(e, ServingError):
            return _error(e)
        # The client gets the protocol's error, the log the traceback.
        _LOG.error("A request failed in a way nobody foresaw.", exc_info=e)
        self.plane.count_error("serving.runtime")
        return _error(ServingError("serving.runtime", "The agent failed to answer; its log says more."))

    def _route(self, request: Request) -> Reply | Awaitable[Reply]:
        path, method = _path(request.url), request.method.decode("ascii", "replace")
        for pattern, allowed, handler in self._routes:
            found = re.fullmatch(pattern, path)
            if not found:
                continue
            if method != allowed:
                self.plane.count_error("serving.method")
                message = f"Expected {allowed} on this path, found {method[:20]}."
                reply = _error(ServingError("serving.method", message))
                return Reply(reply.body, reply.status, headers=((b"allow", allowed.encode()),))
            return handler(
                self._call(request, found, heavy=handler in (self._infer, self._predict, self._give_reasons))
            )
        self.plane.count_error("serving.not-found")
        raise ServingError("serving.not-found", f"No such path: {path[:120]!r}.")

    def _call(self, request: Request, found: re.Match[str], *, heavy: bool) -> Call:
        """What was asked. A body that may be heavy is inflated in a thread, where few are at once."""
        try:
            coding = request.headers.get(b"content-encoding", b"identity")
            if not heavy:
                named = found.groupdict()
                body = _decoded(request.body, coding)
                return Call(request.headers, body, named.get("model", ""), named.get("version"))
            model, version = found["model"], found["version"]
            ends = request.begun + time_allowed(request.headers, self.seconds)
            return Call(request.headers, request.body, model, version, request.begun, ends, coding)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise

    def _predicting(self, call: Call, work: Callable[[], Reply]) -> Reply | Awaitable[Reply]:
        if call.coding == b"identity" and len(call.body) <= _INLINE_BODY and self._is_fast(call):
            with self.plane.admission, self._counting():
                check_in_time(call.ends)
                return work()
        return self._predicting_in_thread(call, work)

    async def _predicting_in_thread(self, call: Call, work: Callable[[], Reply]) -> Reply:
        with self._counting():
            return await in_thread(self.plane.admission, call.ends, work)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except ServingError as e:
            if e.code == "serving.deadline":
                self.plane.count_error(e.code)
            raise

    def _infer(self, call: Call) -> Reply | Awaitable[Reply]:
        try:
            header_length = _header_length(call.headers)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise
        return self._predicting(call, partial(self._answer, call, header_length))

    def _answer(self, call: Call, header_length: int | None) -> Reply:
        try:
            body = _decoded(call.body, call.coding)
            request, encoding = decode_infer(body, header_length=header_length, model=call.model, version=call.version)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise
        ends = min(call.ends, call.begun + request.timeout)
        check_in_time(ends)
        response = self.plane.answer(request)
        check_in_time(ends)
        try:
            text, length = encode_infer(response, encoding)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise
        if length is None:
            return compressed(Reply(text), call.headers)
        headers = ((b"inference-header-content-length", b"%d" % length),)
        reply = Reply(text, content_type=b"application/octet-stream", headers=headers)
        return compressed(reply, call.headers)

    def _predict(self, call: Call) -> Reply | Awaitable[Reply]:
        return self._predicting(call, partial(self._answer_records, call))

    def _answer_records(self, call: Call) -> Reply:
        content_type = call.headers.get(b"content-type", b"").decode("latin-1")
        request_id = call.headers.get(b"x-request-id", b"").decode("utf-8", "replace")
        try:
            key = call.headers.get(b"lightship-key", b"").decode("utf-8", "replace")
            found = self.plane.find(call.model, call.version, key)
            body = _decoded(call.body, call.coding)
            if found.model.spec is not None:
                image = image_request(body, content_type, found.model, request_id)
            else:
                asked = decode_records(body, content_type, found.model, request_id)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise
        if found.model.spec is not None:
            return _json(image_answer(self.plane.answer(image, by=found), found.model))
        told = answers(self.plane.answer(asked.request, by=found), found.model.outputs.labels)
        return compressed(_json(told if asked.is_list else told[0]), call.headers)

    async def _give_reasons(self, call: Call) -> Reply:
        try:
            length = _header_length(call.headers)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise
        body = partial(_decoded, call.body, call.coding)
        told = await self._explainer.answer(body, length, call.model, call.version, call.ends)
        return compressed(Reply(told), call.headers)

    def _is_fast(self, call: Call) -> bool:
        try:
            return self.plane.row_ms(call.model, call.version) <= HOT_ROW_MS
        except ServingError:
            return True  # refused in a moment

    def _live(self, _call: Call) -> Reply:
        return _json({"live": True})

    def _ready(self, _call: Call) -> Reply:
        if not self.plane.models():
            raise ServingError("serving.no-model", "This device has no model yet.", remedy="Assign it one.")
        return _json({"ready": True})

    async def _aside(self, work: Callable[..., T], *arguments: object, **named: object) -> T:
        """In a thread that no inference ever holds."""
        return await asyncio.get_running_loop().run_in_executor(self._light, partial(work, *arguments, **named))

    async def _health(self, _call: Call) -> Reply:
        return _json(await self._aside(self.status))

    async def _metrics(self, _call: Call) -> Reply:
        text = await self._aside(self.metrics)
        return Reply(text.encode(), content_type=METRICS_TYPE.encode())

    def _server(self, _call: Call) -> Reply:
        return _json(server_metadata())

    def _model(self, call: Call) -> Reply:
        return _json(model_metadata(self._found(call)))

    def _found(self, call: Call) -> LoadedModel:
        try:
            return self.plane.get(call.model, call.version)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise

    def _parsed(self, body: bytes, kind: type[T]) -> T:
        try:
            return _decode(body, kind)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise

    def _model_ready(self, call: Call) -> Reply:
        model = self._found(call)
        return _json({"name": model.name, "ready": True})

    def _stats(self, call: Call) -> Reply:
        asked = self._found(call)
        told = [s for s in self.plane.stats(asked.name) if call.version is None or s.model is asked]
        return _json({"model_stats": [_stat(s) for s in told]})

    def _all_stats(self, _call: Call) -> Reply:
        return _json({"model_stats": [_stat(s) for s in self.plane.stats()]})

    async def _index(self, call: Call) -> Reply:
        asked = self._parsed(call.body or b"{}", _Index)
        return _json(await self._aside(self.repository.index, ready=asked.ready))

    async def _load(self, call: Call) -> Reply:
        return await self._change(self.repository.load, call)

    async def _unload(self, call: Call) -> Reply:
        return await self._change(self.repository.unload, call)

    async def _change(self, change: Callable[[str, bytes], None], call: Call) -> Reply:
        try:  # a load takes seconds, so not where health is answered
            await asyncio.get_running_loop().run_in_executor(None, change, call.model, call.body)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise
        return Reply(b"")

    async def _feedback(self, call: Call) -> Reply:
        body = call.body
        if not body.lstrip().startswith(b"["):
            return await self._aside(self._take_label, call.model, self._parsed(body, _Label))
        labels = self._parsed(body, list[_Label])
        if len(labels) > _MAX_LABELS:
            message = f"Expected at most {_MAX_LABELS} labels, found {len(labels)}."
            raise ServingError("serving.too-large", message)
        return await self._aside(self._take_labels, call.model, labels)

    async def _tell(self, call: Call) -> Reply:
        """Numbers of the application's own: one, or a list that is taken whole or not at all."""
        listed = call.body.lstrip().startswith(b"[")
        told = self._parsed(call.body, list[AppSample]) if listed else [self._parsed(call.body, AppSample)]
        try:
            await self._aside(self._take_numbers, told)
        except ServingError as e:
            self.plane.count_error(e.code)
            raise
        return _json({"taken": len(told)})

    def _take_numbers(self, told: list[AppSample]) -> None:
        if len(told) > MAX_TOLD:
            raise ServingError("serving.too-large", f"Expected at most {MAX_TOLD} samples, found {len(told)}.")
        if self.told is None:
            raise ServingError("serving.not-found", "Nobody keeps an application's numbers here.")
        self.told(told)

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


def create_app(
    plane: DataPlane,
    *,
    status: Callable[[], dict[str, Any]],
    metrics: Callable[[], str],
    repository: Repository | None = None,
    seconds: float = math.inf,
    told: Callable[[Sequence[AppSample]], None] | None = None,
) -> HttpApp:
    """The HTTP face of `plane`.

    Args:
        plane: what answers.
        status: the agent's degraded modes, as plain data for JSON.
        metrics: the Prometheus text.
        repository: what lists, loads and unloads models; None: of what serves.
        seconds: how long a prediction may take, unless the client says another time.
        told: takes what an application tells of its own numbers.
    """
    shelf = repository or Repository.of(plane)
    return HttpApp(plane, status=status, metrics=metrics, repository=shelf, seconds=seconds, told=told)


def _path(url: bytes) -> str:
    """The path of a request target, its escapes resolved."""
    path = url.partition(b"?")[0].partition(b"#")[0]
    if not path.startswith(b"/"):  # a proxy's absolute form, or what nobody asks a server
        path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
    return urllib.parse.unquote_to_bytes(path).decode("utf-8", "replace")


def _decoded(body: bytes, encoding: bytes) -> bytes:
    """The body as it was before it was compressed.

    Raises:
        ServingError: serving.malformed, serving.too-large.
    """
    encoding = encoding.strip().lower()
    if encoding == b"identity":
        return body
    if encoding not in {b"gzip", b"x-gzip", b"deflate"}:
        message = f"Expected content-encoding gzip, deflate or identity, found {encoding[:40].decode('latin-1')!r}."
        raise ServingError("serving.malformed", message)
    # 32: the header tells whether it is gzip or zlib, which is what "deflate" means.
    inflater = zlib.decompressobj(32 + zlib.MAX_WBITS)
    try:
        plain = inflater.decompress(body, MAX_BODY + 1)
    except zlib.error as e:
        raise ServingError("serving.malformed", f"The body is not {encoding.decode()}: {e}.") from e
    if len(plain) > MAX_BODY:
        raise ServingError("serving.too-large", f"Expected at most {MAX_BODY} bytes, inflated to more.")
    if not inflater.eof or inflater.unused_data:
        raise ServingError("serving.malformed", f"The {encoding.decode()} body is cut off, or something follows it.")
    return plain


def _json(value: object) -> Reply:
    return Reply(msgspec.json.encode(value))


def _error(error: ServingError) -> Reply:
    retry = RETRY_AFTER.get(error.code)
    headers = ((b"retry-after", retry),) if retry else ()
    if error.code == "serving.token":
        headers = ((b"www-authenticate", b"Bearer"),)
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
        found = msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise ServingError("serving.malformed", f"The body is not what this path expects: {e}.") from e
    check_keys(body)
    return found


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
