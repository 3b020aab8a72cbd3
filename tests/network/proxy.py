"""A faulty link: a TCP proxy that drops, resets, hangs, drips, lies and answers by itself, as real links do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

End = Literal["close", "reset", "hang"]
_STEP = 16_384


@dataclass(frozen=True)
class Fault:
    """What goes wrong on one connection."""

    after: int | None = None  # bytes towards the client, after which `end` comes
    end: End = "close"
    rate: float | None = None  # bytes a second towards the client
    drip: float | None = None  # seconds between two single bytes towards the client
    rewrite: tuple[bytes, bytes] | None = None  # in the head of the answer
    answer: Callable[[bytes], bytes] | None = None  # from the head of the request: the proxy answers by itself


NONE = Fault()
Address = tuple[str, int]


class Proxy:
    """Listens on `host`, forwards to `target`; each connection takes the next fault, and then the usual one."""

    def __init__(self, target: Address, *, host: str = "127.0.0.1") -> None:
        self.target = target
        self.usual = NONE
        self.connections = 0
        self.sent: list[tuple[float, int]] = []  # when, and how many bytes towards the client
        self._faults: deque[Fault] = deque()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._listener.settimeout(0.1)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    @property
    def downstream(self) -> int:
        """Bytes towards the client so far."""
        return sum(n for _, n in self.sent)

    def fail(self, faults: Iterable[Fault]) -> None:
        """The next connections fail like this, one after the other."""
        self._faults.extend(faults)

    def cut(self) -> None:
        """Cut every connection there is."""
        for s in self._sockets:
            _cut(s)
        self._sockets.clear()

    def close(self) -> None:
        """Cut everything, and listen no more."""
        self._over.set()
        _cut(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join(timeout=60)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self.connections += 1
            self._sockets.append(client)
            self._start(self._serve, client, self._faults.popleft() if self._faults else self.usual)

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        # What breaks here breaks because a test, or the client, wants it to.
        with contextlib.suppress(OSError):
            client.settimeout(None)
            # What is counted as sent shall have been sent, and not wait here.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _STEP)
            if fault.answer is not None:
                self._towards_client(client, fault.answer(_head(client)), fault)
                _end(client, fault.end)
                return
            server = socket.create_connection(self.target)
            self._sockets.append(server)
            self._start(self._pump_up, client, server)
            self._pump_down(server, client, fault)

    def _pump_up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(_STEP):
                server.sendall(data)
        _cut(server)

    def _pump_down(self, server: socket.socket, client: socket.socket, fault: Fault) -> None:
        left = fault.after
        first = True
        try:
            while data := server.recv(_STEP):
                if first and fault.rewrite is not None:
                    assert fault.rewrite[0] in data
                    data = data.replace(*fault.rewrite)
                first = False
                self._towards_client(client, data[:left], fault)
                if left is not None and (left := left - len(data)) <= 0:
                    _end(client, fault.end)
                    return
            _end(client, "close")
        finally:
            if fault.end != "hang":
                _cut(server)

    def _towards_client(self, client: socket.socket, data: bytes, fault: Fault) -> None:
        step = 1 if fault.drip else max(1, int(fault.rate / 20)) if fault.rate else len(data) or 1
        for i in range(0, len(data), step):
            piece = data[i : i + step]
            client.sendall(piece)
            self.sent.append((time.monotonic(), len(piece)))
            wait = fault.drip or (len(piece) / fault.rate if fault.rate else 0.0)
            if wait and self._over.wait(wait):
                return


def _head(client: socket.socket) -> bytes:
    # A client that begins with TLS says no more until it is answered: a record's first byte is 22.
    head = b""
    while b"\r\n\r\n" not in head and not head.startswith(b"\x16") and (data := client.recv(_STEP)):
        head += data
    return head


def _end(client: socket.socket, how: End) -> None:
    if how == "hang":
        return
    if how == "reset":
        time.sleep(0.05)  # whoever keeps up has read by now what the reset would take along
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # The thread that reads from it holds it open until it wakes.
        client.shutdown(socket.SHUT_RD)
        client.close()
        return
    _cut(client)


def _cut(s: socket.socket) -> None:
    with contextlib.suppress(OSError):
        s.shutdown(socket.SHUT_RDWR)
    s.close()
