"""A file for devices without a network: what is in it, what it does to the repository, and when there is none."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import select
from tests.control_plane.things import ACTOR, MODEL, Served, add_device, enrolled, register

from lightship.cli.root import cli
from lightship.fleet import director
from lightship.fleet.export import Exported, export
from lightship.home import Home
from lightship.registry import release as releasing
from lightship.storage.models import AssignmentRow, AuditEvent, ModelVersion
from lightship_agent.contract.assignment import parse_assignment
from lightship_agent.contract.codes import LightshipError, TrustError
from lightship_agent.contract.device_api import Paths
from lightship_agent.contract.media import MediaIndex, assignment_name, read_index, read_member
from lightship_agent.contract.transport import TRANSPORT_SUFFIX
from lightship_agent.link.client import ControlPlane
from lightship_agent.link.identity import Identity
from lightship_agent.update.check import CheckRequest, check
from lightship_agent.update.importing import import_file
from lightship_agent.update.media import spooled
from lightship_agent.update.releases import Releases

MONTH = timedelta(days=30)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "stick").mkdir()
    return tmp_path / "stick" / "pumps.media"


def assign(home: Home, device: str, version: ModelVersion, *, rollout: str = "ro-1") -> None:
    with home.database.write() as session:
        director.assign(session, home.keys, device=device, version=version, rollout=rollout, actor=ACTOR)


def pumps(home: Home, count: int = 2) -> ModelVersion:
    """So many devices of a group, with version 1 assigned to each."""
    version = register(home, 1)
    for n in range(1, count + 1):
        add_device(home, f"pump-{n}")
        assign(home, f"pump-{n}", version)
    return version


def exported(home: Home, out: Path, *devices: str, life: timedelta = MONTH, **how: Any) -> Exported:
    return export(home, out, devices=devices, life=life, actor=ACTOR, **how)


def index_of(path: Path) -> MediaIndex:
    return read_index(io.BytesIO(path.read_bytes()))


def signed(path: Path, name: str) -> dict[str, Any]:
    """What the metadata file in a media file says."""
    file = io.BytesIO(path.read_bytes())
    said: dict[str, Any] = json.loads(read_member(file, read_index(file), f"metadata/{name}", 1 << 20))["signed"]
    return said


def online(home: Home) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((home.releases.metadata / "timestamp.json").read_bytes())["signed"]
    return said


def verbs(home: Home) -> list[str]:
    with home.database.read() as session:
        return list(session.scalars(select(AuditEvent.verb).order_by(AuditEvent.seq)))


def on_disk(home: Home) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in home.releases.metadata.iterdir() if p.is_file() and p.name != ".lock"}


def refused(home: Home, out: Path, *devices: str, signs: bool = False, **how: Any) -> LightshipError:
    """The refusal; there is no file, and, unless it comes late, nothing was signed and nothing is audited."""
    before = (on_disk(home), verbs(home))
    with pytest.raises(LightshipError) as caught:
        exported(home, out, *devices, **how)
    assert list(out.parent.glob("*")) + list(out.parent.glob(".*")) == [] or out.is_dir()
    if not signs:
        assert (on_disk(home), verbs(home)) == before
    return caught.value


# What is in it --------------------------------------------------------------------------------------------------------


def test_a_device_takes_all_it_needs_from_the_file_with_nobody_to_ask(
    served: Served, out: Path, tmp_path: Path
) -> None:
    home, identity = served.home, enrolled(served.home, served.url, tmp_path, "pump-1")
    version = register(home, 1)
    assign(home, "pump-1", version)

    made = exported(home, out, "pump-1")
    imported = import_file(out, identity.folder.parent, check=check)

    assert (imported.assignment.sha256, imported.assignment.rollout) == (version.digest, "ro-1")
    assert spooled(identity.folder.parent) == [imported.waits_at]
    assert (made.size, made.devices, made.bundles) == (out.stat().st_size, ("pump-1",), (version.path,))


def test_a_group_shares_one_copy_of_each_bundle(home: Home, out: Path) -> None:
    pumps(home, 3)
    add_device(home, "fan-1", group="fans")
    add_device(home, "pump-9", state="revoked")
    two = register(home, 2)
    assign(home, "pump-3", two)

    made = exported(home, out, group="pumps")

    index = index_of(out)
    assert index.devices == made.devices == ("pump-1", "pump-2", "pump-3")
    for device in index.devices:
        envelope = json.loads(read_member(io.BytesIO(out.read_bytes()), index, assignment_name(device), 1 << 14))
        assert parse_assignment(base64.b64decode(envelope["payload"])).device == device
    assert sum(name.startswith("targets/") for name in index.entries) == 2


def test_the_envelopes_are_those_that_the_server_hands_out(home: Home, out: Path) -> None:
    pumps(home, 1)
    with home.database.read() as session:
        row = session.get(AssignmentRow, "pump-1")
        assert row is not None
        handed_out = row.envelope

    exported(home, out, "pump-1")

    file = io.BytesIO(out.read_bytes())
    assert read_member(file, read_index(file), assignment_name("pump-1"), 1 << 14) == handed_out


def test_an_assignment_that_would_expire_on_the_way_is_signed_anew_for_the_same_rollout(home: Home, out: Path) -> None:
    version = pumps(home, 2)
    with home.database.write() as session:
        row = session.get(AssignmentRow, "pump-1")
        assert row is not None
        row.expires_at = int(time.time() + 20 * 86_400) * 1_000

    made = exported(home, out, group="pumps")

    with home.database.read() as session:
        rows = {r.device: r for r in session.scalars(select(AssignmentRow))}
    assert [(rows[d].seq, rows[d].rollout, rows[d].digest) for d in made.devices] == [
        (2, "ro-1", version.digest),
        (1, "ro-1", version.digest),
    ]
    assert all(r.expires_at >= made.until.timestamp() * 1_000 for r in rows.values())


def test_the_lists_in_the_file_live_as_long_as_was_asked_and_those_online_as_ever(home: Home, out: Path) -> None:
    pumps(home)

    made = exported(home, out, group="pumps", life=timedelta(days=60))

    carried = signed(out, "timestamp.json")
    snapshot = signed(out, f"{carried['meta']['snapshot.json']['version']}.snapshot.json")
    until = made.until.isoformat().replace("+00:00", "Z")
    assert (carried["expires"], snapshot["expires"]) == (until, until)
    assert datetime.fromisoformat(online(home)["expires"]) < datetime.now(UTC) + timedelta(days=8)


def test_what_is_online_is_beyond_the_file_and_the_files_lists_are_nowhere_on_the_server(home: Home, out: Path) -> None:
    pumps(home)
    before = online(home)

    exported(home, out, group="pumps")

    carried = signed(out, "timestamp.json")
    assert [before["version"], carried["version"], online(home)["version"]] == [
        before["version"] + n for n in (0, 1, 2)
    ]
    assert f"{carried['meta']['snapshot.json']['version']}.snapshot.json" not in on_disk(home)


def test_every_root_goes_along(home: Home, out: Path) -> None:
    pumps(home)

    exported(home, out, group="pumps")

    roots = {p.name for p in home.releases.metadata.glob("*.root.json")}
    assert roots == {n.partition("/")[2] for n in index_of(out).entries if n.endswith(".root.json")}


def test_it_is_audited(home: Home, out: Path) -> None:
    version = pumps(home)

    made = exported(home, out, group="pumps")

    with home.database.read() as session:
        (event,) = session.scalars(select(AuditEvent).where(AuditEvent.verb == "release.export"))
    assert (event.actor, event.subject) == (ACTOR, "pumps")
    assert event.detail == {
        "devices": ["pump-1", "pump-2"],
        "until": made.until.isoformat(),
        "bundles": [version.path],
    }


# A device that has a network now and then -----------------------------------------------------------------------------


class Wanderer:
    """A device that is online today, and offline tomorrow."""

    def __init__(self, served: Served, identity: Identity) -> None:
        self.served, self.identity = served, identity
        self.state = identity.folder.parent
        self.plane = ControlPlane(identity)

    def look_online(self) -> Releases:
        url = f"{self.plane.server}{Paths.METADATA}"
        return Releases(self.state / "tuf", self.plane.http, url, self.identity.tuf_root)

    def read_file(self, path: Path) -> str:
        """The digest that the file brings, or the code of the refusal."""
        try:
            return import_file(path, self.state, check=check).assignment.sha256
        except TrustError as e:
            return e.code


@pytest.fixture
def wanderer(served: Served, tmp_path: Path) -> Iterator[Wanderer]:
    made = Wanderer(served, enrolled(served.home, served.url, tmp_path, "pump-1"))
    yield made
    made.plane.close()


def test_after_a_file_the_way_back_online_is_open(wanderer: Wanderer, out: Path) -> None:
    home = wanderer.served.home
    version = register(home, 1)
    assign(home, "pump-1", version)
    wanderer.look_online()
    exported(home, out, "pump-1")

    assert wanderer.read_file(out) == version.digest
    assert wanderer.look_online().find(version.path).sha256 == version.digest


def test_a_device_that_was_online_since_still_takes_the_bundle_from_the_file(wanderer: Wanderer, out: Path) -> None:
    home = wanderer.served.home
    version = register(home, 1)
    assign(home, "pump-1", version)
    exported(home, out, "pump-1")
    wanderer.look_online().find(version.path)

    assert wanderer.read_file(out) == version.digest


def test_a_device_that_learnt_of_a_revocation_takes_no_older_file(wanderer: Wanderer, out: Path) -> None:
    home = wanderer.served.home
    version = register(home, 1)
    assign(home, "pump-1", version)
    exported(home, out, "pump-1")
    releasing.revoke(home, f"{MODEL}@1", actor=ACTOR, reason="bad")
    wanderer.look_online().target(version.path)

    assert wanderer.read_file(out) == "trust.not-released"


def test_of_two_files_the_older_one_is_refused_after_the_newer(wanderer: Wanderer, out: Path, tmp_path: Path) -> None:
    home = wanderer.served.home
    one, two = register(home, 1), register(home, 2)
    assign(home, "pump-1", one)
    exported(home, out, "pump-1")
    assign(home, "pump-1", two)
    exported(home, tmp_path / "newer.media", "pump-1")
    (wanderer.state / "update.json").write_bytes(b'{"floor":2}')

    assert wanderer.read_file(tmp_path / "newer.media") == two.digest
    assert wanderer.read_file(out) == "trust.rollback"


def test_the_file_is_no_use_to_show_an_online_device_an_old_list(wanderer: Wanderer, out: Path) -> None:
    """Somebody puts the long-lived lists of the file in the place of the server's."""
    home = wanderer.served.home
    version = register(home, 1)
    assign(home, "pump-1", version)
    exported(home, out, "pump-1")
    wanderer.look_online()
    file = io.BytesIO(out.read_bytes())
    index = read_index(file)
    for name in [n for n in index.entries if n.startswith("metadata/")]:
        (home.releases.metadata / name.partition("/")[2]).write_bytes(read_member(file, index, name, 1 << 20))

    with pytest.raises(TrustError) as caught:
        wanderer.look_online()

    assert caught.value.code == "trust.rollback"


