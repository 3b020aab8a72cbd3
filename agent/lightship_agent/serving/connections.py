"""Serving: what connections of every face share: limits, requests and answers, and the server that counts them.

Rules:
* no timer per request: one sweep a second, and only while somebody is connected;
* whatever asks at the same time for the same model is answered together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec

from lightship_agent.contract.codes import ServingError

_LOG: Final = logging.getLogger("lightship.serving")
#: Requests in a row from one client, after which the others are taken to be silent.
_IN_A_ROW: Final = 16


class Limits(msgspec.Struct, frozen=True):
    """What one client, and all of them, may take."""

    head_bytes: int = 32 * 1024
    fields: int = 100
    body_bytes: int = 16 * 1024 * 1024
    buffered_bytes: int = 64 * 1024 * 1024  # of all bodies that are arriving, and all requests that wait their turn
    pipelined: int = 64  # requests that wait on one connection
    waiting_bytes: int = 1024 * 1024  # of them; beyond either, nothing more is read from it
    connections: int = 512
    secured: int = 128  # of them over TLS, each of which takes 256 KiB before it says a word
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    write_seconds: float = 30.0  # for a client to take what it was answered
    linger_seconds: float = 2.0  # of throwing away, after a refusal


class Reply:
    """An answer before it is sent."""

    __slots__ = ("body", "content_type", "headers", "status")

    def __init__(
        self,
        body: bytes,
        status: int = 200,
        content_type: bytes = b"application/json",
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        self.body, self.status, self.content_type, self.headers = body, status, content_type, headers


class Request:
    """A whole request. Header names are in lower case; of a field that came twice the last counts."""

    __slots__ = ("begun", "body", "headers", "keep_alive", "method", "url")

    def __init__(
        self,
        method: bytes,
        url: bytes,
        headers: dict[bytes, bytes],
        body: bytes,
        keep_alive: bool,
        begun: float | None = None,
    ) -> None:
        self.method, self.url, self.headers, self.body, self.keep_alive = method, url, headers, body, keep_alive
        self.begun = time.monotonic() if begun is None else begun  # when its first byte came


class Answers(Protocol):
    """What a `Server` asks of any face; called in the loop's thread, and never for long."""

    def answer_hot(self, model: Any, asked: list[Any]) -> list[bytes]:
        """The bodies of the answers to what was asked of one model."""

    def refuse(self, error: ServingError) -> Reply:
        """The answer to what is no request, or too much; counted."""


class Face(Answers, Protocol):
    """What answers HTTP requests."""

    def hot(self, request: Request) -> tuple[Any, Any] | None:
        """What `answer_hot` takes, if the request can be answered at once."""

    def respond(self, request: Request) -> Reply | Awaitable[Reply]:
        """The answer to any request, now or later; raises nothing."""


class Client(Protocol):
    """A connection, as the `Server` sees it, whatever it speaks."""

    def finish(self, reply: Reply) -> None:
        """The answer to what was asked."""

    def finish_hot(self, body: bytes) -> None:
        """The same, of a body that the hot path made."""

    def drain(self) -> None:
        """Close if nothing is being answered; otherwise right after it."""

    def abort(self) -> None:
        """Close at once."""

    def look_at_clock(self, now: float) -> None:
        """Close what takes too long."""


F = TypeVar("F", bound=Answers)


class Server(Generic[F]):
    """What connections share: the face, the limits, what waits to be answered together, and the sweep."""

    def __init__(self, face: F, limits: Limits | None = None) -> None:
        """Nobody is connected yet."""
        self.face = face
        self.limits = limits or Limits()
        self.connections: set[Client] = set()
        self.admitted = 0  # clients that are served, and not told that there is no room
        self.buffered = 0  # bytes of bodies that are arriving, and of requests that wait their turn
        self.secured = 0  # clients over TLS
        self.draining = False
        self._empty: asyncio.Event | None = None
        self._waiting: list[tuple[Client, Any, Any]] = []
        self._last: Client | None = None  # who asked for a prediction last, and how often in a row
        self._in_a_row = 0
        self._sweep: asyncio.TimerHandle | None = None

    def tls_room(self) -> int:
        """How many more clients there is room for over TLS."""
        return self.limits.secured - self.secured

    def handshake_failed(self) -> None:
        """Somebody did not speak TLS as we do, or not in time; counted, and told by TLS itself."""
        self.face.refuse(ServingError("serving.handshake", "The TLS handshake came to nothing."))

    def opened(self, connection: Client) -> None:
        """A client is there."""
        self.connections.add(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(1.0, self._look_round)

    def closed(self, connection: Client) -> None:
        """A client is gone."""
        self.connections.discard(connection)
        if self._last is connection:
            self._last = None
        if self._empty is not None and not self.connections:
            self._empty.set()

    def is_alone(self, connection: Client) -> bool:
        """Whether a prediction that it asks for now is best made at once, since nobody else asks for any.

        Others may well be connected: a scraper is, or whoever asked before. To wait a turn of the loop for them costs
        as much as a fifth of the answer.
        """
        if connection is self._last:
            self._in_a_row += 1
        else:
            self._last, self._in_a_row = connection, 1
        return self._in_a_row > _IN_A_ROW or len(self.connections) == 1

    def together(self, connection: Client, model: Any, asked: Any) -> None:
        """Answer with whatever else comes in this turn of the loop."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._answer_waiting)
        self._waiting.append((connection, model, asked))

    async def drain(self, seconds: float) -> None:
        """Close who asks nothing, let the others have their answer for so long, then close them too."""
        self.draining = True
        self._empty = asyncio.Event()
        for connection in list(self.connections):
            connection.drain()
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), seconds)
        self.abort()
        await turns(5)  # a transport is closed a turn or two of the loop later

    def abort(self) -> None:
        """Close everybody."""
        for connection in list(self.connections):
            connection.abort()
        if self._sweep is not None:
            self._sweep.cancel()

    def _answer_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        groups: dict[int, list[tuple[Client, Any, Any]]] = {}
        for one in waiting:
            groups.setdefault(id(one[1]), []).append(one)
        for group in groups.values():
            try:
                bodies = self.face.answer_hot(group[0][1], [asked for _, _, asked in group])
            except Exception as e:  # noqa: BLE001 - whoever is not answered here would wait for ever
                error = e if isinstance(e, ServingError) else _unforeseen(e)
                for connection, _, _ in group:
                    connection.finish(self.face.refuse(error))
                continue
            for (connection, _, _), body in zip(group, bodies, strict=True):
                connection.finish_hot(body)

    def _look_round(self) -> None:
        self._sweep = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self.connections):
            connection.look_at_clock(now)
        if self.connections:
            self._sweep = loop.call_later(1.0, self._look_round)


async def turns(count: int) -> None:
    """Let the loop run what it has, so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


def _unforeseen(e: Exception) -> ServingError:
    _LOG.error("Requests failed in a way nobody foresaw.", exc_info=e)
    return ServingError("serving.runtime", "The agent failed to answer; its log says more.")
