"""What is read of a certificate without cryptography is what cryptography reads; whatever else is refused."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.link.validity import validity_of

KEY = ec.generate_private_key(ec.SECP256R1())
SECONDS = st.integers(-300_000_000, 10_000_000_000)  # from 1960 to 2286
TIMES = SECONDS.map(lambda seconds: datetime.fromtimestamp(seconds, UTC))


def certificate(begins: datetime, ends: datetime, serial: int, name: str) -> bytes:
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(who, who, KEY.public_key(), serial, begins, ends)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@given(
    begins=TIMES,
    life=st.timedeltas(timedelta(seconds=1), timedelta(days=9_000)),
    serial=st.integers(1, 2**159 - 1),
    name=st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1, max_size=60),
)
def test_it_says_what_cryptography_says(begins: datetime, life: timedelta, serial: int, name: str) -> None:
    pem = certificate(begins, (begins + life).replace(microsecond=0), serial, name)
    known = x509.load_pem_x509_certificate(pem)

    found = validity_of(pem + certificate(begins, begins + life, 7, "issuer"))

    assert found.serial == known.serial_number
    assert found.begins == known.not_valid_before_utc.timestamp()
    assert found.ends == known.not_valid_after_utc.timestamp()


@given(cut=st.integers(0, 400), put=st.binary(max_size=3))
def test_damage_is_an_error_of_its_kind_or_changes_nothing_that_is_read(cut: int, put: bytes) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    der = x509.load_pem_x509_certificate(certificate(now, now + timedelta(days=7), 5, "press-1")).public_bytes(
        serialization.Encoding.DER
    )
    damaged = der[:cut] + put + der[cut + len(put) :]
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.b64encode(damaged) + b"\n-----END CERTIFICATE-----\n"
    try:
        found = validity_of(pem)
    except ValueError:
        return
    assert isinstance(found.serial, int)


@pytest.mark.parametrize("pem", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAAAA\n", b"\xff" * 100])
def test_what_is_no_certificate_is_refused(pem: bytes) -> None:
    with pytest.raises(ValueError, match="certificate"):
        validity_of(pem)
