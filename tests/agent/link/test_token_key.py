"""A device key in a PKCS#11 token: SoftHSM beside OpenSSL's own engine, mutual TLS over HTTPS and MQTT with it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.agent.link.field import Field
from tests.control_plane.mqtt import ear
from tests.control_plane.things import settings_for

from lightship.fleet.broker import start_broker
from lightship.integrations import mosquitto
from lightship.storage.models import Device
from lightship_agent.contract.codes import EnrolError
from lightship_agent.link import identity, renewal, token_key
from lightship_agent.link.client import ControlPlane
from lightship_agent.link.enrol import enrol

MODULE = next((p for p in Path("/usr/lib").glob("**/softhsm/libsofthsm2.so") if p.is_file()), None)
ENGINE = next(Path("/usr/lib").glob("**/engines-3/pkcs11.so"), None)
MISSING = [
    name
    for name, found in (
        ("softhsm2", MODULE and shutil.which("softhsm2-util")),
        ("opensc", shutil.which("pkcs11-tool")),
        ("libengine-pkcs11-openssl", ENGINE),
    )
    if not found
]

needs_token = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A token with a P-256 key; its URI."""
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}")
    folder = tmp_path_factory.mktemp("token")
    (folder / "objects").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'objects'}\nobjectstore.backend = file\n")
    (folder / "pin").write_text("1234")
    patch = pytest.MonkeyPatch()
    patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm2.conf"))
    for command in (
        ["softhsm2-util", "--init-token", "--free", "--label", "dev", "--pin", "1234", "--so-pin", "4321"],
        [
            "pkcs11-tool", "--module", str(MODULE), "--login", "--pin", "1234", "--token-label", "dev",
            "--keypairgen", "--key-type", "EC:prime256v1", "--id", "01", "--label", "device",
        ],
    ):  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    # The module reads where its tokens are once per process, and this process keeps it.
    return f"pkcs11:token=dev;object=device;type=private?module-path={MODULE}&pin-source=file:{folder / 'pin'}"


@pytest.mark.system
def test_a_device_with_its_key_in_a_token_enrols_speaks_renews_and_recovers(
    field: Field, tmp_path: Path, token: str
) -> None:
    found = enrol(tmp_path / "press-1", server=field.url, token=field.token(), device="press-1", key_uri=token)

    assert sorted(p.name for p in found.folder.iterdir()) == [
        "ca.pem", "cert.pem", "identity.json", "key.uri", "tuf-root.json",
    ]  # fmt: skip
    assert all(b"PRIVATE KEY" not in p.read_bytes() for p in found.folder.iterdir())
    control = ControlPlane(found)
    assert control.desired().envelope is None
    serials = [found.certificate().serial_number]
    for step in (lambda: renewal.renew(found, control), lambda: renewal.recover(found)):
        step()
        control.reopen()
        assert control.reachable()
        serials.append(found.certificate().serial_number)
    assert len(set(serials)) == 3
    with field.home.database.read() as session:
        row = session.get_one(Device, "press-1")
        assert (row.spki, row.spki_next, row.retired_spki) == (identity.key_digest(found.key()), "", "")
    control.close()


@pytest.mark.system
@pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")
def test_a_key_in_a_token_opens_mqtt_too(field: Field, tmp_path: Path, token: str) -> None:
    home = field.home
    found = enrol(tmp_path / "press-1", server=field.url, token=field.token(), device="press-1", key_uri=token)
    running = start_broker(settings_for(home.path, broker="mosquitto"), home.path / "broker", home.ca)
    assert running is not None
    try:
        with ear(running.info.port, "press-1", found.tls_context()) as device:
            device.publish("lightship/v1/default/press-1/tele", b"hello")
    finally:
        running.stop()


@pytest.mark.system
def test_an_update_is_checked_in_a_child_that_asks_the_token_as_well(
    field: Field, tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightship_agent.update import check

    # A real module has its settings where it always looks; only this one is told by the environment.
    monkeypatch.setattr(check, "_PASSED_ON", (*check._PASSED_ON, "SOFTHSM2_CONF"))
    found = enrol(tmp_path / "press-1", server=field.url, token=field.token(), device="press-1", key_uri=token)
    released = field.release(1)
    field.assign("press-1", released)
    device = field.boot(found)

    assert device.look() == ""

    assert device.host.serving == released.digest


@pytest.mark.system
def test_a_token_without_that_key_is_an_error_that_says_so_and_leaves_nothing(
    field: Field, tmp_path: Path, token: str
) -> None:
    spent = field.token()
    with pytest.raises(EnrolError) as refused:
        enrol(
            tmp_path / "press-1", server=field.url, token=spent, device="press-1",
            key_uri=token.replace("object=device", "object=other"),
        )  # fmt: skip

    assert refused.value.code == "enrol.key"
    assert not (tmp_path / "press-1").exists() or list((tmp_path / "press-1").iterdir()) == []
    assert enrol(tmp_path / "press-1", server=field.url, token=spent, device="press-1").device == "press-1"


@pytest.mark.system
def test_another_devices_certificate_does_not_go_with_the_tokens_key(field: Field, token: str) -> None:
    found = field.enrolled("press-2")
    (found.folder / "key.uri").write_text(token)

    with pytest.raises(EnrolError) as refused:
        found.tls_context()

    assert refused.value.code == "enrol.key"


@pytest.mark.system
def test_the_private_half_can_not_be_had(token: str) -> None:
    key = token_key.TokenKey(token)
    for ask in (key.private_bytes, key.private_numbers, key.exchange):
        with pytest.raises(EnrolError, match="does not leave"):
            ask()


@pytest.mark.parametrize(
    "uri",
    ["", "file:/key.pem", "pkcs11:token=dev?pin-value=1234", "pkcs11:token=dev;pin-value=1", "pkcs11:a\nb"],
)
def test_a_uri_that_is_none_or_tells_the_pin_is_refused_before_anything_is_asked(uri: str) -> None:
    with pytest.raises(EnrolError) as refused:
        token_key.TokenKey(uri)
    assert refused.value.code == "enrol.key"
