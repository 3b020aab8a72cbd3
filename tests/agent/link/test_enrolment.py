"""First contact over real TLS: a device ends with a whole identity or with nothing, whoever is at the other end."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.agent.link.field import Asgi, Field, serving

from lightship.home import Home
from lightship.storage.models import Device, JoinToken
from lightship_agent.contract.codes import EnrolError, InvalidNameError, LightshipError, LinkError, SettingsError
from lightship_agent.contract.device_api import EnrolReply, EnrolRequest
from lightship_agent.link import client, enrol, identity


def attempt(field: Field, folder: Path, *, token: str | None = None, device: str = "press-1") -> LightshipError:
    """An enrolment that is refused, and leaves nothing on disk."""
    with pytest.raises(LightshipError) as refused:
        enrol.enrol(folder, server=field.url, token=token or field.token(), device=device)
    assert not folder.exists() or list(folder.iterdir()) == []
    return refused.value


def devices(field: Field) -> list[str]:
    with field.home.database.read() as session:
        return [d.id for d in session.query(Device)]


def uses_left(field: Field) -> int:
    with field.home.database.read() as session:
        return sum(t.uses_left for t in session.query(JoinToken))


def test_a_device_enrols_and_speaks_to_its_control_plane(field: Field, tmp_path: Path) -> None:
    found = enrol.enrol(tmp_path / "state", server=f"{field.url}/", token=f"{field.token()}\n", device="press-1")

    assert (found.device, found.info.tenant, found.info.server) == ("press-1", "default", field.url)
    assert found.info.broker is None
    assert found.tuf_root == field.home.releases.root_bytes()
    control = client.ControlPlane(found)
    assert control.reachable()
    said = control.desired()
    assert (said.envelope, said.acked) == (None, ())
    control.close()


def test_every_file_of_an_identity_is_its_owners_alone(field: Field, tmp_path: Path) -> None:
    found = enrol.enrol(tmp_path / "state", server=field.url, token=field.token(), device="press-1")

    assert stat.S_IMODE(found.folder.stat().st_mode) == 0o700
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in found.folder.iterdir()} == dict.fromkeys(
        ("key.pem", "cert.pem", "ca.pem", "tuf-root.json", "identity.json"), 0o600
    )
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["identity"]


def test_the_key_never_leaves_the_device(field: Field, tmp_path: Path) -> None:
    found = enrol.enrol(tmp_path / "state", server=field.url, token=field.token(), device="press-1")
    key = (found.folder / "key.pem").read_bytes().splitlines()[1]

    assert not [p for p in field.home.path.rglob("*") if p.is_file() and key in p.read_bytes()]


# Tokens and names -----------------------------------------------------------------------------------------------------


def test_a_token_is_good_for_one_device(field: Field, tmp_path: Path) -> None:
    token = field.token()
    enrol.enrol(tmp_path / "one", server=field.url, token=token, device="press-1")

    assert attempt(field, tmp_path / "two", token=token, device="press-2").code == "enrol.token"
    assert devices(field) == ["press-1"]


def test_an_expired_token_is_refused(field: Field, tmp_path: Path) -> None:
    assert attempt(field, tmp_path / "state", token=field.token(ttl_seconds=-1)).code == "enrol.token"


def test_a_token_for_another_device_is_refused(field: Field, tmp_path: Path) -> None:
    assert attempt(field, tmp_path / "state", token=field.token("press-9")).code == "enrol.token"


def test_a_wrong_secret_is_refused_and_costs_the_token_nothing(field: Field, tmp_path: Path) -> None:
    token_id, _, pin = field.token().split(".")

    assert attempt(field, tmp_path / "state", token=f"{token_id}.guess.{pin}").code == "enrol.token"
    assert uses_left(field) == 1


def test_an_id_that_is_taken_is_refused_and_costs_the_token_nothing(field: Field, tmp_path: Path) -> None:
    field.enrolled("press-1")
    token = field.token()

    assert attempt(field, tmp_path / "state", token=token).code == "enrol.taken"
    assert uses_left(field) == 1


def test_a_device_that_is_enrolled_stays_who_it_is(field: Field) -> None:
    found = field.enrolled("press-1")
    before = {p.name: p.read_bytes() for p in found.folder.iterdir()}

    with pytest.raises(EnrolError) as refused:
        enrol.enrol(found.folder.parent, server=field.url, token=field.token(), device="press-2")

    assert refused.value.code == "enrol.taken"
    assert {p.name: p.read_bytes() for p in found.folder.iterdir()} == before
    assert devices(field) == ["press-1"]


@pytest.mark.parametrize("token", ["", "a.b", "a.b.c", "a.b.c.d", f"..{'a' * 64}"])
def test_what_is_no_token_is_not_sent(field: Field, tmp_path: Path, token: str) -> None:
    with pytest.raises(EnrolError) as refused:
        enrol.enrol(tmp_path / "state", server=field.url, token=token, device="press-1")

    assert refused.value.code == "enrol.token"
    assert field.server.seen == []


@pytest.mark.parametrize("name", ["", "+", "a/b", "../x", "Press 1"])
def test_what_is_no_name_is_not_asked_for(field: Field, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidNameError):
        enrol.enrol(tmp_path / "state", server=field.url, token=field.token(), device=name)

    assert field.server.seen == []


@pytest.mark.parametrize("server", ["http://127.0.0.1:1", "127.0.0.1:8643", "https://", "", "ftp://x"])
def test_a_token_is_never_sent_in_the_clear(field: Field, tmp_path: Path, server: str) -> None:
    with pytest.raises(SettingsError) as refused:
        enrol.enrol(tmp_path / "state", server=server, token=field.token(), device="press-1")

    assert refused.value.code == "settings.invalid"
    assert not (tmp_path / "state").exists()


# Who is at the other end ----------------------------------------------------------------------------------------------


class Impostor:
    """Answers `/v1/ca` and `/v1/enrol` as told, and keeps the tokens it is shown."""

    def __init__(self, ca: bytes, reply: bytes = b"{}") -> None:
        self.answers = {"/v1/ca": ca, "/v1/enrol": reply}
        self.tokens: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"")
        if scope["path"] == "/v1/enrol":
            self.tokens.append(msgspec.json.decode(body, type=EnrolRequest).token)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.answers[scope["path"]]})


@pytest.fixture
def another(tmp_path: Path, empty_home: Path) -> Home:
    """A home of somebody else, with other keys."""
    path = tmp_path / "another"
    shutil.copytree(empty_home, path, ignore=shutil.ignore_patterns("ca"))
    home = Home.at(path)
    home.ca.create()
    return home


def deceived(field: Field, another: Home, app: Asgi, folder: Path) -> LightshipError:
    with serving(app, another) as url, pytest.raises(LightshipError) as refused:
        enrol.enrol(folder, server=url, token=field.token(), device="press-1")
    assert not folder.exists()
    return refused.value


def test_an_authority_that_the_token_does_not_name_is_refused(field: Field, another: Home, tmp_path: Path) -> None:
    impostor = Impostor(another.ca.certificate_pem())

    assert deceived(field, another, impostor, tmp_path / "state").code == "enrol.pin"
    assert impostor.tokens == []


def test_an_authority_smuggled_in_behind_the_named_one_is_not_trusted(
    field: Field, another: Home, tmp_path: Path
) -> None:
    both = field.home.ca.certificate_pem() + another.ca.certificate_pem()
    impostor = Impostor(both)

    # Its TLS certificate is from the second authority: whoever trusts both would tell it the token.
    assert deceived(field, another, impostor, tmp_path / "state").code == "link.unreachable"
    assert impostor.tokens == []


@pytest.mark.parametrize("answer", [b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_an_answer_that_is_no_certificate_is_refused(
    field: Field, another: Home, tmp_path: Path, answer: bytes
) -> None:
    assert deceived(field, another, Impostor(answer), tmp_path / "state").code == "enrol.pin"


def test_an_endless_answer_is_cut_off(field: Field, another: Home, tmp_path: Path) -> None:
    refusal = deceived(field, another, Impostor(b"x" * (client.MAX_BODY + 1)), tmp_path / "state")

    assert refusal.code == "link.status"


def test_nobody_there_is_a_link_error(field: Field, tmp_path: Path) -> None:
    with pytest.raises(LinkError) as refused:
        enrol.enrol(tmp_path / "state", server="https://127.0.0.1:1", token=field.token(), device="press-1")

    assert refused.value.code == "link.unreachable"
    assert not (tmp_path / "state").exists()


# Answers that are not what they should be -----------------------------------------------------------------------------


def test_a_lost_answer_is_asked_for_again_with_the_same_key(field: Field, tmp_path: Path) -> None:
    field.fault("/v1/enrol", times=1, cut_after=10)

    found = enrol.enrol(tmp_path / "state", server=field.url, token=field.token(), device="press-1")

    assert len(field.server.asked("/v1/enrol")) == 2
    control = client.ControlPlane(found)
    assert control.reachable()
    control.close()


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (200, b"", "link.status"),
        (200, b"<html>login</html>", "link.status"),
        (200, b'{"device": "press-1"}', "link.status"),
        (500, b"oops", "link.status"),
        (302, b"", "link.status"),
        (401, b'{"code": "enrol.token", "error": "No."}', "enrol.token"),
        (400, b'{"code": "wire.too-large", "error": "No."}', "link.status"),
        (400, b'{"code": "enrol.invented", "error": "No."}', "link.status"),
        (400, b'["enrol.token"]', "link.status"),
    ],
)
def test_a_refusal_or_nonsense_leaves_nothing_on_disk(
    field: Field, tmp_path: Path, status: int, body: bytes, code: str
) -> None:
    field.fault("/v1/enrol", status=status, body=body)

    assert attempt(field, tmp_path / "state").code == code


def self_signed(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + dt.timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


Spoil = Callable[[Field, dict[str, Any]], dict[str, Any]]


def for_another_key(field: Field, _: dict[str, Any]) -> dict[str, Any]:
    csr = identity.certificate_request(identity.new_key(), "press-1").decode()
    return {"chain": field.home.ca.issue_device(csr, "press-1").chain.decode()}


SPOILT: dict[str, tuple[Spoil, str]] = {
    "no chain": (lambda *_: {"chain": ""}, "enrol.certificate"),
    "a chain of noise": (lambda *_: {"chain": "noise"}, "enrol.certificate"),
    "for another key": (for_another_key, "enrol.certificate"),
    "from nobody": (
        lambda *_: {"chain": self_signed("press-1", identity.new_key()).decode()},
        "enrol.certificate",
    ),
    "a root of noise": (lambda *_: {"tuf_root": "{}"}, "link.status"),
    "a root that is not signed": (
        lambda _, reply: {"tuf_root": reply["tuf_root"].replace('"version":1', '"version":2')},
        "link.status",
    ),
    "a tenant of wildcards": (lambda *_: {"tenant": "+/#"}, "link.status"),
    "a broker of another kind": (
        lambda *_: {"broker_host": "h", "broker_port": 1, "broker_auth": "x"},
        "link.status",
    ),
    "a broker at no port": (
        lambda *_: {"broker_host": "h", "broker_port": 0, "broker_auth": "mtls"},
        "link.status",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_an_answer_that_would_brick_the_device_is_refused(
    field: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    spoil, code = SPOILT[kind]
    really = enrol._ask

    def ask(*arguments: Any) -> EnrolReply:
        reply = really(*arguments)
        return msgspec.structs.replace(reply, **spoil(field, msgspec.to_builtins(reply)))

    monkeypatch.setattr(enrol, "_ask", ask)

    assert attempt(field, tmp_path / "state").code == code


def test_a_disk_that_fills_up_while_storing_leaves_no_half_identity(
    field: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightship_agent.contract.codes import StorageError

    def full(path: Path, data: bytes, *, mode: int) -> None:
        if path.name == "tuf-root.json":
            raise StorageError("storage.full", "No space left.")
        path.write_bytes(data)

    monkeypatch.setattr(identity, "write_durably", full)

    assert attempt(field, tmp_path / "state").code == "storage.full"


ENROL = """
import sys
from pathlib import Path
from lightship_agent.link.enrol import enrol
enrol(Path(sys.argv[1]), server=sys.argv[2], token=Path(sys.argv[3]).read_text(), device="press-1")
"""


def test_a_device_that_is_killed_once_its_key_is_certified_enrols_with_the_same_token_again(
    field: Field, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(field.token())
    command = [sys.executable, "-c", ENROL, str(tmp_path / "state"), field.url, str(tmp_path / "token")]
    environment = {**os.environ, "LIGHTSHIP_FAIL_POINT": "enrol-answered"}
    killed = subprocess.run(command, env=environment, check=False, timeout=60, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["enrol-key.pem"]
    assert (devices(field), uses_left(field)) == (["press-1"], 0)

    again = subprocess.run(command, check=False, timeout=60, capture_output=True)

    assert again.returncode == 0, again.stderr
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["identity"]
    control = client.ControlPlane(identity.load_identity(tmp_path / "state"))
    assert control.reachable()
    control.close()