def test_a_file_that_travelled_too_long_is_refused(wanderer: Wanderer, out: Path) -> None:
    home = wanderer.served.home
    version = register(home, 1)
    assign(home, "pump-1", version)
    exported(home, out, "pump-1", life=timedelta(days=3))

    def in_four_days(request: CheckRequest) -> Any:
        return check(CheckRequest(**{**{f: getattr(request, f) for f in request.__struct_fields__}, "now": later}))

    later = time.time() + 4 * 86_400
    with pytest.raises(TrustError) as caught:
        import_file(out, wanderer.state, check=in_four_days)

    assert caught.value.code == "trust.expired"


# When there is none ---------------------------------------------------------------------------------------------------


def test_devices_that_nobody_knows_are_named(home: Home, out: Path) -> None:
    pumps(home)
    add_device(home, "pump-9", state="revoked")

    error = refused(home, out, "pump-1", "pump-9", "nobody")

    assert (error.code, error.message) == ("fleet.unknown-device", "Not enrolled, or revoked: pump-9, nobody.")
    assert refused(home, out, group="nowhere").code == "fleet.unknown-device"


def test_devices_that_nothing_is_assigned_to_are_named(home: Home, out: Path) -> None:
    pumps(home)
    add_device(home, "pump-3")

    error = refused(home, out, group="pumps")

    assert (error.code, "pump-3" in error.message, "pump-1" in error.message) == ("fleet.unassigned", True, False)


