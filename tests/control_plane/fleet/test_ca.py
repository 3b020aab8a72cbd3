"""The certificate authority: what it certifies, for how long, and what it refuses to sign."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lightship.fleet.ca import BACKDATE, CA_LIFE, DEVICE_LIFE, SERVER_LIFE, CertificateAuthority, spki_digest
from lightship.home import Home
from lightship_agent.contract.codes import EnrolError, StorageError
from lightship_agent.link.identity import certificate_request, new_key


def request(*names: str, key: object | None = None) -> str:
    chosen = key or new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    algorithm = None if isinstance(chosen, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(chosen, algorithm)  # type: ignore[arg-type]
    return made.public_bytes(serialization.Encoding.PEM).decode()


def patched(pem: str, find: bytes, put: bytes) -> str:
    """A request some of whose bytes were exchanged after signing."""
    der = x509.load_pem_x509_csr(pem.encode()).public_bytes(serialization.Encoding.DER)
    assert find in der
    import base64

    body = base64.encodebytes(der.replace(find, put, 1)).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"


def test_a_device_certificate_opens_client_doors_only_and_lives_for_days(home: Home) -> None:
    key = new_key()
    issued = home.ca.issue_device(certificate_request(key, "pump-1").decode(), "pump-1")
    certificate = x509.load_pem_x509_certificate(issued.chain)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert certificate.subject.rfc4514_string() == "CN=pump-1"
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:lightship:device:pump-1"]
    assert names.get_values_for_type(x509.DNSName) == []
    assert list(usages) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not basic.ca
    now = datetime.now(UTC)
    assert abs(certificate.not_valid_after_utc - now - DEVICE_LIFE) < timedelta(minutes=1)
    assert abs(now - certificate.not_valid_before_utc - BACKDATE) < timedelta(minutes=1)
    assert issued.spki == spki_digest(key.public_key())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(home.ca.certificate_pem()))


def test_a_server_certificate_names_its_hosts_and_is_no_client(home: Home) -> None:
    key, chain = home.ca.issue_server(["localhost", "127.0.0.1", "::1", "plane.example"])
    certificate = x509.load_pem_x509_certificate(chain)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "plane.example"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert list(usages) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert certificate.not_valid_after_utc - datetime.now(UTC) < SERVER_LIFE
    private = serialization.load_pem_private_key(key, password=None)
    assert spki_digest(private.public_key()) == spki_digest(certificate.public_key())


def test_the_authority_may_sign_but_not_have_authorities_below_it(home: Home) -> None:
    certificate = x509.load_pem_x509_certificate(home.ca.certificate_pem())
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert certificate.not_valid_after_utc - datetime.now(UTC) > CA_LIFE - timedelta(days=1)
    assert len(home.ca.pin()) == 64


def test_making_the_authority_again_changes_nothing(home: Home) -> None:
    before = {p.name: p.read_bytes() for p in home.ca.folder.iterdir()}
    home.ca.create()
    assert {p.name: p.read_bytes() for p in home.ca.folder.iterdir()} == before


#: The curve's name is the last arc of 1.2.840.10045.3.1.7: another one of the same length is a curve nobody knows.
P256, NO_CURVE = bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d03010b")
FORGED = patched(request("pump-2"), b"pump-2", b"pump-1")

REFUSED = {
    "another device's name": request("pump-2"),
    "two names": request("pump-1", "pump-2"),
    "no name": request(),
    "an RSA key": request("pump-1", key=rsa.generate_private_key(65537, 2048)),
    "an Ed25519 key": request("pump-1", key=ed25519.Ed25519PrivateKey.generate()),
    "another curve": request("pump-1", key=ec.generate_private_key(ec.SECP384R1())),
    "a curve nobody knows": patched(request("pump-1"), P256, NO_CURVE),
    "a signature that does not fit": FORGED,
    "a version nobody knows": patched(request("pump-1"), b"\x02\x01\x00", b"\x02\x01\x07"),
    "nothing": "",
    "no PEM": "hello",
    "a certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    "letters beyond Unicode": "\udcff",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_request_that_is_not_a_p256_key_proving_that_very_name_is_refused(home: Home, what: str) -> None:
    with pytest.raises(EnrolError) as e:
        home.ca.issue_device(REFUSED[what], "pump-1")
    assert e.value.code == "enrol.request"


@pytest.mark.parametrize("name", ["Pump", "p", "_control-plane", "a/b", "a+", "#", "..", "x" * 64, "", "pümp"])
def test_a_name_that_is_not_a_device_id_is_refused(home: Home, name: str) -> None:
    with pytest.raises(EnrolError) as e:
        home.ca.issue_device(request("pump-1"), name)
    assert e.value.code == "enrol.request"


@pytest.mark.parametrize("name", ["ca.pem", "ca.key"])
@pytest.mark.parametrize("content", [None, b"", b"junk"])
def test_a_damaged_authority_says_so(home: Home, name: str, content: bytes | None) -> None:
    path = home.ca.folder / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(StorageError) as e:
        CertificateAuthority(home.ca.folder).issue_server(["localhost"])
    assert e.value.code == "storage.corrupt"
