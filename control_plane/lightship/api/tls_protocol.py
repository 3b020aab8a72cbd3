"""API: a uvicorn protocol that tells the application who is at the other end of the TLS connection.

Rules: the peer's common name and key come from the certificate that the handshake verified against our CA, and from
nothing else; they are put into the ASGI scope under `extensions["lightship.peer"]`.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lightship.fleet.ca import spki_digest

EXTENSION = "lightship.peer"


@dataclass(frozen=True)
class Peer:
    """A verified client certificate."""

    name: str
    spki: str


class PeerProtocol(HttpToolsProtocol):
    """HTTP over TLS with the peer in the scope."""

    _peer: Peer | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note who connected, once per connection."""
        super().connection_made(transport)
        self._peer = _peer_of(transport.get_extra_info("ssl_object"))

    def on_message_begin(self) -> None:
        """Put the peer into each request's scope."""
        super().on_message_begin()
        extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
        if self._peer is not None:
            extensions[EXTENSION] = self._peer


def _peer_of(connection: ssl.SSLObject | None) -> Peer | None:
    der = connection.getpeercert(binary_form=True) if connection is not None else None
    if not der:
        return None
    certificate = x509.load_der_x509_certificate(der)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        return None
    return Peer(str(names[0].value), spki_digest(certificate.public_key()))
