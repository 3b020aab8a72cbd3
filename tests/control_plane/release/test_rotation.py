"""New keys in place of old ones, and releases that two must sign, seen by the agent's own client over real HTTPS."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import Signer
from sqlalchemy import select
from tests.control_plane.release.device import Client, CuttableDisk
from tests.control_plane.release.people import RELEASERS, ROOT, People
from tests.control_plane.release.test_ceremonies import ONE, TWO, on_disk, refused, released, state_of
from tests.control_plane.things import ACTOR, add_device, register, settings_for
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Timestamp

from lightship.app import ControlPlane
from lightship.fleet import director
from lightship.fleet.reconciler import Reconciler
from lightship.home import Home
from lightship.registry import ceremonies, release, versions
from lightship.release.ceremony import Ceremony
from lightship.release.changes import RoleKeys
from lightship.release.keys import OFFLINE_ROLES
from lightship.release.metadata import LIFE
from lightship.storage.models import AssignmentRow, AuditEvent, ModelVersion
from lightship_agent.contract.codes import ReleaseError, StorageError, TrustError

NOW = datetime(2026, 11, 25, tzinfo=UTC)


def rotation(home: Home, people: People, role: str) -> Ceremony:
    """The ceremony that gives a role other keys: Dave and Bob for offline roles, a key that is made here for others."""
    if role in OFFLINE_ROLES:
        wanted = {role: people.keys(("bob", "dave"), 2)}
    else:
        wanted = {role: RoleKeys.of([home.keys.add(role).public_key])}
    begun = ceremonies.begin(home, f"Rotate {role}", wanted, actor=ACTOR)
    return people.sign(begun, *signers_of(begun, people))


def signers_of(begun: Ceremony, people: People) -> list[str]:
    """Alice and Bob, and whoever else must."""
    asked = {k for need in begun.needs for k in need.keyids}
    return [n for n in ("alice", "bob", "dave", *RELEASERS) if people.public(n).keyid in asked]


@pytest.mark.parametrize("role", ["root", "targets", "releases", "snapshot", "timestamp", "director"])
def test_every_role_is_rotated_and_a_device_follows(office: Home, people: People, device: Client, role: str) -> None:
    digest = released(office, people, 1)
    assert device.sees(ONE) == digest
    old = set(office.releases.trusted(role))

    ceremonies.finish(office, [rotation(office, people, role)], actor=ACTOR)

    assert not old & set(office.releases.trusted(role)) or role in OFFLINE_ROLES
    assert set(office.releases.trusted(role)) != old
    assert device.sees(ONE) == digest
    assert len(office.keys.files("snapshot")) == 1  # what nobody believes any more is gone
    assert len(office.keys.files("director")) == 1
    office.releases.renew(datetime.now(UTC) + timedelta(days=5))
    assert device.sees(ONE) == digest


@pytest.mark.parametrize("role", ["root", "targets", "releases", "snapshot", "timestamp", "director"])
def test_a_rotation_that_was_cut_anywhere_shows_no_device_a_gap_and_is_finished_by_the_next(
    office: Home, people: People, device: Client, disk: CuttableDisk, role: str
) -> None:
    digest = released(office, people, 1)
    signed = rotation(office, people, role)
    journal = office.path / "tuf" / "changing.json"
    for writes in range(10):
        # What a try finds of the one before it, it writes again from the start, and comes one file further.
        disk.allow(writes)
        try:
            ceremonies.finish(office, [signed], actor=ACTOR)
        except StorageError:
            assert device.sees(ONE) == digest
            assert journal.exists() == bool(writes)
            continue
        break
    assert writes >= 2
    disk.allow(-1)
    assert not journal.exists()
    assert device.sees(ONE) == digest
    assert ceremonies.finish(office, [signed], actor=ACTOR) == []


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_an_online_key_that_was_lost_is_replaced(office: Home, people: People, device: Client, role: str) -> None:
    digest = released(office, people, 1)
    assert device.sees(ONE) == digest
    (office.keys.folder / f"{role}.pem").unlink()
    with pytest.raises(ReleaseError) as e:
        office.releases.renew(datetime.now(UTC) + timedelta(days=5))
    assert e.value.code == "release.keys"

    ceremonies.finish(office, [rotation(office, people, role)], actor=ACTOR)

    assert device.sees(ONE) == digest
    assert office.releases.renew(datetime.now(UTC) + timedelta(days=5))
    assert device.sees(ONE) == digest


def test_rotating_the_online_keys_recovers_a_device_that_a_thief_drove_to_the_sky(
    office: Home, people: People, device: Client
) -> None:
    digest = released(office, people, 1)
    honest = (office.releases.metadata / "timestamp.json").read_bytes()
    fast_forward(office, 2**31)
    assert device.sees(ONE) == digest
    (office.releases.metadata / "timestamp.json").write_bytes(honest)  # the thief is thrown out
    assert device.sees(ONE) == "trust.rollback"

    for role in ("snapshot", "timestamp"):
        ceremonies.finish(office, [rotation(office, people, role)], actor=ACTOR)

    assert device.sees(ONE) == digest
    assert device.sees(TWO) == "trust.not-released"
    two = released(office, people, 2)
    assert device.sees(TWO) == two


def fast_forward(home: Home, version: int) -> None:
    """What a thief of both online keys serves: the genuine lists, under versions nobody can follow."""
    snapshot, timestamp = (home.releases._load(r, k) for r, k in (("snapshot", Snapshot), ("timestamp", Timestamp)))
    snapshot.signed.version = version
    timestamp.signed.version = version
    timestamp.signed.snapshot_meta = MetaFile(version)
    for role, metadata in (("snapshot", snapshot), ("timestamp", timestamp)):
        metadata.sign(home.keys.signer(role))
    snapshot.to_file(str(home.releases.metadata / f"{version}.snapshot.json"))
    timestamp.to_file(str(home.releases.metadata / "timestamp.json"))


def test_after_a_rotation_the_old_online_keys_sign_nothing_a_device_believes(
    office: Home, people: People, device: Client, tmp_path: Path
) -> None:
    digest = released(office, people, 1)
    shutil.copytree(office.keys.folder, tmp_path / "stolen")
    for role in ("snapshot", "timestamp"):
        ceremonies.finish(office, [rotation(office, people, role)], actor=ACTOR)
    assert device.sees(ONE) == digest
    honest = (office.releases.metadata / "timestamp.json").read_bytes()
    mine = office.keys.folder
    office.keys.folder = tmp_path / "stolen"
    fast_forward(office, 100)
    office.keys.folder = mine
    assert device.sees(ONE) == "trust.signature"
    (office.releases.metadata / "timestamp.json").write_bytes(honest)
    assert device.sees(ONE) == digest


def test_after_the_directors_rotation_every_assignment_is_signed_anew(
    office: Home, people: People, device: Client
) -> None:
    released(office, people, 1)
    with office.database.write() as session:
        version = office_version(office, 1)
        director.assign(session, office.keys, device="pump-1", version=version, rollout="r", actor=ACTOR)
    old = envelope(office)
    pokes: list[tuple[str, ...]] = []
    reconciler = Reconciler(office, settings_for(office.path), pokes.append)
    assert reconciler.tick()
    assert envelope(office) == old  # nothing to be done

    ceremonies.finish(office, [rotation(office, people, "director")], actor=ACTOR)

    assert device_opens(device, old) == "trust.signature"
    assert reconciler.tick()
    assert device_opens(device, envelope(office)) == "pump@1"
    assert ("pump-1",) in pokes
    last = envelope(office)
    assert reconciler.tick()
    assert envelope(office) == last


def office_version(home: Home, version: int) -> ModelVersion:
    with home.database.read() as session:
        return versions.get(session, "pump", version)


def envelope(home: Home) -> bytes:
    with home.database.read() as session:
        return session.scalars(select(AssignmentRow.envelope)).one()


def device_opens(device: Client, data: bytes) -> str:
    try:
        assignment = device.look().open_assignment(data)
    except TrustError as e:
        return e.code
    return f"{assignment.model}@{assignment.version}"


# Revoked keys ---------------------------------------------------------------------------------------------------------


def without(home: Home, people: People, name: str, role: str, *, instead: Sequence[str] = ()) -> dict[str, RoleKeys]:
    now = home.releases.in_force().role_keys(role)
    left = [k for k in now.keys if k.keyid != people.public(name).keyid]
    return {role: RoleKeys.of([*left, *(people.public(n) for n in instead)], now.threshold)}


def test_a_stolen_root_key_is_revoked_by_the_two_others(office: Home, people: People, device: Client) -> None:
    digest = released(office, people, 1)
    wanted = {**without(office, people, "carol", "root"), **without(office, people, "carol", "targets")}
    begun = ceremonies.begin(office, "Revoke Carol", wanted, actor=ACTOR)
    ceremonies.finish(office, [people.sign(begun, "alice", "bob")], actor=ACTOR)
    assert people.public("carol").keyid not in office.releases.trusted("root")
    assert device.sees(ONE) == digest


def test_a_key_whose_going_would_leave_too_few_stays_and_is_told_so(office: Home, people: People) -> None:
    before = on_disk(office)
    with pytest.raises(ReleaseError, match="can't be reached with 1 keys") as e:
        ceremonies.begin(office, "x", without(office, people, "builder", "releases"), actor=ACTOR)
    assert (e.value.code, on_disk(office)) == ("release.ceremony", before)


def test_a_revoked_releases_key_with_a_replacement_has_the_list_signed_anew(
    office: Home, people: People, device: Client
) -> None:
    digest = released(office, people, 1)
    wanted = without(office, people, "builder", "releases", instead=["dave"])
    begun = ceremonies.begin(office, "Revoke builder", wanted, actor=ACTOR)
    assert [role for role, _ in begun.after.items()] == ["targets", "releases"]
    refused(office, [people.sign(begun, "alice", "bob", "approver")], "release.threshold", "releases has 1 of 2")
    ceremonies.finish(office, [people.sign(begun, "alice", "bob", "approver", "dave")], actor=ACTOR)
    assert device.sees(ONE) == digest
    register(office, 2, released=False)
    begun = release.propose_release(office, "pump@2")
    with pytest.raises(ReleaseError, match="no say"):
        people.sign(begun, "approver", "builder")


def test_an_online_key_can_not_be_made_one_of_the_offline_ones(office: Home, people: People) -> None:
    stolen = RoleKeys.of([*people.keys(("alice", "bob"), 2).keys, office.keys.signer("snapshot").public_key], 2)
    before = on_disk(office)
    with pytest.raises(ReleaseError, match="online"):
        ceremonies.begin(office, "x", {"root": stolen}, actor=ACTOR)
    assert on_disk(office) == before


def test_a_change_that_changes_nothing_is_refused(office: Home, people: People) -> None:
    with pytest.raises(ReleaseError, match="changes nothing"):
        ceremonies.begin(office, "x", {"root": people.keys(ROOT, 2)}, actor=ACTOR)


# Thieves --------------------------------------------------------------------------------------------------------------


def test_one_root_key_of_two_needed_changes_nothing(office: Home, people: People, device: Client) -> None:
    """The thief has Alice's key and the server: he writes what he likes, and no device follows."""
    digest = released(office, people, 1)
    assert device.sees(ONE) == digest
    forged = ceremonies.begin(office, "Mine", {"root": people.keys(("mallory",), 1)}, actor=ACTOR)
    forged = people.sign(forged, "alice", "mallory")
    refused(office, [forged], "release.threshold", "root has 1 of 2")
    assert forged.after.root is not None
    number = forged.after.root.signed.version
    forged.after.root.to_file(str(office.releases.metadata / f"{number}.root.json"))
    assert device.sees(ONE) == "trust.signature"
    (office.releases.metadata / f"{number}.root.json").unlink()
    assert device.sees(ONE) == digest


