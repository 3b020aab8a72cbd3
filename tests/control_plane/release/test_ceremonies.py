"""Keys that are kept apart from the server: the first ceremony, and the file that is carried from signer to signer."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import Signature
from tests.agent.conftest import build
from tests.control_plane.release.device import Client, CuttableDisk
from tests.control_plane.release.people import RELEASERS, ROOT, People, first
from tests.control_plane.things import ACTOR, register, settings_for
from tuf.api.metadata import Metadata, Root

from lightship.app import ControlPlane
from lightship.home import Home
from lightship.registry import ceremonies, release
from lightship.release import ceremony
from lightship.release.ceremony import Ceremony
from lightship.release.keys import OFFLINE_ROLES, ONLINE_ROLES
from lightship.storage.models import ModelVersion
from lightship_agent.contract.codes import ReleaseError, StorageError

ONE, TWO = "bundles/pump/1.tar", "bundles/pump/2.tar"


def on_disk(home: Home) -> dict[str, bytes]:
    """Every file that is signed or signs."""
    files = (p for f in ("tuf", "keys") for p in (home.path / f).rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(home.path).as_posix(): p.read_bytes() for p in files}


def refused(home: Home, copies: list[Ceremony], code: str, match: str = ".") -> None:
    """Finishing it is refused, and nothing on the server has changed."""
    before = on_disk(home)
    with pytest.raises(ReleaseError, match=match) as e:
        ceremonies.finish(home, copies, actor=ACTOR)
    assert e.value.code == code
    assert on_disk(home) == before


def released(home: Home, people: People, version: int) -> str:
    """A version released by both who must; its digest."""
    row = register(home, version, released=False)
    carried = people.sign(release.propose_release(home, f"pump@{version}"), *RELEASERS)
    ceremonies.finish(home, [carried], actor=ACTOR)
    return row.digest


def state_of(home: Home, version: int) -> str:
    with home.database.read() as session:
        row = session.get(ModelVersion, ("pump", version))
        assert row is not None
        return row.state


# The first ceremony ---------------------------------------------------------------------------------------------------


def test_a_production_server_never_holds_a_key_of_root_targets_or_releases(office: Home) -> None:
    held = {p.name for p in office.keys.folder.iterdir()}
    assert held == {"director.pem", "production", "snapshot.pem", "timestamp.pem"}
    Home.create(office.path).close()
    assert {p.name for p in office.keys.folder.iterdir()} == held
    assert office.notice() == ""


def test_before_its_first_ceremony_a_production_server_releases_and_serves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        Home.create(tmp_path / "home", production=True).close()
    Home.create(tmp_path / "home").close()  # without the word, it stays what it is
    with closing(Home.open(tmp_path / "home")) as home:
        assert {h.role for h in home.keys.held()} == set(ONLINE_ROLES)
        for act in (
            home.releases.released,
            home.releases.root_bytes,
            home.releases.expiries,
            lambda: home.releases.publish(ONE, build(1)),
            lambda: home.releases.renew(datetime.now(UTC)),
            lambda: ControlPlane(home, settings_for(home.path)).start(),
        ):
            with pytest.raises(ReleaseError, match="ceremony") as e:
                act()
            assert e.value.code == "release.not-begun"
        assert not (home.path / "tuf").exists()


def test_a_development_home_is_not_made_a_production_home_by_a_word(home: Home) -> None:
    before = on_disk(home)
    with pytest.raises(ReleaseError, match="ceremony begin") as e:
        Home.create(home.path, production=True)
    assert (e.value.code, on_disk(home)) == ("release.exists", before)


def test_what_two_of_three_founded_a_device_believes(office: Home, people: People, device: Client) -> None:
    digest = released(office, people, 1)
    assert device.sees(ONE) == digest
    root = Metadata[Root].from_bytes(device.identity.tuf_root).signed
    assert (root.roles["root"].threshold, len(root.roles["root"].keyids)) == (2, 3)


@pytest.mark.parametrize("signers", [(), ("alice",), ("alice", "builder", "approver"), ("alice", "bob", "builder")])
def test_a_first_root_that_too_few_signed_is_not_in_force(
    tmp_path: Path, people: People, signers: tuple[str, ...]
) -> None:
    with closing(Home.create(tmp_path / "home", production=True)) as home:
        refused(home, [people.sign(first(home, people), *signers)], "release.threshold", "of 2")
        assert not home.releases.exists


def test_copies_that_were_signed_apart_are_laid_together(tmp_path: Path, people: People) -> None:
    with closing(Home.create(tmp_path / "home", production=True)) as home:
        begun = first(home, people)
        here, there = people.sign(begun, "alice", "builder"), people.sign(begun, "carol", "approver")
        assert here.fingerprint == there.fingerprint
        assert not here.complete
        assert ceremonies.finish(home, [here, there], actor=ACTOR) == list(OFFLINE_ROLES)
        assert ceremonies.finish(home, [here, there], actor=ACTOR) == []  # again is no change


def test_a_bad_signature_in_one_copy_does_not_stand_in_the_way_of_the_good_one_in_another(
    tmp_path: Path, people: People
) -> None:
    with closing(Home.create(tmp_path / "home", production=True)) as home:
        begun = first(home, people)
        bad, good = people.sign(begun, "alice", *RELEASERS), people.sign(begun, "bob")
        keyid = people.public("bob").keyid
        for role in OFFLINE_ROLES:
            getattr(bad.after, role).signatures[keyid] = Signature(keyid, "00" * 64)
        refused(home, [bad], "release.threshold")
        assert ceremonies.finish(home, [bad, good], actor=ACTOR) == list(OFFLINE_ROLES)


def test_copies_of_different_ceremonies_are_not(tmp_path: Path, people: People) -> None:
    with closing(Home.create(tmp_path / "home", production=True)) as home:
        begun = first(home, people)
        assert begun.after.releases is not None
        other = ceremony.decode(ceremony.encode(begun))
        assert other.after.releases is not None
        other.after.releases.signed.expires -= timedelta(days=1)
        refused(home, [people.sign(begun, *ROOT), people.sign(other, *RELEASERS)], "release.ceremony", "different")


def test_a_first_ceremony_that_was_cut_anywhere_is_finished_by_repeating_it(
    tmp_path: Path, people: People, disk: CuttableDisk
) -> None:
    for writes in range(7):  # the journal, root, targets, releases, snapshot, timestamp
        with closing(Home.create(tmp_path / f"home-{writes}", production=True)) as home:
            signed = people.sign(first(home, people), "alice", "bob", *RELEASERS)
            disk.allow(writes)
            if writes < 6:
                with pytest.raises(StorageError):
                    ceremonies.finish(home, [signed], actor=ACTOR)
            disk.allow(-1)
            ceremonies.finish(home, [signed], actor=ACTOR)
            assert home.releases.released() == []
            assert not (home.path / "tuf" / "changing.json").exists()


def test_a_development_home_moves_to_keys_of_people_and_forgets_its_own(home: Home, people: People) -> None:
    digest = register(home, 1).digest
    wanted = {"root": people.keys(ROOT, 2), "targets": people.keys(ROOT, 2), "releases": people.keys(RELEASERS, 2)}
    begun = ceremonies.begin(home, "Grow up", wanted, actor=ACTOR)
    assert {n.whose for n in begun.needs if not n.missing} == {"keys in force"}

    ceremonies.finish(home, [people.sign(begun, "bob", "carol", *RELEASERS)], actor=ACTOR)

    assert {h.role for h in home.keys.held()} == set(ONLINE_ROLES)
    assert [r.sha256 for r in home.releases.released()] == [digest]
    assert home.releases.lacking("root") == 2
    assert home.notice() == ""


# The file -------------------------------------------------------------------------------------------------------------


def test_a_key_signs_only_what_it_has_a_say_in(tmp_path: Path, people: People) -> None:
    with closing(Home.create(tmp_path / "home", production=True)) as home:
        begun = first(home, people)
        assert ceremony.sign(begun, people.signer("alice")) == ("root", "targets")
        assert ceremony.sign(begun, people.signer("builder")) == ("releases",)
        before = ceremony.encode(begun)
        with pytest.raises(ReleaseError, match="no say") as e:
            ceremony.sign(begun, people.signer("mallory"))
        assert e.value.code == "release.ceremony"
        assert ceremony.encode(begun) == before


def test_what_is_shown_is_what_would_change(office: Home, people: People) -> None:
    released(office, people, 1)
    wanted = {"root": people.keys(("alice", "bob", "dave"), 3), "releases": people.keys(("builder",), 1)}
    lines = ceremony.describe(ceremonies.begin(office, "x", wanted, actor=ACTOR))
    ids = {name: people.public(name).keyid[:16] for name in (*ROOT, "dave", *RELEASERS)}
    (root,) = (line for line in lines if line.startswith("  root:"))
    assert "3 (was 2) of 3" in root
    assert f"{ids['dave']} NEW" in root
    assert f"{ids['carol']} GONE" in root
    assert any(f"{ids['approver']} GONE" in line for line in lines if line.startswith("  releases:"))
    register(office, 2, released=False)
    lines = ceremony.describe(release.propose_release(office, "pump@2", deltas=False))
    assert [line.split()[:2] for line in lines if line.startswith("  +")] == [["+", TWO], ["+", f"{TWO}.zst"]]
    assert not any("GONE" in line or "NEW" in line for line in lines)
    lines = ceremony.describe(release.propose_revocation(office, "pump@1", reason="it lies"))
    assert [line.split() for line in lines if line.startswith("  -")] == [["-", ONE], ["-", f"{ONE}.zst"]]


def test_the_fingerprint_is_of_what_is_signed_and_of_nothing_else(office: Home, people: People) -> None:
    begun = ceremonies.begin(office, "x", {}, renew=["root"], actor=ACTOR)
    retold = replace(begun, title="y", reason="z", begun="1970-01-01T00:00:00Z")
    assert people.sign(retold, "alice").fingerprint == begun.fingerprint
    assert begun.after.root is not None
    begun.after.root.signed.expires += timedelta(seconds=1)
    assert begun.fingerprint != retold.fingerprint or retold.after is begun.after


@pytest.mark.parametrize("role", OFFLINE_ROLES)
def test_a_file_that_says_a_stranger_had_a_say_before_is_refused_before_anybody_signs(
    office: Home, people: People, role: str
) -> None:
    """Else the stranger's key would be shown as if it had always been there."""
    wanted = {role: people.keys(("alice", "bob", "mallory"), 2)}
    begun = ceremonies.begin(office, "Renew", wanted, renew=OFFLINE_ROLES, actor=ACTOR)
    assert any("NEW" in line for line in ceremony.describe(begun))
    plain = json.loads(ceremony.encode(begun))
    before, after = plain["before"], plain["after"]
    for document in ("root", "targets", "releases"):
        version = before[document]["signed"]["version"]
        before[document]["signed"] = {**after[document]["signed"], "version": version}
    with pytest.raises(ReleaseError, match="said to be in force") as e:
        ceremony.decode(json.dumps(plain).encode())
    assert e.value.code == "release.ceremony"
    assert ceremony.decode(ceremony.encode(begun)).fingerprint == begun.fingerprint


