"""Link: the device's identity on disk.

    <state>/identity/key.pem        P-256 private key, born here, mode 0600, never leaves
    <state>/identity/key.uri        or where it is instead: a PKCS#11 URI
    <state>/identity/cert.pem       the device's certificate and its issuer chain
    <state>/identity/ca.pem         the control plane's certificate authority
    <state>/identity/tuf-root.json  the initial root of trust for releases
    <state>/identity/identity.json  who this device is and where its control plane lives

Rules:
* cryptography is loaded by whoever needs a key or a certificate as such: serving begins without it;
* an identity is written whole into a new folder that is renamed into place, so a device has one or none;
* a renewed pair of key and certificate takes the place of the old one, which is kept beside it (identity.old) until the
  control plane has accepted the new one once: a pair that is refused is taken back;
* a certificate is kept only if it is over our key, in our name, and from our authority: a device that stored
  anything else could never speak to its control plane again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from lightship_agent.contract.codes import EnrolError, StorageError
from lightship_agent.files import storage_error, sync_folder, write_durably
from lightship_agent.update.clock import BUILT

from .validity import Validity, validity_of

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

FOLDER = "identity"
#: Beside it: a key that was made before the device was enrolled.
EARLY_KEY = "enrol-key.pem"
_NO_CHECK_TIME: Final = ssl.VerifyFlags(0x200000)  # X509_V_FLAG_NO_CHECK_TIME, which the ssl module has no name for


class Broker(msgspec.Struct, frozen=True, kw_only=True):
    """Where the MQTT broker is, and how it knows a device.

    `auth` is "mtls" where the broker enforces client certificates, "password" where it can't.
    """

    host: str
    port: int
    auth: str = "mtls"
    username: str = ""


class IdentityFile(msgspec.Struct, frozen=True, kw_only=True):
    """identity.json."""

    device: str
    tenant: str
    server: str
    broker: Broker | None = None


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The identity as the other rooms use it."""

    folder: Path
    info: IdentityFile
    tuf_root: bytes
    broker_password: str = ""

    @property
    def device(self) -> str:
        """The device id."""
        return self.info.device

    def server_context(self) -> ssl.SSLContext:
        """TLS towards the control plane and its broker, without our certificate: its CA only.

        Raises:
            StorageError: storage.corrupt.
        """
        try:
            context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        except OSError as e:
            raise _corrupt(self.folder, e) from e
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if time.time() < BUILT:
            # A board that woke in 1970 finds every certificate too young. Whose it is, is checked all the same.
            context.verify_flags |= _NO_CHECK_TIME
        return context

    def tls_context(self) -> ssl.SSLContext:
        """Mutual TLS towards the control plane: its CA only, our certificate.

        Raises:
            StorageError: storage.corrupt.
            EnrolError: enrol.key where a token does not give its key.
        """
        context = self.server_context()
        self.show_in(context)
        return context

    def show_in(self, context: ssl.SSLContext) -> None:
        """Show our certificate to whom that context connects.

        Raises:
            StorageError: storage.corrupt.
            EnrolError: enrol.key.
        """
        try:
            if self.key_uri:
                from .token_key import TokenKey

                TokenKey(self.key_uri).use_in(context, self.folder / "cert.pem")
            else:
                context.load_cert_chain(self.folder / "cert.pem", self.folder / "key.pem")
        except OSError as e:
            raise _corrupt(self.folder, e) from e

    @property
    def key_uri(self) -> str:
        """Where the key is, if it is in a token; "" for a file."""
        path = self.folder / "key.uri"
        return path.read_text().strip() if path.exists() else ""

    def key(self) -> ec.EllipticCurvePrivateKey:
        """The device's private key.

        Raises:
            StorageError: storage.corrupt.
            EnrolError: enrol.key.
        """
        try:
            if self.key_uri:
                return token_key(self.key_uri)
            return read_key((self.folder / "key.pem").read_bytes())
        except (OSError, ValueError, TypeError) as e:
            raise _corrupt(self.folder, e) from e

    def next_key(self) -> ec.EllipticCurvePrivateKey:
        """The key to be certified next: a fresh one, or the one that can't leave its token.

        Raises:
            StorageError: storage.corrupt.
            EnrolError: enrol.key.
        """
        return self.key() if self.key_uri else new_key()

    @property
    def unconfirmed(self) -> bool:
        """Whether the control plane has not accepted the present pair yet, so that the old one is still kept."""
        return _beside(self.folder, "old").is_dir()

    def validity(self) -> Validity:
        """From when to when the device's own certificate is valid, without cryptography where it is as ours are.

        Raises:
            StorageError: storage.corrupt.
        """
        try:
            return validity_of((self.folder / "cert.pem").read_bytes())
        except (OSError, ValueError):
            found = self.certificate()
            begins, ends = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
            return Validity(begins, ends, found.serial_number)

    def certificate(self) -> x509.Certificate:
        """The device's own certificate.

        Raises:
            StorageError: storage.corrupt.
        """
        from cryptography import x509

        try:
            return x509.load_pem_x509_certificate((self.folder / "cert.pem").read_bytes())
        except (OSError, ValueError) as e:
            raise _corrupt(self.folder, e) from e


