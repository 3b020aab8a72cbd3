"""The release repository, asked by the agent's own client over real HTTPS."""

from __future__ import annotations

import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.agent.conftest import build
from tests.control_plane.release.device import Client, CuttableDisk
from tests.control_plane.things import ACTOR, Served, register

from lightship.fleet import director
from lightship.home import Home
from lightship.release import repository
from lightship.release.keys import ROLES, KeyFolder
from lightship.release.repository import LIFE, ReleaseRepository
from lightship.storage.models import AssignmentRow
from lightship_agent.contract.assignment import Assignment
from lightship_agent.contract.codes import LightshipError, ReleaseError, StorageError, TrustError
from lightship_agent.contract.device_api import MAX_RELEASE_LIST, Paths
from lightship_agent.contract.transport import TRANSPORT_SUFFIX, unpack_transport
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.update.download import download
from lightship_agent.update.releases import LIMITS

ONLINE = ("releases", "snapshot", "timestamp")
ONE, TWO = "bundles/pump/1.tar", "bundles/pump/2.tar"


@pytest.fixture
def client(served: Served, tmp_path: Path) -> Iterator[Client]:
    made = Client(served, tmp_path / "device")
    yield made
    made.plane.close()


def names(repository: ReleaseRepository) -> set[str]:
    return {p.name for p in repository.metadata.iterdir() if not p.name.startswith(".")}


# What a device sees ---------------------------------------------------------------------------------------------------


def test_a_device_finds_what_was_released_and_the_bytes_are_the_signed_ones(home: Home, client: Client) -> None:
    bundle = build(1)
    home.releases.publish(ONE, bundle)
    releases = client.look()
    listed, transport = releases.find(ONE), releases.find(ONE + TRANSPORT_SUFFIX)
    assert (listed.sha256, listed.length) == (sha256_hex(bundle), len(bundle))
    url = f"{client.plane.server}{Paths.TARGETS}{transport.url_path}"
    packed = download(client.plane.http, url, client.cache / "part", transport.length)
    unpacked = unpack_transport(packed, packed_sha256=transport.sha256, sha256=listed.sha256, length=listed.length)
    assert unpacked == bundle


def test_what_was_never_released_or_lies_outside_the_delegation_is_not_found(home: Home, client: Client) -> None:
    home.releases.publish(ONE, build(1))
    assert [client.sees(p) for p in (TWO, "bundles/pump", "1.tar", "bundles/a/b/1.tar", "../keys/root.pem")] == [
        "trust.not-released"
    ] * 5


def test_a_revoked_bundle_is_gone_at_the_next_look(home: Home, client: Client) -> None:
    home.releases.publish(ONE, build(1))
    home.releases.publish(TWO, build(2))
    assert client.sees(ONE) == sha256_hex(build(1))
    home.releases.revoke(ONE)
    assert (client.sees(ONE), client.sees(TWO)) == ("trust.not-released", sha256_hex(build(2)))


def test_an_assignment_counts_only_when_the_director_signed_it_and_the_release_is_the_same(
    home: Home, client: Client
) -> None:
    version = register(home, 1)
    with home.database.write() as session:
        director.assign(session, home.keys, device="pump-1", version=version, rollout="r", actor=ACTOR)
        row = session.get(AssignmentRow, "pump-1")
        assert row is not None
        envelope = row.envelope
    releases = client.look()
    assignment = releases.open_assignment(envelope)
    assert releases.check_released(assignment).sha256 == version.digest
    # A stolen director key can't make anything up.
    made_up = {"device": "pump-1", "seq": 2, "issued": 1, "expires": 2**40, "model": "pump", "version": 1, "path": ONE}
    evil = Assignment(**made_up, sha256="0" * 64, length=version.length)  # type: ignore[arg-type]
    signed = releases.open_assignment(director.sign(home.keys, evil))
    with pytest.raises(TrustError) as e:
        releases.check_released(signed)
    assert e.value.code == "trust.not-released"
    # Nor can anybody else assign.
    other = KeyFolder(home.path / "other")
    other.create()
    with pytest.raises(TrustError) as e:
        releases.open_assignment(director.sign(other, assignment))
    assert e.value.code == "trust.signature"


def test_after_every_possible_cut_a_device_still_sees_the_old_list_or_the_new_one(
    home: Home, client: Client, disk: CuttableDisk
) -> None:
    home.releases.publish(ONE, build(1))
    assert disk.wrote == 4  # the bundle, releases, snapshot, timestamp
    old = sha256_hex(build(1))
    for writes in range(4):
        version = writes + 2
        path, bundle = f"bundles/pump/{version}.tar", build(version)
        disk.allow(writes)
        with pytest.raises(StorageError):
            home.releases.publish(path, bundle)
        assert (client.sees(ONE), client.sees(path)) == (old, "trust.not-released")
        assert [r.path for r in home.releases.released()] == [f"bundles/pump/{v}.tar" for v in range(1, version)]
        disk.allow(-1)
        home.releases.publish(path, bundle)
        assert (client.sees(ONE), client.sees(path)) == (old, sha256_hex(bundle))


