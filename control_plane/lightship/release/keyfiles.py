"""Release: files that hold a key, or say where one is.

    alice.pem        a private key (PKCS #8), sealed with a passphrase or not; 0600, stays where it was made
    alice.pub.json   its public half, to be carried to whoever puts it into a role
    alice.key.json   the public half of a key in a token, a KMS or a vault, and the URI it signs under

Rules: every file is foreign: bounded, typed, refused with a code; a key's id is always computed, never believed, so
that one key can't count twice towards a threshold; a secret (passphrase, PIN) comes from a file, never from the command
line, and is asked for only when it is needed; what holds a private key is written with mode 0600 and never overwrites.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import KEY_FOR_TYPE_AND_SCHEME, CryptoSigner, Key, Signer, SSlibKey

from lightship_agent.contract.codes import ReleaseError
from lightship_agent.files import storage_error, sync_folder

from .uris import UriSigner, check_uri

PRIVATE_SUFFIX: Final = ".pem"
PUBLIC_SUFFIX: Final = ".pub.json"
REFERENCE_SUFFIX: Final = ".key.json"
MAX_KEY_FILE: Final = 65_536  # bytes
_BACKUP: Final = "Restore it from your backup."
#: Gives a passphrase or a PIN when one is needed; its argument says what for.
Secret = Callable[[str], str]


class PublicKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a `.pub.json` or a `.key.json` holds; `uri` only the latter."""

    keytype: str
    scheme: str
    public: str
    keyid: str = ""  # for people; computed anew when it is read
    uri: str = ""
    pin_file: str = ""  # with the PIN of a token that signs without a person


def no_secret(what: str) -> str:
    """The secret of those who gave none.

    Raises:
        ReleaseError: release.keys.
    """
    raise ReleaseError("release.keys", f"It needs a {what}.", remedy="Give it with --passphrase-file (- for stdin).")


def new_key(path: Path, *, passphrase: str = "") -> SSlibKey:
    """Make an Ed25519 key in `path`, and its public half beside it.

    Raises:
        ReleaseError: release.exists.
        StorageError: storage.full, storage.unwritable.
    """
    signer = CryptoSigner.generate_ed25519()
    write_new(path, private_pem(signer, passphrase))
    public = path.with_name(path.name.removesuffix(PRIVATE_SUFFIX) + PUBLIC_SUFFIX)
    write_new(public, public_json(signer.public_key), mode=0o644)
    return signer.public_key


def private_pem(signer: CryptoSigner, passphrase: str = "") -> bytes:
    """The private key as PKCS #8, sealed when there is a passphrase."""
    seal: KeySerializationEncryption = NoEncryption()
    if passphrase:
        seal = BestAvailableEncryption(passphrase.encode())
    key = load_pem_private_key(signer.private_bytes, password=None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, seal)


def public_json(key: Key, *, uri: str = "", pin_file: str = "") -> bytes:
    """What is written into a `.pub.json`, or with a URI into a `.key.json`."""
    facts = PublicKey(
        keyid=key.keyid, keytype=key.keytype, scheme=key.scheme, public=key.keyval["public"], uri=uri, pin_file=pin_file
    )
    given = {name: value for name, value in msgspec.to_builtins(facts).items() if value}
    return msgspec.json.format(msgspec.json.encode(given)) + b"\n"


def read_public(path: Path) -> SSlibKey:
    """The public key in a `.pub.json` or `.key.json`, under the id that its bytes have.

    Raises:
        ReleaseError: release.keys.
    """
    return _key_of(path, _read_facts(path))


def read_reference(path: Path) -> tuple[SSlibKey, PublicKey]:
    """The key that a `.key.json` names, and what else it says.

    Raises:
        ReleaseError: release.keys.
    """
    facts = _read_facts(path)
    if not facts.uri:
        message = f"{path} names no URI: it holds a public key only, which can't sign."
        raise ReleaseError("release.keys", message)
    check_uri(facts.uri)
    return _key_of(path, facts), facts


def open_key(path: Path, secret: Secret = no_secret) -> Signer:
    """What signs with the key in a `.pem`, or that a `.key.json` names.

    Raises:
        ReleaseError: release.keys.
    """
    if path.name.endswith(REFERENCE_SUFFIX):
        return _open_reference(path, secret)
    try:
        data = read_bounded(path)
        password = secret("passphrase").encode() if b"ENCRYPTED" in data else None
        key = load_pem_private_key(data, password=password)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise ReleaseError("release.keys", f"The key {path} can't be read: {_words(e)}.", remedy=_BACKUP) from e
    if not isinstance(key, Ed25519PrivateKey | EllipticCurvePrivateKey | RSAPrivateKey):
        message = f"The key {path} is a {type(key).__name__}; expected Ed25519, ECDSA or RSA."
        raise ReleaseError("release.keys", message)
    try:
        return CryptoSigner(key)
    except ValueError as e:
        raise ReleaseError("release.keys", f"The key {path} is of a kind that can't sign: {e}.") from e


def read_bounded(path: Path) -> bytes:
    """At most MAX_KEY_FILE bytes.

    Raises:
        OSError: it can't be read.
        ReleaseError: release.keys for a larger one.
    """
    with path.open("rb") as f:
        data = f.read(MAX_KEY_FILE + 1)
    if len(data) > MAX_KEY_FILE:
        raise ReleaseError("release.keys", f"{path} is no key: it has more than {MAX_KEY_FILE} bytes.")
    return data


def write_new(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file that must not be there yet, durably.

    Raises:
        ReleaseError: release.exists.
        StorageError: storage.full, storage.unwritable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            path.hardlink_to(temporary)  # unlike a rename, it never replaces
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError as e:
        raise ReleaseError("release.exists", f"{path} exists; a key is never overwritten.") from e
    except OSError as e:
        raise storage_error(e, path) from e


def _open_reference(path: Path, secret: Secret) -> Signer:
    key, facts = read_reference(path)

    def asked(what: str) -> str:
        if not facts.pin_file:
            return secret(what)
        try:
            return read_bounded(Path(facts.pin_file)).decode().strip()
        except (OSError, UnicodeDecodeError) as e:
            raise ReleaseError("release.keys", f"The PIN in {facts.pin_file} can't be read: {_words(e)}.") from e

    return UriSigner(facts.uri, key, asked)


def _read_facts(path: Path) -> PublicKey:
    try:
        return msgspec.json.decode(read_bounded(path), type=PublicKey)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        message = f"{path} is no public key: {_words(e)}."
        remedy = "Expected a .pub.json or .key.json as `lightship keys` writes it."
        raise ReleaseError("release.keys", message, remedy=remedy) from e


def _key_of(path: Path, facts: PublicKey) -> SSlibKey:
    try:
        if facts.keytype == "ed25519":
            public: Any = Ed25519PublicKey.from_public_bytes(bytes.fromhex(facts.public))
        else:
            public = load_pem_public_key(facts.public.encode())
        key = SSlibKey.from_crypto(public, scheme=facts.scheme)
        known = (facts.keytype, facts.scheme) in KEY_FOR_TYPE_AND_SCHEME and key.keytype == facts.keytype
    except (ValueError, UnsupportedAlgorithm) as e:
        raise ReleaseError("release.keys", f"{path} holds no public key: {_words(e)}.") from e
    if not known:
        message = f"{path}: {facts.keytype[:40]!r} with {facts.scheme[:40]!r} is no kind of key that devices verify."
        raise ReleaseError("release.keys", message)
    return key


def _words(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__)[:300].rstrip(".")
