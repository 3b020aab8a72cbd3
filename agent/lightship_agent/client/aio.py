"""Client: asking from a coroutine; as `sync`, with `await` in front."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from lightship_agent.contract.app_metrics import AppSample
from lightship_agent.contract.codes import LightshipError, LinkError

from .answers import (
    FORGETTING,
    Answer,
    Ask,
    Explained,
    FrameWire,
    Got,
    HttpWire,
    Known,
    Wire,
    only_one,
    parse_address,
    pause,
)
from .sync import bearing, timed, tls_to

if TYPE_CHECKING:
    import ssl

    import httpx

_LENGTH: Final = struct.Struct("<I")


class _Transport(Protocol):
    async def send(self, ask: Ask, seconds: float) -> Got:
        """Raises LinkError: link.unreachable, link.slow."""

    async def close(self) -> None:
        """Give the connection back."""


class AsyncClient:
    """An agent, as seen from a coroutine; arguments and errors are those of `Client`."""

    def __init__(
        self,
        address: str,
        *,
        model: str | None = None,
        timeout: float = 10.0,
        retries: int = 2,
        token: str = "",
        ca: str | Path | None = None,
        cert: tuple[str | Path, str | Path] | None = None,
    ) -> None:
        """Nothing is connected yet.

        Raises:
            LinkError: link.unreachable for an address that can't be one.
            SettingsError: settings.invalid for files that can't be used.
            ServingError: serving.unknown-model without a model, over a broker.
        """
        kind, where = parse_address(address)
        self._wire: Wire = FrameWire() if kind in {"frames", "mqtt"} else HttpWire()
        self._transport: _Transport = _transport(kind, where, model, token, tls_to(where, ca, cert))
        self._model = model
        self._found: Known | None = None  # until something says that another model is served by now
        self._timeout, self._retries = timeout, retries

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connection back."""
        await self._transport.close()

    async def predict(self, rows: Any, *, id: str = "", key: str = "") -> Answer:  # noqa: A002 - the protocol's name
        """As `Client.predict`.

        Raises:
            ServingError: what the agent refused with.
            LinkError: link.unreachable, link.slow, link.status.
        """
        return cast("Answer", await self._ask(lambda known: self._wire.predict(rows, known, id, key)))

    async def explain(
        self, rows: Any = None, *, newest: int = 1, permutations: int = 10, seed: int = 0, top: int = 5
    ) -> tuple[Explained, ...]:
        """As `Client.explain`.

        Raises:
            ServingError: what the agent refused with.
            LinkError: link.unreachable, link.slow, link.status.
        """
        wish = {"permutations": permutations, "seed": seed, "top": top, "newest": newest if rows is None else 0}
        return cast("tuple[Explained, ...]", await self._ask(lambda known: self._wire.explain(rows, known, wish)))

    async def feedback(self, prediction_id: str, label: str | float) -> bool:
        """As `Client.feedback`.

        Raises:
            ServingError: serving.unknown-prediction, serving.input.
            LinkError: link.unreachable, link.slow, link.status.
        """
        return bool(await self._ask(lambda known: self._wire.feedback(prediction_id, label, known)))

    async def tell(self, *told: AppSample) -> None:
        """As `Client.tell`.

        Raises:
            ServingError: serving.metric-name, serving.metric-kind, serving.metric-value, serving.metric-full.
            LinkError: link.unreachable, link.slow, link.status.
        """
        await self._call(self._wire.tell(told), time.monotonic() + self._timeout, 0)

    async def ready(self) -> bool:
        """Whether the agent answers and serves the model; asked once, without retries."""
        try:
            return bool(await self._call(self._wire.ready(self._model), time.monotonic() + self._timeout, 0))
        except LightshipError:
            return False

    async def _ask(self, make: Callable[[Known], Ask]) -> Any:
        ends = time.monotonic() + self._timeout
        return await self._call(make(await self._know(ends)), ends, self._retries)

    async def _know(self, ends: float) -> Known:
        """Which model, and its input, where the protocol wants to hear them."""
        if not isinstance(self._wire, HttpWire):
            return Known(self._model)
        if self._found is None:
            name = self._model or only_one(await self._call(self._wire.models(), ends, self._retries))
            self._found = Known(name, await self._call(self._wire.tensor(name), ends, self._retries))
        return self._found

    async def _call(self, ask: Ask, ends: float, retries: int) -> Any:
        attempt = 0
        while True:
            got: Got | None = None
            try:
                got = await self._transport.send(ask, max(0.0, ends - time.monotonic()))
                return ask.read(got)
            except LightshipError as e:
                if e.code in FORGETTING:
                    self._found = None
                seconds = pause(e, got, attempt)
                if seconds is None or attempt >= retries or time.monotonic() + seconds >= ends:
                    raise
            await asyncio.sleep(seconds)
            attempt += 1


