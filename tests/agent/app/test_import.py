"""A stick is carried to a device whose control plane is out of reach: the real agent, and the command beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from tests.agent.conftest import build
from tests.agent.link.field import Field, open_field, until
from tests.control_plane.things import ACTOR, register

from lightship.fleet.export import export
from lightship.storage.models import ModelVersion
from lightship_agent.contract.codes import EXIT_STATUS
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.update import machine as m
from lightship_agent.update.media import spooled
from lightship_agent.update.store import BundleStore, StateFile

from .agents import RunningAgent, command, environment

#: In a network namespace of its own a program has no interface that is up, not even loopback.
NOWHERE = ("unshare", "--map-root-user", "--net")


@dataclass(frozen=True)
class Site:
    """A device that has version 1, sticks with versions 2 and, later, 3, and no control plane any more."""

    state: Path
    stick: Path
    old: str
    new: str

    @property
    def later(self) -> Path:
        return self.stick.with_name("later.media")

    def stored(self) -> m.UpdateState:
        return StateFile(self.state).load()

    def on_disk(self) -> dict[str, str]:
        """Digests of what the device keeps, but for the metadata cache and what every start writes."""
        files = (p for p in self.state.rglob("*") if p.is_file() and not p.is_symlink())
        names = {p.relative_to(self.state).as_posix(): p for p in files}
        passing = ("tuf/", "boot", "outbox/", "windows.json", "latest-time", ".")
        return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in names.items() if not n.startswith(passing)}

    def carried(
        self, *arguments: str, within: tuple[str, ...] = (), **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Import the stick."""
        line = ("import", str(self.stick), "--json", *arguments)
        return command(*line, state=self.state, within=within, **settings)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Site:
    return _made(tmp_path_factory.mktemp("site"), empty_home, build(2, flip=True))


@pytest.fixture
def site(template: Site, tmp_path: Path) -> Site:
    """A site of one's own, copied."""
    shutil.copytree(template.state.parent, tmp_path / "site")
    return Site(tmp_path / "site" / "press-1", tmp_path / "site" / "stick.media", template.old, template.new)


def _made(folder: Path, empty_home: Path, second: bytes) -> Site:
    (folder / "server").mkdir()
    with open_field(folder / "server", empty_home) as field:
        state, first = field.enrolled().folder.parent, register(field.home, 1)
        BundleStore(state).put(first.digest, build(1))
        field.assign("press-1", first)
        StateFile(state).save(m.UpdateState(floor=1, current=m.Target.of(field.assignment("press-1", first, seq=1))))
        two = _released(field, 2, second)
        field.assign("press-1", two)
        (folder / "site").mkdir()
        made = Site(folder / "site" / "press-1", folder / "site" / "stick.media", first.digest, two.digest)
        _export(field, made.stick)
        field.assign("press-1", _released(field, 3, build(3)))
        _export(field, made.later)
        shutil.copytree(state, made.state)
    return made


def _export(field: Field, path: Path) -> None:
    export(field.home, path, devices=["press-1"], life=timedelta(days=30), actor=ACTOR)


