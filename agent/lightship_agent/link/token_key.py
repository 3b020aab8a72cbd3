"""Link: a device key that lives in a PKCS#11 token (a TPM, a smart card, a secure element) and never leaves it.

    pkcs11:token=dev;object=device;type=private?module-path=/usr/lib/….so&pin-source=file:/etc/…/pin     (RFC 7512)

Python's `ssl` takes keys from PEM files only. So the key is loaded by OpenSSL's own `pkcs11` engine (Debian 12:
libengine-pkcs11-openssl), in the very library that `ssl` uses, and put into the context beneath it.

Rules:
* the URI is kept, never a PIN: a PIN in the URI would be in the command line, so it comes from `pin-source`;
* one module per process: a device has one token;
* what is missing (the engine, the module, the token, the key) is an error that names it; nothing falls back to a file;
* it looks like any other private key to the rest of the program: it signs, and says its public half.
"""

from __future__ import annotations

import _ssl
import ctypes
import functools
import ssl
import sys
import weakref
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ulong, c_void_p
from pathlib import Path
from typing import Any, Final, NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from lightship_agent.contract.codes import EnrolError

_SCHEME: Final = "pkcs11:"
_REMEDY: Final = "See `Keys in a token` in the operator's guide."


class TokenKey(ec.EllipticCurvePrivateKey):
    """A P-256 private key behind a PKCS#11 URI."""

    def __init__(self, uri: str) -> None:
        """Find the key.

        Raises:
            EnrolError: enrol.key.
        """
        self.uri = uri.strip()
        asked, module = _parse(self.uri)
        self._openssl = _openssl()
        self._key = _load(self._openssl, module, asked)
        weakref.finalize(self, self._openssl.EVP_PKEY_free, self._key)
        self._public = self._read_public()

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half."""
        return self._public

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """ECDSA over SHA-256, DER: the one signature that certificate requests and proofs use.

        Raises:
            EnrolError: enrol.key where the token refuses.
        """
        algorithm = signature_algorithm.algorithm
        if isinstance(algorithm, Prehashed) or not isinstance(algorithm, hashes.SHA256):
            message = "a token key signs with SHA-256 only"
            raise UnsupportedAlgorithm(message)
        lib, signed = self._openssl, bytes(data)
        context = lib.EVP_MD_CTX_new()
        try:
            length = c_size_t(0)
            ready = lib.EVP_DigestSignInit(context, None, lib.EVP_sha256(), None, self._key) == 1
            if ready and lib.EVP_DigestSign(context, None, byref(length), signed, len(signed)) == 1:
                signature = ctypes.create_string_buffer(length.value)
                if lib.EVP_DigestSign(context, signature, byref(length), signed, len(signed)) == 1:
                    return signature.raw[: length.value]
        finally:
            lib.EVP_MD_CTX_free(context)
        raise _refused("The token did not sign", lib)

    def use_in(self, context: ssl.SSLContext, chain: Path) -> None:
        """Show the chain's certificate in that context, and prove it with this key.

        Raises:
            EnrolError: enrol.key.
        """
        lib = self._openssl
        # The first field of CPython's SSLContext object is OpenSSL's own context.
        beneath = c_void_p.from_address(id(context) + object.__basicsize__)
        if lib.SSL_CTX_use_certificate_chain_file(beneath, str(chain).encode()) != 1:
            what = f"{chain} can't be used"
            raise _refused(what, lib)
        if lib.SSL_CTX_use_PrivateKey(beneath, self._key) != 1 or lib.SSL_CTX_check_private_key(beneath) != 1:
            raise _refused("The token's key is not that of the certificate", lib)

    @property
    def curve(self) -> ec.EllipticCurve:
        """P-256."""
        return self._public.curve

    @property
    def key_size(self) -> int:
        """256."""
        return self._public.key_size

    def exchange(self, *_: Any, **__: Any) -> NoReturn:
        """Not for this key."""
        raise _stays()

    def private_numbers(self) -> NoReturn:
        """Not for this key."""
        raise _stays()

    def private_bytes(self, *_: Any, **__: Any) -> NoReturn:
        """Not for this key."""
        raise _stays()

    def __copy__(self) -> TokenKey:
        """A key in a token is one key."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenKey:
        """A key in a token is one key."""
        return self

    def _read_public(self) -> ec.EllipticCurvePublicKey:
        lib = self._openssl
        length = lib.i2d_PUBKEY(self._key, None)
        if length <= 0:
            raise _refused("The token does not say the public half of the key", lib)
        buffer = ctypes.create_string_buffer(length)
        end = c_void_p(ctypes.addressof(buffer))
        lib.i2d_PUBKEY(self._key, byref(end))
        found = serialization.load_der_public_key(buffer.raw)
        if not isinstance(found, ec.EllipticCurvePublicKey) or not isinstance(found.curve, ec.SECP256R1):
            raise EnrolError("enrol.key", "Expected a P-256 key in the token.", remedy=_REMEDY)
        return found


