"""Fleet: the built-in certificate authority.

Rules:
* P-256 throughout; device certificates live days, not years; a stolen one ages out;
* of a request only the public key and the common name are taken, after its signature proves possession;
* the CA's private key is a file with mode 0600 under `<home>/ca`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lightship_agent.contract.codes import EnrolError, InvalidNameError, StorageError
from lightship_agent.contract.names import check_name
from lightship_agent.files import storage_error, write_durably

DEVICE_LIFE: Final = timedelta(days=7)
SERVER_LIFE: Final = timedelta(days=397)
CA_LIFE: Final = timedelta(days=3650)
#: Devices without a real-time clock may be minutes behind.
BACKDATE: Final = timedelta(minutes=10)


@dataclass(frozen=True)
class Issued:
    """A certificate that was just signed."""

    chain: bytes
    serial: str
    spki: str
    not_after: datetime


class CertificateAuthority:
    """Key and certificate under `<home>/ca`."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self.folder = folder
        self.certificate_path = folder / "ca.pem"

    def create(self) -> None:
        """Make the CA, if there is none.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        if self.certificate_path.exists():
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(e, self.folder) from e
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Lightship CA")])
        builder = _builder(name, name, key.public_key(), CA_LIFE)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(cert_sign=True), critical=True)
        write_durably(self.folder / "ca.key", _key_pem(key), mode=0o600)
        write_durably(self.certificate_path, _pem(builder.sign(key, hashes.SHA256())))

    def require(self) -> None:
        """See that the CA is here: a new one would be unknown to every enrolled device.

        Raises:
            StorageError: storage.corrupt.
        """
        missing = [p.name for p in (self.certificate_path, self.folder / "ca.key") if not p.exists()]
        if missing:
            message = f"The certificate authority in {self.folder} has lost {' and '.join(missing)}."
            raise StorageError("storage.corrupt", message, remedy="Restore <home>/ca from your backup.")

    def certificate_pem(self) -> bytes:
        """The CA certificate."""
        return self.certificate_path.read_bytes()

    def pin(self) -> str:
        """sha256 of the CA's public key: what a join token carries."""
        return spki_digest(self._certificate().public_key())

    def issue_device(self, csr_pem: str, device: str) -> Issued:
        """A client certificate for `device` over the key in its request.

        Raises:
            EnrolError: enrol.request.
        """
        public = check_request(csr_pem, device)
        return self._issue(public, device, [ExtendedKeyUsageOID.CLIENT_AUTH], DEVICE_LIFE, [_device_uri(device)])

    def issue_client(self, name: str, life: timedelta = SERVER_LIFE) -> tuple[bytes, bytes]:
        """Key and certificate for one of our own programs, e.g. the ingest's MQTT session."""
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._issue(key.public_key(), name, [ExtendedKeyUsageOID.CLIENT_AUTH], life, [])
        return _key_pem(key), issued.chain

    def sign_revocations(
        self, serials: Mapping[int, datetime], *, now: datetime, last_update: datetime, next_update: datetime
    ) -> bytes:
        """The list of these serials and when each was revoked, PEM."""
        ca, key = self._certificate(), self._key()
        builder = x509.CertificateRevocationListBuilder().issuer_name(ca.subject)
        builder = builder.last_update(last_update).next_update(next_update)
        # Numbers only grow: milliseconds do, whichever process signs.
        builder = builder.add_extension(x509.CRLNumber(int(now.timestamp() * 1_000)), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        for serial, at in sorted(serials.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue_server(self, hosts: list[str]) -> tuple[bytes, bytes]:
        """Key and certificate for our servers under these host names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [_general_name(h) for h in hosts]
        issued = self._issue(key.public_key(), hosts[0], [ExtendedKeyUsageOID.SERVER_AUTH], SERVER_LIFE, names)
        return _key_pem(key), issued.chain

    def _issue(
        self,
        public: ec.EllipticCurvePublicKey,
        common_name: str,
        usages: list[x509.ObjectIdentifier],
        life: timedelta,
        names: list[x509.GeneralName],
    ) -> Issued:
        ca, key = self._certificate(), self._key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = _builder(subject, ca.subject, public, life)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(cert_sign=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(key, hashes.SHA256())
        return Issued(
            chain=_pem(certificate),
            serial=f"{certificate.serial_number:x}",
            spki=spki_digest(public),
            not_after=certificate.not_valid_after_utc,
        )

    def _certificate(self) -> x509.Certificate:
        try:
            return x509.load_pem_x509_certificate(self.certificate_pem())
        except (OSError, ValueError) as e:
            raise StorageError("storage.corrupt", f"The CA certificate can't be read: {e}.") from e

    def _key(self) -> ec.EllipticCurvePrivateKey:
        try:
            key = serialization.load_pem_private_key((self.folder / "ca.key").read_bytes(), password=None)
        except (OSError, ValueError) as e:
            raise StorageError("storage.corrupt", f"The CA key can't be read: {e}.") from e
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


def check_request(csr_pem: str, device: str) -> ec.EllipticCurvePublicKey:
    """The public key of a request that is fit to be certified for `device`.

    Raises:
        EnrolError: enrol.request.
    """
    try:
        check_name("device id", device)
        request = x509.load_pem_x509_csr(csr_pem.encode())
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key = request.public_key()
        possessed = request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature, InvalidNameError, UnsupportedAlgorithm, x509.InvalidVersion) as e:
        raise EnrolError("enrol.request", f"Not an acceptable certificate request: {e}.") from e
    if [n.value for n in names] != [device]:
        raise EnrolError("enrol.request", f"The request's common name is not {device!r}.")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise EnrolError("enrol.request", "Expected a P-256 key.")
    if not possessed:
        raise EnrolError("enrol.request", "The request is not signed by its own key.")
    return key


def spki_digest(key: object) -> str:
    """sha256 of a public key's SubjectPublicKeyInfo."""
    assert isinstance(key, ec.EllipticCurvePublicKey)
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def server_names(extra: list[str]) -> list[str]:
    """Host names and addresses a server certificate of this machine covers."""
    return list(dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname().lower(), *extra]))


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=cert_sign,
        crl_sign=cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _device_uri(device: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(f"urn:lightship:device:{device}")


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
