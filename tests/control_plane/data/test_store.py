"""The dataset store: whole files or none, checked when read."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from lightship.data.dataset import Dataset, from_arrays
from lightship.data.store import DatasetStore
from lightship_agent.contract.codes import DataError, StorageError


@pytest.fixture
def dataset() -> Dataset:
    return from_arrays("rows", np.arange(2_000).reshape(1_000, 2), np.arange(1_000) % 3, ["a", "b"], "t")


def files(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.is_file()]


def test_what_was_put_is_got(tmp_path: Path, dataset: Dataset) -> None:
    store = DatasetStore(tmp_path / "data")
    digest = store.put(dataset)
    assert digest == dataset.digest
    assert store.get(digest).digest == digest
    assert store.digests() == (digest,)


def test_the_same_dataset_is_kept_once_and_not_written_again(tmp_path: Path, dataset: Dataset) -> None:
    store = DatasetStore(tmp_path)
    digest = store.put(dataset)
    before = store.path(digest).stat()
    store.put(dataset)
    after = store.path(digest).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert len(files(tmp_path)) == 1


def test_a_damaged_file_is_refused_and_healed_by_adding_the_data_again(tmp_path: Path, dataset: Dataset) -> None:
    store = DatasetStore(tmp_path)
    digest = store.put(dataset)
    data = bytearray(store.path(digest).read_bytes())
    data[-5] ^= 1
    store.path(digest).write_bytes(data)
    with pytest.raises(StorageError) as caught:
        store.get(digest)
    assert caught.value.code == "storage.corrupt"
    store.put(dataset)
    assert store.get(digest).rows == 1_000


@pytest.mark.parametrize("digest", ["0" * 64, "../../etc/passwd", "ABC", ""])
def test_an_unknown_digest_is_unknown_and_never_a_path(tmp_path: Path, digest: str) -> None:
    with pytest.raises(DataError) as caught:
        DatasetStore(tmp_path).get(digest)
    assert caught.value.code == "data.unknown"


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    # A real limit in a real process: files may not grow beyond 1 KB there.
    program = """
        import resource, sys
        from pathlib import Path
        from lightship.data.dataset import from_arrays
        from lightship.data.store import DatasetStore
        from lightship_agent.contract.codes import StorageError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
        rows = from_arrays("rows", [[float(i)] for i in range(1000)], [i % 2 for i in range(1000)], ["a"], "t")
        try:
            DatasetStore(Path(sys.argv[1])).put(rows)
        except StorageError as e:
            print(e.code)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "storage.full"
    assert files(tmp_path) == []


def test_a_place_that_is_no_folder_is_said_to_be_unwritable(tmp_path: Path, dataset: Dataset) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError) as caught:
        DatasetStore(tmp_path / "file").put(dataset)
    assert caught.value.code == "storage.unwritable"
