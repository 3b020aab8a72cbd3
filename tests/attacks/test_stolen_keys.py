"""Keys stolen from a production server and from its people, too few of them: the device serves what it served.

The thief has the server: he writes into its repository what he can sign, as genuinely as his keys allow. Root and
targets need two of three, releases two of two; the online keys are all his.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.agent.conftest import build
from tests.agent.link import field as fields
from tests.agent.link.field import Field, open_field
from tests.attacks.test_hostile_bundles import ROWS, AnsweringHost, Victim
from tests.control_plane.release.people import RELEASERS, People, found
from tests.control_plane.things import ACTOR
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Timestamp

from lightship.home import Home
from lightship.registry import ceremonies
from lightship.release.changes import RoleKeys
from lightship.storage.models import ModelVersion
from lightship_agent.contract.transport import TRANSPORT_SUFFIX, pack_transport
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.update import machine as m
from lightship_agent.update.store import BundleStore, StateFile

BACKDOOR = "bundles/pump/666.tar"


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    return People(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def founded(people: People, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "home"
    home = Home.create(path, production=True)
    found(home, people)
    home.close()
    return path


@pytest.fixture
def victim(tmp_path: Path, founded: Path, people: People, monkeypatch: pytest.MonkeyPatch) -> Iterator[Victim]:
    """A device that serves version 1, which both releasers signed."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(fields, "RecordingHost", AnsweringHost)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    with open_field(tmp_path / "field", founded) as field:
        identity, first = field.enrolled(), released(field, people, 1)
        seq = field.assign("press-1", first)
        target = m.Target.of(field.assignment("press-1", first, seq=seq))
        BundleStore(identity.folder.parent).put(first.digest, build(1))
        StateFile(identity.folder.parent).save(m.UpdateState(floor=seq, current=target))
        device = field.boot(identity)
        assert device.look() == ""
        host = device.host
        assert isinstance(host, AnsweringHost)
        assert host.model is not None
        yield Victim(field, device, first, host.model.predict(ROWS).scores, tmp_path / "tmp")


def version_row(version: int, bundle: bytes) -> ModelVersion:
    return ModelVersion(
        model="pump", version=version, run_id="run", state="released", digest=sha256_hex(bundle), length=len(bundle),
        metrics={}, created_at=0, released_at=0,
    )  # fmt: skip


def released(field: Field, people: People, version: int) -> ModelVersion:
    row = version_row(version, build(version))
    field.home.releases.publish(row.path, build(version), signers=[people.signer(n) for n in RELEASERS])
    return row


def write(home: Home, metadata: Metadata[Any], role: str) -> None:
    name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
    metadata.to_file(str(home.releases.metadata / name))


def list_them(home: Home, **versions: int) -> None:
    """A snapshot and a timestamp over these versions, genuinely signed: these keys are the thief's."""
    snapshot, timestamp = home.releases._load("snapshot", Snapshot), home.releases._load("timestamp", Timestamp)
    snapshot.signed.meta.update({f"{role}.json": MetaFile(version) for role, version in versions.items()})
    snapshot.signed.version += 1
    timestamp.signed.version += 1
    timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
    for role, metadata in (("snapshot", snapshot), ("timestamp", timestamp)):
        metadata.sign(home.keys.signer(role))
        write(home, metadata, role)


def backdoor(home: Home) -> Metadata[Any]:
    """The next release list with the thief's bundle on it, whose files lie where they should."""
    bundle = build(666, flip=True)
    forged = home.releases.draft()
    for path, data in ((BACKDOOR, bundle), (BACKDOOR + TRANSPORT_SUFFIX, pack_transport(bundle))):
        forged.signed.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        home.releases._store_target(path, data)
    return forged


def one_releases_key(victim: Victim, people: People) -> None:
    home = victim.field.home
    forged = backdoor(home)
    forged.sign(people.signer("builder"))
    for role in ("snapshot", "timestamp", "director"):
        forged.sign(home.keys.signer(role), append=True)
    write(home, forged, "releases")
    list_them(home, releases=forged.signed.version)


def one_releases_key_twice(victim: Victim, people: People) -> None:
    """The same signature under both ids."""
    home = victim.field.home
    forged = backdoor(home)
    signature = forged.sign(people.signer("builder"))
    second = people.public("approver").keyid
    forged.signatures[second] = type(signature)(second, signature.signature)
    write(home, forged, "releases")
    list_them(home, releases=forged.signed.version)


