"""What waits its turn on a connection: bounded in number and in bytes, and forgotten with the connection."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lightship_agent.contract.codes import ServingError
from lightship_agent.serving.connections import Limits, Reply, Server
from lightship_agent.serving.framed import FrameConnection
from lightship_agent.serving.http1 import Connection


class Wire:
    """A transport that notes what happens to it."""

    def __init__(self) -> None:
        self.paused = self.closed = False
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def get_extra_info(self, _name: str) -> None:
        return None

    def close(self) -> None:
        self.closed = True

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0


class Slow:
    """A face whose answers come when they are told to."""

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[Reply]] = []

    def hot(self, _request: Any) -> None:
        return None

    def answer_hot(self, _model: Any, asked: list[Any]) -> list[bytes]:
        bug = f"nobody foresaw {len(asked)}"
        raise ValueError(bug)

    def respond(self, _request: Any) -> Awaitable[Reply]:
        self.asked.append(asyncio.get_running_loop().create_future())
        return self.asked[-1]

    def refuse(self, error: ServingError) -> Reply:
        return Reply(error.code.encode(), 503)


class Line:
    """One connection to a slow face, and how to speak on it."""

    def __init__(self, limits: Limits) -> None:
        self.face, self.wire = Slow(), Wire()
        self.server: Server[Any] = Server(self.face, limits)
        self.connection = self.open()

    def open(self) -> Any:
        raise NotImplementedError

    def say(self, body: bytes, times: int = 1) -> None:
        """Send that many requests with that body, as the network would."""
        raise NotImplementedError

    async def answer(self) -> None:
        """Answer what is being asked."""
        self.face.asked[-1].set_result(Reply(b"well"))
        for _ in range(3):
            await asyncio.sleep(0)


class HttpLine(Line):
    def open(self) -> Connection:
        connection = Connection(self.server)
        connection.connection_made(self.wire)  # type: ignore[arg-type]
        return connection

    def say(self, body: bytes, times: int = 1) -> None:
        self.connection.data_received(
            (b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)) * times
        )


class FrameLine(Line):
    def open(self) -> FrameConnection:
        connection = FrameConnection(self.server)
        connection.connection_made(self.wire)  # type: ignore[arg-type]
        return connection

    def say(self, body: bytes, times: int = 1) -> None:
        data = (struct.pack("<I", len(body)) + body) * times
        room = self.connection.get_buffer(-1)
        for at in range(0, len(data), len(room)):
            piece = data[at : at + len(room)]
            room[: len(piece)] = piece
            self.connection.buffer_updated(len(piece))


Kind = Callable[[Limits], Line]
BOTH = pytest.mark.parametrize("kind", [HttpLine, FrameLine])


@BOTH
def test_as_long_as_enough_waits_nothing_more_is_read_however_much_is_answered(kind: Kind) -> None:
    async def story() -> None:
        line = kind(Limits(pipelined=4))
        line.say(b"x" * 10, times=10)
        for _ in range(5):  # nine wait, and then eight, …
            assert line.wire.paused
            await line.answer()
        await line.answer()
        assert not line.wire.paused

    asyncio.run(story())


@BOTH
def test_large_requests_that_wait_are_counted_and_few_of_them_are_enough(kind: Kind) -> None:
    async def story() -> None:
        line = kind(Limits(waiting_bytes=6_000))
        line.say(b"x" * 4_000)
        assert not line.wire.paused
        line.say(b"x" * 4_000)
        line.say(b"x" * 4_000)
        assert line.wire.paused
        assert line.server.buffered >= 8_000
        await line.answer()
        assert not line.wire.paused
        line.connection.connection_lost(None)
        assert line.server.buffered == 0

    asyncio.run(story())


@BOTH
def test_what_waits_on_all_connections_is_bounded_together(kind: Kind) -> None:
    async def story() -> None:
        line = kind(Limits(buffered_bytes=20_000))
        line.say(b"x" * 4_000, times=8)
        assert len(line.face.asked) == 1
        for _ in range(8):
            if line.face.asked[-1].done():
                break
            await line.answer()
        assert b"serving.overloaded" in line.wire.written
        assert line.server.buffered == 0

    asyncio.run(story())


@BOTH
def test_all_that_was_asked_is_answered_also_to_whoever_says_that_nothing_more_comes(kind: Kind) -> None:
    async def story() -> None:
        line = kind(Limits())
        line.say(b"x" * 10, times=3)
        assert line.connection.eof_received()
        for _ in range(3):
            assert not line.wire.closed
            await line.answer()
        assert line.wire.written.count(b"well") == 3
        assert line.wire.closed

    asyncio.run(story())


def test_whoever_waits_for_an_answer_that_fails_as_nobody_foresaw_gets_one_all_the_same() -> None:
    async def story() -> None:
        line = HttpLine(Limits())
        told: list[Reply] = []

        class Waiting:
            def finish(self, reply: Reply) -> None:
                told.append(reply)

        line.server.together(Waiting(), "a model", "a row")  # type: ignore[arg-type]
        line.server.together(Waiting(), "a model", "a row")  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert [reply.body for reply in told] == [b"serving.runtime"] * 2

    asyncio.run(story())


def test_who_asks_alone_is_not_kept_waiting_for_those_who_are_only_connected() -> None:
    async def story() -> None:
        server = HttpLine(Limits()).server
        busy, silent = HttpLine(Limits()).connection, HttpLine(Limits()).connection
        server.opened(busy)
        assert not server.is_alone(busy), "whoever else is there might ask too"
        found = [server.is_alone(busy) for _ in range(20)]
        assert found == [False] * 15 + [True] * 5
        assert not server.is_alone(silent), "it asks now"
        assert not server.is_alone(busy)
        server.closed(busy)
        assert server.is_alone(silent), "nobody else is left"
        server.abort()

    asyncio.run(story())
