"""Callers of the operator API and the dashboard: one request at a time, through the whole application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from lightship.access import tokens
from lightship.access.rules import Role
from lightship.api.guard import Policy
from lightship.api.operator_api import create_operator_app
from lightship.home import Home
from lightship.web.pages import add_pages

CLOSED = Policy(environment="production", open_reads=False)
OPEN = Policy(environment="development", open_reads=True)
AWAY = "203.0.113.9"


def application(home: Home, policy: Policy = CLOSED) -> FastAPI:
    """The operator API with its dashboard, as `lightship up` makes it."""
    app = create_operator_app(home, policy=policy)
    add_pages(app, home)
    return app


def token(home: Home, role: Role, *, environment: str = "production", name: str = "", ttl: int = 600) -> str:
    """An API token of that role; its name is the role unless told otherwise."""
    with home.database.write() as session:
        return tokens.create(
            session, name=name or role.value, role=role, environment=environment, ttl_seconds=ttl, actor="user:test"
        )


class Caller:
    """Somebody with a token, a cookie, or nothing."""

    def __init__(self, app: FastAPI, shown: str = "", *, cookie: str = "", origin: str = AWAY) -> None:
        self._app = app
        self._origin = origin
        self._headers = {"Authorization": f"Bearer {shown}"} if shown else {}
        if cookie:
            self._headers["Cookie"] = f"lightship_session={cookie}"

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
        return self.ask("POST", path, json=body if body is not None else {}, headers=headers)

    def ask(self, method: str, path: str, *, headers: dict[str, str] | None = None, **sent: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._app, client=(self._origin, 40_000), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://dashboard") as client:
                return await client.request(method, path, headers={**self._headers, **(headers or {})}, **sent)

        return asyncio.run(send())


class Unread:
    """A body that notices whether anybody read it."""

    def __init__(self, chunks: int = 1, size: int = 1_024) -> None:
        self.read = 0
        self._chunks, self._size = chunks, size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self._chunks):
            self.read += 1
            yield b" " * self._size


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