def _released(field: Field, number: int, bundle: bytes) -> ModelVersion:
    row = register(field.home, number, released=False)
    with field.home.database.write() as session:
        stored = session.get(ModelVersion, (row.model, row.version))
        assert stored is not None
        stored.digest, stored.length, stored.state = field.home.artifacts.put(bundle), len(bundle), "released"
    field.home.releases.publish(stored.path, bundle)
    return stored


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The code on the last line of standard error."""
    said = json.loads(done.stderr.splitlines()[-1])
    assert (done.returncode, done.stdout) == (EXIT_STATUS[said["code"].partition(".")[0]], "")
    assert "Traceback" not in done.stderr
    return str(said["code"])


def outcome(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["outcome"])


def test_a_running_agent_without_a_control_plane_applies_the_stick_and_keeps_it(site: Site) -> None:
    with RunningAgent(site.state) as agent:
        agent.wait_for(site.old)

        done = site.carried()

        assert outcome(done) == "applied"
        agent.wait_for(site.new)
        assert agent.terminate() == 0
    assert spooled(site.state) == []
    with RunningAgent(site.state) as agent:
        agent.wait_for(site.new)
    current, previous = site.stored().current, site.stored().previous
    assert current is not None
    assert previous is not None
    assert (current.offline, current.seq, previous.sha256) == (True, 2, site.old)


@pytest.mark.system
def test_a_stick_needs_no_network_interface_of_any_kind(site: Site) -> None:
    if subprocess.run([*NOWHERE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("network namespaces can't be made here")
    with RunningAgent(site.state, within=NOWHERE) as agent:
        agent.wait_for(site.old)

        assert outcome(site.carried(within=NOWHERE)) == "applied"

        agent.wait_for(site.new)


def test_without_an_agent_the_stick_is_applied_at_the_next_start(site: Site) -> None:
    done = site.carried("--no-wait")

    assert outcome(done) == "waits for the agent"
    assert len(spooled(site.state)) == 1
    with RunningAgent(site.state) as agent:
        agent.wait_for(site.new)
        until(lambda: spooled(site.state) == [])


@pytest.mark.slow
def test_of_two_sticks_that_wait_only_the_later_one_is_tried(site: Site) -> None:
    for stick in (site.stick, site.later):
        assert command("import", str(stick), "--no-wait", state=site.state).returncode == 0
    assert len(spooled(site.state)) == 2
    third = sha256_hex(build(3))

    with RunningAgent(site.state) as agent:
        agent.wait_for(third)
        until(lambda: spooled(site.state) == [])
    assert sorted(p.stem for p in (site.state / "bundles").iterdir()) == sorted([site.old, third])
    assert refusal(site.carried()) == "trust.rollback"


def test_a_stick_for_what_already_runs_leaves_nothing_to_do(site: Site) -> None:
    site.carried("--no-wait")
    with RunningAgent(site.state) as agent:
        agent.wait_for(site.new)
        until(lambda: spooled(site.state) == [])

        assert outcome(site.carried()) == outcome(site.carried("--no-wait")) == "already runs here"


def _altered_bundle(data: bytearray) -> None:
    data[-2_000] ^= 1


def _cut(data: bytearray) -> None:
    del data[len(data) // 2 :]


def _altered_list(data: bytearray) -> None:
    at = data.index(b'"_type":"snapshot"')
    data[at + 10] ^= 1


def _altered_envelope(data: bytearray) -> None:
    at = data.index(b'"payload":"') + 30
    data[at] = ord("A") if data[at] != ord("A") else ord("B")


@pytest.mark.parametrize(
    ("spoil", "codes"),
    [
        (_altered_bundle, {"trust.digest"}),
        (_cut, {"media.truncated"}),
        (_altered_list, {"trust.signature", "trust.metadata"}),
        (_altered_envelope, {"trust.signature", "trust.metadata"}),
    ],
)
def test_a_spoilt_stick_is_refused_and_the_old_model_serves_on(site: Site, spoil: object, codes: set[str]) -> None:
    data = bytearray(site.stick.read_bytes())
    assert callable(spoil)
    spoil(data)
    site.stick.write_bytes(data)
    with RunningAgent(site.state) as agent:
        agent.wait_for(site.old)
        before = site.on_disk()

        assert refusal(site.carried()) in codes

        assert (agent.serving(), site.on_disk()) == ([site.old], before)


@pytest.mark.slow
def test_a_file_that_is_spoilt_while_it_waits_is_refused_by_the_agent_too(site: Site) -> None:
    site.carried("--no-wait")
    (waiting,) = spooled(site.state)
    data = bytearray(waiting.read_bytes())
    _altered_bundle(data)
    waiting.write_bytes(data)

    with RunningAgent(site.state, POLL_SECONDS="1") as agent:
        agent.wait_for(site.old)
        until(lambda: spooled(site.state) == [])
        assert (agent.serving(), site.stored().last_code) == ([site.old], "trust.digest")
        # The stick itself is whole, and may be tried again.
        assert outcome(site.carried()) == "applied"


def test_what_somebody_leaves_in_the_folder_that_is_no_media_file_is_removed(site: Site) -> None:
    (site.state / "import").mkdir()
    (site.state / "import" / "0000000009-x.media").write_bytes(b"hello")

    with RunningAgent(site.state, POLL_SECONDS="1") as agent:
        agent.wait_for(site.old)
        until(lambda: spooled(site.state) == [])
        assert agent.serving() == [site.old]


@pytest.mark.slow
def test_a_veto_on_site_holds_the_stick_until_it_is_lifted(site: Site, tmp_path: Path) -> None:
    veto = tmp_path / "veto"
    veto.write_text("the press is running")
    with RunningAgent(site.state, VETO_FILE=str(veto), POLL_SECONDS="1") as agent:
        agent.wait_for(site.old)

        held = site.carried(VETO_FILE=str(veto))

        assert refusal(held) == "media.waiting"
        assert "the press is running" in held.stderr
        assert (agent.serving(), len(spooled(site.state))) == ([site.old], 1)
        veto.unlink()
        agent.wait_for(site.new)
        until(lambda: spooled(site.state) == [])


@pytest.mark.parametrize("point", ["before-store", "after-save-fetching", "after-save-idle"])
def test_an_agent_that_is_killed_while_it_applies_goes_on_at_its_next_start(site: Site, point: str) -> None:
    site.carried("--no-wait")
    with RunningAgent(site.state, fail_point=point) as agent:
        assert agent.process.wait(60) == -signal.SIGKILL

    with RunningAgent(site.state, POLL_SECONDS="1") as agent:
        agent.wait_for(site.new)
        until(lambda: spooled(site.state) == [])


def test_an_import_that_is_killed_while_it_copies_leaves_nothing_that_lasts(site: Site) -> None:
    before = site.on_disk()
    killed = subprocess.run(
        [sys.executable, "-m", "lightship_agent", "import", str(site.stick)],
        env={**environment(site.state), "LIGHTSHIP_FAIL_POINT": "file-written(*.media)"},
        capture_output=True,
        check=False,
    )

    assert (killed.returncode, spooled(site.state)) == (-9, [])
    with RunningAgent(site.state, POLL_SECONDS="1") as agent:
        agent.wait_for(site.old)
        assert agent.terminate() == 0
    left = site.on_disk().keys() - before.keys()
    assert [n for n in left if n.startswith("import/")] == []


def test_a_model_that_fails_on_this_device_is_told_and_the_old_one_serves_on(tmp_path: Path, empty_home: Path) -> None:
    site = _made(tmp_path, empty_home, build(2, flip=True, golden_shift=0.5))
    with RunningAgent(site.state) as agent:
        agent.wait_for(site.old)

        done = site.carried()

        assert refusal(done) == "update.golden"
        assert (agent.serving(), spooled(site.state)) == ([site.old], [])