def test_what_was_revoked_is_not_carried_anywhere(home: Home, out: Path) -> None:
    pumps(home)
    releasing.revoke(home, f"{MODEL}@1", actor=ACTOR, reason="bad")

    assert refused(home, out, "pump-1").code == "fleet.unassigned"


@pytest.mark.parametrize("life", [timedelta(0), timedelta(days=91), timedelta(days=4_000)])
def test_a_life_that_no_assignment_has_is_refused(home: Home, out: Path, life: timedelta) -> None:
    pumps(home)

    assert refused(home, out, "pump-1", life=life).code == "release.expiry"


def test_a_list_that_expires_sooner_says_what_may_be_asked_for(home: Home, out: Path) -> None:
    """Everything was signed, then two months went by in which the releases key was away."""
    pumps(home)
    documents = home.releases.in_force()
    assert documents.releases is not None
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(days=25, hours=1)
    file = home.releases.metadata / f"{documents.version('releases')}.releases.json"
    said = json.loads(file.read_bytes())
    said["signed"]["expires"] = f"{soon:%Y-%m-%dT%H:%M:%SZ}"
    file.write_text(json.dumps(said))

    error = refused(home, out, "pump-1")

    assert (error.code, "releases" in error.message, "--expires 25d" in error.remedy) == ("release.expiry", True, True)


