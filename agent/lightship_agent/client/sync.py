"""Client: asking from a thread."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from lightship_agent.contract.app_metrics import AppSample
from lightship_agent.contract.codes import LightshipError, LinkError, SettingsError

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

if TYPE_CHECKING:
    import ssl

    import httpx

_LENGTH: Final = struct.Struct("<I")


class _Transport(Protocol):
    def send(self, ask: Ask, seconds: float) -> Got:
        """Raises LinkError: link.unreachable, link.slow."""

    def close(self) -> None:
        """Give the connection back."""


class Client:
    """An agent, as seen from a program; safe to use from several threads, which take turns over frames.

    Args:
        address: `http://host:port`, `unix:/path`, `frames:/path`, or `mqtt://[user:password@]host:port` (`mqtts`: TLS).
        model: which model; the only one that is served when None. Over a broker it must be named.
        timeout: seconds for a whole call.
        retries: how often a call is repeated while the agent is overloaded, has no model yet or can't be reached.
        token: what `lightship-agent token` printed, where the agent wants one.
        ca: PEM file of the authority that verifies the agent over https; the system's when None.
        cert: PEM files of our certificate and its key, where the agent wants to see one.
    """

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

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back."""
        self._transport.close()

    def predict(self, rows: Any, *, id: str = "", key: str = "") -> Answer:  # noqa: A002 - the protocol's name
        """What the model says about `rows`: numbers `[n, features]` or `[features]`, or records by feature name.

        `key` says on whose behalf: where two versions share the work, the same one always answers it.

        Raises:
            ServingError: what the agent refused with.
            LinkError: link.unreachable, link.slow, link.status.
        """
        answer = self._ask(lambda known: self._wire.predict(rows, known, id, key))
        return cast("Answer", answer)

    def explain(
        self, rows: Any = None, *, newest: int = 1, permutations: int = 10, seed: int = 0, top: int = 5
    ) -> tuple[Explained, ...]:
        """Why the model answers `rows` (numbers) so, one `Explained` a row; it takes many predictions' time.

        Without rows: the `newest` rows that the device has answered, to whomever; 1 to 16.

        Raises:
            ServingError: what the agent refused with.
            LinkError: link.unreachable, link.slow, link.status.
        """
        wish = {"permutations": permutations, "seed": seed, "top": top, "newest": newest if rows is None else 0}
        return cast("tuple[Explained, ...]", self._ask(lambda known: self._wire.explain(rows, known, wish)))

    def feedback(self, prediction_id: str, label: str | float) -> bool:
        """Tell what a prediction should have been; False when that was told before.

        Raises:
            ServingError: serving.unknown-prediction, serving.input.
            LinkError: link.unreachable, link.slow, link.status.
        """
        return bool(self._ask(lambda known: self._wire.feedback(prediction_id, label, known)))

    def tell(self, *told: AppSample) -> None:
        """Tell the agent numbers of the application's own, all of them or, if one is refused, none; asked once.

        `AppSample(name="parts_made", kind="counter", value=1)`; `lightship_agent.Metrics` gathers them for you.

        Raises:
            ServingError: serving.metric-name, serving.metric-kind, serving.metric-value, serving.metric-full.
            LinkError: link.unreachable, link.slow, link.status.
        """
        self._call(self._wire.tell(told), time.monotonic() + self._timeout, 0)

    def ready(self) -> bool:
        """Whether the agent answers and serves the model; asked once, without retries."""
        try:
            return bool(self._call(self._wire.ready(self._model), time.monotonic() + self._timeout, 0))
        except LightshipError:
            return False

    def _ask(self, make: Callable[[Known], Ask]) -> Any:
        ends = time.monotonic() + self._timeout
        return self._call(make(self._know(ends)), ends, self._retries)

    def _know(self, ends: float) -> Known:
        """Which model, and its input, where the protocol wants to hear them."""
        if not isinstance(self._wire, HttpWire):
            return Known(self._model)
        if self._found is None:
            name = self._model or only_one(self._call(self._wire.models(), ends, self._retries))
            self._found = Known(name, self._call(self._wire.tensor(name), ends, self._retries))
        return self._found

    def _call(self, ask: Ask, ends: float, retries: int) -> Any:
        attempt = 0
        while True:
            got: Got | None = None
            try:
                got = self._transport.send(ask, max(0.0, ends - time.monotonic()))
                return ask.read(got)
            except LightshipError as e:
                if e.code in FORGETTING:
                    self._found = None
                seconds = pause(e, got, attempt)
                if seconds is None or attempt >= retries or time.monotonic() + seconds >= ends:
                    raise
            time.sleep(seconds)
            attempt += 1


