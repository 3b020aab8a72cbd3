"""The content-addressed store: a name is a promise, and what breaks it counts as absent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightship_agent import files
from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.files import storage_error, sweep, write_durably
from lightship_agent.update.machine import UpdateState
from lightship_agent.update.store import BundleStore, StateFile

ONE, TWO = b"one bundle", b"another"


def test_what_was_put_is_read_back_and_nothing_else_is(tmp_path: Path) -> None:
    store = BundleStore(tmp_path)
    store.put(sha256_hex(ONE), ONE)

    assert store.read(sha256_hex(ONE)) == ONE
    assert store.read(sha256_hex(TWO)) is None


@pytest.mark.parametrize("damage", [b"", b"one bundlE", ONE + b"\0"])
def test_a_damaged_bundle_counts_as_absent(tmp_path: Path, damage: bytes) -> None:
    store = BundleStore(tmp_path)
    store.put(sha256_hex(ONE), ONE).write_bytes(damage)

    assert not store.holds(sha256_hex(ONE))


def test_garbage_is_what_nobody_refers_to_and_half_written_files_too(tmp_path: Path) -> None:
    store = BundleStore(tmp_path)
    for data in (ONE, TWO):
        store.put(sha256_hex(data), data)
        (store.staging / f"{sha256_hex(data)}.part").write_bytes(data)
    (store.bundles / f".{sha256_hex(ONE)}.tar.77.tmp").write_bytes(b"on")

    (store.staging / f"{'3' * 64}.part").write_bytes(b"half of what is still wanted")

    store.collect_garbage((sha256_hex(ONE), "3" * 64))

    left = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted([f"{'3' * 64}.part", f"{sha256_hex(ONE)}.tar"])


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StorageError) as refused:
        BundleStore(tmp_path / "file" / "state")

    assert refused.value.code == "storage.unwritable"


def test_a_device_without_a_state_begins_with_nothing(tmp_path: Path) -> None:
    assert StateFile(tmp_path).load() == UpdateState()


def test_a_state_from_a_later_agent_is_read_as_far_as_we_know_it(tmp_path: Path) -> None:
    (tmp_path / "update.json").write_bytes(b'{"phase": "idle", "floor": 7, "mood": "calm"}')

    assert StateFile(tmp_path).load().floor == 7


# The one way to write -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "storage.full"),
        (errno.EDQUOT, "storage.full"),
        (errno.EROFS, "storage.unwritable"),
        (errno.EACCES, "storage.unwritable"),
        (errno.EIO, "storage.unwritable"),
    ],
)
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, code: str
) -> None:
    path = tmp_path / "state"
    write_durably(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(number, "no")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(StorageError) as refused:
            write_durably(path, b"new")

    assert refused.value.code == code
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_file_limit_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_durably(path, b"old")
    program = (
        "import resource, signal, sys; from pathlib import Path; from lightship_agent.files import write_durably\n"
        "from lightship_agent.contract.codes import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_durably(Path(sys.argv[1]), b'x' * 100_000)\n"
        "except StorageError as e: print(e.code)\n"
    )
    home = str(Path(files.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, env={"PYTHONPATH": home}
    )

    assert done.stdout.strip() == "storage.full"
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_what_killed_writers_left_is_swept_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    ours, theirs = tmp_path / f".state.{os.getpid()}.tmp", tmp_path / f".state.{gone.pid}.tmp"
    others = [tmp_path / n for n in (".state.x.tmp", ".tmp", "state.1.tmp", f".state.{10**30}.part", "state")]
    for path in (ours, theirs, *others):
        path.write_bytes(b"half")

    sweep(tmp_path)

    assert not theirs.exists()
    assert all(p.exists() for p in (ours, *others))


def test_the_mode_of_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    write_durably(tmp_path / "secret", b"s", mode=0o600)

    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_an_error_without_a_number_is_still_said() -> None:
    assert storage_error(OSError("odd"), Path("/x")).code == "storage.unwritable"
