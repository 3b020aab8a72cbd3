"""Link: HTTPS to the control plane, over mutual TLS.

Rules:
* httpx is loaded by the first request, when the committed model answers already;
* no redirects, no compression; a body is bounded while it is read, and has an absolute deadline;
* every foreign error becomes a LinkError, or says which trust failed;
* the first request that is answered with a renewed certificate confirms it, and one that is refused takes it back;
* of what the pinned authority sends only the pinned certificate is kept: whatever else came along is not trusted.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import msgspec

from lightship_agent.contract.codes import EnrolError, LinkError, SettingsError, WireError
from lightship_agent.contract.device_api import (
    ACKED_HEADER,
    ALSO_ACKED_HEADER,
    ASKED_HEADER,
    INSTANCE_HEADER,
    Paths,
    RenewReply,
    RenewRequest,
)
from lightship_agent.contract.messages import Asking, Command
from lightship_agent.contract.wire import decode

from .identity import Identity, confirm, take_back

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

MAX_BODY: Final = 1024 * 1024  # bytes
#: What msgspec raises for bytes that are no JSON of the wanted kind.
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_T = TypeVar("_T")
_GAP_SECONDS: Final = 15.0  # of silence
_ANSWER_SECONDS: Final = 60.0  # for a whole body


class Desired(msgspec.Struct, frozen=True):
    """What the server said about this device: an envelope, if any, and how far it has stored our reports."""

    envelope: bytes | None
    acked: tuple[Acknowledged, ...] = ()
    date: str = ""  # the answer's Date header


class Acknowledged(NamedTuple):
    """How far the server has stored our reports of an epoch."""

    epoch: str
    seq: int


class Stored(NamedTuple):
    """What became of an envelope: why it was not stored, or ""; what its epoch misses; how far each epoch is stored."""

    code: str
    missing: tuple[tuple[int, int], ...]
    acked: tuple[Acknowledged, ...]


class Reply(msgspec.Struct, frozen=True):
    """An answer, read whole and within bounds."""

    url: str
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def said(self) -> str:
        """The beginning of the body, for error messages."""
        return self.body[:500].decode(errors="replace")

    @property
    def acknowledged(self) -> tuple[Acknowledged, ...]:
        """What the answer says about our reports; nothing, where it says nothing sensible."""
        said = [self.headers.get(ACKED_HEADER, ""), *self.headers.get(ALSO_ACKED_HEADER, "")[:500].split(",")]
        parts = [one.strip().partition(":") for one in said]
        return tuple(Acknowledged(epoch, int(seq)) for epoch, _, seq in parts if seq.isdecimal() and len(seq) < 17)

    @property
    def asked(self) -> tuple[tuple[str, Command], ...]:
        """Commands that came along; none, where what came is none."""
        said = self.headers.get(ASKED_HEADER, "")
        try:
            return decode(base64.urlsafe_b64decode(said), Asking, max_bytes=16_384).asked if said else ()
        except (ValueError, WireError) as e:
            log.warning("commands in an answer can't be understood: %s", e)
            return ()

    def refusal(self) -> EnrolError | LinkError:
        """What a refusal says, in the server's words where these are ours."""
        try:
            said = msgspec.json.decode(self.body, type=dict[str, str])
            return EnrolError(said["code"], said["error"])
        except (*UNREADABLE, KeyError, AssertionError):
            return LinkError("link.status", f"{self.url}: expected status 200, found {self.status}: {self.said}")

    def read(self, kind: type[_T]) -> _T:
        """The body, as JSON of that kind.

        Raises:
            LinkError: link.status.
        """
        try:
            return msgspec.json.decode(self.body, type=kind)
        except UNREADABLE as e:
            raise LinkError("link.status", f"{self.url}: the answer is not a {kind.__name__}: {e}.") from e

    def expect(self, *statuses: int) -> Reply:
        """This reply, if its status is one of these.

        Raises:
            LinkError: link.status.
        """
        if self.status not in statuses:
            message = f"{self.url}: expected status {' or '.join(map(str, statuses))}, found {self.status}: {self.said}"
            raise LinkError("link.status", message)
        return self