def test_one_releases_key_of_two_and_all_online_keys_release_nothing(
    office: Home, people: People, device: Client
) -> None:
    digest = released(office, people, 1)
    assert device.sees(ONE) == digest
    kept = {p: p.read_bytes() for p in office.releases.metadata.glob("*.json")}
    forged = office.releases.draft()
    forged.signed.targets[TWO] = TargetFile.from_data(TWO, b"malware", ["sha256"])
    forged.sign(people.signer("builder"), append=True)
    for thief in ("snapshot", "timestamp", "director"):
        forged.sign(office.keys.signer(thief), append=True)
    forged.to_file(str(office.releases.metadata / f"{forged.signed.version}.releases.json"))
    office.releases._commit_snapshot(forged.signed.version)
    assert device.sees(TWO) == "trust.signature"
    assert device.sees(ONE) == "trust.signature"
    for path in set(office.releases.metadata.glob("*.json")) - set(kept):
        path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)
    # The thief's snapshot was genuinely signed, so the honest one is old news: until the stolen keys are revoked.
    assert device.sees(ONE) == "trust.rollback"
    for role in ("snapshot", "timestamp"):
        ceremonies.finish(office, [rotation(office, people, role)], actor=ACTOR)
    assert device.sees(ONE) == digest
    assert device.sees(TWO) == "trust.not-released"