def twisted(begun: Ceremony, twist: Callable[[Any], None]) -> bytes:
    plain = json.loads(ceremony.encode(begun))
    twist(plain)
    return json.dumps(plain).encode()


def twice(plain: Any) -> None:
    """One key under a second id: it would count twice."""
    root = plain["after"]["root"]["signed"]
    key = root["keys"][root["roles"]["root"]["keyids"][0]]
    root["keys"]["f" * 64] = key
    root["roles"]["root"]["keyids"] = [root["roles"]["root"]["keyids"][0], "f" * 64]


def back_door(plain: Any) -> None:
    targets = plain["after"]["targets"]["signed"]
    role = {**targets["delegations"]["roles"][0], "name": "mine", "paths": ["*"]}
    targets["delegations"]["roles"].insert(0, role)


def set_in(path: str, value: Any) -> Callable[[Any], None]:
    def change(plain: Any) -> None:
        *way, last = path.split()
        for step in way:
            plain = plain[int(step)] if isinstance(plain, list) else plain[step]
        plain[last] = value

    return change


TWISTS: dict[str, Callable[[Any], None]] = {
    "one key under two ids": twice,
    "a role that nobody spoke of": back_door,
    "other paths for the release list": set_in("after targets signed delegations roles 0 paths", ["*/*/*"]),
    "a delegation that does not end": set_in("after targets signed delegations roles 0 terminating", False),
    "a target in targets": set_in("after targets signed targets", {"x": {"length": 1, "hashes": {"sha256": "a" * 64}}}),
    "a listed name that moves the cursor": set_in(
        "after releases signed targets", {"bundles/\x1b[2J/x": {"length": 1, "hashes": {"sha256": "a" * 64}}}
    ),
    "a listed name of another folder": set_in(
        "after releases signed targets", {"bundles/a/b/c": {"length": 1, "hashes": {"sha256": "a" * 64}}}
    ),
    "a listed file without its digest": set_in(
        "after releases signed targets", {"bundles/a/1.tar": {"length": 1, "hashes": {"md5": "a" * 32}}}
    ),
    "a release list that delegates on": lambda plain: plain["after"]["releases"]["signed"].update(
        delegations=plain["after"]["targets"]["signed"]["delegations"]
    ),
    "no delegations": lambda plain: plain["after"]["targets"]["signed"].pop("delegations"),
    "a threshold of more than all": set_in("after root signed roles root threshold", 4),
    "a threshold of none": set_in("after root signed roles root threshold", 0),
    "a key that is none": lambda plain: next(iter(plain["after"]["root"]["signed"]["keys"].values())).update(
        keyval={"public": "zz"}
    ),
    "a key that is not listed": set_in("after root signed roles root keyids", ["a" * 64, "b" * 64]),
    "an inconsistent snapshot": set_in("after root signed consistent_snapshot", False),
    "a document of another type": lambda plain: plain["after"].update(root=plain["after"]["targets"]),
    "nothing to sign": set_in("after", {}),
    "only some of the first": lambda plain: plain["after"].pop("releases"),
    "a field that nobody knows": set_in("extra", 1),
    "another format": set_in("lightship", "ceremony 2"),
    "a version ahead": set_in("after root signed version", 2),
    "a root of the past": set_in("after root signed expires", "2020-01-01T00:00:00Z"),
    "words that move the cursor": set_in("title", "\x1b[2Jharmless"),
    "words without end": set_in("reason", "x" * 10_000),
}


