"""Key files: every one is foreign, and none is ever overwritten."""

from __future__ import annotations

import io
import json
import stat
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, SSlibKey

from lightship.cli.keys import secret_of
from lightship.release.keyfiles import MAX_KEY_FILE, new_key, open_key, public_json, read_public, read_reference
from lightship.release.uris import INSTALL, import_uri
from lightship_agent.contract.codes import LightshipError, ReleaseError


def refused(path: Path, code: str = "release.keys", match: str = ".") -> None:
    before = {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    for read in (open_key,) if path.name.endswith(".pem") else (read_public, read_reference, open_key):
        with pytest.raises(ReleaseError, match=match) as e:
            read(path)
        assert e.value.code == code
    assert {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file()} == before


def test_a_new_key_signs_and_its_public_half_verifies(tmp_path: Path) -> None:
    made = new_key(tmp_path / "alice.pem")
    signer, public = open_key(tmp_path / "alice.pem"), read_public(tmp_path / "alice.pub.json")
    assert made.keyid == signer.public_key.keyid == public.keyid
    public.verify_signature(signer.sign(b"x"), b"x")
    assert stat.S_IMODE((tmp_path / "alice.pem").stat().st_mode) == 0o600
    assert b"PRIVATE" not in (tmp_path / "alice.pub.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alice.pem", "alice.pub.json"]


def test_a_sealed_key_opens_with_its_passphrase_and_no_other(tmp_path: Path) -> None:
    made = new_key(tmp_path / "alice.pem", passphrase="correct horse")
    assert b"ENCRYPTED" in (tmp_path / "alice.pem").read_bytes()
    assert open_key(tmp_path / "alice.pem", lambda _: "correct horse").public_key.keyid == made.keyid
    with pytest.raises(ReleaseError, match="--passphrase-file"):
        open_key(tmp_path / "alice.pem")
    with pytest.raises(ReleaseError) as e:
        open_key(tmp_path / "alice.pem", lambda _: "wrong mule")
    assert "mule" not in str(e.value)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    new_key(tmp_path / "alice.pem")
    before = (tmp_path / "alice.pem").read_bytes()
    with pytest.raises(ReleaseError) as e:
        new_key(tmp_path / "alice.pem")
    assert (e.value.code, (tmp_path / "alice.pem").read_bytes()) == ("release.exists", before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alice.pem", "alice.pub.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[" * 20_000, b"{}", b"null", b" " * (MAX_KEY_FILE + 1), b"-----BEGIN PRIVATE KEY-----\n"],
)
@pytest.mark.parametrize("name", ["a.pem", "a.pub.json", "a.key.json"])
def test_what_is_no_key_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)


@pytest.mark.parametrize("name", ["a.pem", "a.pub.json", "a.key.json"])
def test_a_file_that_is_not_there_is_an_error_with_a_code(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name, match="No such file")


FIELDS = st.dictionaries(st.sampled_from(["keytype", "scheme", "public", "uri"]), st.text())


@given(st.binary(max_size=300) | FIELDS.map(lambda fields: json.dumps(fields).encode()))
def test_no_bytes_make_reading_a_public_key_crash(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("key") / "a.key.json"
    path.write_bytes(data)
    for read in (read_public, read_reference):
        with pytest.raises(LightshipError):
            read(path)


def test_the_id_of_a_key_is_computed_and_never_believed(tmp_path: Path) -> None:
    made = new_key(tmp_path / "alice.pem")
    lying = json.loads((tmp_path / "alice.pub.json").read_bytes())
    lying["keyid"] = "f" * 64
    (tmp_path / "lying.pub.json").write_text(json.dumps(lying))
    assert read_public(tmp_path / "lying.pub.json").keyid == made.keyid


def test_the_same_key_spelled_otherwise_has_the_same_id(tmp_path: Path) -> None:
    """Line ends and capitals in a public key would otherwise make two ids of one key."""
    key = SSlibKey.from_crypto(ec.generate_private_key(ec.SECP256R1()).public_key())
    for name, text in (("a", key.keyval["public"]), ("b", key.keyval["public"].replace("\n", "\r\n") + "\n")):
        facts = {"keytype": key.keytype, "scheme": key.scheme, "public": text}
        (tmp_path / f"{name}.pub.json").write_text(json.dumps(facts))
    assert read_public(tmp_path / "a.pub.json").keyid == read_public(tmp_path / "b.pub.json").keyid == key.keyid


@pytest.mark.parametrize(
    "change",
    [{"scheme": "rsassa-pss-sha256"}, {"keytype": "rsa"}, {"public": "zz"}, {"scheme": "none"}, {"public": ""}],
)
def test_a_public_key_of_a_kind_that_devices_do_not_verify_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    new_key(tmp_path / "alice.pem")
    facts = {**json.loads((tmp_path / "alice.pub.json").read_bytes()), **change}
    (tmp_path / "odd.pub.json").write_text(json.dumps(facts))
    refused(tmp_path / "odd.pub.json")


def test_a_private_key_of_a_kind_that_devices_do_not_verify_is_refused(tmp_path: Path) -> None:
    odd = {"dsa": dsa.generate_private_key(2048), "curve": ec.generate_private_key(ec.SECP256K1())}
    for name, key in odd.items():
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / f"{name}.pem").write_bytes(pem)
        refused(tmp_path / f"{name}.pem")


# URIs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri", ["", "hsm", "file2:/etc/shadow", "gnupg:x", "https://x", "hsm:2\n", "awskms:" + "x" * 3_000]
)
def test_a_uri_that_names_no_key_of_ours_is_refused(tmp_path: Path, uri: str) -> None:
    made = new_key(tmp_path / "alice.pem")
    (tmp_path / "x.key.json").write_bytes(public_json(made, uri=uri))
    with pytest.raises(ReleaseError) as e:
        open_key(tmp_path / "x.key.json")
    assert e.value.code == "release.keys"
    with pytest.raises(ReleaseError):
        import_uri(uri, lambda _: "")