# Releases that two must sign ------------------------------------------------------------------------------------------


def test_a_release_is_in_force_when_both_have_signed_and_not_before(
    office: Home, people: People, device: Client
) -> None:
    row = register(office, 1, released=False)
    with pytest.raises(ReleaseError) as e:
        release.release(office, "pump@1", actor=ACTOR)
    assert e.value.code == "release.keys"
    begun = release.propose_release(office, "pump@1")
    one = people.sign(begun, "builder")
    refused(office, [one], "release.threshold", "releases has 1 of 2")
    assert (state_of(office, 1), device.sees(ONE)) == ("registered", "trust.not-released")

    ceremonies.finish(office, [people.sign(one, "approver")], actor=ACTOR)

    assert (state_of(office, 1), device.sees(ONE)) == ("released", row.digest)
    with office.database.read() as session:
        events = session.scalars(select(AuditEvent).order_by(AuditEvent.seq)).all()
    signed = {people.public(n).keyid for n in RELEASERS}
    assert [e.verb for e in events[-2:]] == ["keys.finish", "model.release"]
    assert set(events[-2].detail["signed"]["releases"]) == signed


def test_with_both_keys_at_hand_one_command_releases(office: Home, people: People, device: Client) -> None:
    row = register(office, 1, released=False)
    signers: list[Signer] = [people.signer(n) for n in RELEASERS]
    assert release.release(office, "pump@1", actor=ACTOR, signers=signers).state == "released"
    assert device.sees(ONE) == row.digest


