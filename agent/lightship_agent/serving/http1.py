"""Serving: HTTP/1.1 connections, from bytes to requests and back, over httptools.

Rules:
* one answer at a time and in order: what a client pipelines waits for what it asked before;
* everything is bounded: the head in bytes and fields, a body in bytes, all bodies together, what waits on a connection,
  connections, and the time that each of head, body, answer and silence may take;
* what is not HTTP gets the protocol's error and a closed connection, after what was read was thrown away for a moment,
  so that the client can still read the answer;
* an answer is one write; several that are ready together are one write too.

Sources: RFC 9110, RFC 9112; llhttp through httptools.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Final, cast

import httptools

from lightship_agent.contract.codes import ServingError

from .connections import Face, Reply, Request, Server

if TYPE_CHECKING:
    from .access import Door

_LOG: Final = logging.getLogger("lightship.serving")
_REASONS: Final = {
    200: b"OK", 400: b"Bad Request", 401: b"Unauthorized", 403: b"Forbidden", 404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout", 413: b"Content Too Large", 415: b"Unsupported Media Type", 500: b"Internal Server Error",
    503: b"Service Unavailable", 504: b"Gateway Timeout",
}  # fmt: skip
_JSON_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
#: Whoever stands before us might believe another one of several than we do.
_ONCE: Final = frozenset(
    {b"host", b"authorization", b"content-length", b"transfer-encoding", b"content-encoding", b"origin"}
    | {b"inference-header-content-length"}
)
#: What a request that waits takes beside its head and body, in bytes.
_OVERHEAD: Final = 1024
_LONG: Final = 1.0  # s
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


#: What arrives is read into it and parsed in the same turn, so that all connections share it. Without it asyncio makes
#: room for 256 KiB at every read, which costs more than parsing it.
_VIEW: Final = memoryview(bytearray(64 * 1024))


class Connection(asyncio.BufferedProtocol):
    """One client."""

    def __init__(self, server: Server[Face], door: Door | None = None) -> None:
        self._server = server
        self._door = door
        self._limits = server.limits
        self._parser = httptools.HttpRequestParser(self)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._queue: deque[tuple[Request, int]] = deque()  # with the bytes that each takes
        self._queued = 0  # bytes of them together
        self._out: list[bytes] = []
        self._feeding = False  # inside data_received: answers are collected
        self._busy = False  # an answer is being made
        self._keep_alive = True
        self._ended = False  # nothing more comes
        self._task: asyncio.Task[None] | None = None
        self._admitted = False  # one of the clients that are served
        self._secured = False  # over TLS
        self._messages = 0  # that have begun
        self._unfinished_head = 0  # bytes of a head that came after those in which it began
        self._refusal: ServingError | None = None
        self._closing = False  # nothing more is read, or answered
        self._paused = False  # the client does not take what we write
        self._since = self._loop.time()  # when what we wait for now began
        self._progress = (0, self._since)  # bytes waiting to be written, and since when they are so many
        self._size = 0  # bytes of the body so far
        self._held = 0  # bytes of the body of what is being answered
        self._begun = self._since  # when the request that arrives began
        self._reading = False  # a request has begun and is not whole
        self._begin_message()

    # What the transport tells us ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there, and may be one too many."""
        self._transport = cast("asyncio.Transport", transport)
        self._secured = transport.get_extra_info("sslcontext") is not None
        self._server.secured += self._secured
        if self._server.draining:
            self.abort()
            return
        if len(self._server.connections) >= 2 * self._limits.connections:
            self.abort()  # so many are being told already that there is no room
            return
        if self._server.admitted >= self._limits.connections:
            message = f"{self._server.admitted} clients are connected already."
            self._server.opened(self)
            self._give_up(ServingError("serving.overloaded", message, remedy="Try again later."))
            return
        self._admitted = True
        self._server.admitted += 1
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why it went does not matter
        """The client is gone."""
        self._server.closed(self)
        self._server.secured -= self._secured
        self._secured = False
        self._server.admitted -= self._admitted
        self._admitted = False
        self._server.buffered -= self._size
        self._size = 0
        self._closing = True
        self._forget_queue()
        self._let_go_of_body()
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> bool:
        """The client sends no more; what it asked for is still answered."""
        self._ended = True
        if not self._transport.can_write_eof():
            return False  # TLS has no half of a connection
        if not self._busy and not self._queue:
            return False
        return not self._closing

    def pause_writing(self) -> None:
        """The client does not take its answers: nothing more is read from it."""
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It does again."""
        self._paused = False
        if not self._is_full:
            self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - what fits in is what is read
        """Where to put what arrives; a view, since asyncio's TLS fills it in slices, which of an array are copies."""
        return _VIEW

    def buffer_updated(self, nbytes: int) -> None:
        """It has arrived."""
        self.data_received(_VIEW[:nbytes])

    def data_received(self, data: bytes | memoryview) -> None:
        """Parse, and answer what is whole; nothing of `data` is kept."""
        if self._closing:
            return
        # How many messages may have begun in these bytes if all of them belong to one head.
        only = self._messages + (not self._reading)
        in_head = not (self._reading and self._in_body)
        self._feeding = True
        try:
            self._parser.feed_data(data)
            if in_head and self._reading and not self._in_body and self._messages == only:
                self._bound_head(len(data))
        except httptools.HttpParserUpgrade:
            # Nothing is upgraded here: the request is answered as it stands, and nothing after it.
            self._keep_alive = False
            if not self._busy and not self._queue:
                self._closing = True
        except ServingError as e:
            self._refusal = e
        except httptools.HttpParserCallbackError as e:
            if self._refusal is None:
                _LOG.exception("A request could not be read.")
                self._refusal = ServingError("serving.malformed", f"The request can't be read: {e.__context__}.")
        except httptools.HttpParserError as e:
            if self._refusal is None:
                self._refusal = ServingError("serving.malformed", f"Expected HTTP/1.1, found something else: {e}.")
        self._feeding = False
        self._write_out()
        if self._refusal is not None and not self._busy and not self._queue:
            self._give_up(self._refusal)
        elif self._is_full:
            self._transport.pause_reading()

    # What the parser tells us ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Somebody asks."""
        self._begin_message()
        self._messages += 1
        self._unfinished_head = 0
        self._reading = True
        self._since = self._begun = self._loop.time()

    def on_url(self, url: bytes) -> None:
        """A part of the path."""
        self._url += url
        self._count_head(len(url), 0)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field, or a trailer, which is counted and not kept."""
        self._count_head(len(name) + len(value), 1)
        if not self._in_body:
            name = name.lower()
            if name in _ONCE and name in self._headers:
                message = f"Expected {name.decode()} once."
                self._refuse(ServingError("serving.malformed", message))
            self._headers[name] = value

    def on_headers_complete(self) -> None:
        """The head is whole: refuse what is announced too large before it comes."""
        self._in_body = True
        headers = self._headers
        if b"host" not in headers and self._parser.get_http_version() == "1.1":
            self._refuse(ServingError("serving.malformed", "Expected a Host field."))
        if self._door is not None:
            try:
                self._door.check(self._parser.get_method(), self._url, headers)
            except ServingError as e:
                self._refuse(e)
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._limits.body_bytes:
            message = f"Expected at most {self._limits.body_bytes} bytes, {declared[:20].decode()} announced."
            self._refuse(ServingError("serving.too-large", message))
        if headers.get(b"expect", b"").lower() == b"100-continue":
            self._answer_bytes(_CONTINUE)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._size += len(body)
        self._server.buffered += len(body)
        self._parts.append(body)
        if self._size > self._limits.body_bytes:
            self._refuse(
                ServingError("serving.too-large", f"Expected at most {self._limits.body_bytes} bytes, found more.")
            )
        if self._server.buffered > self._limits.buffered_bytes:
            self._refuse(ServingError("serving.overloaded", "Too many large requests are arriving at once."))

    def on_message_complete(self) -> None:
        """A request is whole: answer it, or keep it until the ones before it are answered."""
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        size, self._size = self._size, 0
        self._server.buffered -= size
        self._reading = False
        keep_alive = self._parser.should_keep_alive()
        if b"connection" in self._headers and self._parser.get_http_version() != "1.1":
            keep_alive = False  # HTTP/1.0 would want to be told that it may stay
        request = Request(self._parser.get_method(), self._url, self._headers, body, keep_alive, self._begun)
        if self._busy or self._queue:
            self._queue_up(request, size + self._head + _OVERHEAD)
        else:
            self._begin(request)

    # What waits its turn --------------------------------------------------------------------------------------------

    @property
    def _is_full(self) -> bool:
        return len(self._queue) >= self._limits.pipelined or self._queued >= self._limits.waiting_bytes

    def _queue_up(self, request: Request, size: int) -> None:
        self._queue.append((request, size))
        self._queued += size
        self._server.buffered += size
        if self._server.buffered > self._limits.buffered_bytes:
            self._refuse(ServingError("serving.overloaded", "Too many requests wait to be answered."))

    def _next(self) -> Request:
        request, size = self._queue.popleft()
        self._queued -= size
        self._server.buffered -= size
        return request

    def _forget_queue(self) -> None:
        self._server.buffered -= self._queued
        self._queued = 0
        self._queue.clear()

    # Answering ------------------------------------------------------------------------------------------------------

    def _begin(self, request: Request) -> None:
        self._keep_alive = self._keep_alive and request.keep_alive
        face = self._server.face
        # Whoever waited for long is looked at closely: its time may be over.
        waited = self._loop.time() - request.begun > _LONG
        hot = None if waited else face.hot(request)
        if hot is not None:
            if not self._server.is_alone(self):
                self._busy = True
                self._server.together(self, *hot)
                return
            try:
                self._sent(_JSON_HEAD % (len(body := face.answer_hot(hot[0], [hot[1]])[0]), body))
            except ServingError as e:
                self._sent(_bytes(face.refuse(e), self._keep_alive))
            return
        outcome = face.respond(request)
        if isinstance(outcome, Reply):
            self._sent(_bytes(outcome, self._keep_alive))
            return
        self._busy = True
        self._held = len(request.body)
        self._server.buffered += self._held
        self._task = self._loop.create_task(self._later(outcome))

    async def _later(self, outcome: Awaitable[Reply]) -> None:
        reply = await outcome
        self._task = None
        self._let_go_of_body()
        self.finish(reply)

    def _let_go_of_body(self) -> None:
        self._server.buffered -= self._held
        self._held = 0

    def finish(self, reply: Reply) -> None:
        """The answer to what was asked."""
        self._finish(_bytes(reply, self._keep_alive))

    def finish_hot(self, body: bytes) -> None:
        """The same, of a body that the hot path made."""
        self._finish(_JSON_HEAD % (len(body), body))

    def _finish(self, data: bytes) -> None:
        if self._closing:
            return
        self._busy = False
        # More may be answered at once: it goes out together.
        was_feeding, self._feeding = self._feeding, True
        self._sent(data)
        while self._queue and not self._busy and not self._closing:
            self._begin(self._next())
        self._feeding = was_feeding
        if not was_feeding:
            self._write_out()
            if self._refusal is not None and not self._busy and not self._queue:
                self._give_up(self._refusal)
            elif not self._paused and not self._closing and not self._is_full:
                self._transport.resume_reading()

    def _sent(self, data: bytes) -> None:
        self._answer_bytes(data)
        self._since = self._loop.time()
        if not self._keep_alive or self._server.draining or (self._ended and not self._queue):
            self._forget_queue()
            self._refusal = None
            self._flush_and_close()

    def _answer_bytes(self, data: bytes) -> None:
        if self._feeding:
            self._out.append(data)
        else:
            self._transport.write(data)

    def _write_out(self) -> None:
        out = self._out
        if out and not self._transport.is_closing():
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
        if out:
            self._out = []
        if self._closing and not self._transport.is_closing() and self._lingers_until is None:
            self._transport.close()

    def _flush_and_close(self) -> None:
        self._closing = True
        if not self._feeding:
            self._transport.close()

    # Refusing, and time ---------------------------------------------------------------------------------------------

    def _begin_message(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._size = 0
        self._head = self._fields = 0
        self._in_body = False
        self._lingers_until: float | None = None

    def _count_head(self, size: int, fields: int) -> None:
        self._head += size
        self._fields += fields
        if self._head > self._limits.head_bytes or self._fields > self._limits.fields:
            message = (
                f"Expected at most {self._limits.fields} header fields and {self._limits.head_bytes} bytes of them."
            )
            self._refuse(ServingError("serving.too-large", message))

    def _bound_head(self, size: int) -> None:
        """Count what the parser keeps of a field that has not ended."""
        self._unfinished_head += size
        if self._unfinished_head > self._limits.head_bytes:
            raise ServingError("serving.too-large", f"Expected at most {self._limits.head_bytes} bytes of head.")

    def _refuse(self, error: ServingError) -> None:
        """Stop the parser; what was asked before is still answered."""
        self._refusal = error
        raise error

    def _give_up(self, error: ServingError) -> None:
        """Answer with the error, throw away what still comes for a moment, and close."""
        reply = self._server.face.refuse(error)
        self._closing = True
        self._server.buffered -= self._size
        self._size = 0
        self._parts = []
        self._lingers_until = self._loop.time() + self._limits.linger_seconds
        if not self._transport.is_closing():
            self._transport.write(_bytes(reply, keep_alive=False))
            if self._transport.can_write_eof():
                self._transport.write_eof()

    def drain(self) -> None:
        """Close if nothing is being answered; otherwise right after it."""
        if self._busy or self._queue:
            self._keep_alive = False
        elif self._lingers_until is None:
            self._closing = True
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._transport.abort()

    def look_at_clock(self, now: float) -> None:
        """Close what takes too long."""
        limits, waits = self._limits, now - self._since
        pending = self._transport.get_write_buffer_size()
        if pending != self._progress[0]:
            self._progress = (pending, now)
        if self._lingers_until is not None:
            if now >= self._lingers_until:
                self._transport.abort()
        elif pending and now - self._progress[1] > limits.write_seconds:
            self._transport.abort()
        elif self._closing or self._busy:
            return
        elif self._reading:
            allowed = limits.body_seconds if self._in_body else limits.head_seconds
            if waits > allowed:
                what = "body" if self._in_body else "head"
                message = f"The {what} of the request did not arrive within {allowed:g} s."
                self._give_up(ServingError("serving.slow", message))
        elif waits > limits.idle_seconds:
            self._closing = True
            self._transport.close()


def _bytes(reply: Reply, keep_alive: bool) -> bytes:
    lines = [
        b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n"
        % (reply.status, _REASONS.get(reply.status, b"Unknown"), reply.content_type, len(reply.body))
    ]
    lines += [b"%b: %b\r\n" % header for header in reply.headers]
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    return b"".join((*lines, b"\r\n", reply.body))