def one_targets_key(victim: Victim, people: People) -> None:
    """Targets that make the thief the only releaser."""
    home = victim.field.home
    begun = ceremonies.begin(home, "Mine", {"releases": people.keys(("mallory",), 1)}, actor=ACTOR)
    assert begun.after.targets is not None
    forged, mine = begun.after.targets, backdoor(home)
    forged.sign(people.signer("alice"), append=True)
    mine.sign(people.signer("mallory"))
    write(home, forged, "targets")
    write(home, mine, "releases")
    list_them(home, targets=forged.signed.version, releases=mine.signed.version)


def one_root_key(victim: Victim, people: People) -> None:
    """A root of his own, with targets and a release list to it."""
    home = victim.field.home
    his = {role: people.keys(("mallory",), 1) for role in ("root", "targets", "releases")}
    begun = ceremonies.begin(home, "Mine", his, actor=ACTOR)
    people.sign(begun, "alice")
    mine = backdoor(home)
    assert begun.after.root is not None
    assert begun.after.targets is not None
    for document in (begun.after.root, begun.after.targets, mine):
        document.sign(people.signer("mallory"), append=True)
    begun.after.root.sign(people.signer("alice"), append=True)
    write(home, begun.after.root, "root")
    write(home, begun.after.targets, "targets")
    write(home, mine, "releases")
    list_them(home, targets=begun.after.targets.signed.version, releases=mine.signed.version)


def the_online_keys(victim: Victim, people: People) -> None:
    home = victim.field.home
    forged = backdoor(home)
    for role in ("snapshot", "timestamp", "director"):
        forged.sign(home.keys.signer(role), append=True)
    write(home, forged, "releases")
    list_them(home, releases=forged.signed.version)


def deliver_backdoor(victim: Victim) -> None:
    """An assignment of the thief's bundle, genuinely signed by the director."""
    row = version_row(666, build(666, flip=True))
    victim.field.deliver("press-1", victim.field.sign(victim.field.assignment("press-1", row, seq=9_999)))


THEFTS: dict[str, Callable[[Victim, People], None]] = {
    "all online keys": the_online_keys,
    "one releases key of two, and all online keys": one_releases_key,
    "one releases key of two, used twice": one_releases_key_twice,
    "one targets key of three, and all online keys": one_targets_key,
    "one root key of three, and all online keys": one_root_key,
}


@pytest.mark.parametrize("what", THEFTS)
def test_too_few_stolen_keys_release_nothing_and_the_device_is_as_it_was(
    victim: Victim, people: People, what: str
) -> None:
    before, steps = victim.on_disk(), list(victim.device.host.steps)
    THEFTS[what](victim, people)
    deliver_backdoor(victim)

    assert victim.device.look() == "trust.signature"

    assert victim.device.host.steps == steps
    victim.assert_nothing_changed(before)
    restarted = victim.field.boot(victim.device.identity)
    assert restarted.host.serving == victim.first.digest


def test_the_online_keys_choose_among_what_was_released_and_that_is_all(victim: Victim, people: People) -> None:
    """The thief moves the device to another released bundle; that one was signed by both."""
    second = released(victim.field, people, 2)
    victim.field.deliver("press-1", victim.field.sign(victim.field.assignment("press-1", second, seq=9_998)))
    assert victim.device.look() == ""
    assert victim.device.host.serving == second.digest
    deliver_backdoor(victim)
    assert victim.device.look() == "trust.not-released"
    assert victim.device.host.serving == second.digest


def test_after_the_theft_new_online_keys_bring_the_device_back_to_the_honest_list(
    victim: Victim, people: People
) -> None:
    home = victim.field.home
    kept = {path: path.read_bytes() for path in home.releases.metadata.glob("*.json")}
    one_releases_key(victim, people)
    deliver_backdoor(victim)
    assert victim.device.look() == "trust.signature"
    for path in set(home.releases.metadata.glob("*.json")) - set(kept):
        path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)
    wanted = {role: RoleKeys.of([home.keys.add(role).public_key]) for role in ("snapshot", "timestamp", "director")}
    begun = ceremonies.begin(home, "After the theft", wanted, actor=ACTOR)
    ceremonies.finish(home, [people.sign(begun, "bob", "carol")], actor=ACTOR)
    second = released(victim.field, people, 2)
    victim.field.assign("press-1", second)

    assert victim.device.look() == ""

    assert victim.device.host.serving == second.digest
