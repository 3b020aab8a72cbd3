"""Serving: connections that speak frames, from bytes to requests and back.

Rules:
* one thing is answered at a time and in order; rows for the same model that wait behind each other count as one;
* everything is bounded: a frame, all frames that are arriving, what waits on a connection, connections, and the time
  that a frame and the taking of an answer may last;
* answers that are ready together are one write.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable
from typing import Any, Final, cast

from lightship_agent.contract.codes import ServingError

from .connections import Reply, Server
from .frames import LENGTH, FrameFace
from .hot import MAX_TOGETHER

#: What arrives is read into it and taken out in the same turn, so that all connections share it. Without it
#: asyncio makes room for 256 KiB at every read, which costs more than all the rest where that is given back at once.
_SCRATCH: Final = bytearray(64 * 1024)
_VIEW: Final = memoryview(_SCRATCH)


class FrameConnection(asyncio.BufferedProtocol):
    """One client; a `Client` of `connections.Server`."""

    def __init__(self, server: Server[FrameFace]) -> None:
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._queue: deque[bytes] = deque()
        self._queued = 0  # bytes in it
        self._rest = bytearray()  # of a frame that is not whole
        self._wanted = LENGTH.size  # bytes of it before it is worth looking again
        self._out: list[bytes] = []
        self._unanswered = 0  # what was begun and has no answer yet
        self._task: asyncio.Task[None] | None = None
        self._admitted = False  # one of the clients that are served
        self._refusal: ServingError | None = None
        self._closing = False  # nothing more is read, or answered
        self._ending = False  # nothing more is begun
        self._paused = False  # the client does not take what we write
        self._since = self._loop.time()  # when the frame that is not whole began
        self._progress = (0, self._since)  # bytes waiting to be written, and since when they are so many
        self._lingers_until: float | None = None

    # What the transport tells us ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there, and may be one too many."""
        self._transport = cast("asyncio.Transport", transport)
        server, most = self._server, self._limits.connections
        if server.draining or len(server.connections) >= 2 * most:
            self.abort()
            return
        server.opened(self)
        if server.admitted >= most:
            message = f"{server.admitted} clients are connected already."
            self._give_up(ServingError("serving.overloaded", message, remedy="Try again later."))
            return
        self._admitted = True
        server.admitted += 1

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why it went does not matter
        """The client is gone."""
        self._server.closed(self)
        self._server.admitted -= self._admitted
        self._admitted = False
        self._forget_rest()
        self._closing = True
        self._server.buffered -= self._queued
        self._queued = 0
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> bool:
        """The client sends no more; what it asked for is still answered."""
        self._ending = True
        return bool(self._unanswered or self._queue) and not self._closing

    def pause_writing(self) -> None:
        """The client does not take its answers: nothing more is read from it."""
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It does again."""
        self._paused = False
        if not self._is_full and not self._closing:
            self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002 - what fits in is what is read
        """Where to put what arrives."""
        return _SCRATCH

    def buffer_updated(self, nbytes: int) -> None:
        """Take frames out, and answer those that are whole."""
        if self._closing or self._refusal is not None:
            return
        if not self._rest and nbytes >= LENGTH.size and nbytes == LENGTH.size + LENGTH.unpack_from(_SCRATCH)[0]:
            # One frame and nothing else, as nearly always; and nobody else's to answer it with, as often.
            frame = bytes(_VIEW[LENGTH.size : nbytes])
            if not self._unanswered and self._server.is_alone(self) and self._answer_alone(frame):
                return
            self._queue_up(frame)
        else:
            self._take(bytes(_VIEW[:nbytes]))
        self._go_on()
        self._write_out()
        if self._is_full:
            self._transport.pause_reading()

    # Frames ---------------------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        rest, limits = self._rest, self._limits
        if not rest:
            self._since = self._loop.time()
        rest += data
        self._server.buffered += len(data)
        at = 0
        while len(rest) - at >= self._wanted:
            size = int.from_bytes(rest[at : at + LENGTH.size], "little")
            if size > limits.body_bytes:
                message = f"Expected frames of at most {limits.body_bytes} bytes, {size} announced."
                self._refusal = ServingError("serving.too-large", message)
                break
            end = at + LENGTH.size + size
            if len(rest) < end:
                self._wanted = LENGTH.size + size
                break
            self._queue_up(bytes(rest[at + LENGTH.size : end]))
            self._wanted = LENGTH.size
            self._since = self._loop.time()
            at = end
        del rest[:at]
        self._server.buffered -= at
        if self._refusal is not None:
            self._forget_rest()
        elif self._server.buffered > limits.buffered_bytes:
            self._refusal = ServingError("serving.overloaded", "Too many large frames are arriving at once.")
            self._forget_rest()

    @property
    def _is_full(self) -> bool:
        return len(self._queue) >= self._limits.pipelined or self._queued >= self._limits.waiting_bytes

    def _queue_up(self, frame: bytes) -> None:
        self._queue.append(frame)
        self._queued += len(frame)
        self._server.buffered += len(frame)

    def _next(self) -> bytes:
        frame = self._queue.popleft()
        self._queued -= len(frame)
        self._server.buffered -= len(frame)
        return frame

    def _forget_rest(self) -> None:
        self._server.buffered -= len(self._rest)
        self._rest = bytearray()

    # Answering ------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Begin what waits, until something takes time."""
        server, queue = self._server, self._queue
        while queue and not self._unanswered and not self._closing:
            frame = self._next()
            hot = server.face.hot(frame)
            if hot is not None:
                self._answer_hot(hot[0], [hot[1], *self._more_for(hot[0])])
                continue
            outcome = server.face.respond(frame)
            if isinstance(outcome, Reply):
                self._out.append(outcome.body)
            else:
                self._unanswered = 1
                self._task = self._loop.create_task(self._later(outcome))

    def _answer_alone(self, frame: bytes) -> bool:
        """Answer one plain row at once; False if it is something else."""
        hot = self._server.face.hot(frame)
        if hot is None:
            return False
        try:
            self._transport.write(hot[0].answer(hot[1]))
        except ServingError as e:
            self._transport.write(self._server.face.refuse(e).body)
        return True

    def _more_for(self, model: Any) -> list[Any]:
        """The rows right behind, as long as they are for the same model."""
        more: list[Any] = []
        while self._queue and len(more) < MAX_TOGETHER - 1:
            hot = self._server.face.hot(self._queue[0])
            if hot is None or hot[0] is not model:
                break
            more.append(hot[1])
            self._next()
        return more

    def _answer_hot(self, model: Any, asked: list[Any]) -> None:
        server = self._server
        if not server.is_alone(self):
            self._unanswered = len(asked)
            for one in asked:
                server.together(self, model, one)
            return
        try:
            self._out += server.face.answer_hot(model, asked)
        except ServingError as e:
            self._out += [server.face.refuse(e).body] * len(asked)

    async def _later(self, outcome: Awaitable[Reply]) -> None:
        reply = await outcome
        self._task = None
        self.finish(reply)

    def finish(self, reply: Reply) -> None:
        """The answer to what was asked."""
        self.finish_hot(reply.body)

    def finish_hot(self, body: bytes) -> None:
        """The same, of a frame that the hot path made."""
        if self._closing:
            return
        self._out.append(body)
        self._unanswered -= 1
        if self._unanswered:
            return
        self._go_on()
        self._write_out()
        if not self._paused and not self._closing and not self._is_full:
            self._transport.resume_reading()

    def _write_out(self) -> None:
        """Send what is answered; end if this was the last."""
        out = self._out
        if out and not self._transport.is_closing():
            self._out = []
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
        if self._unanswered or self._queue or self._closing:
            return
        if self._refusal is not None:
            self._give_up(self._refusal)
        elif self._ending or self._server.draining:
            self._closing = True
            self._transport.close()

    # Refusing, and time ---------------------------------------------------------------------------------------------

    def _give_up(self, error: ServingError) -> None:
        """Answer with the error, throw away what still comes for a moment, and close."""
        self._closing = True
        self._forget_rest()
        self._lingers_until = self._loop.time() + self._limits.linger_seconds
        if not self._transport.is_closing():
            self._transport.write(self._server.face.refuse(error).body)
            if self._transport.can_write_eof():
                self._transport.write_eof()

    def drain(self) -> None:
        """Close if nothing is being answered; otherwise right after it."""
        if not self._unanswered and not self._queue and self._lingers_until is None:
            self._closing = True
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._transport.abort()

    def look_at_clock(self, now: float) -> None:
        """Close what takes too long."""
        limits = self._limits
        pending = self._transport.get_write_buffer_size()
        if pending != self._progress[0]:
            self._progress = (pending, now)
        if self._lingers_until is not None:
            if now >= self._lingers_until:
                self._transport.abort()
        elif pending and now - self._progress[1] > limits.write_seconds:
            self._transport.abort()
        elif self._closing or self._unanswered:
            return
        elif self._rest and now - self._since > limits.body_seconds:
            message = f"The frame did not arrive within {limits.body_seconds:g} s."
            self._give_up(ServingError("serving.slow", message))
