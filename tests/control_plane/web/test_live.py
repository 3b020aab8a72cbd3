"""Open pages are told that something changed: soon, seldom, and not for ever."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from sqlalchemy import insert, update
from tests.control_plane.web import believable

from lightship.api.operator_api import create_operator_app
from lightship.api.views import SILENT_MS
from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import AlertRow, Device, DeviceEpoch, RolloutRow
from lightship.web.live import Live, fingerprint
from lightship.web.pages import add_pages


@contextmanager
def serving(home: Home) -> Iterator[tuple[str, Live]]:
    """A real server on a free port; it is stopped as the control plane stops it."""
    app = create_operator_app(home)
    add_pages(app, home)
    live: Live = app.state.live
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, lifespan="off", log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 60
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", live
        finally:
            live.stop()
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def test_a_write_reaches_an_open_page_as_one_changed_event(fresh_home: Home) -> None:
    with serving(fresh_home) as (address, _), httpx.stream("GET", f"{address}/events", timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines).startswith("retry:")
        time.sleep(0.3)  # the stream has looked once before the write
        with fresh_home.database.write() as session:
            audit.append(session, actor="user:ada", verb="test.change", subject="x")
        assert next(line for line in lines if line) == "event: changed"


def test_a_stopping_server_is_not_held_by_an_open_page(fresh_home: Home) -> None:
    with serving(fresh_home) as (address, live), httpx.stream("GET", f"{address}/events", timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        began = time.monotonic()
        live.stop()
        assert list(lines) == [""]
        assert time.monotonic() - began < 30  # streams last an hour


def test_one_page_too_many_is_asked_to_come_back_later(fresh_home: Home) -> None:
    with serving(fresh_home) as (address, live):
        live._limit = 1
        with httpx.stream("GET", f"{address}/events", timeout=60) as first:
            lines = first.iter_lines()  # kept: when it is gone, so is the connection
            next(lines)
            second = httpx.get(f"{address}/events")
            assert (second.status_code, second.headers["retry-after"]) == (503, "30")


def test_many_pages_cost_one_look_a_tick_and_nobody_costs_none() -> None:
    looks: list[float] = []

    def look() -> str:
        looks.append(time.monotonic())
        return str(len(looks) // 3)

    live = Live(look, tick=0.1, lifetime=1.5)

    async def reader() -> list[str]:
        return [event async for event in live.stream()]

    async def ten() -> list[list[str]]:
        return await asyncio.gather(*(reader() for _ in range(10)))

    assert looks == []
    told = asyncio.run(ten())
    assert all(t[0].startswith("retry") and "event: changed\ndata: {}\n\n" in t for t in told)
    assert len(looks) <= 20
    assert all(b - a >= 0.07 for a, b in itertools.pairwise(looks))


def test_a_quiet_stream_sends_heartbeats_and_no_events() -> None:
    async def read() -> list[str]:
        return [e async for e in Live(lambda: "same", tick=0.05, heartbeat=0.1, lifetime=0.5).stream()]

    events = asyncio.run(read())[1:]
    assert events
    assert set(events) == {": still here\n\n"}


def test_the_fingerprint_moves_with_everything_the_pages_show(fresh_home: Home) -> None:
    now = believable.fill(fresh_home)

    def look(at: int = now) -> str:
        with fresh_home.database.read() as session:
            return fingerprint(session, at)

    seen = [look()]
    assert look() == seen[0]
    changes = (
        update(DeviceEpoch).where(DeviceEpoch.device == "meter-1").values(next_seq=999),
        update(Device).where(Device.id == "meter-1").values(last_seen=now + 1),
        update(Device).where(Device.id == "meter-1").values(quarantined=True),
        update(Device).where(Device.id == "meter-1").values(verdict={"verdict": {"window": 41}}),
        insert(AlertRow).values(
            id="a1",
            kind="silent",
            status="open",
            severity="critical",
            sentence="",
            count=1,
            began=1,
            resolved_at=0,
            state=b"",
        ),
        update(AlertRow).values(status="resolved", resolved_at=5),
        update(RolloutRow).where(RolloutRow.id == "c0de0004").values(gate={"verdict": {"outcome": "pass"}}),
    )
    for change in changes:
        with fresh_home.database.write() as session:
            session.execute(change)
        seen.append(look())
    seen.append(look(now + SILENT_MS + 2_000))  # nothing was written: devices fell silent
    assert len(set(seen)) == len(seen)
