"""Attacks on identities: each is refused, over real TLS and on a real broker, and moves nothing in the database."""

from __future__ import annotations

import base64
import shutil
import ssl
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from tests.attacks.identities import Ground, bare_context, context_with, database_of, expired_certificate, ground, post
from tests.control_plane.conftest import fresh_home, home, served
from tests.control_plane.mqtt import ear, let_in
from tests.control_plane.things import Served, token_for, until

from lightship.fleet import certificates
from lightship.fleet.broker_guard import BrokerGuard
from lightship.home import Home
from lightship.integrations import mosquitto
from lightship.storage.audit import now_ms
from lightship.storage.models import Certificate, Cut, Device, JoinToken
from lightship_agent.contract import topics
from lightship_agent.contract.codes import EnrolError, LinkError
from lightship_agent.contract.device_api import Paths
from lightship_agent.contract.recovery import PAYLOAD_TYPE, Proof, pae
from lightship_agent.link import identity as store
from lightship_agent.link import renewal
from lightship_agent.link.client import ControlPlane
from lightship_agent.link.identity import Identity

__all__ = ["fresh_home", "home", "served"]  # fixtures of the control plane's room

TENANT = "default"
needs_mosquitto = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")


@pytest.fixture
def site(served: Served, tmp_path: Path) -> Iterator[Ground]:
    with ground(served, tmp_path) as made:
        yield made


# Enrolment ------------------------------------------------------------------------------------------------------------


def csr_named(*names: str, key: Any = None) -> str:
    """A request with these common names, signed by its key."""
    key = key or store.new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n) for n in names])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, algorithm)
    return request.public_bytes(serialization.Encoding.PEM).decode()


def with_a_foreign_signature(device: str) -> str:
    """The request of one key with the signature bytes changed: no proof of possession."""
    lines = csr_named(device).strip().splitlines()
    der = bytearray(base64.b64decode("".join(lines[1:-1])))
    der[-3] ^= 1
    body = base64.encodebytes(bytes(der)).decode()
    return f"{lines[0]}\n{body}{lines[-1]}\n"


def used(home: Home) -> str:
    token = token_for(home)
    with home.database.write() as session:
        session.get_one(JoinToken, token.split(".")[0]).uses_left = 0
    return token


