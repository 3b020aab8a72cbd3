"""Serving: the faces in a thread of their own: HTTP on TCP, on a Unix socket, or on both, and frames on another socket.

Rules:
* addresses are taken first: a port in use is said before anything else has started;
* a Unix socket is 0660 before it listens: the file's owner and group are the permission;
* what is reached from other machines is secured, or refused at start (see `access`);
* stopping lets requests that are inside finish, within a bound.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import socket
import ssl
import stat
import threading
from pathlib import Path
from typing import Any, Final

from lightship_agent.contract.codes import SettingsError

from .access import Access, Door, Watched
from .connections import Face, Limits, Server, turns
from .framed import FrameConnection
from .frames import LIMITS as FRAME_LIMITS
from .frames import FrameFace
from .http1 import Connection
from .tls import TlsListener

_START_SECONDS: Final = 30.0
_GRACE_SECONDS: Final = 10
_BACKLOG: Final = 512
#: Threads for heavy requests: onnxruntime computes without the interpreter's lock, two keep two cores busy.
_WORKERS: Final = 2


class HttpServer:
    """Serves a face until it is stopped.

    Args:
        face: what answers.
        host: TCP address to bind; used only with a port.
        port: TCP port, 0 for any free one, None for no TCP.
        unix_socket: path of a Unix socket, None for none.
        frames: what answers frames, with `frames_socket`.
        frames_socket: path of the Unix socket on which frames are spoken, None for none.
        limits: what clients may take.
        access: what is asked of clients over TCP.
    """

    def __init__(
        self,
        face: Face,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        unix_socket: Path | None = None,
        frames: FrameFace | None = None,
        frames_socket: Path | None = None,
        limits: Limits | None = None,
        access: Access | None = None,
    ) -> None:
        if port is None and unix_socket is None:
            raise SettingsError("settings.missing", "A port or a Unix socket is needed to serve on.")
        self._face = face
        self._limits = limits or Limits()
        self._access = access or Access()
        self._door: Door | None = None
        self._tls: Watched[ssl.SSLContext] | None = None
        self._host, self._port, self._path = host, port, unix_socket
        self._frames, self._frames_path = frames, frames_socket
        self._sockets: list[socket.socket] = []
        self._frames_bound: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port that are bound, None without TCP."""
        for bound in self._sockets:
            if bound.family != socket.AF_UNIX:
                host, port = bound.getsockname()[:2]
                return host, port
        return None

    @property
    def is_running(self) -> bool:
        """Whether the thread is alive and accepting."""
        return self._thread is not None and self._thread.is_alive()

    def bind(self) -> None:
        """Take the addresses without serving yet; `start` does it when it was not done.

        Raises:
            SettingsError: settings.port-taken, settings.exposed, settings.invalid.
        """
        if self._sockets:
            return
        try:
            if self._port is not None:
                where = _resolve(self._host, self._port)
                self._access.check_exposure(where[4][0])
                self._door = self._access.door(where[4][0])
                self._tls = self._access.tls.watched() if self._access.tls else None
                self._sockets.append(_bind_tcp(where))
            if self._path is not None:
                self._sockets.append(_bind_unix(self._path))
            if self._frames_path is not None:
                self._frames_bound = _bind_unix(self._frames_path)
        except SettingsError:
            self._close_sockets()
            raise

    def start(self) -> None:
        """Serve from now on; returns when connections are accepted.

        Raises:
            SettingsError: settings.port-taken, settings.exposed, settings.invalid.
        """
        self.bind()
        self._thread = threading.Thread(target=self._run, name="lightship-http", daemon=True)
        self._thread.start()
        if not self._ready.wait(_START_SECONDS) or self._failure:
            failure = self._failure
            self.stop()
            raise SettingsError("settings.invalid", f"The HTTP server did not start: {failure}.") from failure

    def stop(self) -> None:
        """Accept nothing more, let running requests finish, and give the addresses back."""
        if self._thread and self._loop is not None and self._stopped is not None:
            with contextlib.suppress(RuntimeError):  # it has stopped by itself
                self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(_GRACE_SECONDS + 5)
        self._thread = self._loop = self._stopped = None
        self._ready.clear()
        self._close_sockets()

    def _run(self) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._serve())
        except BaseException as e:  # noqa: BLE001 - handed to the thread that called start()
            self._failure = e
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        pool = concurrent.futures.ThreadPoolExecutor(_WORKERS, thread_name_prefix="lightship-infer")
        loop.set_default_executor(pool)
        server: Server[Face] = Server(self._face, self._limits)
        self._loop, self._stopped = loop, asyncio.Event()
        # Copies: a server closes what it is given, and `address` still wants the originals.
        copies = [bound.dup() for bound in self._sockets]
        listeners: list[asyncio.Server | TlsListener] = [await self._listen(server, copy) for copy in copies]
        framed = None
        if self._frames_bound is not None and self._frames is not None:
            framed = Server(self._frames, FRAME_LIMITS)
            copies.append(self._frames_bound.dup())
            listeners.append(await _listen_frames(framed, copies[-1]))
        self._ready.set()
        await self._stopped.wait()
        # Not closed yet: who was accepted in this very moment would be lost with the listener, and never closed.
        for copy in copies:
            loop.remove_reader(copy)
        await turns(5)
        for listener in listeners:
            listener.close()
        await asyncio.gather(*(s.drain(_GRACE_SECONDS) for s in (server, framed) if s is not None))
        # Asked in a thread, and still not answered: nobody waits for it any more.
        pool.shutdown(wait=False, cancel_futures=True)

    async def _listen(self, server: Server[Face], bound: socket.socket) -> asyncio.Server | TlsListener:
        loop = asyncio.get_running_loop()
        if bound.family == socket.AF_UNIX:
            return await loop.create_unix_server(lambda: Connection(server), sock=bound, backlog=_BACKLOG)
        protocol = functools.partial(Connection, server, self._door)
        if self._tls is None:
            return await loop.create_server(protocol, sock=bound, backlog=_BACKLOG)
        return TlsListener(bound, self._tls, protocol, room=server.tls_room, failed=server.handshake_failed)

    def _close_sockets(self) -> None:
        ours = any(bound.family == socket.AF_UNIX for bound in self._sockets)
        for bound in self._sockets:
            bound.close()
        self._sockets = []
        if ours and self._path is not None:
            self._path.unlink(missing_ok=True)
        if self._frames_bound is not None and self._frames_path is not None:
            self._frames_bound.close()
            self._frames_bound = None
            self._frames_path.unlink(missing_ok=True)


