"""Link: the certificate is kept young, and got back once it has run out.

    two thirds of its life, and a little            → a fresh pair over mutual TLS, with the certificate
    it has run out, by our clock or the server's    → a fresh pair for a proof of the registered key, without it
    the server hangs up on us                       → we ask it for the time, without the certificate

Rules:
* every renewal makes a new key, unless the key is in a token, which keeps its one; the old pair stays beside the new
  one until that was accepted (see `identity`);
* when exactly is up to the certificate: devices that were enrolled together don't come back together;
* the server's word on whether a certificate has run out counts more than our clock: its Date comes over TLS too;
* what fails is tried again, ever more seldom, up to once an hour.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from lightship_agent.contract.codes import EnrolError, LightshipError, LinkError
from lightship_agent.contract.device_api import Paths, RenewReply
from lightship_agent.contract.recovery import (
    PAYLOAD_TYPE,
    NonceReply,
    NonceRequest,
    Proof,
    Signature,
    SignedProof,
    pae,
    to_base64,
)
from lightship_agent.update.clock import date_of

from . import identity as store
from .client import ControlPlane, Reply, ask, open_client

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

log = logging.getLogger(__name__)

_T = TypeVar("_T")
JITTER: Final = 0.04  # of the certificate's life: seven hours of a week
RETRY_BASE: Final = 60.0  # s
RETRY_CAP: Final = 3_600.0  # s


def renewal_due(not_before: float, not_after: float, now: float, share: float = 0.0) -> bool:
    """Whether two thirds of a certificate's life are over, and of the `JITTER` after that the given share.

    Times are Unix seconds.
    """
    return now >= not_before + (not_after - not_before) * (2 / 3 + JITTER * share)


def share_of(serial: int) -> float:
    """A number in [0, 1) that every certificate has for itself."""
    digest = hashlib.sha256(serial.to_bytes(20, "big")).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def renew(identity: store.Identity, client: ControlPlane) -> None:
    """Replace key and certificate by fresh ones, with the certificate.

    Raises:
        LinkError: link.unreachable, link.slow, link.status.
        EnrolError: enrol.revoked, enrol.certificate.
        StorageError: storage.full, storage.unwritable.
    """
    key = identity.next_key()
    chain = client.renew(store.certificate_request(key, identity.device))
    store.replace_certificate(identity, key, chain)


def recover(identity: store.Identity, *, believed: bool = True) -> bool:
    """Replace key and certificate by fresh ones, for a proof of the registered key and without the certificate.

    With `believed=False` only if the certificate has run out by the server's clock; whether it was replaced.

    Raises:
        LinkError: link.unreachable, link.slow, link.status.
        EnrolError: enrol.proof, enrol.certificate, enrol.revoked, enrol.pending, enrol.too-late.
        StorageError: storage.full, storage.unwritable, storage.corrupt.
    """
    registered, fresh = identity.key(), identity.next_key()
    with open_client(identity.server_context(), identity.info.server) as http:
        asked = msgspec.json.encode(NonceRequest(device=identity.device))
        answer = ask(http, "POST", Paths.RECOVERY_NONCE, content=asked)
        nonce = _read(answer, NonceReply).nonce
        ends = identity.certificate().not_valid_after_utc.timestamp()
        if not (believed or date_of(answer.headers.get("date", "")) >= ends):
            return False
        csr = store.certificate_request(fresh, identity.device).decode()
        signed = prove(registered, Proof(device=identity.device, nonce=nonce, csr=csr))
        reply = ask(http, "POST", Paths.RECOVER, content=msgspec.json.encode(signed))
    store.replace_certificate(identity, fresh, _read(reply, RenewReply).chain.encode(errors="replace"))
    return True


def prove(key: ec.EllipticCurvePrivateKey, proof: Proof) -> SignedProof:
    """The proof, signed."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = msgspec.json.encode(proof)
    signature = Signature(
        keyid=store.key_digest(key),
        sig=to_base64(key.sign(pae(payload), ec.ECDSA(hashes.SHA256()))),
        public=to_base64(store.public_der(key)),
    )
    return SignedProof(payload=to_base64(payload), payload_type=PAYLOAD_TYPE, signatures=(signature,))


class CertificateKeeper:
    """Looks after one identity's certificate, whenever it is asked to."""

    def __init__(
        self,
        identity: store.Identity,
        control: ControlPlane,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the certificate of `identity`, which `control` uses."""
        self._identity = identity
        self._control = control
        self._wall = wall
        self._monotonic = monotonic
        self._failures = 0
        self._not_before = -RETRY_CAP  # monotonic seconds

    def tick(self) -> None:
        """Renew or recover, if it is time and the last failure long enough ago.

        Raises:
            LinkError: link.unreachable, link.slow, link.status.
            EnrolError: enrol.*.
            StorageError: storage.full, storage.unwritable, storage.corrupt.
        """
        begins, ends, serial = self._identity.validity()
        now = self._wall()
        due = renewal_due(begins, ends, now, share_of(serial))
        if not (due or self._control.hung_up) or self._monotonic() < self._not_before:
            return
        try:
            replaced = self._fetch(due=due, expired=now >= ends)
        except LightshipError:
            self._wait()
            raise
        if replaced:
            self._failures = 0
            self._control.reopen()
        else:
            self._wait()

    def _wait(self) -> None:
        ceiling = min(RETRY_CAP, RETRY_BASE * (1 << min(self._failures, 10)))
        self._not_before = self._monotonic() + random.uniform(0.5, 1.0) * ceiling
        self._failures += 1

    def _fetch(self, *, due: bool, expired: bool) -> bool:
        if due:
            try:
                renew(self._identity, self._control)
            except LinkError:
                # Our clock may be wrong, and the certificate good: only where one of us says otherwise, we go on.
                if not (expired or self._control.hung_up):
                    raise
            else:
                log.info("certificate renewed")
                return True
        try:
            replaced = recover(self._identity, believed=expired)
        except EnrolError as e:
            if e.code == "enrol.certificate" and store.take_back(self._identity):
                self._control.reopen()
            raise
        if replaced:
            log.info("certificate recovered: it had run out")
        return replaced


def _read(reply: Reply, kind: type[_T]) -> _T:
    if reply.status != 200:
        raise reply.refusal()
    return reply.read(kind)