TOKENS: dict[str, tuple[Callable[[Home], str], int]] = {
    "used before": (used, 401),
    "expired": (lambda home: token_for(home, ttl=-1), 401),
    "bound to another id": (lambda home: token_for(home, "pump-8"), 401),
    "with another secret": (lambda home: ".".join([token_for(home).split(".")[0], "x" * 32, home.ca.pin()]), 401),
    "of nobody": (lambda home: f"{'0' * 12}.{'x' * 32}.{home.ca.pin()}", 401),
    "none": (lambda _: "", 401),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_that_is_not_good_brings_no_certificate(served: Served, kind: str) -> None:
    make, status = TOKENS[kind]
    token = make(served.home)
    before = database_of(served.home)

    answer = post(
        served.url, Paths.ENROL, {"token": token, "device": "pump-9", "csr": csr_named("pump-9")},
        bare_context(served.home),
    )  # fmt: skip

    assert (answer.status_code, answer.json()["code"]) == (status, "enrol.token")
    assert "BEGIN CERTIFICATE" not in answer.text
    assert database_of(served.home) == before


def test_a_token_is_good_for_one_device_and_its_reuse_for_none(served: Served) -> None:
    token, tls = token_for(served.home), bare_context(served.home)
    first = post(served.url, Paths.ENROL, {"token": token, "device": "pump-1", "csr": csr_named("pump-1")}, tls)
    assert first.status_code == 200
    before = database_of(served.home)

    again = post(served.url, Paths.ENROL, {"token": token, "device": "pump-2", "csr": csr_named("pump-2")}, tls)
    other_key = post(served.url, Paths.ENROL, {"token": token, "device": "pump-1", "csr": csr_named("pump-1")}, tls)

    assert (again.status_code, again.json()["code"]) == (401, "enrol.token")
    assert (other_key.status_code, other_key.json()["code"]) == (409, "enrol.taken")
    assert database_of(served.home) == before


REQUESTS: dict[str, tuple[str, Callable[[], str]]] = {
    "in another device's name": ("pump-9", lambda: csr_named("pump-1")),
    "with two names": ("pump-9", lambda: csr_named("pump-9", "pump-1")),
    "with no name": ("pump-9", csr_named),
    "in the control plane's name": ("_control-plane", lambda: csr_named("_control-plane")),
    "named +": ("+", lambda: csr_named("+")),
    "named #": ("#", lambda: csr_named("#")),
    "named by a level and a wildcard": ("pump/+", lambda: csr_named("pump/+")),
    "named with a capital": ("Pump", lambda: csr_named("Pump")),
    "with a signature of another key": ("pump-9", lambda: with_a_foreign_signature("pump-9")),
    "over RSA": ("pump-9", lambda: csr_named("pump-9", key=rsa.generate_private_key(65_537, 2_048))),
    "over P-384": ("pump-9", lambda: csr_named("pump-9", key=ec.generate_private_key(ec.SECP384R1()))),
    "over Ed25519": ("pump-9", lambda: csr_named("pump-9", key=ed25519.Ed25519PrivateKey.generate())),
    "of noise": ("pump-9", lambda: "noise"),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_that_is_not_fit_is_not_certified_and_costs_no_token(served: Served, kind: str) -> None:
    device, make = REQUESTS[kind]
    token = token_for(served.home)
    before = database_of(served.home)

    answer = post(served.url, Paths.ENROL, {"token": token, "device": device, "csr": make()}, bare_context(served.home))

    assert (answer.status_code, answer.json()["code"]) == (400, "enrol.request")
    assert database_of(served.home) == before


def test_what_a_request_asks_for_beside_its_name_and_key_is_not_certified(served: Served) -> None:
    key = store.new_key()
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, "pump-9"),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "_control-plane"),
            ]
        )
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("pump-1")]), critical=False)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    body = {"token": token_for(served.home), "device": "pump-9", "csr": csr}
    answer = post(served.url, Paths.ENROL, body, bare_context(served.home))

    certificate = x509.load_pem_x509_certificate(answer.json()["chain"].encode())
    assert certificate.subject.rfc4514_string() == "CN=pump-9"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [n.value for n in names] == ["urn:lightship:device:pump-9"]


# Certificates that no longer count, or never did ----------------------------------------------------------------------

PATHS = (Paths.PING, Paths.ASSIGNMENT, f"{Paths.METADATA}1.root.json", f"{Paths.TARGETS}bundles/pump/x.tar")


def refused(url: str, tls: ssl.SSLContext) -> set[str]:
    """What each path says to that certificate."""
    said = set()
    for path in PATHS:
        with httpx.Client(verify=tls, timeout=20) as http:
            answer = http.get(url + path)
        said.add(f"{answer.status_code} {answer.json()['code']}")
    return said


def test_without_a_certificate_there_is_nothing_to_be_had(served: Served) -> None:
    assert refused(served.url, bare_context(served.home)) == {"401 enrol.certificate"}


def test_a_certificate_of_our_own_authority_over_a_key_that_was_never_registered_is_refused(
    site: Ground, tmp_path: Path
) -> None:
    site.enrolled("pump-1")
    key = store.new_key()
    forged = site.home.ca.issue_device(store.certificate_request(key, "pump-1").decode(), "pump-1")
    before = database_of(site.home)

    assert refused(site.url, context_with(site.home, tmp_path / "forged", key, forged.chain)) == {
        "401 enrol.certificate"
    }
    assert database_of(site.home) == before


def test_the_control_planes_own_certificate_is_no_device(site: Ground, tmp_path: Path) -> None:
    key, chain = site.home.ca.issue_client(mosquitto.CONTROL_PLANE_USER)
    loaded = store.read_key(key)
    assert refused(site.url, context_with(site.home, tmp_path / "ours", loaded, chain)) == {"401 enrol.certificate"}