def _transport(kind: str, where: str, model: str | None, token: str, tls: ssl.SSLContext | bool) -> _Transport:
    if kind == "mqtt":
        return _Mqtt(where, model)
    return _Frames(where) if kind == "frames" else _Http(kind, where, token, tls)


class _Http:
    def __init__(self, kind: str, where: str, token: str, tls: ssl.SSLContext | bool) -> None:
        import httpx

        transport = httpx.HTTPTransport(uds=where) if kind == "unix" else None
        base = "http://agent" if kind == "unix" else where
        self._client: httpx.Client = httpx.Client(
            base_url=base, transport=transport, headers=bearing(token), verify=tls
        )

    def send(self, ask: Ask, seconds: float) -> Got:
        import httpx

        try:
            reply = self._client.request(
                ask.method, ask.path, content=ask.body, headers=timed(ask, seconds), timeout=max(0.001, seconds)
            )
        except httpx.TimeoutException as e:
            raise LinkError("link.slow", f"The agent did not answer within {seconds:.3g} s.") from e
        except httpx.HTTPError as e:
            raise LinkError("link.unreachable", f"The agent can't be reached: {e}.") from e
        return Got(reply.content, reply.status_code, reply.headers)

    def close(self) -> None:
        self._client.close()


def timed(ask: Ask, seconds: float) -> list[tuple[str, str]]:
    """The headers of a request that nobody waits for beyond that time."""
    return [*ask.headers, ("request-timeout", f"{max(0.001, seconds):.3f}")]


def bearing(token: str) -> dict[str, str]:
    """The header that shows a token, if there is one."""
    return {"authorization": f"Bearer {token.strip()}"} if token else {}


def tls_to(where: str, ca: str | Path | None, cert: tuple[str | Path, str | Path] | None) -> ssl.SSLContext | bool:
    """What verifies the agent at an https address, and shows our certificate.

    Raises:
        SettingsError: settings.invalid.
    """
    if not where.startswith("https:"):
        return False
    import ssl

    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
        if cert is not None:
            context.load_cert_chain(*cert)
    except (OSError, ValueError) as e:
        raise SettingsError("settings.invalid", f"Expected PEM files in ca={ca} and cert={cert}: {e}.") from e
    return context


class _Frames:
    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def send(self, ask: Ask, seconds: float) -> Got:
        with self._lock:
            try:
                return Got(self._exchange(ask.body, time.monotonic() + max(0.001, seconds)))
            except BaseException as e:
                # What was half said or half heard would be taken for the next answer.
                self._drop()
                if isinstance(e, TimeoutError):
                    raise LinkError("link.slow", f"The agent did not answer within {seconds:.3g} s.") from e
                if isinstance(e, OSError):
                    raise LinkError("link.unreachable", f"The agent can't be reached: {e}.") from e
                raise

    def _exchange(self, body: bytes, ends: float) -> bytes:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._patient(ends).connect(self._path)
        self._patient(ends).sendall(_LENGTH.pack(len(body)) + body)
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, ends))
        return self._read(length, ends)

    def _patient(self, ends: float) -> socket.socket:
        assert self._socket is not None
        left = ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket

    def _read(self, size: int, ends: float) -> bytes:
        parts: list[bytes] = []
        while size:
            part = self._patient(ends).recv(min(size, 1 << 16))
            if not part:
                raise ConnectionError("it closed the connection")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        with self._lock:
            self._drop()


class _Mqtt:
    def __init__(self, url: str, model: str | None) -> None:
        from .broker import Broker

        self._broker = Broker(url, model)

    def send(self, ask: Ask, seconds: float) -> Got:
        ends = time.monotonic() + max(0.001, seconds)
        self._broker.listen(max(0.001, seconds))
        answer = self._broker.ask(ask.body)
        try:
            return Got(answer.result(max(0.0, ends - time.monotonic())))
        except TimeoutError as e:
            raise LinkError("link.slow", f"No agent answered over the broker within {seconds:.3g} s.") from e
        finally:
            answer.cancel()

    def close(self) -> None:
        self._broker.close()