def _parse(uri: str) -> tuple[str, str]:
    """The URI without `module-path`, and the module."""
    if not uri.startswith(_SCHEME) or not uri.isprintable():
        raise EnrolError("enrol.key", f"Expected a URI that begins with {_SCHEME}, found {uri[:40]!r}.")
    path, _, query = uri.partition("?")
    attributes = [a for a in query.split("&") if a]
    if any(a.startswith("pin-value") for a in [*attributes, *path.removeprefix(_SCHEME).split(";")]):
        raise EnrolError(
            "enrol.key", "A PIN in the URI is seen by everybody.", remedy="Use pin-source=file:/path instead."
        )
    modules = [a.partition("=")[2] for a in attributes if a.startswith("module-path=")]
    kept = "&".join(a for a in attributes if not a.startswith("module-path="))
    return f"{path}?{kept}" if kept else path, modules[0] if modules else ""


@functools.cache
def _openssl() -> Any:
    """The OpenSSL that Python's ssl uses, with the functions we need typed."""
    if sys.implementation.name != "cpython":
        raise EnrolError("enrol.key", "Keys in a token need CPython.", remedy=_REMEDY)
    lib = ctypes.CDLL(_ssl.__file__)
    functions: dict[str, tuple[Any, list[Any]]] = {
        "ENGINE_by_id": (c_void_p, [c_char_p]),
        "ENGINE_ctrl_cmd_string": (c_int, [c_void_p, c_char_p, c_char_p, c_int]),
        "ENGINE_init": (c_int, [c_void_p]),
        "ENGINE_load_private_key": (c_void_p, [c_void_p, c_char_p, c_void_p, c_void_p]),
        "ERR_get_error": (c_ulong, []),
        "ERR_error_string_n": (None, [c_ulong, c_char_p, c_size_t]),
        "EVP_MD_CTX_new": (c_void_p, []),
        "EVP_MD_CTX_free": (None, [c_void_p]),
        "EVP_PKEY_free": (None, [c_void_p]),
        "EVP_sha256": (c_void_p, []),
        "EVP_DigestSignInit": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p]),
        "EVP_DigestSign": (c_int, [c_void_p, c_char_p, POINTER(c_size_t), c_char_p, c_size_t]),
        "i2d_PUBKEY": (c_int, [c_void_p, c_void_p]),
        "SSL_CTX_use_certificate_chain_file": (c_int, [c_void_p, c_char_p]),
        "SSL_CTX_use_PrivateKey": (c_int, [c_void_p, c_void_p]),
        "SSL_CTX_check_private_key": (c_int, [c_void_p]),
    }
    try:
        for name, (result, arguments) in functions.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as e:
        message = f"The OpenSSL of this Python ({ssl.OPENSSL_VERSION}) has no engines: {e}."
        raise EnrolError("enrol.key", message, remedy=_REMEDY) from e
    return lib


@functools.cache
def _engine(module: str) -> int:
    lib = _openssl()
    engine = lib.ENGINE_by_id(b"pkcs11")
    if not engine:
        remedy = "On Debian: apt install libengine-pkcs11-openssl."
        raise _refused("OpenSSL has no pkcs11 engine", lib, remedy)
    if module and lib.ENGINE_ctrl_cmd_string(engine, b"MODULE_PATH", module.encode(), 0) != 1:
        what = f"The PKCS#11 module {module} can't be set"
        raise _refused(what, lib)
    if lib.ENGINE_init(engine) != 1:
        what = f"The PKCS#11 module {module or 'of p11-kit'} can't be loaded"
        raise _refused(what, lib)
    return int(engine)


def _load(lib: Any, module: str, uri: str) -> int:
    key = lib.ENGINE_load_private_key(_engine(module), uri.encode(), None, None)
    if not key:
        raise _refused("The token has no such key, or does not give it", lib)
    return int(key)


def _refused(what: str, lib: Any, remedy: str = _REMEDY) -> EnrolError:
    said = []
    while code := lib.ERR_get_error():
        buffer = ctypes.create_string_buffer(256)
        lib.ERR_error_string_n(code, buffer, 256)
        said.append(buffer.value.decode(errors="replace"))
    return EnrolError("enrol.key", f"{what}: {'; '.join(said) or 'OpenSSL says no more'}.", remedy=remedy)


def _stays() -> EnrolError:
    return EnrolError("enrol.key", "The key does not leave its token.")
