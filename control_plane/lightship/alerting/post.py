"""Alerting: one POST over HTTP or HTTPS, in a time that is bounded whatever the other side does.

Rules:
* every way to fail has a code, and no message holds a secret or what the receiver answered;
* no redirect is followed; a certificate is checked, always;
* the whole of it ends at the deadline: a receiver that sends a byte now and then gains nothing by it.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lightship_agent.contract.codes import AlertError, SettingsError


@dataclass(frozen=True)
class Address:
    """Where to; made by `parse`."""

    host: str
    port: int
    path: str
    tls: bool

    @property
    def near(self) -> bool:
        """Whether it is this machine."""
        return is_near(self.host)


def parse(setting: str, url: str) -> Address:
    """The parts of a URL.

    Raises:
        SettingsError: settings.invalid.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.fragment:
        message = f"{setting}: expected https://HOST[:PORT]/PATH without user and password."
        raise SettingsError("settings.invalid", message)
    tls = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(parts.hostname, port or (443 if tls else 80), path, tls)


def is_near(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def trust(authorities: str) -> ssl.SSLContext:
    """What receivers' certificates are checked against: the system's authorities, and those in a file.

    Raises:
        SettingsError: settings.invalid.
    """
    context = ssl.create_default_context()
    if authorities:
        try:
            context.load_verify_locations(cafile=Path(authorities).expanduser())
        except OSError as e:  # ssl.SSLError is one
            message = f"alert_ca: {authorities} is no readable PEM file of certificates: {e.strerror or e}."
            raise SettingsError("settings.invalid", message) from e
    return context


def post(to: Address, headers: Mapping[str, str], body: bytes, context: ssl.SSLContext, timeout: float) -> None:
    """Post, and see a status 2xx.

    Raises:
        AlertError: alert.unreachable, alert.slow, alert.certificate, alert.status, alert.protocol.
    """
    kind = http.client.HTTPSConnection if to.tls else http.client.HTTPConnection
    connection = kind(to.host, to.port)  # of a socket that we open and guard ourselves
    with contextlib.closing(connection), explained(f"{to.host}:{to.port}", timeout) as deadline:
        raw = socket.create_connection((to.host, to.port), timeout)
        connection.sock = raw
        deadline.guard(lambda: connection.sock)
        if to.tls:
            connection.sock = tls = context.wrap_socket(raw, server_hostname=to.host, do_handshake_on_connect=False)
            tls.do_handshake()
        connection.request("POST", to.path, body, {"content-type": "application/json", **headers})
        status = connection.getresponse().status
    if not 200 <= status < 300:
        remedy = {401: "Look at its secret.", 403: "Look at its secret.", 404: "Look at its address."}.get(status, "")
        raise AlertError("alert.status", f"{to.host}:{to.port} answered with {status}.", remedy=remedy)


class Deadline:
    """Ends what waits on a socket when the time is over."""

    def __init__(self, timeout: float) -> None:
        """Nothing is guarded yet; the time runs."""
        self.over = False
        self._socket: Callable[[], socket.socket | None] = lambda: None
        self._timer = threading.Timer(timeout, self._end)
        self._timer.daemon = True
        self._timer.start()

    def guard(self, sock: Callable[[], socket.socket | None]) -> None:
        """End the waiting on what this gives at that time."""
        self._socket = sock
        if self.over:
            self._end()

    def cancel(self) -> None:
        """It is done."""
        self._timer.cancel()

    def _end(self) -> None:
        self.over = True
        with contextlib.suppress(OSError):
            waiting = self._socket()
            if waiting is not None:
                # Of a TLS socket, too, only the system's own: closing TLS politely would wait.
                socket.socket.shutdown(waiting, socket.SHUT_RDWR)


@contextlib.contextmanager
def explained(where: str, timeout: float) -> Iterator[Deadline]:
    """Say what errors of sockets, TLS and HTTP mean; the deadline runs inside."""
    deadline = Deadline(timeout)
    late = AlertError("alert.slow", f"{where} did not take it within {timeout:g} s.")
    try:
        yield deadline
    except ssl.SSLCertVerificationError as e:
        message = f"{where} shows a certificate that is not trusted: {e.verify_message}."
        raise AlertError("alert.certificate", message, remedy="Name its authority with alert_ca.") from e
    except TimeoutError as e:
        raise late from e
    except ssl.SSLError as e:
        if deadline.over:
            raise late from e
        raise AlertError("alert.protocol", f"{where} does not speak TLS as expected: {e.reason}.") from e
    except socket.gaierror as e:
        raise AlertError("alert.unreachable", f"{where}: the name is not known: {e.strerror}.") from e
    except OSError as e:
        if deadline.over:
            raise late from e
        raise AlertError("alert.unreachable", f"{where} can't be reached: {e.strerror or type(e).__name__}.") from e
    except http.client.HTTPException as e:
        if deadline.over:
            raise late from e
        raise AlertError("alert.protocol", f"{where} does not speak HTTP as expected: {type(e).__name__}.") from e
    finally:
        deadline.cancel()
