"""The device API over real mutual TLS: who gets in, what they get, and what everybody else gets."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from sqlalchemy import select
from tests.control_plane.api.callers import HUNG_UP, Caller, body_for, facts, guarded_routes, member, shows, stranger
from tests.control_plane.things import ACTOR, Served, envelope, heartbeat, token_for

from lightship.fleet import enrolment
from lightship.fleet.ca import CertificateAuthority, server_names
from lightship.home import Home
from lightship.storage.models import Device
from lightship_agent.contract.device_api import ACKED_HEADER, EnrolRequest, Paths
from lightship_agent.contract.wire import pack
from lightship_agent.link.identity import certificate_request, key_pem, new_key


def refusals(caller: Caller, home: Home) -> dict[str, tuple[int, str]]:
    """What a caller hears on every guarded route."""
    heard = {}
    for method, path in guarded_routes(home):
        said = caller.ask(path, method=method, body=body_for(path))
        heard[path] = (said.status, said.code)
    return heard


def certify(
    authority: tuple[x509.Name, ec.EllipticCurvePrivateKey],
    *names: str,
    life: timedelta = timedelta(days=1),
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
) -> tuple[bytes, bytes]:
    """Key and certificate as the authority's key could sign them, whether or not our CA would."""
    issuer, signer = authority
    key, now = new_key(), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return key_pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def authority_of(ca: CertificateAuthority) -> tuple[x509.Name, ec.EllipticCurvePrivateKey]:
    """Name and key of an authority."""
    key = serialization.load_pem_private_key((ca.folder / "ca.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate(ca.certificate_pem()).subject, key


def is_hung_up_on(caller: Caller, path: str = Paths.PING) -> bool:
    """Whether TLS itself refuses the caller."""
    try:
        caller.ask(path)
    except HUNG_UP:
        return True
    return False


# Who gets in --------------------------------------------------------------------------------------------------------


def test_without_a_certificate_every_guarded_route_says_401(served: Served) -> None:
    heard = refusals(stranger(served), served.home)
    assert len(heard) >= 6
    assert set(heard.values()) == {(401, "enrol.certificate")}


def test_the_ca_and_enrolment_need_no_certificate(served: Served) -> None:
    anybody = stranger(served)
    ca = anybody.ask(Paths.CA)
    assert (ca.status, ca.body) == (200, served.home.ca.certificate_pem())
    request = EnrolRequest(
        token=token_for(served.home), device="pump-1", csr=certificate_request(new_key(), "pump-1").decode()
    )
    assert anybody.ask(Paths.ENROL, method="POST", body=msgspec.json.encode(request)).status == 200


def test_an_enrolled_device_gets_in(served: Served, tmp_path: Path) -> None:
    device = member(served, tmp_path)
    assert device.ask(Paths.PING).body == b'{"ok":true}'
    assert device.ask(Paths.ASSIGNMENT).status == 204


def test_a_certificate_of_a_foreign_authority_does_not_get_through_the_handshake(
    served: Served, tmp_path: Path
) -> None:
    member(served, tmp_path)
    before = facts(served.home)
    foreign = CertificateAuthority(tmp_path / "foreign")
    foreign.create()
    key = new_key()
    issued = foreign.issue_device(certificate_request(key, "pump-1").decode(), "pump-1")
    assert is_hung_up_on(shows(served, tmp_path / "spy", key_pem(key), issued.chain))
    assert facts(served.home) == before


def test_an_authority_of_the_same_name_is_a_foreign_one(served: Served, tmp_path: Path) -> None:
    member(served, tmp_path)
    name, _ = authority_of(served.home.ca)
    key, chain = certify((name, new_key()), "pump-1")
    assert is_hung_up_on(shows(served, tmp_path / "spy", key, chain))


def test_a_self_signed_certificate_does_not_get_through_the_handshake(served: Served, tmp_path: Path) -> None:
    member(served, tmp_path)
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pump-1")])
    key, chain = certify((own, new_key()), "pump-1")
    assert is_hung_up_on(shows(served, tmp_path / "spy", key, chain))


def test_an_expired_certificate_does_not_get_through_the_handshake(served: Served, tmp_path: Path) -> None:
    member(served, tmp_path)
    key, chain = certify(authority_of(served.home.ca), "pump-1", life=-timedelta(minutes=1))
    assert is_hung_up_on(shows(served, tmp_path / "late", key, chain))


def test_a_certificate_for_servers_is_none_for_clients(served: Served, tmp_path: Path) -> None:
    key, chain = served.home.ca.issue_server(server_names([]))
    assert is_hung_up_on(shows(served, tmp_path / "server", key, chain))


def test_a_client_of_ours_that_is_no_device_is_refused_everywhere(served: Served, tmp_path: Path) -> None:
    key, chain = served.home.ca.issue_client("lightship-control-plane")
    heard = refusals(shows(served, tmp_path / "ingest", key, chain), served.home)
    assert set(heard.values()) == {(401, "enrol.certificate")}


def test_another_key_in_the_name_of_a_device_is_refused_everywhere(served: Served, tmp_path: Path) -> None:
    real = member(served, tmp_path)
    before = facts(served.home)
    key, chain = certify(authority_of(served.home.ca), "pump-1")
    heard = refusals(shows(served, tmp_path / "spy", key, chain), served.home)
    assert set(heard.values()) == {(401, "enrol.certificate")}
    assert facts(served.home) == before
    assert real.ask(Paths.PING).status == 200


@pytest.mark.parametrize("names", [(), ("pump-1", "pump-2"), ("PUMP-1",), ("pump-1 ",), ("%",)], ids=repr)
def test_an_odd_name_is_nobody(served: Served, tmp_path: Path, names: tuple[str, ...]) -> None:
    member(served, tmp_path)
    key, chain = certify(authority_of(served.home.ca), *names)
    said = shows(served, tmp_path / "odd", key, chain).ask(Paths.PING)
    assert (said.status, said.code) == (401, "enrol.certificate")


def test_a_revoked_device_hears_403_everywhere_from_its_next_request_on(served: Served, tmp_path: Path) -> None:
    device, other = member(served, tmp_path), member(served, tmp_path, "pump-2")
    assert device.ask(Paths.PING).status == 200
    with served.home.database.write() as session:
        enrolment.revoke(session, "pump-1", actor=ACTOR, reason="stolen")
    before = facts(served.home)
    heard = refusals(device, served.home)
    assert set(heard.values()) == {(403, "enrol.revoked")}
    assert facts(served.home) == before
    assert other.ask(Paths.PING).status == 200


def test_a_device_that_came_back_is_not_reached_with_its_old_key(served: Served, tmp_path: Path) -> None:
    old = member(served, tmp_path / "old")
    with served.home.database.write() as session:
        enrolment.revoke(session, "pump-1", actor=ACTOR, reason="stolen")
    new = member(served, tmp_path / "new")
    assert new.ask(Paths.PING).status == 200
    said = old.ask(Paths.PING)
    assert (said.status, said.code) == (401, "enrol.certificate")


def test_a_renewed_key_works_and_retires_the_one_before(served: Served, tmp_path: Path) -> None:
    old = member(served, tmp_path)
    key = new_key()
    body = json.dumps({"csr": certificate_request(key, "pump-1").decode()}).encode()
    said = old.ask(Paths.RENEW, method="POST", body=body)
    assert said.status == 200
    assert old.ask(Paths.PING).status == 200, "the answer may have been lost"
    new = shows(served, tmp_path / "new", key_pem(key), json.loads(said.body)["chain"].encode())
    assert new.ask(Paths.PING).status == 200
    retired = old.ask(Paths.PING)
    assert (retired.status, retired.code) == (401, "enrol.certificate")


def test_a_device_can_not_renew_in_the_name_of_another(served: Served, tmp_path: Path) -> None:
    device = member(served, tmp_path)
    member(served, tmp_path, "pump-2")
    before = facts(served.home)
    body = json.dumps({"csr": certificate_request(new_key(), "pump-2").decode()}).encode()
    said = device.ask(Paths.RENEW, method="POST", body=body)
    assert (said.status, said.code) == (400, "enrol.request")
    assert facts(served.home) == before


def test_reports_count_for_the_one_who_showed_the_certificate(served: Served, tmp_path: Path) -> None:
    device = member(served, tmp_path)
    member(served, tmp_path, "pump-2")
    said = device.ask(Paths.TELEMETRY, method="POST", body=pack(envelope(heartbeat(1))))
    assert (said.status, json.loads(said.body)) == (202, {"code": "", "missing": []})
    assert said.headers[ACKED_HEADER].endswith(":1")
    with served.home.database.read() as session:
        running = {d.id: d.running_version for d in session.scalars(select(Device))}
    assert running["pump-1"] == 1
    assert not running["pump-2"]