def _transport(kind: str, where: str, model: str | None, token: str, tls: ssl.SSLContext | bool) -> _Transport:
    if kind == "mqtt":
        return _Mqtt(where, model)
    return _Frames(where) if kind == "frames" else _Http(kind, where, token, tls)


class _Http:
    def __init__(self, kind: str, where: str, token: str, tls: ssl.SSLContext | bool) -> None:
        import httpx

        transport = httpx.AsyncHTTPTransport(uds=where) if kind == "unix" else None
        base = "http://agent" if kind == "unix" else where
        self._client: httpx.AsyncClient = httpx.AsyncClient(
            base_url=base, transport=transport, headers=bearing(token), verify=tls
        )

    async def send(self, ask: Ask, seconds: float) -> Got:
        import httpx

        try:
            reply = await self._client.request(
                ask.method, ask.path, content=ask.body, headers=timed(ask, seconds), timeout=max(0.001, seconds)
            )
        except httpx.TimeoutException as e:
            raise LinkError("link.slow", f"The agent did not answer within {seconds:.3g} s.") from e
        except httpx.HTTPError as e:
            raise LinkError("link.unreachable", f"The agent can't be reached: {e}.") from e
        return Got(reply.content, reply.status_code, reply.headers)

    async def close(self) -> None:
        await self._client.aclose()


class _Frames:
    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, ask: Ask, seconds: float) -> Got:
        try:
            async with asyncio.timeout(max(0.001, seconds)), self._lock:
                try:
                    return Got(await self._exchange(ask.body))
                except BaseException:
                    # What was half said or half heard would be taken for the next answer.
                    await self._drop()
                    raise
        except TimeoutError as e:
            raise LinkError("link.slow", f"The agent did not answer within {seconds:.3g} s.") from e
        except (OSError, asyncio.IncompleteReadError) as e:
            raise LinkError("link.unreachable", f"The agent can't be reached: {e}.") from e

    async def _exchange(self, body: bytes) -> bytes:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(self._path)
        reader, writer = self._streams
        writer.write(_LENGTH.pack(len(body)) + body)
        await writer.drain()
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length)

    async def _drop(self) -> None:
        if self._streams is not None:
            writer = self._streams[1]
            self._streams = None
            writer.transport.abort()  # a question that nobody waits for any more need not arrive

    async def close(self) -> None:
        async with self._lock:
            await self._drop()


class _Mqtt:
    def __init__(self, url: str, model: str | None) -> None:
        from .broker import Broker

        self._broker = Broker(url, model)

    async def send(self, ask: Ask, seconds: float) -> Got:
        ends = time.monotonic() + max(0.001, seconds)
        if not self._broker.listening:  # once per connection, so that a thread may wait for it
            await asyncio.to_thread(self._broker.listen, max(0.001, seconds))
        try:
            async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                return Got(await asyncio.wrap_future(self._broker.ask(ask.body)))
        except TimeoutError as e:
            raise LinkError("link.slow", f"No agent answered over the broker within {seconds:.3g} s.") from e

    async def close(self) -> None:
        await asyncio.to_thread(self._broker.close)
