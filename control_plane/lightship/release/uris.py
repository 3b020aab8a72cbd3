"""Release: keys that are no files: in a PKCS#11 token, a cloud's KMS, a vault.

securesystemslib speaks to all of them; each needs a library of its own, which is imported when such a key signs:

    hsm:2?label=NAME       PKCS#11; the environment variable PYKCS11LIB names the module   lightship[pkcs11]
    awskms:KEY             AWS KMS                                                         securesystemslib[awskms]
    gcpkms:KEY             Google Cloud KMS                                                securesystemslib[gcpkms]
    azurekms://VAULT/KEY   Azure Key Vault                                                 securesystemslib[azurekms]
    hv:NAME/VERSION        HashiCorp Vault, transit                                        securesystemslib[vault]

Rules: the private half never comes here; whatever a token or a cloud answers becomes a ReleaseError with the URI in it,
and never with the PIN; only PKCS#11 is tested here, against SoftHSM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, Key, Signature, Signer, SSlibKey

from lightship_agent.contract.codes import ReleaseError

#: URI scheme → what to install for it.
INSTALL: Final[dict[str, str]] = {
    "hsm": "lightship[pkcs11]",
    "awskms": "securesystemslib[awskms]",
    "gcpkms": "securesystemslib[gcpkms]",
    "azurekms": "securesystemslib[azurekms]",
    "hv": "securesystemslib[vault]",
}


class UriSigner(Signer):
    """Signs with the key behind a URI; opened anew for every signature, so that a token may come and go."""

    def __init__(self, uri: str, public_key: SSlibKey, secret: Callable[[str], str]) -> None:
        """Nothing is opened yet."""
        self._uri = uri
        self._public_key = public_key
        self._secret = secret

    @property
    def public_key(self) -> SSlibKey:
        """The public half."""
        return self._public_key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: Callable[[str], str] | None = None
    ) -> UriSigner:
        """The signer of that URI.

        Raises:
            ReleaseError: release.keys without somebody to ask for the secret.
        """
        if not isinstance(public_key, SSlibKey) or secrets_handler is None:
            raise ReleaseError("release.keys", f"{priv_key_uri[:80]!r}: expected a public key and a way to its secret.")
        return cls(priv_key_uri, public_key, secrets_handler)

    def sign(self, payload: bytes) -> Signature:
        """Sign.

        Raises:
            ReleaseError: release.keys.
        """
        try:
            return Signer.from_priv_key_uri(self._uri, self._public_key, self._secret).sign(payload)
        except ReleaseError:
            raise
        except Exception as e:
            raise explained(self._uri, e) from e


def check_uri(uri: str) -> str:
    """The scheme of a URI that may name a key.

    Raises:
        ReleaseError: release.keys.
    """
    scheme, colon, _ = uri.partition(":")
    if scheme not in INSTALL or not colon or len(uri) > 2_000 or not uri.isprintable():
        message = f"Expected a key URI that begins with {', '.join(f'{s}:' for s in INSTALL)}; found {uri[:80]!r}."
        raise ReleaseError("release.keys", message)
    return scheme


def import_uri(uri: str, secret: Callable[[str], str]) -> tuple[str, SSlibKey]:
    """Ask a token, KMS or vault for its public key; the exact URI to sign under, and the key.

    Raises:
        ReleaseError: release.keys.
    """
    scheme = check_uri(uri)
    try:
        found = SIGNER_FOR_URI_SCHEME[scheme].import_(*_arguments(scheme, uri, secret))  # type: ignore[attr-defined]
    except ReleaseError:
        raise
    except Exception as e:
        raise explained(uri, e) from e
    exact, key = found
    if not isinstance(key, SSlibKey):
        raise ReleaseError("release.keys", f"{uri} holds a key of a kind that devices can't verify.")
    return str(exact), key


def explained(uri: str, e: Exception) -> ReleaseError:
    """What went wrong at a URI."""
    if isinstance(e, UnsupportedLibraryError):
        remedy = f"Install it: pip install '{INSTALL[uri.partition(':')[0]]}'."
        return ReleaseError("release.keys", f"{uri} needs a library that is not installed: {e}.", remedy=remedy)
    words = str(e).strip() or type(e).__name__
    remedy = "Is the token there, the PIN right, PYKCS11LIB set?" if uri.startswith("hsm:") else ""
    return ReleaseError("release.keys", f"The key {uri} can't be used: {words[:300].rstrip('.')}.", remedy=remedy)


def _arguments(scheme: str, uri: str, secret: Callable[[str], str]) -> tuple[Any, ...]:
    """What `import_` of that scheme takes."""
    parts = urlsplit(uri)
    if scheme == "hsm":
        slot = int(parts.path) if parts.path else None
        return slot, dict(parse_qsl(parts.query)).get("label"), secret
    if scheme == "azurekms":
        vault, _, name = uri.removeprefix("azurekms:").strip("/").partition("/")
        return vault.partition(".")[0], name.removeprefix("keys/").partition("/")[0]
    name = uri.removeprefix(f"{scheme}:")
    return (name.partition("/")[0],) if scheme == "hv" else (name,)