def test_a_renewal_that_is_cut_anywhere_leaves_what_was_in_force(
    home: Home, client: Client, disk: CuttableDisk
) -> None:
    home.releases.publish(ONE, build(1))
    late = datetime.now(UTC) + timedelta(days=60)
    for writes in range(3):
        disk.allow(writes)
        with pytest.raises(StorageError):
            home.releases.renew(late)
        assert client.sees(ONE) == sha256_hex(build(1))
    disk.allow(-1)
    assert home.releases.renew(late) == ["releases", "snapshot", "timestamp"]
    assert client.sees(ONE) == sha256_hex(build(1))


def test_an_expired_timestamp_stops_updates_with_the_word_for_it(
    home: Home, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.releases.publish(ONE, build(1))
    monkeypatch.setitem(LIFE, "timestamp", timedelta(seconds=-1))
    home.releases.publish(TWO, build(2))
    assert client.sees(ONE) == "trust.expired"


def test_a_repository_put_back_to_yesterday_is_refused(home: Home, client: Client) -> None:
    home.releases.publish(ONE, build(1))
    yesterday = (home.releases.metadata / "timestamp.json").read_bytes()
    home.releases.publish(TWO, build(2))
    assert client.sees(TWO) == sha256_hex(build(2))
    (home.releases.metadata / "timestamp.json").write_bytes(yesterday)
    assert client.sees(TWO) == "trust.rollback"


# What the operator may do ---------------------------------------------------------------------------------------------


def test_the_same_bytes_again_are_no_change(home: Home) -> None:
    first = home.releases.publish(ONE, build(1))
    before = names(home.releases)
    assert home.releases.publish(ONE, build(1)) == first
    assert names(home.releases) == before


def test_other_bytes_at_the_same_path_are_refused_and_change_nothing(home: Home) -> None:
    home.releases.publish(ONE, build(1))
    before = names(home.releases)
    with pytest.raises(ReleaseError, match="other bytes") as e:
        home.releases.publish(ONE, build(2))
    assert e.value.code == "release.exists"
    assert (names(home.releases), [r.sha256 for r in home.releases.released()]) == (before, [sha256_hex(build(1))])


def test_a_list_that_devices_would_not_read_is_never_signed(
    home: Home, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LIMITS.targets_max_length == MAX_RELEASE_LIST
    home.releases.publish(ONE, build(1))
    before = names(home.releases)
    monkeypatch.setattr(repository, "MAX_RELEASE_LIST", 500)

    for attempt in (lambda: home.releases.publish(TWO, build(2)), lambda: home.releases.draft(add={TWO: build(2)})):
        with pytest.raises(ReleaseError) as caught:
            attempt()
        assert caught.value.code == "release.too-long"

    assert names(home.releases) == before
    assert (client.sees(ONE), client.sees(TWO)) == (sha256_hex(build(1)), "trust.not-released")


def test_what_is_not_released_can_not_be_revoked(home: Home) -> None:
    with pytest.raises(ReleaseError) as e:
        home.releases.revoke(ONE)
    assert e.value.code == "release.unknown"


def test_a_second_repository_in_the_same_place_is_refused(home: Home) -> None:
    root = home.releases.root_bytes()
    with pytest.raises(ReleaseError) as e:
        home.releases.create()
    assert e.value.code == "release.exists"
    assert home.releases.root_bytes() == root


def test_two_processes_that_publish_at_once_keep_both(home: Home, tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from lightship.home import Home
        home = Home.open(Path(sys.argv[1]))
        for n in range(4):
            home.releases.publish(f"bundles/{sys.argv[2]}/{n + 1}.tar", f"{sys.argv[2]} {n}".encode() * 500)
        home.close()
    """)
    both = [subprocess.Popen([sys.executable, "-c", program, str(home.path), m]) for m in ("pump", "valve")]
    assert [p.wait(timeout=60) for p in both] == [0, 0]
    paths = {r.path for r in home.releases.released()}
    assert paths == {f"bundles/{m}/{n}.tar" for m in ("pump", "valve") for n in range(1, 5)}


# Time -----------------------------------------------------------------------------------------------------------------


def test_nothing_is_signed_anew_before_half_of_its_life(home: Home) -> None:
    before = names(home.releases)
    assert home.releases.renew(datetime.now(UTC) + timedelta(days=3, hours=11)) == []
    assert names(home.releases) == before


@pytest.mark.parametrize(("days", "due"), [(4, ["snapshot", "timestamp"]), (44, ["snapshot", "timestamp"]), (46, None)])
def test_at_half_of_its_life_a_role_is_signed_anew(home: Home, days: int, due: list[str]) -> None:
    before = home.releases.expiries()
    assert home.releases.renew(datetime.now(UTC) + timedelta(days=days)) == (
        due or ["releases", "snapshot", "timestamp"]
    )
    assert home.releases.expiries()["timestamp"] >= before["timestamp"]


def test_every_role_says_when_it_ends(home: Home) -> None:
    left = {role: ends - datetime.now(UTC) for role, ends in home.releases.expiries().items()}
    assert set(left) == set(LIFE)
    for role, life in LIFE.items():
        # The home is a copy of one that this run of the suite made, up to hours ago.
        assert life - timedelta(hours=12) < left[role] <= life


def test_with_the_releases_key_kept_elsewhere_the_online_roles_live_on(home: Home, client: Client) -> None:
    home.releases.publish(ONE, build(1))
    (home.path / "keys" / "releases.pem").rename(home.path / "in-the-safe.pem")
    assert home.releases.renew(datetime.now(UTC) + timedelta(days=60)) == ["snapshot", "timestamp"]
    assert client.sees(ONE) == sha256_hex(build(1))


# Keys -----------------------------------------------------------------------------------------------------------------


def test_only_the_owner_can_read_a_private_key(home: Home) -> None:
    keys = sorted((home.path / "keys").iterdir())
    assert [k.name for k in keys] == sorted(f"{role}.pem" for role in ROLES)
    assert {stat.S_IMODE(k.stat().st_mode) for k in [*keys, home.path / "ca" / "ca.key", home.token_path]} == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in (home.path, home.path / "keys", home.path / "ca")} == {0o700}


def test_making_keys_again_changes_none(home: Home) -> None:
    before = {p.name: p.read_bytes() for p in (home.path / "keys").iterdir()}
    home.keys.create()
    assert {p.name: p.read_bytes() for p in (home.path / "keys").iterdir()} == before


@pytest.mark.parametrize("content", [None, b"", b"not a key"])
def test_a_key_that_is_missing_or_broken_stops_the_release_and_nothing_changes(
    home: Home, content: bytes | None
) -> None:
    path = home.path / "keys" / "releases.pem"
    path.unlink() if content is None else path.write_bytes(content)
    before = names(home.releases)
    with pytest.raises(ReleaseError, match="backup") as e:
        home.releases.publish(ONE, build(1))
    assert e.value.code == "release.keys"
    assert (names(home.releases), home.releases.released()) == (before, [])


def test_a_key_for_another_purpose_is_refused(home: Home) -> None:
    ca_key = (home.path / "ca" / "ca.key").read_bytes()
    (home.path / "keys" / "releases.pem").write_bytes(ca_key)
    with pytest.raises(ReleaseError, match="not the one that devices were told to trust"):
        home.releases.publish(ONE, build(1))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda p: p.write_bytes(b""),
    "not JSON": lambda p: p.write_bytes(b"\xff\xfe{"),
    "not metadata": lambda p: p.write_bytes(b'{"signed": {}}'),
}


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.releases.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metadata_is_an_error_with_a_code_and_a_remedy(home: Home, name: str, damage: str) -> None:
    DAMAGES[damage](home.releases.metadata / name)
    for act in (home.releases.released, lambda: home.releases.publish(ONE, build(1)), home.releases.expiries):
        with pytest.raises(LightshipError, match="backup") as e:
            act()
        assert e.value.code == "release.unknown"


@pytest.mark.parametrize("role", ["releases", "snapshot", "timestamp"])
def test_a_key_that_devices_do_not_trust_signs_nothing_that_they_would_see(
    home: Home, client: Client, role: str
) -> None:
    home.releases.publish(ONE, build(1))
    path = home.path / "keys" / f"{role}.pem"
    path.unlink()
    home.keys.create()
    in_force = (home.releases.metadata / "timestamp.json").read_bytes()

    with pytest.raises(ReleaseError, match="not the one that devices were told to trust") as e:
        home.releases.publish(TWO, build(2))

    assert e.value.code == "release.keys"
    assert (home.releases.metadata / "timestamp.json").read_bytes() == in_force
    assert [r.path for r in home.releases.released()] == [ONE]
    assert client.sees(ONE) == sha256_hex(build(1))


@pytest.mark.parametrize("role", ["snapshot", "timestamp", "director"])
def test_a_home_that_lost_an_online_key_is_not_completed_with_a_new_one(home: Home, role: str) -> None:
    path = home.path / "keys" / f"{role}.pem"
    path.unlink()

    with pytest.raises(ReleaseError, match=role) as e:
        Home.create(home.path)

    assert (e.value.code, path.exists()) == ("release.keys", False)


def test_a_home_whose_root_and_targets_keys_are_offline_is_whole(home: Home) -> None:
    for role in ("root", "targets", "releases"):
        (home.path / "keys" / f"{role}.pem").unlink()
    Home.create(home.path).close()
    assert not (home.path / "keys" / "root.pem").exists()


@pytest.mark.parametrize("name", ["ca.pem", "ca.key"])
def test_a_home_that_lost_its_ca_is_not_given_another(home: Home, name: str) -> None:
    (home.path / "ca" / name).unlink()

    with pytest.raises(StorageError, match=name) as e:
        Home.create(home.path)

    assert (e.value.code, (home.path / "ca" / name).exists()) == ("storage.corrupt", False)
