"""Fleet: the doors of a broker that is being checked: how TLS is made, and which doors are open without it.

Rules: nothing here says more than CONNECT, and nothing is believed: these are doors that should be shut.
"""

from __future__ import annotations

import socket
import ssl
import warnings
from collections.abc import Iterable
from typing import Final

from lightship_agent.contract.codes import SettingsError

SECONDS: Final = 3.0
#: CONNECT of MQTT 3.1.1 with a clean session and no name.
_HELLO: Final = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x1e\x00\x00"
_CONNACK: Final = 0x20


def context(ca: str | None, certificate: tuple[str, str] | None = None) -> ssl.SSLContext:
    """TLS with that authority, or those of the system; and a certificate and its key.

    Raises:
        SettingsError: settings.invalid.
    """
    try:
        found = ssl.create_default_context(cafile=ca)
        if certificate is not None:
            found.load_cert_chain(*certificate)
    except (OSError, ssl.SSLError) as e:
        message = f"Can't use {', '.join(filter(None, (ca, *(certificate or ()))))}: {e}."
        raise SettingsError("settings.invalid", message, remedy="Each is a PEM file; the key is not encrypted.") from e
    return found


def speaks_old_tls(host: str, port: int, certificate: tuple[str, str] | None) -> bool:
    """Whether a version before 1.2 is agreed to."""
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings():
        # They are deprecated, and that is the question.
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    if certificate is not None:
        old.load_cert_chain(*certificate)
    try:
        with socket.create_connection((host, port), SECONDS) as plain, old.wrap_socket(plain):
            return True
    except OSError:
        return False


def plain_ports(host: str, ports: Iterable[int]) -> tuple[int, ...]:
    """Those that answer MQTT without TLS."""
    return tuple(port for port in dict.fromkeys(ports) if _answers(host, port))


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), SECONDS) as connection:
            connection.settimeout(SECONDS)
            connection.sendall(_HELLO)
            return connection.recv(1)[:1] == bytes((_CONNACK,))
    except OSError:
        return False
