"""The identity on disk: renewed as a pair, whole or not at all, wherever it is cut."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tests.agent.link.field import Field

from lightship_agent.contract.codes import EnrolError, LinkError, StorageError
from lightship_agent.link import identity, renewal
from lightship_agent.link.client import ControlPlane


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_device_without_an_identity_is_not_enrolled(tmp_path: Path) -> None:
    with pytest.raises(EnrolError) as refused:
        identity.load_identity(tmp_path)

    assert (refused.value.code, refused.value.exit_status) == ("enrol.not-enrolled", 21)


@pytest.mark.parametrize("name", ["identity.json", "tuf-root.json"])
@pytest.mark.parametrize("damage", [None, b"\xff"])
def test_an_identity_that_cannot_be_read_is_said(field: Field, name: str, damage: bytes | None) -> None:
    found = field.enrolled()
    (found.folder / name).unlink()
    if damage is None or name != "identity.json":
        (found.folder / name).mkdir()
    else:
        (found.folder / name).write_bytes(damage)

    with pytest.raises(StorageError) as refused:
        identity.load_identity(found.folder.parent)

    assert refused.value.code == "storage.corrupt"


@pytest.mark.parametrize("name", ["cert.pem", "key.pem", "ca.pem"])
@pytest.mark.parametrize("damage", [None, b"", b"noise"])
def test_a_damaged_certificate_is_said_and_is_no_crash(field: Field, name: str, damage: bytes | None) -> None:
    found = field.enrolled()
    (found.folder / name).unlink()
    if damage is not None:
        (found.folder / name).write_bytes(damage)

    with pytest.raises(StorageError) as refused:
        ControlPlane(found)
    assert refused.value.code == "storage.corrupt"
    if name == "cert.pem":
        with pytest.raises(StorageError):
            found.certificate()


# Renewal --------------------------------------------------------------------------------------------------------------


def test_a_renewed_pair_replaces_the_old_one_and_is_used_at_once(field: Field) -> None:
    found = field.enrolled()
    control = ControlPlane(found)
    assert control.reachable()
    before, old = files_of(found.folder), found.certificate()

    renewal.renew(found, control)
    control.reopen()

    after = files_of(found.folder)
    assert found.certificate().serial_number != old.serial_number
    assert {n for n in before if before[n] != after[n]} == {"key.pem", "cert.pem"}
    assert {stat.S_IMODE(p.stat().st_mode) for p in found.folder.iterdir()} == {0o600}
    assert sorted(p.name for p in found.folder.parent.iterdir()) == ["identity", "identity.old"]
    assert control.reachable()
    assert sorted(p.name for p in found.folder.parent.iterdir()) == ["identity"]  # the new pair was accepted
    assert control.reachable()
    control.close()


def test_a_new_pair_that_the_control_plane_does_not_know_is_taken_back(field: Field) -> None:
    from lightship.storage.models import Device as Row

    found = field.enrolled()
    control = ControlPlane(found)
    before = files_of(found.folder)
    renewal.renew(found, control)
    with field.home.database.write() as session:
        session.get_one(Row, "press-1").spki_next = ""  # as after a backup of yesterday was restored
    control.reopen()

    assert not control.reachable()

    assert files_of(found.folder) == before
    assert sorted(p.name for p in found.folder.parent.iterdir()) == ["identity"]
    assert control.reachable()
    control.close()


def test_a_renewal_whose_answer_got_lost_locks_nobody_out(field: Field) -> None:
    found = field.enrolled()
    control = ControlPlane(found)
    before = files_of(found.folder)
    field.fault("/v1/renew", times=1, cut_after=5)

    with pytest.raises(LinkError):
        renewal.renew(found, control)

    assert files_of(found.folder) == before
    assert control.reachable()
    renewal.renew(found, control)
    control.reopen()
    assert control.reachable()
    control.close()


@pytest.mark.parametrize("body", [b"", b"{}", b'{"chain": 5}', b"<html>"])
def test_an_answer_that_is_no_renewal_changes_nothing(field: Field, body: bytes) -> None:
    found = field.enrolled()
    control = ControlPlane(found)
    before = files_of(found.folder)
    field.fault("/v1/renew", status=200, body=body)

    with pytest.raises(LinkError) as refused:
        renewal.renew(found, control)

    assert refused.value.code == "link.status"
    assert files_of(found.folder) == before
    control.close()


@pytest.mark.parametrize("body", [b'{"chain": ""}', b'{"chain": "noise"}', None])
def test_a_certificate_that_is_not_ours_is_not_kept(field: Field, body: bytes | None) -> None:
    found = field.enrolled()
    control = ControlPlane(found)
    before = files_of(found.folder)
    stranger = identity.certificate_request(identity.new_key(), "press-1").decode()
    other = field.home.ca.issue_device(stranger, "press-1").chain.decode().replace("\n", "\\n")
    field.fault("/v1/renew", status=200, body=body if body is not None else f'{{"chain": "{other}"}}'.encode())

    with pytest.raises(EnrolError) as refused:
        renewal.renew(found, control)

    assert refused.value.code == "enrol.certificate"
    assert files_of(found.folder) == before
    assert sorted(p.name for p in found.folder.parent.iterdir()) == ["identity"]
    control.close()


def test_a_revoked_device_is_not_renewed(field: Field) -> None:
    from lightship.fleet import enrolment

    found = field.enrolled()
    control = ControlPlane(found)
    with field.home.database.write() as session:
        enrolment.revoke(session, "press-1", actor="test", reason="stolen")

    with pytest.raises(EnrolError) as refused:
        renewal.renew(found, control)

    assert refused.value.code == "enrol.revoked"
    control.close()


def test_renewal_is_due_after_two_thirds_of_a_life() -> None:
    assert not renewal.renewal_due(0.0, 9.0, 5.9)
    assert renewal.renewal_due(0.0, 9.0, 6.0)
    assert renewal.renewal_due(0.0, 9.0, 100.0)


def test_certificates_of_one_hour_are_not_renewed_in_one_hour(field: Field) -> None:
    shares = [renewal.share_of(field.enrolled(f"press-{n}").validity().serial) for n in range(8)]

    assert all(0 <= share < 1 for share in shares)
    assert len(set(shares)) == 8
    due = 100.0 * (2 / 3 + renewal.JITTER * 0.5)
    assert not renewal.renewal_due(0.0, 100.0, due - 0.1, 0.5)
    assert renewal.renewal_due(0.0, 100.0, due + 0.1, 0.5)


# Cuts -----------------------------------------------------------------------------------------------------------------

#: Runs in a child that is killed at its n-th rename or n-th write of the switch.
SWITCH = """
import os, signal, sys
from pathlib import Path
from lightship_agent.link import identity
state, kind, count, chain, key = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
from cryptography.hazmat.primitives.serialization import load_pem_private_key
really, done = getattr(Path if kind == "rename" else identity, kind if kind == "rename" else "write_durably"), 0
def counted(*a, **k):
    global done
    done += 1
    if done == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return really(*a, **k)
