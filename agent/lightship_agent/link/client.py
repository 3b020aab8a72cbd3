"""Link: HTTPS to the control plane, over mutual TLS.

Rules: no redirects, no compression, bounded bodies, absolute time limits; every foreign error becomes a LinkError
or says which trust failed.
"""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from typing import Final

import httpx
import msgspec

from lightship_agent.contract.codes import EnrolError, LinkError
from lightship_agent.contract.device_api import Paths, RenewReply, RenewRequest

from .identity import Identity

MAX_BODY: Final = 1024 * 1024  # bytes


@dataclass(frozen=True)
class Desired:
    """What the server said about this device: an envelope, if any, and how far it has stored our reports."""

    envelope: bytes | None
    acked_epoch: str
    acked_seq: int


def link_error(e: httpx.HTTPError | ssl.SSLError | OSError, url: str) -> LinkError:
    """The LinkError that says what a transport error means."""
    kind = "link.slow" if isinstance(e, httpx.TimeoutException) else "link.unreachable"
    return LinkError(kind, f"{url}: {type(e).__name__}: {e}.")


def server_ca(server: str, pin: str) -> bytes:
    """The control plane's CA certificate, accepted only if its public key has the digest in the join token.

    Raises:
        LinkError: link.unreachable, link.status.
        EnrolError: enrol.pin.
    """
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    # Trust comes from the pin below, not from this first connection.
    unverified.verify_mode = ssl.CERT_NONE
    url = f"{server}{Paths.CA}"
    try:
        reply = httpx.get(url, verify=unverified, timeout=15.0)
    except (httpx.HTTPError, OSError) as e:
        raise link_error(e, url) from e
    _expect(reply, 200)
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        key = x509.load_pem_x509_certificate(reply.content).public_key()
    except ValueError as e:
        raise EnrolError("enrol.pin", f"{url} did not answer with a certificate.") from e
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    found = hashlib.sha256(spki).hexdigest()
    if found != pin:
        message = f"The token names CA {pin[:16]}…, the server shows {found[:16]}…."
        raise EnrolError("enrol.pin", message, remedy="Check the server address, or ask for a new token.")
    return reply.content


class ControlPlane:
    """The device API, as this device sees it."""

    def __init__(self, identity: Identity) -> None:
        """Open a client with the device's certificate."""
        self._identity = identity
        self.server = identity.info.server
        self.http = self._open()

    def _open(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.server,
            verify=self._identity.tls_context(),
            timeout=httpx.Timeout(15.0),
            follow_redirects=False,
            headers={"Accept-Encoding": "identity"},
            limits=httpx.Limits(max_connections=4, keepalive_expiry=30.0),
        )

    def reopen(self) -> None:
        """Use the certificate that is on disk now; requests under way on old connections may fail and are repeated."""
        old, self.http = self.http, self._open()
        old.close()

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def desired(self, seen_etag: str = "") -> Desired:
        """The current assignment envelope, unless it is the one we have seen.

        Raises:
            LinkError: link.unreachable, link.slow, link.status.
            EnrolError: enrol.revoked.
        """
        headers = {"If-None-Match": f'"{seen_etag}"'} if seen_etag else {}
        reply = self._request("GET", Paths.ASSIGNMENT, headers=headers)
        _expect(reply, 200, 204, 304)
        epoch, _, seq = reply.headers.get("lightship-acked", ":0").partition(":")
        envelope = reply.content if reply.status_code == 200 else None
        return Desired(envelope, epoch, int(seq) if seq.isdigit() else 0)

    def post_telemetry(self, packed: bytes) -> None:
        """Deliver an envelope over HTTPS, for sites where MQTT is blocked.

        Raises:
            LinkError: link.unreachable, link.slow, link.status.
        """
        _expect(self._request("POST", Paths.TELEMETRY, content=packed), 200, 202)

    def renew(self, csr: bytes) -> bytes:
        """A fresh certificate chain for a fresh key.

        Raises:
            LinkError: link.unreachable, link.slow, link.status.
            EnrolError: enrol.revoked.
        """
        reply = self._request("POST", Paths.RENEW, content=msgspec.json.encode(RenewRequest(csr=csr.decode())))
        _expect(reply, 200)
        return msgspec.json.decode(reply.content, type=RenewReply).chain.encode()

    def reachable(self) -> bool:
        """Whether the control plane answers us at all."""
        try:
            return self._request("GET", Paths.PING).status_code == 200
        except (LinkError, EnrolError):
            return False

    def _request(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, content: bytes | None = None
    ) -> httpx.Response:
        try:
            reply = self.http.request(method, path, headers=headers, content=content)
        except (httpx.HTTPError, OSError) as e:
            raise link_error(e, f"{self.server}{path}") from e
        if reply.status_code == 403:
            raise EnrolError("enrol.revoked", f"The control plane refuses this device: {_said(reply)}")
        return reply


def _said(reply: httpx.Response) -> str:
    return reply.text[:500]


def _expect(reply: httpx.Response, *statuses: int) -> None:
    if reply.status_code not in statuses:
        message = f"{reply.request.url}: expected {statuses}, found {reply.status_code}: {_said(reply)}"
        raise LinkError("link.status", message)
    if len(reply.content) > MAX_BODY:
        raise LinkError("link.status", f"{reply.request.url}: answer of {len(reply.content)} bytes is too large.")