def test_without_a_place_for_the_file_nothing_is_signed(home: Home, out: Path, tmp_path: Path) -> None:
    pumps(home)

    assert refused(home, out.parent / "no" / "such" / "folder.media", "pump-1").code == "storage.unwritable"
    assert refused(home, out.parent, "pump-1").code == "storage.unwritable"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "stick"]


def test_without_room_there_is_no_file(home: Home, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pumps(home)
    full = os.statvfs(out.parent)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*full[:4], 0, *full[5:])))

    assert refused(home, out, "pump-1", signs=True).code == "storage.full"


@pytest.mark.parametrize("spoil", ["altered", "cut", "longer", "gone"])
def test_a_bundle_that_the_servers_disk_has_spoilt_is_not_carried(home: Home, out: Path, spoil: str) -> None:
    version = pumps(home)
    (file,) = home.releases.targets.glob(f"bundles/{MODEL}/*.tar{TRANSPORT_SUFFIX}")
    data = file.read_bytes()
    if spoil == "gone":
        file.unlink()
    else:
        file.write_bytes({"altered": b"x" + data[1:], "cut": data[:-1], "longer": data + b"x"}[spoil])

    if spoil == "longer":
        # What comes after the signed length is nobody's business, and does not travel.
        assert exported(home, out, "pump-1").bundles == (version.path,)
        return
    assert refused(home, out, "pump-1", signs=True).code == "storage.corrupt"


def test_an_export_that_fails_leaves_an_older_file_as_it_was(home: Home, out: Path) -> None:
    pumps(home)
    exported(home, out, "pump-1")
    before = out.read_bytes()
    for file in home.releases.targets.glob("bundles/*/*"):
        file.unlink()

    with pytest.raises(LightshipError):
        exported(home, out, "pump-1")

    assert (out.read_bytes(), [p.name for p in out.parent.iterdir()]) == (before, [out.name])


@pytest.mark.parametrize("point", ["file-begun", "file-written"])
def test_an_export_that_is_killed_leaves_no_file_and_the_next_one_is_as_good(
    served: Served, out: Path, tmp_path: Path, point: str
) -> None:
    home, identity = served.home, enrolled(served.home, served.url, tmp_path, "pump-1")
    version = register(home, 1)
    assign(home, "pump-1", version)
    line = ["--home", str(home.path), "release", "export", "--device", "pump-1", "-o", str(out)]

    killed = subprocess.run(
        [sys.executable, "-m", "lightship", *line],
        env={**os.environ, "LIGHTSHIP_FAIL_POINT": f"{point}({out.name})"},
        capture_output=True,
        check=False,
    )

    assert (killed.returncode, out.exists()) == (-9, False)
    exported(home, out, "pump-1")
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert import_file(out, identity.folder.parent, check=check).assignment.sha256 == version.digest


# The command ----------------------------------------------------------------------------------------------------------


def run(home: Home, *arguments: str) -> Any:
    return CliRunner().invoke(cli, ["--home", str(home.path), "release", "export", *arguments])


def test_the_command_writes_it_and_says_what_to_do_with_it(home: Home, out: Path) -> None:
    pumps(home)

    done = run(home, "--group", "pumps", "--expires", "36h", "-o", str(out))

    assert done.exit_code == 0, done.output
    assert f"lightship-agent import {out.name}" in done.output
    assert index_of(out).devices == ("pump-1", "pump-2")


def test_the_command_speaks_json(home: Home, out: Path) -> None:
    pumps(home)

    done = run(home, "--device", "pump-1", "--device", "pump-2", "--json", "-o", str(out))

    said = json.loads(done.stdout)
    assert (said["devices"], said["bytes"]) == (["pump-1", "pump-2"], out.stat().st_size)


@pytest.mark.parametrize(
    "arguments", [(), ("--expires", "soon", "--group", "pumps"), ("--expires", "0d", "--group", "pumps")]
)
def test_wrong_usage_writes_nothing(home: Home, out: Path, arguments: tuple[str, ...]) -> None:
    pumps(home)

    done = run(home, *arguments, "-o", str(out))

    assert (done.exit_code, out.exists()) == (2, False)