@pytest.mark.parametrize("what", TWISTS)
def test_a_file_that_asks_for_what_must_not_be_is_refused_before_anybody_signs(
    tmp_path: Path, people: People, what: str
) -> None:
    with closing(Home.create(tmp_path / "home", production=True)) as home:
        data = twisted(first(home, people), TWISTS[what])
    with pytest.raises(ReleaseError) as e:
        ceremony.decode(data)
    assert e.value.code in ("release.ceremony", "release.stale")


@given(
    st.one_of(st.binary(max_size=2_000), st.text(max_size=500).map(str.encode), st.integers(0, 40).map(b"[".__mul__))
)
def test_what_is_no_ceremony_file_is_refused_with_a_code(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        ceremony.decode(data)


def test_a_file_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceremony, "MAX_FILE", 1_000)
    (tmp_path / "big").write_bytes(b" " * 2_000)
    for name, words in (("big", "at most 1000 bytes"), ("none", "No such file")):
        with pytest.raises(ReleaseError, match=words) as e:
            ceremony.read(tmp_path / name)
        assert e.value.code == "release.ceremony"


@given(st.data())
def test_a_genuine_file_that_was_bent_anywhere_is_refused_or_needs_the_same_keys(
    bent: tuple[bytes, People], data: st.DataObject
) -> None:
    """Whatever is changed in a file that is fully signed, it is refused, or lacks signatures, or says the same."""
    genuine, _ = bent
    at = data.draw(st.integers(0, len(genuine) - 1))
    changed = genuine[:at] + data.draw(st.binary(min_size=0, max_size=3)) + genuine[at + data.draw(st.integers(1, 3)) :]
    original = ceremony.decode(genuine)
    try:
        found_ = ceremony.decode(changed)
    except ReleaseError:
        return
    same = found_.fingerprint == original.fingerprint
    assert same or not found_.complete


@pytest.fixture(scope="module")
def bent(people: People, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, People]:
    with closing(Home.create(tmp_path_factory.mktemp("bent") / "home", production=True)) as home:
        return ceremony.encode(people.sign(first(home, people), *ROOT, *RELEASERS)), people
