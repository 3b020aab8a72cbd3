"""Bench telemetry: a publisher that costs next to nothing: ready-made MQTT 3.1.1 packets on a TLS socket.

It comes under the control plane's certificate, which may write on every device's topics: one connection for a fleet.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

WINDOW: Final = 400  # messages that the broker has not acknowledged
_CONNACK: Final = 4
_PUBACK: Final = 4


class Publisher:
    """One connection."""

    def __init__(self, port: int, tls: ssl.SSLContext, name: str) -> None:
        """Connect."""
        plain = socket.create_connection(("127.0.0.1", port), 10)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = tls.wrap_socket(plain, server_hostname="127.0.0.1")
        body = _text("MQTT") + b"\x04\x02\x00\x00" + _text(name)  # 3.1.1, a clean session, no keepalive
        self._socket.sendall(b"\x10" + _length(len(body)) + body)
        self._mid = 0
        self._waiting = 0
        self._part = b""
        if self._socket.recv(_CONNACK)[3:] != b"\x00":
            message = "the broker refuses the publisher"
            raise ConnectionError(message)

    def publish(self, messages: Sequence[tuple[str, bytes]], rate: float = 0.0) -> None:
        """All of them, QoS 1, as fast as the broker takes them, or so many a second; returns when all are taken."""
        began = time.monotonic()
        for first in range(0, len(messages), 50):
            part = messages[first : first + 50]
            while self._waiting > WINDOW:
                self._hear()
            self._socket.sendall(b"".join(self._packet(topic, payload) for topic, payload in part))
            self._waiting += len(part)
            if rate:
                time.sleep(max(0.0, began + (first + len(part)) / rate - time.monotonic()))
        while self._waiting:
            self._hear()

    def close(self) -> None:
        """Say goodbye."""
        self._socket.sendall(b"\xe0\x00")
        self._socket.close()

    def _packet(self, topic: str, payload: bytes) -> bytes:
        self._mid = self._mid % 65_535 + 1
        body = _text(topic) + struct.pack("!H", self._mid) + payload
        return b"\x32" + _length(len(body)) + body

    def _hear(self) -> None:
        heard = self._part + self._socket.recv(16_384)
        if heard == self._part:
            message = "the broker hung up"
            raise ConnectionError(message)
        whole = len(heard) // _PUBACK
        self._waiting -= whole
        self._part = heard[whole * _PUBACK :]


@contextmanager
def publisher(port: int, tls: ssl.SSLContext, name: str) -> Iterator[Publisher]:
    """A connection that is closed afterwards."""
    made = Publisher(port, tls, name)
    try:
        yield made
    finally:
        made.close()


def _text(said: str) -> bytes:
    data = said.encode()
    return struct.pack("!H", len(data)) + data


def _length(size: int) -> bytes:
    out = bytearray()
    while True:
        size, digit = divmod(size, 128)
        out.append(digit | (128 if size else 0))
        if not size:
            return bytes(out)