def test_of_two_releases_begun_at_once_the_second_is_told_to_begin_anew(office: Home, people: People) -> None:
    register(office, 1, released=False)
    register(office, 2, released=False)
    both = [people.sign(release.propose_release(office, f"pump@{v}"), *RELEASERS) for v in (1, 2)]
    ceremonies.finish(office, [both[0]], actor=ACTOR)
    refused(office, [both[1]], "release.stale", "begin anew")
    assert [r.path for r in office.releases.released()] == [ONE]
    again = people.sign(release.propose_release(office, "pump@2"), *RELEASERS)
    ceremonies.finish(office, [again], actor=ACTOR)
    assert [r.path for r in office.releases.released()] == [ONE, TWO]


def test_a_release_that_was_cut_before_the_database_is_finished_by_repeating_it(office: Home, people: People) -> None:
    register(office, 1, released=False)
    signed = people.sign(release.propose_release(office, "pump@1"), *RELEASERS)
    office.releases.change(signed.after)
    assert state_of(office, 1) == "registered"
    assert ceremonies.finish(office, [signed], actor=ACTOR) == []
    assert state_of(office, 1) == "released"


def test_what_is_signed_but_not_here_is_not_listed(office: Home, people: People) -> None:
    register(office, 1, released=False)
    signed = people.sign(release.propose_release(office, "pump@1"), *RELEASERS)
    (stored,) = (p for p in office.releases.targets.rglob("*") if p.is_file())
    stored.unlink()
    refused(office, [signed], "release.ceremony", "its file is not here")


def test_bytes_of_a_released_path_are_not_changed_by_any_signature(office: Home, people: People) -> None:
    released(office, people, 1)
    begun = release.propose_revocation(office, "pump@1", reason="x")
    assert begun.after.releases is not None
    begun.after.releases.signed.targets[ONE] = TargetFile.from_data(ONE, b"other", ["sha256"])
    begun.after.releases.signatures.clear()
    refused(office, [people.sign(begun, *RELEASERS)], "release.exists", "other bytes")


def test_a_revocation_that_waits_for_a_signature_pauses_and_then_takes_back(
    office: Home, people: People, device: Client
) -> None:
    digest = released(office, people, 1)
    begun = release.propose_revocation(office, "pump@1", reason="it lies")
    refused(office, [people.sign(begun, "approver")], "release.threshold")
    assert (state_of(office, 1), device.sees(ONE)) == ("released", digest)
    ceremonies.finish(office, [people.sign(begun, *RELEASERS)], actor=ACTOR)
    assert (state_of(office, 1), device.sees(ONE)) == ("revoked", "trust.not-released")


