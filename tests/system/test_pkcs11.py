"""Signing keys in a PKCS#11 token: SoftHSM stands for the smart card. Nothing is installed here; skips say what for."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tests.control_plane.release.people import ROOT, People, first
from tests.control_plane.things import ACTOR

from lightship.home import Home
from lightship.registry import ceremonies
from lightship.release import ceremony
from lightship.release.changes import RoleKeys
from lightship.release.keyfiles import open_key, read_public
from lightship_agent.contract.codes import ReleaseError

MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")
MODULE = next((m for m in MODULES if Path(m).exists()), "")
MISSING = [
    what
    for what, there in {
        "softhsm2 (apt)": MODULE and shutil.which("softhsm2-util"),
        "opensc (apt)": shutil.which("pkcs11-tool"),
        "python-pkcs11 (pip install 'lightship[pkcs11]')": importlib.util.find_spec("pkcs11"),
    }.items()
    if not there
]
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]
PIN, URI = "271828", "hsm:2?label=alice"


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token with a P-256 key, as a smart card's slot 9c; the file with its PIN."""
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    monkeypatch.setenv("PYKCS11LIB", MODULE)
    run("softhsm2-util", "--init-token", "--free", "--label", "alice", "--so-pin", "314159", "--pin", PIN)
    run(
        "pkcs11-tool", "--module", MODULE, "--token-label", "alice", "--login", "--pin", PIN,
        "--keypairgen", "--key-type", "EC:prime256v1", "--id", "02", "--label", "root",
    )  # fmt: skip
    pin = tmp_path / "alice.pin"
    pin.write_text(PIN + "\n")
    return pin


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=60)


def lightship(folder: Path, *words: str) -> tuple[int, str]:
    """The command, in a process of its own, as a signer would type it."""
    command = [str(Path(sys.executable).with_name("lightship")), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_root_key_in_a_token_signs_its_part_and_a_root_with_it_holds(tmp_path: Path, token: Path) -> None:
    people = People(tmp_path)
    assert lightship(tmp_path, "keys", "add-uri", URI, "hardware", "--passphrase-file", str(token))[0] == 0
    written = json.loads((tmp_path / "hardware.key.json").read_bytes())
    assert (written["uri"], written["keytype"]) == (URI, "ecdsa")
    assert PIN not in (tmp_path / "hardware.key.json").read_text()
    with closing(Home.create(tmp_path / "home", production=True)) as home:
        begun = first(home, people)
        ceremonies.finish(home, [people.sign(begun, *ROOT, "builder", "approver")], actor=ACTOR)
        hard = read_public(tmp_path / "hardware.key.json")
        wanted = {"root": RoleKeys.of([hard, people.public("bob")], 2)}
        begun = people.sign(ceremonies.begin(home, "Harden", wanted, actor=ACTOR), "alice", "bob")
        ceremony.write(tmp_path / "harden.json", begun)

        status, said = lightship(
            tmp_path,
            "keys", "ceremony", "sign", "harden.json", "--key", "hardware.key.json", "--passphrase-file", "alice.pin",
        )  # fmt: skip

        assert (status, PIN in said) == (0, False), said
        assert ceremonies.finish(home, [ceremony.read(tmp_path / "harden.json")], actor=ACTOR) == ["root"]
        assert hard.keyid in home.releases.trusted("root")


def test_an_online_role_signs_with_a_token_while_nobody_is_there(tmp_path: Path, token: Path) -> None:
    words = ("keys", "add-uri", URI, "online", "--pin-file", str(token))
    assert lightship(tmp_path, *words)[0] == 0
    with closing(Home.create(tmp_path / "home")) as home:
        key = read_public(tmp_path / "online.key.json")
        home.keys.adopt("timestamp", tmp_path / "online.key.json")
        wanted = {"timestamp": RoleKeys.of([key])}
        ceremonies.finish(home, [ceremonies.begin(home, "Harden", wanted, actor=ACTOR)], actor=ACTOR)
        assert home.releases.trusted("timestamp") == [key.keyid]
        before = home.releases.version("timestamp") or 0
        home.releases._commit_timestamp()
        assert home.releases.version("timestamp") == before + 1
        assert not (home.keys.folder / "timestamp.pem").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pin": "000000"}, "can't be used"),
        ({"uri": "hsm:7?label=alice"}, "could not find"),
        ({"uri": "hsm:2?label=nobody"}, "No PKCS#11 token found"),
        ({"module": "/nonexistent.so"}, "can't be used"),
    ],
)
def test_a_token_that_will_not_is_an_error_with_a_code_and_without_its_pin(
    tmp_path: Path, token: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], words: str
) -> None:
    from lightship.release.uris import import_uri

    _, key = import_uri(URI, lambda _: PIN)
    written = {"keytype": key.keytype, "scheme": key.scheme, "public": key.keyval["public"]}
    facts = {**written, "uri": change.get("uri", URI)}
    (tmp_path / "bad.key.json").write_text(json.dumps(facts))
    monkeypatch.setenv("PYKCS11LIB", change.get("module", MODULE))
    signer = open_key(tmp_path / "bad.key.json", lambda _: change.get("pin", PIN))
    with pytest.raises(ReleaseError, match=words) as e:
        signer.sign(b"x")
    assert e.value.code == "release.keys"
    assert PIN not in str(e.value)
