"""Serving: who may ask over TCP: TLS, tokens, and the pages of browsers that may not.

    loopback          open; a token where the site wants one
    wider             TLS, and a token or a client's certificate; anything less is refused at start
    a Unix socket     whoever the file's mode lets in; nothing here is asked of them

Rules:
* what is configured is required: tokens and certificates together mean both;
* of a token only its sha256 is kept, and all of them are compared, each in the same time;
* a page in a browser on this device is no program of this device: what names a foreign host, or comes from a page,
  is refused, so that no site can predict, or label predictions, through whoever reads it (DNS rebinding, forms);
* whether the process lives and is ready is told without a token, as probes and balancers have none; nothing else is;
* a token file or a certificate that changes counts from the next look on; one that became unreadable does not, and the
  last good one stays.

Sources: RFC 6750, RFC 9110 §7.2, Fetch Metadata.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Generic, TypeVar

import msgspec

from lightship_agent.contract.codes import LightshipError, ServingError, SettingsError
from lightship_agent.files import write_durably

T = TypeVar("T")

#: What anybody may ask.
OPEN: Final = frozenset({b"/v2/health/live", b"/v2/health/ready"})
PREFIX: Final = "lsa_"
_LOOK_SECONDS: Final = 1.0
_MAX_TOKENS: Final = 100
_TOKEN_LINE: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+([0-9a-f]{64})")
_HOST: Final = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{0,5})?")
_LOG: Final = logging.getLogger("lightship.serving")


class Watched(Generic[T]):
    """What was made of some files, made anew when they change.

    Args:
        paths: the files.
        make: reads them; raises LightshipError where they are no good.
        clock: monotonic seconds.
    """

    def __init__(
        self, paths: tuple[Path, ...], make: Callable[[], T], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Read the files, once.

        Raises:
            SettingsError: settings.invalid.
        """
        self._paths, self._make, self._clock = paths, make, clock
        self._seen = self._marks()
        self._value = make()
        self._looked = clock()

    def now(self) -> T:
        """The value; the files are looked at once a second at most."""
        if self._clock() - self._looked >= _LOOK_SECONDS:
            self._looked = self._clock()
            marks = self._marks()
            if marks != self._seen:
                try:
                    self._value = self._make()
                    _LOG.info("read anew: %s", ", ".join(str(p) for p in self._paths))
                except LightshipError as e:
                    _LOG.warning("%s: %s What was read before still counts.", e.code, e)
                self._seen = marks
        return self._value

    def _marks(self) -> list[tuple[int, int, int] | None]:
        return [_mark(path) for path in self._paths]


class Door:
    """What every request over TCP passes, before its body is read.

    Args:
        tokens: a file of tokens, as `add_token` makes it; None asks for none.
        hosts: names this agent answers to, beside those of loopback; used only on loopback.
        loopback: whether it is bound there.
    """

    def __init__(
        self, *, tokens: Path | None = None, hosts: frozenset[str] = frozenset(), loopback: bool = True
    ) -> None:
        """Read the tokens.

        Raises:
            SettingsError: settings.invalid.
        """
        self._tokens = None if tokens is None else Watched((tokens,), lambda: read_tokens(tokens))
        self._hosts = hosts
        self._loopback = loopback
        self._known: set[bytes] = set()  # values of Host that were found good

    def check(self, method: bytes, url: bytes, headers: Mapping[bytes, bytes]) -> None:
        """Let a request in.

        Raises:
            ServingError: serving.origin, serving.token.
        """
        host = headers.get(b"host")
        if self._loopback and host is not None and host not in self._known:
            self._admit(host)
        if b"origin" in headers or b"sec-fetch-site" in headers:
            _refuse_pages(headers)
        if self._tokens is not None and not (method == b"GET" and url in OPEN):
            _check_token(headers.get(b"authorization", b""), self._tokens.now())

    def _admit(self, host: bytes) -> None:
        name = _name_of(host)
        if not (name == "localhost" or name.endswith(".localhost") or name in self._hosts or is_loopback(name)):
            message = f"Expected a name of this device in Host, found {host[:80].decode('latin-1')!r}."
            remedy = "LIGHTSHIP_AGENT_HTTP_ALLOWED_HOSTS lists other names that are meant for it."
            raise ServingError("serving.origin", message, remedy=remedy)
        if len(self._known) < 64:
            self._known.add(host)