class _TelemetryReply(msgspec.Struct):
    code: str = ""
    missing: tuple[tuple[int, int], ...] = ()


def ask(
    http: httpx.Client, method: str, url: str, *, headers: dict[str, str] | None = None, content: bytes | None = None
) -> Reply:
    """Send a request and read its answer, at most `MAX_BODY` bytes within a minute, whatever is sent.

    Raises:
        LinkError: link.unreachable, link.slow, link.status.
    """
    import httpx

    deadline = time.monotonic() + _ANSWER_SECONDS
    body = bytearray()
    try:
        with http.stream(method, url, headers=headers, content=content) as response:
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > MAX_BODY:
                    raise LinkError("link.status", f"{url}: the answer is larger than {MAX_BODY} bytes.")
                if time.monotonic() > deadline:
                    raise LinkError("link.slow", f"{url}: no whole answer within {_ANSWER_SECONDS:.0f} s.")
            return Reply(str(response.request.url), response.status_code, response.headers, bytes(body))
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as e:
        raise link_error(e, url) from e


def open_client(context: ssl.SSLContext, base_url: str = "") -> httpx.Client:
    """An HTTP client with our rules, over that TLS context."""
    import httpx

    return httpx.Client(
        base_url=base_url,
        verify=context,
        timeout=httpx.Timeout(_GAP_SECONDS),
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},
        limits=httpx.Limits(max_connections=4, keepalive_expiry=30.0),
    )


def check_server(server: str) -> str:
    """The address of a control plane, which is always https: over anything else a token would be read by all.

    Raises:
        SettingsError: settings.invalid.
    """
    address = server.strip().rstrip("/")
    if not address.startswith("https://") or not address.removeprefix("https://"):
        raise SettingsError("settings.invalid", f"server: expected https://host:port, found {server[:200]!r}.")
    return address


def link_error(e: httpx.HTTPError | httpx.InvalidURL | OSError, url: str) -> LinkError:
    """The LinkError that says what a transport error means."""
    import httpx

    kind = "link.slow" if isinstance(e, httpx.TimeoutException) else "link.unreachable"
    return LinkError(kind, f"{url}: {type(e).__name__}: {e}.")


def server_ca(server: str, pin: str) -> bytes:
    """The control plane's CA certificate, accepted only if its public key has the digest in the join token.

    Raises:
        LinkError: link.unreachable, link.slow, link.status.
        EnrolError: enrol.pin.
    """
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    # Trust comes from the pin below, not from this first connection.
    unverified.verify_mode = ssl.CERT_NONE
    url = f"{server}{Paths.CA}"
    with open_client(unverified) as http:
        reply = ask(http, "GET", url).expect(200)
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        certificate = x509.load_pem_x509_certificate(reply.body)
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as e:
        raise EnrolError("enrol.pin", f"{url} did not answer with a certificate.") from e
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    found = hashlib.sha256(spki).hexdigest()
    if found != pin:
        message = f"The token names CA {pin[:16]}…, the server shows {found[:16]}…."
        raise EnrolError("enrol.pin", message, remedy="Check the server address, or ask for a new token.")
    # Not what was sent, but what was pinned: a certificate smuggled in behind it would be trusted as well.
    return certificate.public_bytes(serialization.Encoding.PEM)