@needs_mosquitto
def test_an_expired_certificate_opens_neither_https_nor_mqtt(site: Ground) -> None:
    pump = site.enrolled("pump-1")
    expired_certificate(site.home, pump)
    control = ControlPlane(pump)

    with pytest.raises(LinkError):
        control.desired()
    assert not control.reachable()
    with ear(site.broker.info.port, "pump-1", pump.tls_context(), welcome=False) as sent_away:
        assert sent_away.said == []
    control.close()


@needs_mosquitto
def test_a_revoked_device_is_refused_at_its_next_request_and_its_session_is_cut(site: Ground) -> None:
    pump, other = site.enrolled("pump-1"), site.enrolled("pump-2")
    control, port = ControlPlane(pump), site.broker.info.port
    mine = topics.telemetry(TENANT, "pump-1")
    with (
        site.control() as listening,
        ear(port, "pump-2", other.tls_context()) as bystander,
        ear(port, "pump-1", pump.tls_context()) as session,
    ):
        listening.subscribe("lightship/v1/+/+/tele")
        session.publish(mine, b"before")
        until(lambda: listening.heard)
        assert control.reachable()

        site.revoke("pump-1")

        with pytest.raises(EnrolError) as no:  # at once, on the connection that is open
            control.desired()
        assert no.value.code == "enrol.revoked"
        assert session.lost == 0  # the broker can't know yet

        site.guard.tick()

        until(lambda: session.lost)
        until(lambda: not let_in(port, "pump-1", pump.tls_context()))  # once the broker comes round to the signal
        with ear(port, "pump-1", pump.tls_context(), welcome=False) as again:
            assert again.said == []
        assert bystander.lost == 0
        bystander.publish(topics.telemetry(TENANT, "pump-2"), b"still here")
        until(lambda: (topics.telemetry(TENANT, "pump-2"), b"still here") in listening.heard)
        assert [p for t, p in listening.heard if t == mine] == [b"before"]
    control.close()
    with site.home.database.read() as database:
        assert database.query(Cut).all() == []
        assert {c.reason for c in database.query(Certificate).filter_by(device="pump-1")} == {"revoked"}


@needs_mosquitto
def test_a_copy_with_the_key_from_before_a_renewal_is_off_the_broker_within_a_day(site: Ground, tmp_path: Path) -> None:
    pump = site.enrolled("pump-1")
    shutil.copytree(pump.folder, tmp_path / "copy" / "identity")
    copy = store.load_identity(tmp_path / "copy")
    control = ControlPlane(pump)
    renewal.renew(pump, control)
    control.reopen()
    assert control.reachable()

    assert refused(site.url, copy.tls_context()) == {"401 enrol.certificate"}
    site.guard._issued -= 86_400  # a day goes by
    site.guard.tick()

    port = site.broker.info.port
    until(lambda: not let_in(port, "pump-1", copy.tls_context()))  # once the broker comes round to the signal
    with ear(port, "pump-1", copy.tls_context(), welcome=False) as sent_away:
        assert sent_away.said == []
    with ear(port, "pump-1", pump.tls_context()):
        pass
    control.close()


