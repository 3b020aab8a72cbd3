"""API: how the operator API listens: with or without TLS, its reads open or not. Decided here, from the settings alone.

Rules:
* on an address that others can reach, it is HTTPS, and everything but the health check needs a token;
* plain HTTP there has to be asked for by its name, `insecure`, and is said at every start;
* on loopback it is plain HTTP, and in the environment `development` reading needs no token: whoever has an account on
  this machine may look. Behind a proxy that others can reach, set `api_reads = "token"`.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from lightship.settings import Settings
from lightship_agent.contract.codes import SettingsError

DEVELOPMENT = "development"


@dataclass(frozen=True)
class Listener:
    """How to listen."""

    tls: bool
    open_reads: bool
    certificate: Path | None  # None: of the built-in CA
    key: Path | None
    notice: str

    @property
    def scheme(self) -> str:
        """Https or http."""
        return "https" if self.tls else "http"


def operator_listener(settings: Settings) -> Listener:
    """How the operator API shall listen.

    Raises:
        SettingsError: settings.invalid.
    """
    loopback = is_loopback(settings.api_host)
    given = bool(settings.api_cert), bool(settings.api_key)
    if given[0] != given[1]:
        raise SettingsError("settings.invalid", "api_cert and api_key go together; only one of them is set.")
    if given[0] and settings.api_tls == "insecure":
        raise SettingsError("settings.invalid", "api_tls is insecure, and api_cert is set: which of the two?")
    if settings.api_reads == "open" and not loopback:
        message = f"api_reads is open and api_host is {settings.api_host}: everybody who reaches it could read."
        raise SettingsError("settings.invalid", message, remedy="Open reads are for loopback only.")
    tls = settings.api_tls == "on" or given[0] or (settings.api_tls == "auto" and not loopback)
    wanted = settings.api_reads
    open_reads = wanted == "open" or (wanted == "auto" and loopback and settings.environment == DEVELOPMENT)
    return Listener(
        tls=tls,
        open_reads=open_reads,
        certificate=_readable("api_cert", settings.api_cert),
        key=_readable("api_key", settings.api_key),
        notice=_notice(settings.api_host, tls=tls, loopback=loopback, open_reads=open_reads),
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`. A name other than localhost is not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _readable(name: str, path: str) -> Path | None:
    if not path:
        return None
    try:
        Path(path).expanduser().read_bytes()
    except OSError as e:
        raise SettingsError("settings.invalid", f"{name}: can't read {path}: {e.strerror}.") from e
    return Path(path).expanduser()


def _notice(host: str, *, tls: bool, loopback: bool, open_reads: bool) -> str:
    if not tls and not loopback:
        return f"INSECURE: the operator API is plain HTTP on {host}; tokens can be read on the way."
    if open_reads:
        return "Whoever is on this machine may read the dashboard; what changes something needs an API token."
    return "The dashboard and the operator API need an API token."
