"""A change of keys, in a process that is really killed at every write; a device looks, and the command is repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tests.control_plane.release.device import Client
from tests.control_plane.release.people import RELEASERS, People
from tests.control_plane.release.test_ceremonies import ONE, released
from tests.control_plane.things import ACTOR

from lightship.home import Home
from lightship.registry import ceremonies
from lightship.release import ceremony
from lightship.release.ceremony import Ceremony
from lightship.release.changes import RoleKeys

FILES = ("changing.json", "*.targets.json", "*.releases.json", "*.snapshot.json", "timestamp.json", "*.root.json")
STEPS = ("file-begun", "file-written", "file-renamed")
POINTS = (*(f"{step}({name})" for name in FILES for step in STEPS), "before-commit", "after-commit")


def everything_at_once(home: Home, people: People) -> Ceremony:
    """New keys for every role but root's own, so that every kind of file is written."""
    online = {role: RoleKeys.of([home.keys.add(role).public_key]) for role in ("snapshot", "timestamp", "director")}
    offline = {"targets": people.keys(("bob", "dave"), 2), "releases": people.keys(("dave", "approver"), 2)}
    begun = ceremonies.begin(home, "Everything", {**online, **offline}, actor=ACTOR)
    return people.sign(begun, "alice", "bob", "dave", RELEASERS[1])


def finish(home: Path, file: Path, fail_point: str = "") -> int:
    command = [sys.executable, "-m", "lightship", "--home", str(home), "keys", "ceremony", "finish", str(file)]
    environment = {**os.environ, "LIGHTSHIP_FAIL_POINT": fail_point}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_there_a_device_sees_no_gap_and_repeating_the_command_ends_it(
    office: Home, people: People, device: Client, tmp_path: Path, point: str
) -> None:
    digest = released(office, people, 1)
    signed = everything_at_once(office, people)
    ceremony.write(tmp_path / "all.json", signed)
    assert device.sees(ONE) == digest

    assert finish(office.path, tmp_path / "all.json", point) == -signal.SIGKILL

    assert device.sees(ONE) == digest
    assert finish(office.path, tmp_path / "all.json") == 0
    assert device.sees(ONE) == digest
    with closing(Home.open(office.path)) as again:
        assert again.releases.in_force().role_keys("targets").keyids == people.keys(("bob", "dave"), 2).keyids
        assert {r: len(again.keys.files(r)) for r in ("snapshot", "timestamp", "director")} == {
            "snapshot": 1, "timestamp": 1, "director": 1,
        }  # fmt: skip
    everything = (p.name for folder in ("tuf", "keys") for p in (office.path / folder).rglob("*"))
    left = [name for name in everything if name.endswith(".tmp") or name == "changing.json"]
    assert left == []
