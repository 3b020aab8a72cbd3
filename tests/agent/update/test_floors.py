"""Version floors: a way back is refused, new keys start anew, and nothing else does."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import StorageError, TrustError
from lightship_agent.update.floors import FILE, FloorFile, Floors, Stated, check, key_set, raised

roles = st.sampled_from(["targets", "releases", "releases-0a", "ümlaut"])
versions = st.dictionaries(roles, st.integers(1, 5), max_size=4)
stated = st.builds(Stated, keys=st.sampled_from(["1:a", "1:b", "2:a,b"]), versions=versions)
floors = st.builds(
    Floors, anchor=st.sampled_from(["", "x", "y"]), root=st.integers(0, 4), by_timestamp=stated, by_snapshot=stated
)


def accepted(before: Floors, seen: Floors) -> bool:
    try:
        check(before, seen)
    except TrustError:
        return False
    return True


def at(version: int, keys: str = "1:a") -> Floors:
    """Everything at one version."""
    own, listed = {"timestamp": version, "snapshot": version}, {"targets": version, "releases": version}
    return Floors(
        anchor="x", root=1, by_timestamp=Stated(keys=keys, versions=own), by_snapshot=Stated(keys=keys, versions=listed)
    )


@given(floors)
def test_what_was_seen_may_be_seen_again(seen: Floors) -> None:
    assert accepted(seen, seen)
    assert raised(seen, seen) == seen


@given(floors, floors)
def test_what_is_accepted_is_accepted_again_and_from_then_on_a_floor(before: Floors, seen: Floors) -> None:
    if accepted(before, seen):
        after = raised(before, seen)
        assert accepted(after, seen)
        assert raised(after, seen) == after


@given(floors, floors, floors)
def test_a_floor_never_sinks_while_its_keys_stay(one: Floors, two: Floors, older: Floors) -> None:
    """Whatever was refused before something newer under the same keys was accepted is refused after it."""
    same = (one.anchor, one.by_timestamp.keys, one.by_snapshot.keys) == (
        two.anchor,
        two.by_timestamp.keys,
        two.by_snapshot.keys,
    )
    if same and accepted(one, two) and not accepted(one, older):
        assert not accepted(raised(one, two), older)


@given(floors, floors)
def test_new_keys_and_a_root_that_is_not_older_are_always_a_way_out(before: Floors, seen: Floors) -> None:
    fresh = Floors(
        anchor=before.anchor,
        root=before.root + 1,
        by_timestamp=Stated(keys="1:new", versions=seen.by_timestamp.versions),
        by_snapshot=Stated(keys="1:newer", versions=seen.by_snapshot.versions),
    )
    assert accepted(before, fresh)
    after = raised(before, fresh)
    assert (after.by_timestamp, after.by_snapshot) == (fresh.by_timestamp, fresh.by_snapshot)


@given(st.lists(st.text(string.hexdigits, min_size=1), max_size=5), st.integers(1, 5), st.randoms())
def test_a_key_set_has_one_name_whatever_its_order(keyids: list[str], threshold: int, random: object) -> None:
    shuffled = sorted(keyids, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert key_set(keyids, threshold) == key_set(shuffled, threshold)
    assert key_set(keyids, threshold) != key_set(keyids, threshold + 1)
    assert key_set(keyids, threshold) != key_set([*keyids, "another-key"], threshold)


@pytest.mark.parametrize(
    ("seen", "role"),
    [
        (at(2), "snapshot"),
        (Floors(anchor="x", root=0, by_timestamp=at(3).by_timestamp, by_snapshot=at(3).by_snapshot), "root"),
        (Floors(anchor="x", root=1, by_timestamp=at(3, "1:b").by_timestamp, by_snapshot=at(2).by_snapshot), "releases"),
        (Floors(anchor="x", root=1, by_timestamp=at(2).by_timestamp, by_snapshot=at(3, "1:b").by_snapshot), "snapshot"),
        (Floors(anchor="x", root=1, by_timestamp=at(3).by_timestamp, by_snapshot=Stated(keys="1:a")), "releases"),
    ],
)
def test_the_refusal_names_the_role(seen: Floors, role: str) -> None:
    with pytest.raises(TrustError, match=f"^{role}: version") as refusal:
        check(at(3), seen)
    assert refusal.value.code == "trust.rollback"


def test_floors_outlive_the_process_and_a_refusal_leaves_them_alone(tmp_path: Path) -> None:
    FloorFile(tmp_path).accept(at(3))
    before = (tmp_path / FILE).read_bytes()

    with pytest.raises(TrustError):
        FloorFile(tmp_path).accept(at(2))

    assert (tmp_path / FILE).read_bytes() == before
    assert FloorFile(tmp_path).load() == at(3)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    FloorFile(tmp_path).accept(at(3))
    before = (tmp_path / FILE).stat()
    FloorFile(tmp_path).accept(at(3))
    after = (tmp_path / FILE).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"root": "x"}', b"[" * 100_000])
def test_floors_that_cannot_be_read_start_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / FILE).write_bytes(damage)
    FloorFile(tmp_path).accept(at(2))
    assert FloorFile(tmp_path).load() == at(2)


def test_floors_that_cannot_be_kept_are_an_error_with_a_code(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as refusal:
        FloorFile(tmp_path / "absent").accept(at(2))
    assert refusal.value.code == "storage.unwritable"