async def _listen_frames(server: Server[FrameFace], bound: socket.socket) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    return await loop.create_unix_server(lambda: FrameConnection(server), sock=bound, backlog=_BACKLOG)


_Where = tuple[Any, Any, int, str, tuple[Any, ...]]  # as socket.getaddrinfo says it


def _resolve(host: str, port: int) -> _Where:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise SettingsError("settings.invalid", f"{host!r} is not an address to serve on: {e}.") from e


def _bind_tcp(where: _Where) -> socket.socket:
    family, kind, protocol, _, address = where
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as e:
        bound.close()
        place = f"{address[0]}:{address[1]}"
        raise _refusal(place, e) from e
    return bound


def _bind_unix(path: Path) -> socket.socket:
    _clear_stale(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(str(path))
        # Nobody can connect between bind and listen, so the mode is right before the first chance.
        path.chmod(0o660)
        bound.listen(_BACKLOG)
    except OSError as e:
        bound.close()
        raise _refusal(str(path), e) from e
    return bound


def _clear_stale(path: Path) -> None:
    """Remove a socket that a dead process left; never a live one, and never another kind of file."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise SettingsError("settings.invalid", f"{path} exists and is not a socket.")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink()
                return
        raise SettingsError("settings.port-taken", f"Another program listens on {path}.", remedy="Stop it first.")


def _refusal(where: str, error: OSError) -> SettingsError:
    if error.errno == errno.EADDRINUSE:
        message = f"{where} is in use by another program."
        return SettingsError("settings.port-taken", message, remedy="Stop it, or choose another port.")
    return SettingsError("settings.invalid", f"{where} can't be bound: {error.strerror or error}.")