@pytest.mark.parametrize("scheme", INSTALL)
def test_where_a_library_is_missing_the_error_says_what_to_install(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        @staticmethod
        def import_(*_: object) -> None:
            raise UnsupportedLibraryError("not here")

        from_priv_key_uri = import_

    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, scheme, Missing)
    made = new_key(tmp_path / "alice.pem")
    (tmp_path / "x.key.json").write_bytes(public_json(made, uri=f"{scheme}:1"))
    signer = open_key(tmp_path / "x.key.json")
    for act in (lambda: import_uri(f"{scheme}:1", lambda _: ""), lambda: signer.sign(b"x")):
        with pytest.raises(ReleaseError, match="pip install") as e:
            act()
        assert INSTALL[scheme] in str(e.value)


def test_the_pin_of_a_key_that_signs_alone_is_read_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Token:
        @staticmethod
        def from_priv_key_uri(_uri: str, _key: object, secret: object) -> object:
            assert callable(secret)
            asked.append(secret("pin"))
            raise ValueError("enough")

    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "hsm", Token)
    made = new_key(tmp_path / "alice.pem")
    (tmp_path / "pin").write_text("271828\n")
    (tmp_path / "x.key.json").write_bytes(public_json(made, uri="hsm:2", pin_file=str(tmp_path / "pin")))
    with pytest.raises(ReleaseError, match="enough"):
        open_key(tmp_path / "x.key.json").sign(b"x")
    assert asked == ["271828"]
    (tmp_path / "pin").unlink()
    with pytest.raises(ReleaseError, match="PIN"):
        open_key(tmp_path / "x.key.json").sign(b"x")


def test_a_secret_comes_from_a_file_or_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pass").write_bytes(b"correct horse\r\n")
    assert secret_of(tmp_path / "pass")("passphrase") == "correct horse"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n")))
    assert secret_of(Path("-"))("passphrase") == "from a pipe"
    for content in (b"", b"\n", b"x" * 5_000, b"\xff\xfe"):
        (tmp_path / "pass").write_bytes(content)
        with pytest.raises(ReleaseError) as e:
            secret_of(tmp_path / "pass")("passphrase")
        assert e.value.code == "release.keys"
    with pytest.raises(ReleaseError):
        secret_of(tmp_path / "none")("passphrase")