class ControlPlane:
    """The device API, as this device sees it."""

    def __init__(self, identity: Identity, instance: str = "") -> None:
        """Open a client with the device's certificate.

        Args:
            identity: who we are.
            instance: what this run of the agent is called, `<16 hexadecimal digits>:<boot>`; empty for a program that
                is none, such as a command beside the agent.

        Raises:
            StorageError: storage.corrupt.
        """
        self._identity = identity
        self._headers = {INSTANCE_HEADER: instance} if instance else {}
        #: The other end hung up in the handshake or after it, as a server does that finds our certificate too old.
        self.hung_up = False
        #: Told of each command that came with the answer to a poll; it must not block.
        self.on_asked: Callable[[str, Command], object] = lambda _verb, _command: None
        self.server = identity.info.server
        self._retired: list[httpx.Client] = []
        self._context = identity.tls_context()
        self._opening = threading.Lock()
        self._http: httpx.Client | None = None

    @property
    def http(self) -> httpx.Client:
        """The client, from its first use on."""
        with self._opening:
            if self._http is None:
                self._http = self._open(self._context)
            return self._http

    def _open(self, context: ssl.SSLContext) -> httpx.Client:
        http = open_client(context, self.server)
        http.headers.update(self._headers)
        return http

    def reopen(self) -> None:
        """Use the certificate that is on disk now; what is under way on old connections goes on there.

        Raises:
            StorageError: storage.corrupt; the present certificate stays in use.
        """
        fresh = self._open(self._identity.tls_context())
        # A download in another thread may still hold the present client; the one before it has had days to finish.
        while self._retired:
            self._retired.pop().close()
        with self._opening:
            if self._http is not None:
                self._retired.append(self._http)
            self._http = fresh
        self.hung_up = False

    def close(self) -> None:
        """Close the connections."""
        for http in (*self._retired, self._http):
            if http is not None:
                http.close()

    def desired(self, seen_etag: str = "") -> Desired:
        """The current assignment envelope, unless it is the one we have seen.

        Raises:
            LinkError: link.unreachable, link.slow, link.status.
            EnrolError: enrol.revoked.
        """
        headers = {"If-None-Match": f'"{seen_etag}"'} if seen_etag else {}
        reply = self._request("GET", Paths.ASSIGNMENT, headers=headers).expect(200, 204, 304)
        envelope = reply.body if reply.status == 200 else None
        for verb, command in reply.asked:
            self.on_asked(verb, command)
        return Desired(envelope, reply.acknowledged, date=reply.headers.get("date", ""))

    def post_telemetry(self, packed: bytes) -> Stored:
        """Deliver an envelope over HTTPS, for sites where MQTT is blocked; what became of it.

        Raises:
            LinkError: link.unreachable, link.slow, link.status.
        """
        reply = self._request("POST", Paths.TELEMETRY, content=packed).expect(200, 202)
        try:
            said = msgspec.json.decode(reply.body, type=_TelemetryReply)
        except UNREADABLE:
            said = _TelemetryReply()  # what is acknowledged is in the head
        return Stored(said.code, said.missing, reply.acknowledged)

    def post_reply(self, packed: bytes) -> None:
        """Deliver the answer to a command.

        Raises:
            LinkError: link.unreachable, link.slow, link.status.
        """
        self._request("POST", Paths.REPLY, content=packed).expect(200, 202)

    def renew(self, csr: bytes) -> bytes:
        """A fresh certificate chain for a fresh key.

        Raises:
            LinkError: link.unreachable, link.slow, link.status.
            EnrolError: enrol.revoked.
        """
        content = msgspec.json.encode(RenewRequest(csr=csr.decode()))
        reply = self._request("POST", Paths.RENEW, content=content).expect(200)
        try:
            return reply.read(RenewReply).chain.encode()
        except UnicodeEncodeError as e:
            raise LinkError("link.status", f"{reply.url}: the answer is not a renewal: {e}.") from e

    def reachable(self) -> bool:
        """Whether the control plane answers us at all."""
        try:
            return self._request("GET", Paths.PING).status == 200
        except (LinkError, EnrolError):
            return False

    def _request(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, content: bytes | None = None
    ) -> Reply:
        try:
            reply = ask(self.http, method, path, headers=headers, content=content)
        except LinkError as e:
            import httpx

            # Whether it sends the alert that says why depends on the server; many just close.
            lost = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
            self.hung_up = isinstance(e.__cause__, lost) or "certificate expired" in str(e)
            raise
        self.hung_up = False
        if reply.status == 403:
            code = "enrol.pending" if b'"enrol.pending"' in reply.body else "enrol.revoked"
            raise EnrolError(code, f"The control plane refuses this device: {reply.said}")
        if self._identity.unconfirmed:
            self._settle_pair(reply)
        return reply

    def _settle_pair(self, reply: Reply) -> None:
        if reply.status < 400:
            confirm(self._identity)
        elif reply.status == 401 and take_back(self._identity):
            self.reopen()
