"""Link: the device's identity on disk.

    <state>/identity/key.pem        P-256 private key, born here, mode 0600, never leaves
    <state>/identity/cert.pem       the device's certificate and its issuer chain
    <state>/identity/ca.pem         the control plane's certificate authority
    <state>/identity/tuf-root.json  the initial root of trust for releases
    <state>/identity/identity.json  who this device is and where its control plane lives

Rules: an identity is written whole into a new folder that is renamed into place, so a device has one or none.
"""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lightship_agent.contract.codes import EnrolError, StorageError
from lightship_agent.files import storage_error, sync_folder, write_durably

FOLDER = "identity"


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

    def tls_context(self) -> ssl.SSLContext:
        """Mutual TLS towards the control plane: its CA only, our certificate."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.folder / "cert.pem", self.folder / "key.pem")
        return context

    def certificate(self) -> x509.Certificate:
        """The device's own certificate."""
        return x509.load_pem_x509_certificate((self.folder / "cert.pem").read_bytes())


def new_key() -> ec.EllipticCurvePrivateKey:
    """A P-256 key: the curve that TPMs, brokers and proxies all know."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8 PEM, unencrypted: the file mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_request(key: ec.EllipticCurvePrivateKey, device: str) -> bytes:
    """A PEM CSR with CN = device id, signed by the key as proof of possession."""
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
        raise EnrolError(
            "enrol.not-enrolled", message, remedy="Run `lightship-agent enrol --server URL --token-file F`."
        )
    try:
        info = msgspec.json.decode((folder / "identity.json").read_bytes(), type=IdentityFile)
        password = folder / "broker-password"
        return Identity(
            folder=folder,
            info=info,
            tuf_root=(folder / "tuf-root.json").read_bytes(),
            broker_password=password.read_text() if password.exists() else "",
        )
    except (OSError, msgspec.MsgspecError) as e:
        raise StorageError("storage.corrupt", f"The identity in {folder} can't be read: {e}.") from e


def store_identity(state_dir: Path, files: dict[str, bytes]) -> None:
    """Write a new identity folder and rename it into place.

    Raises:
        StorageError: storage.full, storage.unwritable; no identity is left behind.
    """
    fresh = state_dir / f"{FOLDER}.new"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700, parents=True)
        for name, data in files.items():
            write_durably(fresh / name, data, mode=0o600)
        fresh.rename(state_dir / FOLDER)
        sync_folder(state_dir)
    except OSError as e:
        shutil.rmtree(fresh, ignore_errors=True)
        raise storage_error(e, fresh) from e


def replace_certificate(identity: Identity, key: ec.EllipticCurvePrivateKey, chain: bytes) -> None:
    """Switch key and certificate as a pair: a new folder with both, exchanged by rename.

    Raises:
        StorageError: storage.full, storage.unwritable; the old pair stays in use.
    """
    folder, fresh = identity.folder, identity.folder.with_name(f"{FOLDER}.new")
    old = identity.folder.with_name(f"{FOLDER}.old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(folder, fresh)
        write_durably(fresh / "key.pem", key_pem(key), mode=0o600)
        write_durably(fresh / "cert.pem", chain, mode=0o600)
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        fresh.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise storage_error(e, fresh) from e


def recover_identity(state_dir: Path) -> None:
    """Finish a certificate switch that was cut between its two renames."""
    folder, old = state_dir / FOLDER, state_dir / f"{FOLDER}.old"
    if not folder.exists() and old.is_dir():
        old.rename(folder)
