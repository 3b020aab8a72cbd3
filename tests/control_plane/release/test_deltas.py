"""Patches beside releases: from what, when they pay, and what takes them off the list again."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.agent.conftest import build
from tests.control_plane.things import (
    ACTOR,
    MODEL,
    Served,
    add_device,
    enrolled,
    make_champion,
    register,
    reports_running,
)

from lightship.fleet import director
from lightship.home import Home
from lightship.registry import release as releasing
from lightship.release.deltas import KEPT_VERSIONS, MAX_BASES, Base, choose_bases, make_deltas, stale_patches
from lightship.storage.models import AssignmentRow, ModelVersion
from lightship_agent.contract.device_api import Paths
from lightship_agent.contract.transport import DELTA_BASE_MAX, DELTA_WORTH, apply_patch, delta_path, pack_transport
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.update.check import CheckRequest, ServerSource, check

NEW = "f" * 64


def noise(seed: str, length: int) -> bytes:
    """Bytes that no compressor makes smaller."""
    return hashlib.shake_256(seed.encode()).digest(length)


def base(version: int, *, length: int = 1_000, devices: int = 0, champion: bool = False) -> Base:
    return Base(version, f"{version:064x}", length, devices=devices, champion=champion)


def chosen(*candidates: Base, length: int = 1_000) -> list[int]:
    return [b.version for b in choose_bases(candidates, digest=NEW, length=length)]


# From what ------------------------------------------------------------------------------------------------------------


def test_what_most_devices_run_comes_first_then_the_champion_then_the_newest() -> None:
    found = chosen(base(1, devices=5), base(2, devices=90), base(3, champion=True), base(4), base(5))

    assert found == [2, 1, 3]


def test_without_devices_the_newest_are_patched_from() -> None:
    assert chosen(base(1), base(2), base(3)) == [3, 2]
    assert chosen(base(1, champion=True), base(2), base(3)) == [1, 3, 2]


def test_nothing_is_patched_from_itself_from_what_is_too_large_or_from_next_to_nothing() -> None:
    itself = Base(9, NEW, 1_000, devices=9)

    assert chosen(itself, base(1, length=DELTA_BASE_MAX + 1), base(2, length=7)) == []
    assert chosen(base(1, length=DELTA_BASE_MAX)) == [1]
    assert chosen(base(1, length=DELTA_BASE_MAX), length=120 << 20) == []


bases = st.builds(
    base,
    st.integers(1, 9),
    length=st.integers(0, 2 * DELTA_BASE_MAX),
    devices=st.integers(0, 9),
    champion=st.booleans(),
)


@given(st.lists(bases, max_size=12, unique_by=lambda b: b.version), st.integers(1, 1 << 30))
def test_the_bases_are_few_small_enough_and_different(candidates: list[Base], length: int) -> None:
    found = choose_bases(candidates, digest=NEW, length=length)

    assert len(found) <= MAX_BASES
    assert len({b.digest for b in found}) == len(found)
    assert set(found) <= set(candidates)
    assert all(b.length <= DELTA_BASE_MAX and b.length + length <= 128 << 20 for b in found)


# When they pay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "listed"), [(0.9, True), (0.5, True), (0.3, False), (0.0, False)])
def test_only_a_patch_under_three_fifths_of_the_whole_is_kept(shared: float, listed: bool) -> None:
    common = noise("common", int(100_000 * shared))
    old, new = common + noise("old", 50_000), common + noise("new", 100_000 - len(common))
    told: list[str] = []

    made = make_deltas(
        "pump", new, len(pack_transport(new)), [(Base(1, sha256_hex(old), len(old)), old)], progress=told.append
    )

    assert bool(made) == listed
    assert told[-1].startswith("patch from version 1: ")
    for path, patch in made.items():
        assert path == delta_path("pump", sha256_hex(old), sha256_hex(new))
        assert len(patch) < DELTA_WORTH * len(pack_transport(new))
        args = {"patch_sha256": sha256_hex(patch), "sha256": sha256_hex(new), "length": len(new)}
        assert apply_patch(patch, old, **args) == new  # type: ignore[arg-type]


# What is released -----------------------------------------------------------------------------------------------------


def listed(home: Home) -> dict[str, str]:
    """Digests by path, of everything in the release list."""
    targets = home.releases.in_force().releases
    assert targets is not None
    return {p: t.hashes["sha256"] for p, t in targets.signed.targets.items()}


def patches(home: Home) -> set[str]:
    return {p for p in listed(home) if p.startswith("deltas/")}


def alike(home: Home, version: int) -> ModelVersion:
    """A version like the others but for its number, registered and not released."""
    row = register(home, version, released=False)
    bundle = build(version)
    with home.database.write() as session:
        stored = session.get(ModelVersion, (row.model, row.version))
        assert stored is not None
        stored.digest, stored.length = home.artifacts.put(bundle), len(bundle)
    return stored


def release(home: Home, version: int, *, deltas: bool = True) -> ModelVersion:
    alike(home, version)
    return releasing.release(home, f"{MODEL}@{version}", actor=ACTOR, deltas=deltas)


def test_a_release_brings_patches_from_what_devices_run_in_the_same_commit(home: Home) -> None:
    one, two, three = (release(home, v, deltas=False) for v in (1, 2, 3))
    make_champion(home, 2)
    add_device(home, "pump-1")
    reports_running(home, "pump-1", one)
    before = home.releases.in_force().version("releases")

    four = release(home, 4)

    assert home.releases.in_force().version("releases") == before + 1
    assert patches(home) == {delta_path(MODEL, old.digest, four.digest) for old in (one, two, three)}
    for path in patches(home):
        (file,) = home.releases.targets.glob(f"deltas/{MODEL}/*.{Path(path).name}")
        assert sha256_hex(file.read_bytes()) == listed(home)[path]
    assert [r.path for r in home.releases.released()] == [f"bundles/{MODEL}/{v}.tar" for v in (1, 2, 3, 4)]


def test_a_device_that_runs_the_base_is_offered_the_patch_and_others_are_not(served: Served, tmp_path: Path) -> None:
    home, identity = served.home, enrolled(served.home, served.url, tmp_path, "pump-1")
    one, two = release(home, 1), release(home, 2)
    with home.database.write() as session:
        director.assign(session, home.keys, device="pump-1", version=two, rollout="r", actor=ACTOR)
        envelope = session.get_one(AssignmentRow, "pump-1").envelope
    request = CheckRequest(
        state_dir=str(identity.folder.parent),
        device="pump-1",
        envelope=envelope,
        floor=0,
        now=time.time(),
        source=ServerSource(metadata_url=f"{served.url}{Paths.METADATA}"),
    )

    offered = check(msgspec.structs.replace(request, current_sha256=one.digest)).delta
    others = [check(msgspec.structs.replace(request, current_sha256=sha)).delta for sha in ("", NEW, two.digest)]

    assert offered is not None
    patch = (home.releases.targets / offered.url_path).read_bytes()
    args = {"patch_sha256": offered.sha256, "sha256": two.digest, "length": two.length}
    assert apply_patch(patch, build(1), **args) == build(2)  # type: ignore[arg-type]
    assert others == [None, None, None]


def test_without_deltas_there_are_none(home: Home) -> None:
    release(home, 1)
    release(home, 2, deltas=False)

    assert patches(home) == set()


def test_the_first_release_and_another_model_have_nothing_to_patch_from(home: Home) -> None:
    release(home, 1)
    register(home, 1, model="fan")

    assert patches(home) == set()


@pytest.mark.parametrize("end", [1, 2])
def test_revoking_either_end_takes_the_patch_off_the_list(home: Home, end: int) -> None:
    release(home, 1)
    release(home, 2)
    assert len(patches(home)) == 1

    releasing.revoke(home, f"{MODEL}@{end}", actor=ACTOR, reason="bad")

    assert patches(home) == set()


def test_a_revoked_version_is_not_patched_from(home: Home) -> None:
    release(home, 1)
    releasing.revoke(home, f"{MODEL}@1", actor=ACTOR, reason="bad")
    release(home, 2)

    assert patches(home) == set()


def test_releasing_the_same_again_changes_nothing(home: Home) -> None:
    release(home, 1)
    release(home, 2)
    before = listed(home), home.releases.in_force().version("releases")

    releasing.release(home, f"{MODEL}@2", actor=ACTOR)

    assert (listed(home), home.releases.in_force().version("releases")) == before


def test_patches_to_old_versions_leave_the_list(home: Home) -> None:
    versions = [release(home, v) for v in range(1, 6)]

    ends = {p.rpartition("-")[2].partition(".")[0] for p in patches(home)}

    assert ends == {v.digest[:16] for v in versions[-KEPT_VERSIONS:]}


def test_stale_patches_are_those_of_this_model_that_lead_to_no_newest_version() -> None:
    digests = {v: sha256_hex(b"%d" % v) for v in (1, 2, 9, 10)}
    to = {v: delta_path("pump", NEW, digest) for v, digest in digests.items()}
    fan = delta_path("fan", NEW, NEW)
    everything = {
        **{f"bundles/pump/{v}.tar": digest for v, digest in digests.items()},
        **dict.fromkeys([*to.values(), fan, "deltas/pump/a-b.zpatch"], "0"),
    }

    assert sorted(stale_patches(everything, "pump")) == sorted([to[1], to[2], "deltas/pump/a-b.zpatch"])
