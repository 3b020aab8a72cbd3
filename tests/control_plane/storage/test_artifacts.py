"""Artifacts: named by their content, and refused when that is no longer true."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.storage.artifacts import FolderArtifacts
from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.wire import sha256_hex


@pytest.fixture
def artifacts(tmp_path: Path) -> FolderArtifacts:
    return FolderArtifacts(tmp_path / "artifacts")


def only_file(folder: Path) -> Path:
    (found,) = [p for p in folder.rglob("*") if p.is_file()]
    return found


@given(st.binary(max_size=2_000))
def test_what_is_put_comes_back_under_its_digest(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    artifacts = FolderArtifacts(tmp_path_factory.mktemp("artifacts"))
    digest = artifacts.put(data)
    assert digest == sha256_hex(data)
    assert artifacts.get(digest) == data


def test_the_same_content_is_kept_once(artifacts: FolderArtifacts, tmp_path: Path) -> None:
    assert artifacts.put(b"bundle") == artifacts.put(b"bundle")
    only_file(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"bundlf", b"bundle and more"])
def test_altered_bytes_are_never_handed_out(artifacts: FolderArtifacts, tmp_path: Path, damage: bytes) -> None:
    digest = artifacts.put(b"bundle")
    only_file(tmp_path).write_bytes(damage)
    with pytest.raises(StorageError, match="altered") as e:
        artifacts.get(digest)
    assert e.value.code == "storage.corrupt"


def test_a_missing_artifact_is_an_error_with_its_digest(artifacts: FolderArtifacts) -> None:
    with pytest.raises(StorageError, match="0123456789ab") as e:
        artifacts.get("0123456789ab" + "0" * 52)
    assert e.value.code == "storage.corrupt"


def test_a_folder_that_is_a_file_is_called_unwritable_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("in the way")
    with pytest.raises(StorageError) as e:
        FolderArtifacts(tmp_path / "artifacts").put(b"bundle")
    assert e.value.code == "storage.unwritable"
    assert (tmp_path / "artifacts").read_text() == "in the way"
