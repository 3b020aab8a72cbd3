"""Asks the operator app for pages, in process, as the tests read them."""

from __future__ import annotations

import asyncio

import httpx

from lightship.api.operator_api import create_operator_app
from lightship.home import Home
from lightship.web.pages import add_pages


class Browser:
    """One request at a time, each through the whole application."""

    def __init__(self, home: Home) -> None:
        self._app = create_operator_app(home)
        add_pages(self._app, home)

    def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.ask("GET", path, headers)

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://dashboard") as client:
                return await client.request(method, path, headers=headers)

        return asyncio.run(send())