@needs_mosquitto
def test_a_cut_that_fails_is_tried_again_until_it_is_done(site: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    pump = site.enrolled("pump-1")
    site.revoke("pump-1")

    def away(_self: BrokerGuard, _device: str) -> None:
        raise LinkError("link.broker", "The broker is away.")

    with monkeypatch.context() as patched:
        patched.setattr(BrokerGuard, "_end_session", away)
        with pytest.raises(LinkError):
            site.guard.tick()
    with site.home.database.read() as database:
        assert [c.device for c in database.query(Cut)] == ["pump-1"]

    site.guard.tick()

    with site.home.database.read() as database:
        assert database.query(Cut).all() == []
    until(lambda: not let_in(site.broker.info.port, "pump-1", pump.tls_context()))
    assert list((site.home.path / "broker").glob("cut-*")) == []  # the key that cut is gone


@needs_mosquitto
def test_a_list_that_lapsed_locks_everybody_out_and_a_day_later_it_is_made_anew(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(certificates, "CRL_LIFE", timedelta(seconds=-1))
        opened = ground(served, tmp_path)
        site = opened.__enter__()
    try:
        pump, port = site.enrolled("pump-1"), site.broker.info.port
        with ear(port, "pump-1", pump.tls_context(), welcome=False) as refused:  # this is what a lapse does
            assert refused.said == []

        site.guard._issued -= 86_400
        site.guard.tick()

        # The broker reads the new list when it comes round to the signal; until then it sends away who comes.
        until(lambda: let_in(port, "pump-1", pump.tls_context()))
    finally:
        opened.__exit__(None, None, None)


@needs_mosquitto
def test_two_revocations_in_one_second_both_count(site: Ground) -> None:
    pumps = [site.enrolled(f"pump-{n}") for n in range(1, 5)]
    for pump in pumps[:3]:
        site.revoke(pump.device)
        site.guard.tick()

    for name, tls in [(pump.device, pump.tls_context()) for pump in pumps[:3]]:
        until(lambda name=name, tls=tls: not let_in(site.broker.info.port, name, tls))
    with ear(site.broker.info.port, pumps[3].device, pumps[3].tls_context()):
        pass


# The broker -----------------------------------------------------------------------------------------------------------


@needs_mosquitto
def test_a_device_can_neither_write_as_another_nor_hear_it_nor_take_its_session(site: Ground) -> None:
    thief, victim = site.enrolled("pump-1"), site.enrolled("pump-2")
    port = site.broker.info.port
    with (
        site.control() as control,
        ear(port, "pump-2", victim.tls_context()) as two,
        ear(port, "pump-2", thief.tls_context()) as one,  # asks for the other's client id
    ):
        control.subscribe("lightship/v1/#")
        two.subscribe(topics.command(TENANT, "pump-2", "+"))
        one.subscribe("#", "+/+/+/+/+", "lightship/v1/+/+/cmd/+", topics.telemetry(TENANT, "pump-2"))
        for topic in (topics.telemetry(TENANT, "pump-2"), topics.state(TENANT, "pump-2"), topics.notify(TENANT)):
            one.publish(topic, b"forged", retain=True)
        one.publish(topics.telemetry(TENANT, "pump-1"), b"own")
        control.publish(topics.command(TENANT, "pump-2", "check"), b"for two")
        two.publish(topics.telemetry(TENANT, "pump-2"), b"of two")
        until(lambda: two.heard)
        until(lambda: {b"own", b"of two"} <= {payload for _, payload in control.heard})

        assert b"forged" not in {payload for _, payload in control.heard}
        assert one.heard == []
        assert two.heard == [(topics.command(TENANT, "pump-2", "check"), b"for two")]
        assert (one.lost, two.lost) == (0, 0)


# Recovery -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lapsed(served: Served, tmp_path: Path) -> Identity:
    """A device whose certificate ran out yesterday."""
    from tests.control_plane.things import enrolled

    found = enrolled(served.home, served.url, tmp_path, "pump-1")
    expired_certificate(served.home, found)
    with served.home.database.write() as session:
        session.get_one(Device, "pump-1").cert_not_after = now_ms() - 86_400_000
    return found


def nonce_for(served: Served, device: str) -> str:
    answer = post(served.url, Paths.RECOVERY_NONCE, {"device": device}, bare_context(served.home))
    assert answer.status_code == 200
    return str(answer.json()["nonce"])


def body_of(key: Any, device: str, nonce: str, *, csr_for: str | None = None, kind: str = PAYLOAD_TYPE) -> Any:
    csr = store.certificate_request(store.new_key(), csr_for or device).decode()
    signed = renewal.prove(key, Proof(device=device, nonce=nonce, csr=csr))
    return {
        "payload": signed.payload,
        "payloadType": kind,
        "signatures": [{"keyid": s.keyid, "sig": s.sig, "public": s.public} for s in signed.signatures],
    }


def ask_for(served: Served, body: Any) -> tuple[int, str]:
    answer = post(served.url, Paths.RECOVER, body, bare_context(served.home))
    return answer.status_code, answer.json().get("code", "")


def test_a_proof_is_good_once(served: Served, lapsed: Identity) -> None:
    body = body_of(lapsed.key(), "pump-1", nonce_for(served, "pump-1"))
    assert ask_for(served, body) == (200, "")
    before = database_of(served.home)

    assert ask_for(served, body) == (401, "enrol.proof")
    assert database_of(served.home) == before


def test_a_nonce_is_good_for_one_device_and_two_minutes(
    served: Served, lapsed: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightship.fleet import recovery

    foreign = nonce_for(served, "pump-2")
    monkeypatch.setattr(recovery, "NONCE_SECONDS", -1)
    old = nonce_for(served, "pump-1")
    before = database_of(served.home)

    for nonce in (foreign, old, "", "a.b.c", f"{'0' * 32}.9999999999.{'0' * 64}", "é" * 40):
        assert ask_for(served, body_of(lapsed.key(), "pump-1", nonce)) == (401, "enrol.proof")
    assert database_of(served.home) == before


def test_only_the_registered_key_proves_anything(served: Served, lapsed: Identity) -> None:
    before = database_of(served.home)
    body = body_of(store.new_key(), "pump-1", nonce_for(served, "pump-1"))

    assert ask_for(served, body) == (401, "enrol.certificate")
    assert database_of(served.home) == before


def test_a_proof_that_was_tampered_with_holds_for_nothing(served: Served, lapsed: Identity) -> None:
    good = body_of(lapsed.key(), "pump-1", nonce_for(served, "pump-1"))
    payload = base64.b64decode(good["payload"])
    other = body_of(store.new_key(), "pump-1", "x")["signatures"][0]
    mine = good["signatures"][0]
    raw = lapsed.key().sign(payload, ec.ECDSA(hashes.SHA256()))  # without the encoding that says what is signed
    spoilt = (
        {**good, "payload": base64.b64encode(payload.replace(b"pump-1", b"pump-2")).decode()},
        {**good, "payloadType": "application/vnd.lightship.assignment+json"},
        {**good, "signatures": []},
        {**good, "signatures": [mine, mine]},
        {**good, "signatures": [{**mine, "public": other["public"]}]},
        {**good, "signatures": [{**mine, "sig": "AAAA"}]},
        {**good, "signatures": [{**mine, "sig": "*"}]},
        {**good, "signatures": [{**mine, "public": "AAAA"}]},
        {**good, "signatures": [{**mine, "sig": base64.b64encode(raw).decode()}]},
    )
    before = database_of(served.home)

    assert {ask_for(served, body) for body in spoilt} == {(401, "enrol.proof")}
    assert database_of(served.home) == before
    assert pae(payload) != payload


def test_a_proof_for_one_device_brings_no_certificate_for_another(served: Served, lapsed: Identity) -> None:
    before = database_of(served.home)
    body = body_of(lapsed.key(), "pump-1", nonce_for(served, "pump-1"), csr_for="pump-2")

    assert ask_for(served, body) == (400, "enrol.request")
    assert database_of(served.home) == before


def test_a_revoked_device_does_not_recover(served: Served, lapsed: Identity) -> None:
    from lightship.fleet import enrolment

    with served.home.database.write() as session:
        enrolment.revoke(session, "pump-1", actor="user:test", reason="stolen")
    before = database_of(served.home)

    body = body_of(lapsed.key(), "pump-1", nonce_for(served, "pump-1"))

    assert ask_for(served, body) == (403, "enrol.revoked")
    assert database_of(served.home) == before


def test_after_the_operators_days_a_certificate_stays_lapsed(served: Served, lapsed: Identity) -> None:
    with served.home.database.write() as session:
        session.get_one(Device, "pump-1").cert_not_after = now_ms() - 91 * 86_400_000
    before = database_of(served.home)

    body = body_of(lapsed.key(), "pump-1", nonce_for(served, "pump-1"))

    assert ask_for(served, body) == (403, "enrol.too-late")
    assert database_of(served.home) == before


def test_asking_for_nonces_stores_nothing_and_tells_nothing(served: Served) -> None:
    before = database_of(served.home)
    tls = bare_context(served.home)
    shapes = set()
    for device in ("pump-1", "nobody", "+", "x" * 10_000):
        answer = post(served.url, Paths.RECOVERY_NONCE, {"device": device}, tls)
        shapes.add((answer.status_code, tuple(answer.json()), len(answer.json()["nonce"])))
    assert len(shapes) == 1
    assert database_of(served.home) == before