# Time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", OFFLINE_ROLES)
def test_offline_roles_are_renewed_by_the_people_who_hold_their_keys(
    office: Home, people: People, device: Client, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = released(office, people, 1)
    before = office.releases.expiries()[role]
    monkeypatch.setitem(LIFE, role, LIFE[role] + timedelta(days=1))
    begun = ceremonies.begin(office, "Renew", {}, renew=[role], actor=ACTOR)
    assert [r for r, _ in begun.after.items()] == [role]
    ceremonies.finish(office, [people.sign(begun, *signers_of(begun, people))], actor=ACTOR)
    assert office.releases.expiries()[role] > before
    assert device.sees(ONE) == digest


def test_in_development_every_role_is_renewed_by_itself(home: Home) -> None:
    register(home, 1)
    late = datetime.now(UTC) + timedelta(days=200)
    assert home.releases.renew(late) == ["root", "targets", "releases", "snapshot", "timestamp"]
    assert home.releases.version("root") == 2
    assert [r.path for r in home.releases.released()] == [ONE]


def test_what_is_near_its_end_is_said_by_name_and_by_whom_it_is_to_be_signed(office: Home) -> None:
    now = datetime.now(UTC)
    assert {r.state for r in office.releases.health(now)} == {"ok"}
    states = {r.role: r.state for r in office.releases.health(now + timedelta(days=4))}
    assert (states["timestamp"], states["snapshot"], states["releases"]) == ("late", "late", "ok")
    by_role = {r.role: r for r in office.releases.health(now + timedelta(days=75))}
    assert (by_role["releases"].state, by_role["timestamp"].state) == ("due", "expired")
    assert "--renew releases" in by_role["releases"].sentence
    assert {r.state for r in office.releases.health(now + timedelta(days=400))} == {"expired"}


def test_the_scheduler_says_loudly_what_it_can_not_renew(
    office: Home, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIFE, "timestamp", timedelta(seconds=-1))
    monkeypatch.setitem(LIFE, "snapshot", timedelta(seconds=-1))
    office.releases._commit_snapshot()
    (office.keys.folder / "timestamp.pem").unlink()
    reconciler = Reconciler(office, settings_for(office.path), lambda _: None)
    with caplog.at_level(logging.WARNING):
        assert reconciler.tick()
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert any("release.keys" in text for text in said)
    assert any(text.startswith("release metadata: timestamp") for text in said)


# Online ---------------------------------------------------------------------------------------------------------------


def test_the_api_process_needs_only_the_online_keys(office: Home, people: People) -> None:
    """It starts, re-signs what is due and assigns, and no other private key is on this machine."""
    released(office, people, 1)
    add_device(office, "pump-1")
    with closing(ControlPlane(office, settings_for(office.path))) as plane:
        plane.start()
        assert office.releases.renew(datetime.now(UTC) + timedelta(days=5)) == ["snapshot", "timestamp"]
        with office.database.write() as session:
            version = office_version(office, 1)
            director.assign(session, office.keys, device="pump-1", version=version, rollout="r", actor=ACTOR)
    assert {h.role for h in office.keys.held()} == {"snapshot", "timestamp", "director"}
    private = [p for p in office.path.rglob("*") if p.is_file() and b"PRIVATE KEY" in p.read_bytes()]
    assert {p.parent.name for p in private} <= {"keys", "ca"}


def test_a_snapshot_to_be_carried_away_lives_longer_and_what_is_online_goes_beyond_it(
    office: Home, people: People, device: Client
) -> None:
    digest = released(office, people, 1)
    before = office.releases.version("timestamp") or 0
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(days=60)
    apart = office.releases.sign_apart(until)
    timestamp = Metadata[Timestamp].from_bytes(apart["timestamp.json"]).signed
    assert (timestamp.version, timestamp.expires) == (before + 1, until)
    assert set(apart) == {"timestamp.json", f"{timestamp.snapshot_meta.version}.snapshot.json"}
    assert office.releases.version("timestamp") == before + 2
    assert office.releases.expiries()["timestamp"] < until
    assert device.sees(ONE) == digest


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_replacing_a_lost_key_that_was_cut_anywhere_is_mended_by_whoever_runs_next(
    office: Home, people: People, device: Client, disk: CuttableDisk, role: str
) -> None:
    """Without the old key there is a gap, which devices name; it is closed by the next lock, and nothing is lost."""
    digest = released(office, people, 1)
    (office.keys.folder / f"{role}.pem").unlink()
    signed = rotation(office, people, role)
    seen = set()
    for writes in range(1, 10):
        disk.allow(writes)
        try:
            ceremonies.finish(office, [signed], actor=ACTOR)
        except StorageError:
            seen.add(device.sees(ONE))
            continue
        break
    assert seen <= {digest, "trust.signature"}
    disk.allow(-1)
    office.releases.renew(datetime.now(UTC))
    assert device.sees(ONE) == digest


def test_a_home_restored_from_an_old_backup_is_believed_once_its_online_keys_are_new(
    office: Home, people: People, device: Client, tmp_path: Path
) -> None:
    digest = released(office, people, 1)
    shutil.copytree(office.releases.metadata, tmp_path / "backup")
    two = released(office, people, 2)
    assert device.sees(TWO) == two
    shutil.rmtree(office.releases.metadata)
    shutil.copytree(tmp_path / "backup", office.releases.metadata)
    assert device.sees(ONE) == "trust.rollback"

    for role in ("snapshot", "timestamp"):
        ceremonies.finish(office, [rotation(office, people, role)], actor=ACTOR)

    assert (device.sees(ONE), device.sees(TWO)) == (digest, "trust.not-released")
