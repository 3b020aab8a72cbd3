"""Release: signing metadata, and whether enough of the right keys did.

Rules: signatures are added, never trusted: what counts is asked of whoever delegates; a signature by a key that has no
say is not counted, and two ids for one key are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from securesystemslib.signer import Signer, SSlibKey
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Targets

from lightship_agent.contract.codes import ReleaseError

Delegator = Root | Targets


def sign_with(metadata: Metadata[Any], signers: Iterable[Signer]) -> None:
    """Add a signature of each; one that a key made before is replaced.

    Raises:
        ReleaseError: release.keys.
    """
    for signer in signers:
        try:
            metadata.sign(signer, append=True)
        except UnsignedMetadataError as e:
            cause = e.__cause__
            if isinstance(cause, ReleaseError):
                raise cause from e
            raise ReleaseError("release.keys", f"A key could not sign: {cause or e}.") from e


def signed_by(delegator: Delegator, role: str, metadata: Metadata[Any]) -> tuple[str, ...]:
    """The ids of the keys of `role` whose signature is there and right."""
    result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return tuple(sorted(result.signed))


def verifies(delegator: Delegator, role: str, metadata: Metadata[Any]) -> bool:
    """Whether as many keys of `role` signed as must."""
    return bool(delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures).verified)


def check_keys(delegator: Delegator, what: str) -> None:
    """Refuse keys under ids that are not their own: one key would count twice towards a threshold.

    Raises:
        ReleaseError: release.ceremony.
    """
    if isinstance(delegator, Root):
        keys = delegator.keys
    else:
        keys = delegator.delegations.keys if delegator.delegations is not None else {}
    for keyid, key in keys.items():
        own = own_id(key)
        if own != keyid:
            message = f"{what}: the key {keyid[:16]} is listed under an id that is not its own."
            raise ReleaseError("release.ceremony", message, remedy="Sign nothing of this, and find out who made it.")


def own_id(key: Any) -> str:
    """The id that a key's own bytes have; "" for a key of a kind that nobody here can use."""
    if not isinstance(key, SSlibKey):
        return ""
    try:
        return SSlibKey.from_crypto(key._crypto_key(), scheme=key.scheme).keyid  # noqa: SLF001 - no public way in 1.x
    except Exception:  # noqa: BLE001 - whatever its bytes are, they are no key
        return ""
