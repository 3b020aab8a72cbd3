"""Bench update: a link that counts what goes over it, handshakes and heads included, and one that dies."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

_STEP = 65_536


@dataclass
class Meter:
    """Bytes that went over a link since the last `reset`; TCP's and IP's own headers are not in them."""

    url: str = ""
    up: int = 0
    down: int = 0
    connections: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> int:
        """Both ways."""
        return self.up + self.down

    def reset(self) -> None:
        """Begin to count anew."""
        with self._lock:
            self.up = self.down = self.connections = 0

    def count(self, *, up: int = 0, down: int = 0, connections: int = 0) -> None:
        """Add what went over the link."""
        with self._lock:
            self.up += up
            self.down += down
            self.connections += connections


@contextmanager
def metered(url: str, dies_after: int | None = None) -> Iterator[Meter]:
    """A link to the server at `url`; each of its connections ends after so many bytes towards the client."""
    parts = urlsplit(url)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    meter = Meter(urlunsplit((parts.scheme, f"127.0.0.1:{port}", parts.path, "", "")))
    target = (str(parts.hostname), int(parts.port or 443))
    thread = threading.Thread(target=_accept, args=(listener, target, meter, dies_after), daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=5)


def _accept(listener: socket.socket, target: tuple[str, int], meter: Meter, dies_after: int | None) -> None:
    while True:
        try:
            near, _ = listener.accept()
            far = socket.create_connection(target, timeout=10)
        except OSError:
            return
        far.settimeout(None)
        meter.count(connections=1)
        for s in (near, far):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_up, args=(near, far, meter), daemon=True).start()
        threading.Thread(target=_down, args=(far, near, meter, dies_after), daemon=True).start()


def _up(near: socket.socket, far: socket.socket, meter: Meter) -> None:
    with contextlib.suppress(OSError):
        while data := near.recv(_STEP):
            meter.count(up=len(data))
            far.sendall(data)
    _end(near, far)


def _down(far: socket.socket, near: socket.socket, meter: Meter, left: int | None) -> None:
    with contextlib.suppress(OSError):
        while data := far.recv(_STEP if left is None else min(_STEP, left)):
            near.sendall(data)
            meter.count(down=len(data))
            if left is not None and (left := left - len(data)) <= 0:
                break
    _end(far, near)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