if kind == "rename":
    Path.rename = counted
else:
    identity.write_durably = counted
found = identity.load_identity(state)
identity.replace_certificate(
    found, load_pem_private_key(Path(key).read_bytes(), None), Path(chain).read_bytes())
"""


@pytest.mark.parametrize(
    ("kind", "count", "renewed"),
    [("write", 1, False), ("write", 4, False), ("rename", 1, False), ("rename", 2, True), ("rename", 3, True)],
)
def test_a_switch_that_is_cut_ends_with_one_whole_pair(
    field: Field, tmp_path: Path, kind: str, count: int, renewed: bool
) -> None:
    found = field.enrolled()
    key = identity.new_key()
    control = ControlPlane(found)
    chain = control.renew(identity.certificate_request(key, "press-1"))
    control.close()
    (tmp_path / "key").write_bytes(identity.key_pem(key))
    (tmp_path / "chain").write_bytes(chain)
    state = found.folder.parent

    home = str(Path(identity.__file__).parents[2])
    arguments = [str(state), kind, str(count), str(tmp_path / "chain"), str(tmp_path / "key")]
    done = subprocess.run([sys.executable, "-c", SWITCH, *arguments], check=False, env={"PYTHONPATH": home})
    assert done.returncode == (0 if count == 3 else -signal.SIGKILL)
    identity.recover_identity(state)

    survivor = identity.load_identity(state)
    survivor.tls_context()  # key and certificate are of one pair
    assert (survivor.certificate().public_key() == key.public_key()) == renewed
    assert survivor.unconfirmed == renewed
    control = ControlPlane(survivor)
    assert control.reachable()
    assert sorted(p.name for p in state.iterdir()) == ["identity"]
    control.close()


def test_an_enrolment_under_way_is_left_alone_by_recovery(tmp_path: Path) -> None:
    (tmp_path / "identity.new").mkdir()

    identity.recover_identity(tmp_path)

    assert (tmp_path / "identity.new").is_dir()


def test_an_old_folder_alone_is_put_back(field: Field) -> None:
    found = field.enrolled()
    shutil.move(found.folder, found.folder.with_name("identity.old"))

    identity.recover_identity(found.folder.parent)

    assert identity.load_identity(found.folder.parent).device == "press-1"


def test_a_full_disk_in_a_switch_keeps_the_old_pair(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    found = field.enrolled()
    control = ControlPlane(found)
    before = files_of(found.folder)
    really = os.fsync

    def full(descriptor: int) -> None:
        if "cert.pem" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(28, "No space left on device")
        really(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError):
            renewal.renew(found, control)

    assert files_of(found.folder) == before
    assert sorted(p.name for p in found.folder.parent.iterdir()) == ["identity"]
    assert control.reachable()
    control.close()