class Tls(msgspec.Struct, frozen=True):
    """Files of a TLS server.

    `client_ca` is whose certificates clients must show; None asks for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def watched(self) -> Watched[ssl.SSLContext]:
        """A context, made anew when a file changes.

        Raises:
            SettingsError: settings.invalid.
        """
        paths = (self.certificate, self.key, *(() if self.client_ca is None else (self.client_ca,)))
        return Watched(paths, self.context)

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 or newer.

        Raises:
            SettingsError: settings.invalid.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # An empty password, so that an encrypted key is an error and not a question on a terminal.
            context.load_cert_chain(self.certificate, self.key, password=lambda: b"")
            if self.client_ca is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self.client_ca)
                # A session that is taken up again would outlive the authority that let it in.
                context.num_tickets = 0
                context.options |= ssl.OP_NO_TICKET
        except (OSError, ValueError) as e:
            named = f"{self.certificate}, {self.key}" + (f" or {self.client_ca}" if self.client_ca else "")
            message = f"Expected a PEM certificate and its unencrypted key in {named}: {e}."
            raise SettingsError("settings.invalid", message) from e
        return context


class Access(msgspec.Struct, frozen=True):
    """What is asked of whoever comes over TCP."""

    tls: Tls | None = None
    tokens: Path | None = None
    hosts: frozenset[str] = frozenset()

    def check_exposure(self, address: str) -> None:
        """Refuse to be reached from other machines by anybody.

        Raises:
            SettingsError: settings.exposed.
        """
        if is_loopback(address):
            return
        lacking = [] if self.tls else ["TLS (http_certificate_file, http_key_file)"]
        if self.tokens is None and (self.tls is None or self.tls.client_ca is None):
            lacking.append("tokens (http_token_file) or client certificates (http_client_ca_file)")
        if lacking:
            message = f"{address} is reached from other machines, and that needs {' and '.join(lacking)}."
            raise SettingsError("settings.exposed", message, remedy="Give them, or stay on 127.0.0.1.")

    def door(self, address: str) -> Door:
        """What requests to that address pass.

        Raises:
            SettingsError: settings.invalid.
        """
        return Door(tokens=self.tokens, hosts=self.hosts, loopback=is_loopback(address))


def access_of(*, certificate: str, key: str, client_ca: str, tokens: str, hosts: str) -> Access:
    """What the settings say, of which "" is none.

    Raises:
        SettingsError: settings.missing.
    """
    if bool(certificate) != bool(key) or (client_ca and not certificate):
        message = "TLS needs both http_certificate_file and http_key_file."
        raise SettingsError("settings.missing", message)
    tls = Tls(Path(certificate), Path(key), Path(client_ca) if client_ca else None) if certificate else None
    names = frozenset(name.strip().lower() for name in hosts.split(",") if name.strip())
    return Access(tls, Path(tokens) if tokens else None, names)


def is_loopback(address: str) -> bool:
    """Whether that address is this machine's own, and nobody else's way in."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def read_tokens(path: Path) -> dict[str, str]:
    """The sha256 of each token by its name; a line is NAME SHA256, `#` begins a comment.

    Raises:
        SettingsError: settings.invalid.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        writable = path.stat().st_mode & 0o002
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError("settings.invalid", f"The token file {path} can't be read: {e}.") from e
    if writable:
        raise SettingsError("settings.invalid", f"Anybody may write to {path}.", remedy=f"chmod o-w {path}")
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        said = _TOKEN_LINE.fullmatch(text)
        if said is None or said[1] in found or len(found) >= _MAX_TOKENS:
            message = f"{path}, line {number}: expected NAME SHA256, each name once, {_MAX_TOKENS} at most."
            raise SettingsError("settings.invalid", message, remedy="`lightship-agent token NAME` writes such lines.")
        found[said[1]] = said[2]
    return found


def add_token(path: Path, name: str) -> str:
    """Add a new token of 256 bits to the file, which is made if need be, and return it: nobody can tell it again.

    Raises:
        SettingsError: settings.invalid for a name that can't stand there or does already, and for a file that is none.
        StorageError: storage.full, storage.unwritable.
    """
    token = PREFIX + secrets.token_urlsafe(32)
    line = f"{name} {_digest(token.encode())}"
    if _TOKEN_LINE.fullmatch(line) is None:
        message = f"Expected a name of letters, digits, '.', '_' and '-', found {name[:80]!r}."
        raise SettingsError("settings.invalid", message)
    known = read_tokens(path) if path.exists() else {}
    if name in known:
        message = f"{path} has a token {name!r}."
        raise SettingsError("settings.invalid", message, remedy="Choose another name, or remove its line first.")
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_durably(path, (before + ("" if before.endswith("\n") or not before else "\n") + line + "\n").encode())
    return token


def _check_token(said: bytes, tokens: Mapping[str, str]) -> None:
    scheme, _, token = said.partition(b" ")
    shown = _digest(token.strip())
    # All are compared, so that time tells nothing about which.
    good = sum([hmac.compare_digest(shown, digest) for digest in tokens.values()])
    if not good or scheme.lower() != b"bearer":
        message = "Expected a token of this agent in Authorization: Bearer."
        raise ServingError("serving.token", message, remedy="`lightship-agent token NAME` makes one.")


def _refuse_pages(headers: Mapping[bytes, bytes]) -> None:
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site", b"none")
    own = {b"http://" + headers.get(b"host", b""), b"https://" + headers.get(b"host", b"")}
    if (origin is not None and origin not in own) or site not in (b"none", b"same-origin"):
        message = f"Expected a program, found a page of {(origin or site)[:80].decode('latin-1')!r} in a browser."
        raise ServingError("serving.origin", message)


def _name_of(host: bytes) -> str:
    """The name in a Host field, without its port."""
    found = _HOST.fullmatch(host.decode("latin-1").strip().lower())
    return "" if found is None else found[1] or found[2]


def _digest(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
