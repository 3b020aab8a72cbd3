"""A file is carried to a device that has no network: what is taken of it, what is refused, and what that leaves."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.agent.update.carried import archive, carry, members
from tests.agent.update.ground import DEVICE, NEW, OLD, Ground, open_ground

from lightship_agent.contract.assignment import Assignment
from lightship_agent.contract.codes import LightshipError, MediaError, TrustError
from lightship_agent.contract.media import read_chunks
from lightship_agent.update import importing
from lightship_agent.update.check import CheckReply, FileSource, check
from lightship_agent.update.importing import Imported, follow, import_file
from lightship_agent.update.machine import Target, UpdateState
from lightship_agent.update.media import OPENER, envelope_for, open_transport, spooled
from lightship_agent.update.store import StateFile

Parts = dict[str, bytes]


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    (tmp_path / "device").mkdir()
    with open_ground(tmp_path / "device") as opened:
        opened.publish_new()
        yield opened


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    return tmp_path / "release.media"


def refused(ground: Ground, path: Path) -> LightshipError:
    """The refusal; nothing but the metadata cache has changed on disk, and nothing waits for the agent."""
    before = ground.on_disk()
    with pytest.raises(LightshipError) as caught:
        import_file(path, ground.folder, check=check)
    assert ground.on_disk() == before
    assert spooled(ground.folder) == []
    return caught.value


def by_file(ground: Ground, path: Path) -> CheckReply:
    """The file verified in this process."""
    return ground.accepted(envelope_for(path, DEVICE), source=FileSource(path=str(path), opener=OPENER))


def test_a_file_is_verified_and_waits_for_the_agent_with_no_network_at_all(ground: Ground, stick: Path) -> None:
    carry(stick, members(ground))
    told: list[tuple[int, int]] = []

    imported = import_file(stick, ground.folder, progress=lambda done, whole: told.append((done, whole)))

    assert ground.repository.asked == []
    assert (imported.assignment.path, imported.assignment.seq) == (NEW, 2)
    assert spooled(ground.folder) == [imported.waits_at]
    assert told
    # What waits is verified by the agent once more, from where it is.
    assert imported.waits_at is not None
    reply = by_file(ground, imported.waits_at)
    with open_transport(imported.waits_at, reply.transport) as f:
        assert f.read(reply.transport.length + 1) == b"packed new"


def test_what_the_process_of_the_check_says_is_said_here(ground: Ground, stick: Path) -> None:
    carry(stick, members(ground, envelope=ground.sign(ground.assignment(device="press-2"))))

    with pytest.raises(TrustError) as caught:
        import_file(stick, ground.folder)

    assert (caught.value.code, spooled(ground.folder)) == ("trust.foreign", [])


def test_what_waits_is_cut_down_to_what_this_device_needs(ground: Ground, stick: Path) -> None:
    mine = members(ground)
    others = {f"assignments/press-{n}.json": b"x" * 9_000 for n in range(20, 60)} | {
        f"targets/{'0' * 64}": bytes(1 << 20)
    }
    carry(stick, {**mine, **others})

    imported = import_file(stick, ground.folder, check=check)

    assert imported.waits_at is not None
    assert imported.waits_at.read_bytes() == archive(mine)


def test_the_same_file_twice_waits_once(ground: Ground, stick: Path) -> None:
    carry(stick, members(ground))

    first, second = (import_file(stick, ground.folder, check=check) for _ in range(2))

    assert first == second
    assert len(spooled(ground.folder)) == 1


def test_a_device_that_runs_the_bundle_already_has_nothing_to_wait_for(ground: Ground, stick: Path) -> None:
    carry(stick, members(ground))
    wanted = by_file(ground, stick).assignment
    StateFile(ground.folder).save(UpdateState(floor=1, current=Target.of(wanted)))

    imported = import_file(stick, ground.folder, check=check)

    assert imported == Imported(wanted, None, 0)
    assert spooled(ground.folder) == []
    assert follow(imported, ground.folder, timeout=1) == "applied"


def test_root_keys_that_were_rotated_since_enrolment_are_followed_through_the_file(ground: Ground, stick: Path) -> None:
    ground.repository.rotate("timestamp", "snapshot")
    ground.repository.rotate("targets")
    ground.repository.update("releases")
    carry(stick, members(ground))

    assert import_file(stick, ground.folder, check=check).assignment.path == NEW


# Refused --------------------------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def without(parts: Parts, what: str) -> Parts:
    found = {n: d for n, d in parts.items() if what not in n}
    assert len(found) < len(parts)
    return found


def altered(parts: Parts, what: str) -> Parts:
    return {n: flipped(d) if what in n else d for n, d in parts.items()}


SPOILT: dict[str, tuple[Callable[[Parts], Parts], str]] = {
    "the bundle altered": (lambda p: altered(p, "targets/"), "trust.digest"),
    "the bundle cut": (lambda p: {n: d[:-1] if "targets/" in n else d for n, d in p.items()}, "trust.digest"),
    "the bundle longer": (lambda p: {n: d + b"x" if "targets/" in n else d for n, d in p.items()}, "trust.digest"),
    "no bundle": (lambda p: without(p, "targets/"), "media.incomplete"),
    "another bundle": (lambda p: {**without(p, "targets/"), f"targets/{'0' * 64}": b"other"}, "media.incomplete"),
    "no releases": (lambda p: without(p, ".releases."), "media.incomplete"),
    "no snapshot": (lambda p: without(p, ".snapshot."), "media.incomplete"),
    "no targets": (lambda p: without(p, ".targets."), "media.incomplete"),
    "no timestamp": (lambda p: without(p, "timestamp"), "media.incomplete"),
    "envelope not JSON": (lambda p: {**p, f"assignments/{DEVICE}.json": b"{"}, "trust.metadata"),
    "for another device": (
        lambda p: {n.replace(f"assignments/{DEVICE}", "assignments/press-9"): d for n, d in p.items()},
        "media.foreign",
    ),
    "for nobody": (lambda p: without(p, "assignments/"), "media.foreign"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_file_is_refused_and_nothing_changes(ground: Ground, stick: Path, what: str) -> None:
    spoil, code = SPOILT[what]
    carry(stick, spoil(members(ground)))

    assert refused(ground, stick).code == code


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "releases"])
def test_metadata_that_was_altered_is_refused(ground: Ground, stick: Path, role: str) -> None:
    parts = members(ground)
    (name,) = [n for n in parts if n.endswith(f"{role}.json")]
    document = json.loads(parts[name])
    document["signed"]["x-by"] = "somebody else"
    parts[name] = json.dumps(document).encode()
    carry(stick, parts)

    assert refused(ground, stick).code == "trust.signature"


def test_another_devices_envelope_under_this_devices_name_is_refused(ground: Ground, stick: Path) -> None:
    carry(stick, members(ground, envelope=ground.sign(ground.assignment(device="press-2"))))

    assert refused(ground, stick).code == "trust.foreign"


def test_an_assignment_that_expired_on_the_way_is_refused(ground: Ground, stick: Path) -> None:
    carry(stick, members(ground, envelope=ground.sign(ground.assignment(expires=int(time.time()) - 1))))

    error = refused(ground, stick)

    assert (error.code, "--expires" in error.remedy) == ("trust.expired", True)


def test_lists_that_expired_on_the_way_are_refused(ground: Ground, stick: Path) -> None:
    ground.repository.timestamp.expires = ground.repository.expiry().replace(year=2025)
    ground.repository.publish("timestamp")
    carry(stick, members(ground))

    assert refused(ground, stick).code == "trust.expired"


def test_an_assignment_older_than_the_last_accepted_one_is_refused(ground: Ground, stick: Path) -> None:
    carry(stick, members(ground))
    StateFile(ground.folder).save(UpdateState(floor=99))

    assert refused(ground, stick).code == "trust.rollback"


def test_a_bundle_that_was_never_released_is_refused(ground: Ground, stick: Path) -> None:
    envelope = ground.sign(ground.assignment(path="bundles/pump/9.tar", version=9))
    carry(stick, members(ground, envelope=envelope))

    assert refused(ground, stick).code == "trust.not-released"


def test_keys_that_the_device_does_not_trust_are_refused(ground: Ground, stick: Path, tmp_path: Path) -> None:
    (tmp_path / "stranger").mkdir()
    with open_ground(tmp_path / "stranger") as stranger:
        # Of the same pool of keys, but with the roles dealt out anew.
        stranger.repository.rotate("timestamp", "snapshot")
        stranger.publish_new()
        stranger.repository.publish("snapshot", "timestamp")
        parts = members(stranger)
    carry(stick, {n: d for n, d in parts.items() if "2.root" not in n})

    error = refused(ground, stick)

    assert (error.code, "another control plane" in error.remedy) == ("trust.signature", True)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_file_that_was_not_copied_whole_is_refused(ground: Ground, stick: Path, share: float) -> None:
    data = archive(members(ground))
    stick.write_bytes(data[: int(len(data) * share)])

    assert refused(ground, stick).code in {"media.truncated", "media.malformed"}


def test_a_file_that_is_something_else_is_refused(ground: Ground, stick: Path, tmp_path: Path) -> None:
    stick.write_bytes(b"%PDF-1.7 " + bytes(5_000))

    assert refused(ground, stick).code == "media.malformed"
    assert refused(ground, tmp_path / "absent").code == "media.unreadable"
    assert refused(ground, tmp_path).code == "media.unreadable"


def test_without_an_identity_nothing_is_imported(ground: Ground, stick: Path, tmp_path: Path) -> None:
    carry(stick, members(ground))

    with pytest.raises(LightshipError) as caught:
        import_file(stick, tmp_path / "nobody")

    assert (caught.value.code, (tmp_path / "nobody").exists()) == ("enrol.not-enrolled", False)


def test_without_room_nothing_is_copied(ground: Ground, stick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carry(stick, members(ground))
    full = os.statvfs(ground.folder)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*full[:4], 10, *full[5:])))

    assert refused(ground, stick).code == "storage.full"


def test_a_stick_that_is_pulled_out_in_the_middle_leaves_nothing(
    ground: Ground, stick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry(stick, members(ground))
    reads = read_chunks

    def pulled(file: object, entry: object) -> Iterator[bytes]:
        if getattr(entry, "length", 0) == len(b"packed new"):
            raise OSError(5, "Input/output error")
        return reads(file, entry)  # type: ignore[arg-type]

    monkeypatch.setattr("lightship_agent.update.media.read_chunks", pulled)

    assert refused(ground, stick).code == "media.unreadable"


def test_somebody_else_than_the_agents_user_is_told_to_become_it(
    ground: Ground, stick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry(stick, members(ground))
    monkeypatch.setattr(os, "geteuid", lambda: 54_321)

    error = refused(ground, stick)

    assert (error.code, "runuser -u" in error.remedy) == ("storage.unwritable", True)


# Older and newer than what the device knows ---------------------------------------------------------------------------


def newer_lists(ground: Ground) -> None:
    """The repository goes on by one version of each online role."""
    ground.repository.publish("snapshot", "timestamp")


def test_a_device_that_was_online_since_measures_the_file_by_what_it_knows(ground: Ground, stick: Path) -> None:
    """A thin link brings lists and assignments, and a stick the bundle."""
    carry(stick, members(ground))
    newer_lists(ground)
    ground.accepted()

    imported = import_file(stick, ground.folder, check=check)

    assert imported.assignment.path == NEW
    assert spooled(ground.folder) == [imported.waits_at]


def test_a_bundle_that_the_device_knows_to_be_revoked_is_refused(ground: Ground, stick: Path) -> None:
    carry(stick, members(ground))
    for path in (NEW, NEW + ".zst"):
        ground.repository.targets("releases").targets.pop(path)
    ground.repository.publish("releases", "snapshot", "timestamp")
    ground.accepted(ground.sign(ground.assignment(OLD, b"old", version=1)))

    assert refused(ground, stick).code == "trust.not-released"


def test_where_what_the_device_knows_has_expired_an_older_file_is_a_rollback(ground: Ground, stick: Path) -> None:
    parts = members(ground)
    ground.repository.timestamp.expires = ground.repository.expiry().replace(year=2026, month=12, day=1)
    newer_lists(ground)
    ground.accepted(now=time.mktime((2026, 11, 20, 0, 0, 0, 0, 0, 0)))
    carry(stick, parts)

    later = time.mktime((2026, 12, 3, 0, 0, 0, 0, 0, 0))
    code = ground.refused(envelope_for(stick, DEVICE), now=later, source=FileSource(path=str(stick), opener=OPENER))

    assert code == "trust.rollback"


def test_of_two_files_the_older_one_comes_too_late(ground: Ground, stick: Path, tmp_path: Path) -> None:
    """The newer one was imported, so its lists are the measure; the older assignment is below the floor."""
    carry(stick, members(ground))
    newer_lists(ground)
    newer = carry(tmp_path / "newer.media", members(ground))
    accepted = by_file(ground, newer).assignment
    StateFile(ground.folder).save(UpdateState(floor=accepted.seq))

    assert refused(ground, stick).code == "trust.rollback"


@pytest.mark.parametrize("known", [b"", b"{", b"[]", b'{"signed": {"version": "x"}}', b"\xff\xfe", b"[" * 20_000])
def test_a_cache_that_a_cut_left_empty_does_not_matter(ground: Ground, stick: Path, known: bytes) -> None:
    carry(stick, members(ground))
    (ground.folder / "tuf").mkdir()
    (ground.folder / "tuf" / "timestamp.json").write_bytes(known)

    assert import_file(stick, ground.folder, check=check).assignment.path == NEW


# Watching what becomes of it ------------------------------------------------------------------------------------------


def waiting(ground: Ground) -> Imported:
    """A file that waits, and an assignment for it."""
    (ground.folder / "import").mkdir()
    path = ground.folder / "import" / "0000000002-x.media"
    path.write_bytes(b"")
    return Imported(ground.assignment(), path, 10)


def agent_did(ground: Ground, imported: Imported, state: UpdateState) -> Callable[[str], None]:
    """An agent that acts as soon as somebody watches."""

    def act(_words: str) -> None:
        assert imported.waits_at is not None
        StateFile(ground.folder).save(state)
        imported.waits_at.unlink()

    return act


def current(assignment: Assignment) -> Target:
    return Target.of(assignment)


def test_whoever_watches_learns_that_it_was_applied(ground: Ground) -> None:
    imported = waiting(ground)
    applied = UpdateState(current=current(imported.assignment))

    assert follow(imported, ground.folder, timeout=5, progress=agent_did(ground, imported, applied)) == "applied"


@pytest.mark.parametrize("code", ["update.golden", "bundle.incompatible", "storage.full", "update.penalty"])
def test_whoever_watches_learns_why_it_was_not(ground: Ground, code: str) -> None:
    imported = waiting(ground)

    with pytest.raises(LightshipError) as caught:
        follow(imported, ground.folder, timeout=5, progress=agent_did(ground, imported, UpdateState(last_code=code)))

    assert caught.value.code == code


def test_where_no_agent_takes_it_that_is_said(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_TAKEN", 0.3)

    assert follow(waiting(ground), ground.folder, timeout=5) == "untaken"


def test_nobody_waits_for_ever(ground: Ground) -> None:
    imported = waiting(ground)
    StateFile(ground.folder).save(UpdateState(phase="trying", candidate=current(imported.assignment)))

    with pytest.raises(MediaError) as caught:
        follow(imported, ground.folder, timeout=0.3)

    assert caught.value.code == "media.waiting"


# The pieces -----------------------------------------------------------------------------------------------------------


def test_a_stream_of_what_travels_ends_where_it_ends(ground: Ground, stick: Path) -> None:
    carry(stick, members(ground))
    transport = by_file(ground, stick).transport

    with open_transport(stick, transport) as f:
        parts = [f.read(3), f.read(0), f.read(), f.read(5)]

    assert parts == [b"pac", b"", b"ked new", b""]


def test_what_travels_under_a_released_digest_must_have_the_released_length(ground: Ground, stick: Path) -> None:
    carry(stick, members(ground))
    transport = by_file(ground, stick).transport
    parts = {n: d + b"x" if "targets/" in n else d for n, d in members(ground).items()}
    carry(stick, parts)

    with pytest.raises(TrustError) as caught, open_transport(stick, transport):
        pass

    assert caught.value.code == "trust.digest"