def new_key() -> ec.EllipticCurvePrivateKey:
    """A P-256 key: the curve that TPMs, brokers and proxies all know."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def token_key(uri: str) -> ec.EllipticCurvePrivateKey:
    """The key that a PKCS#11 URI names.

    Raises:
        EnrolError: enrol.key.
    """
    from .token_key import TokenKey

    return TokenKey(uri)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8 PEM, unencrypted: the file mode protects it."""
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in a PEM.

    Raises:
        ValueError, TypeError: for anything else.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        message = "expected a P-256 key"
        raise TypeError(message)
    return key


def public_der(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public half, as SubjectPublicKeyInfo."""
    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.DER, form)


def key_digest(key: ec.EllipticCurvePrivateKey) -> str:
    """sha256 of the public half: how the control plane knows a key."""
    return hashlib.sha256(public_der(key)).hexdigest()


def certificate_request(key: ec.EllipticCurvePrivateKey, device: str) -> bytes:
    """A PEM CSR with CN = device id, signed by the key as proof of possession."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def load_identity(state_dir: Path) -> Identity:
    """The identity under `state_dir`.

    Raises:
        EnrolError: enrol.not-enrolled.
        StorageError: storage.corrupt.
    """
    folder = state_dir / FOLDER
    if not folder.is_dir():
        message = f"No identity in {state_dir}."
        remedy = "Run `lightship-agent enrol --server URL --token-file FILE --device NAME`."
        raise EnrolError("enrol.not-enrolled", message, remedy=remedy)
    try:
        info = msgspec.json.decode((folder / "identity.json").read_bytes(), type=IdentityFile)
        password = folder / "broker-password"
        return Identity(
            folder=folder,
            info=info,
            tuf_root=(folder / "tuf-root.json").read_bytes(),
            broker_password=password.read_text() if password.exists() else "",
        )
    except (OSError, ValueError, msgspec.MsgspecError) as e:
        raise _corrupt(folder, e) from e


def check_chain(chain: bytes, key: ec.EllipticCurvePrivateKey, device: str, ca: bytes) -> None:
    """Refuse a certificate that is not over `key`, not in the name of `device`, or not from the authority `ca`.

    Args:
        chain: PEM, the device's certificate first, then its issuers below the authority, if any.
        key: the device's key.
        device: the device id.
        ca: PEM of the pinned authority.

    Raises:
        EnrolError: enrol.certificate.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.x509.oid import NameOID

    try:
        certificates = x509.load_pem_x509_certificates(chain)
        authority = x509.load_pem_x509_certificate(ca)
        names = certificates[0].subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        ours = certificates[0].public_key() == key.public_key() and [n.value for n in names] == [device]
        for issued, issuer in itertools.pairwise([*(c for c in certificates if c != authority), authority]):
            issued.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as e:
        message = f"The control plane did not answer with a certificate of its authority: {type(e).__name__}: {e}."
        raise EnrolError("enrol.certificate", message) from e
    if not ours:
        raise EnrolError("enrol.certificate", f"The control plane certified another key or name than {device!r}'s.")


def store_identity(state_dir: Path, files: dict[str, bytes]) -> None:
    """Write a new identity folder and rename it into place.

    Raises:
        StorageError: storage.full, storage.unwritable; no identity is left behind.
    """
    fresh = state_dir / f"{FOLDER}.new"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        # Of folders that it makes on the way, Python lets everybody in.
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.mkdir(mode=0o700)
        for name, data in files.items():
            write_durably(fresh / name, data, mode=0o600)
        fresh.rename(state_dir / FOLDER)
        sync_folder(state_dir)
    except OSError as e:
        shutil.rmtree(fresh, ignore_errors=True)
        raise storage_error(e, fresh) from e
    except StorageError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def replace_certificate(identity: Identity, key: ec.EllipticCurvePrivateKey, chain: bytes) -> None:
    """Switch key and certificate as a pair: a new folder with both, exchanged by rename. The old pair is kept.

    Raises:
        EnrolError: enrol.certificate; nothing was written.
        StorageError: storage.full, storage.unwritable; the old pair stays in use.
    """
    folder = identity.folder
    fresh, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        check_chain(chain, key, identity.device, kept["ca.pem"])
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        # Every file is written anew, and synced: a copy that is still in the page cache dies with the power.
        fresh_key = {} if identity.key_uri else {"key.pem": key_pem(key)}
        for name, data in {**kept, **fresh_key, "cert.pem": chain}.items():
            write_durably(fresh / name, data, mode=0o600)
        if old.is_dir():
            # Two renewals without an answer in between: what the server accepted last is the older one.
            _remove(folder)
        else:
            folder.rename(old)
        fresh.rename(folder)
        sync_folder(folder.parent)
    except KeyError as e:
        raise _corrupt(folder, e) from e
    except StorageError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    except OSError as e:
        raise storage_error(e, fresh) from e


def confirm(identity: Identity) -> None:
    """The control plane accepts the present pair: the old one is not needed any more."""
    with contextlib.suppress(OSError):  # it is in nobody's way
        _remove(_beside(identity.folder, "old"))


def take_back(identity: Identity) -> bool:
    """The control plane refuses the present pair: go on with the old one, if there is one.

    Raises:
        StorageError: storage.full, storage.unwritable.
    """
    folder = identity.folder
    old, refused = _beside(folder, "old"), _beside(folder, "gone")
    if not old.is_dir():
        return False
    try:
        shutil.rmtree(refused, ignore_errors=True)
        folder.rename(refused)
        old.rename(folder)
        sync_folder(folder.parent)
    except OSError as e:
        raise storage_error(e, folder) from e
    shutil.rmtree(refused, ignore_errors=True)
    return True


def recover_identity(state_dir: Path) -> None:
    """Finish a certificate switch that was cut, and clear away what it left.

    The switch goes forward where the new folder is whole, which it is once the old one has moved: the server has
    certified the new key by then. An old folder stays until the new pair has been accepted.

    Raises:
        StorageError: storage.full, storage.unwritable.
    """
    folder = state_dir / FOLDER
    fresh, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        if not folder.exists() and old.is_dir():
            (fresh if fresh.is_dir() else old).rename(folder)
            sync_folder(state_dir)
    except OSError as e:
        raise storage_error(e, folder) from e
    if folder.exists():  # without one, a new folder may be an enrolment that is under way
        shutil.rmtree(fresh, ignore_errors=True)
        with contextlib.suppress(OSError):
            (state_dir / EARLY_KEY).unlink(missing_ok=True)
    shutil.rmtree(_beside(folder, "gone"), ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{FOLDER}.{what}")


def _remove(folder: Path) -> None:
    """Remove a folder as a whole: a cut leaves it under a name that nobody reads."""
    gone = _beside(folder, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.is_dir():
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _corrupt(folder: Path, e: Exception) -> StorageError:
    message = f"The identity in {folder} can't be read: {type(e).__name__}: {e}."
    return StorageError("storage.corrupt", message, remedy="Restore it, or move it away and enrol anew.")
