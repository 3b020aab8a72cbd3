"""Serving: a listener that speaks TLS.

Rules:
* handshakes are bounded in number and in time; beyond the number the oldest, which has had longest, is let go;
* connections are bounded before their handshake, since a TLS connection costs memory from its first byte;
* a handshake that fails costs a count and nothing else;
* a renewed certificate is shown to whoever connects next, and to nobody who is connected.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from typing import Final

from .access import Watched

HANDSHAKE_SECONDS: Final = 5.0
_GOODBYE_SECONDS: Final = 2.0
_HANDSHAKES: Final = 64
_BREATH: Final = 1.0  # s before the next try where the process has no room for another connection
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class TlsListener:
    """Accepts connections on a socket that listens, and hands them over when they are secure.

    Args:
        bound: the socket.
        context: with what they are secured.
        protocol: makes what speaks on a connection.
        room: how many more connections there is room for now.
        failed: called for each handshake that came to nothing.
    """

    def __init__(
        self,
        bound: socket.socket,
        context: Watched[ssl.SSLContext],
        protocol: Callable[[], asyncio.BaseProtocol],
        *,
        room: Callable[[], int],
        failed: Callable[[], None],
    ) -> None:
        self._bound, self._context, self._protocol = bound, context, protocol
        self._room, self._failed = room, failed
        bound.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._shaking: dict[asyncio.Task[None], socket.socket] = {}  # in the order in which they began
        self._task = self._loop.create_task(self._accept())

    def close(self) -> None:
        """Accept nothing more; who is in the middle of a handshake is let go."""
        self._task.cancel()
        for task in list(self._shaking):
            self._let_go(task)
        self._bound.close()

    async def _accept(self) -> None:
        while True:
            try:
                connected, _ = await self._loop.sock_accept(self._bound)
            except OSError as e:
                if e.errno not in _NO_ROOM:
                    continue  # who connected is gone already
                await asyncio.sleep(_BREATH)
                continue
            if self._room() <= len(self._shaking):
                connected.close()
                continue
            if len(self._shaking) >= _HANDSHAKES:
                self._let_go(next(iter(self._shaking)))
            task = self._loop.create_task(self._shake_hands(connected))
            self._shaking[task] = connected
            task.add_done_callback(lambda done: self._shaking.pop(done, None))
            await asyncio.sleep(0)  # what is accepted at once would otherwise hold up everybody who is connected

    async def _shake_hands(self, connected: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._protocol,
                connected,
                ssl=self._context.now(),
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=_GOODBYE_SECONDS,
            )
        except OSError:  # as ssl.SSLError and TimeoutError are
            self._failed()

    def _let_go(self, task: asyncio.Task[None]) -> None:
        connected = self._shaking.pop(task)
        task.add_done_callback(lambda _: connected.close())  # it may end before a transport had it
        task.cancel()
        self._failed()
