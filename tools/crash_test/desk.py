"""Crash test: one control plane as its operators use it: a home on disk, commands and `lightship up`, each a process.

Rules:
* what a device would get is asked with python-tuf's own client, anew each time, and every listed bundle is fetched;
* a device here is a row of the database: what is looked at is what it is told, and whether it is told it once.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import func, select, text
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

import lightship
import lightship_agent
from lightship.fleet import rollouts
from lightship.fleet.rollout import Rules, WaveSpec
from lightship.home import Home
from lightship.registry import release, versions
from lightship.storage import audit
from lightship.storage.models import AssignmentRow, AuditEvent, Device, ModelVersion, RolloutRow, Run
from lightship_agent.contract.transport import TRANSPORT_SUFFIX, unpack_transport
from lightship_agent.contract.wire import sha256_hex

from . import bundles
from .device import RowError

PACKAGES: Final = os.pathsep.join(str(Path(str(p.__file__)).parents[1]) for p in (lightship, lightship_agent))
DEVICES: Final = ("press-1", "press-2", "press-3")
ROLLOUT: Final = "ro-1"
ACTOR: Final = "user:crash-test"
PATIENCE: Final = 240.0
_MAKING: Final = threading.Lock()


class Desk:
    """A home, and the processes that work on it."""

    def __init__(self, folder: Path, template: Path) -> None:
        """A copy of `template` under `folder`; nothing runs."""
        self.folder = folder
        self.path = folder / "home"
        shutil.copytree(template, self.path)
        self._up: subprocess.Popen[bytes] | None = None
        self.at_end: list[Callable[[], object]] = []
        self._marks = 0
        self._log = folder / "up-0.log"

    # Processes ------------------------------------------------------------------------------------------------------

    def _environment(self, fail: str, more: dict[str, str] | None) -> dict[str, str]:
        self._marks += 1
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": PACKAGES,
            "LIGHTSHIP_FAIL_POINT": fail,
            "LIGHTSHIP_FAIL_POINT_FOLDER": str(self.folder / f"marks-{self._marks}"),
            **(more or {}),
        }

    def run(self, *words: str, fail: str = "", more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """One command, to its end."""
        command = [sys.executable, "-m", "lightship", "--home", str(self.path), *words]
        return subprocess.run(
            command, env=self._environment(fail, more), capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    def does(self, *words: str) -> Any:
        """A command that works; what it says as JSON."""
        done = self.run(*words, "--json")
        if done.returncode != 0:
            message = f"`lightship {' '.join(words)}` ended with {done.returncode}: {done.stderr[-300:]}"
            raise RowError(message)
        return json.loads(done.stdout)

    def dies(self, *words: str, fail: str) -> None:
        """A command that is killed where that is ordered."""
        done = self.run(*words, fail=fail)
        if done.returncode != -signal.SIGKILL:
            message = f"it was to die at {fail}, and ended with {done.returncode}: {done.stderr[-300:]}"
            raise RowError(message)

    def is_refused(self, *words: str, code: str, fail: str = "") -> None:
        """A command that says no, with that code."""
        done = self.run(*words, fail=fail)
        if done.returncode in {0, 1} or code not in done.stderr + done.stdout:
            message = f"expected a refusal with {code}; it ended with {done.returncode}: {done.stderr[-300:]}"
            raise RowError(message)

    def up(self, fail: str = "", more: dict[str, str] | None = None) -> None:
        """Start `lightship up`."""
        flags = ("--api-port", "0", "--device-port", "0", "--broker", "none", "--reconcile-seconds", "0.2")
        command = [sys.executable, "-m", "lightship", "--home", str(self.path), "up", *flags]
        environment = self._environment(fail, more)
        self._log = self.folder / f"up-{self._marks}.log"
        with self._log.open("ab") as log:
            self._up = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def waits(self, happened: Callable[[], Any], what: str) -> None:
        """Wait for something while `lightship up` works."""
        end = time.monotonic() + PATIENCE
        while not happened():
            if self._up is not None and self._up.poll() is not None:
                message = f"waiting for {what}, `lightship up` ended with {self._up.returncode}: {self._last_words()}"
                raise RowError(message)
            if time.monotonic() > end:
                message = f"{what} did not happen within {PATIENCE:.0f} s: {self._last_words()}"
                raise RowError(message)
            time.sleep(0.1)

    def up_dies(self) -> None:
        """Wait until `lightship up` has killed itself."""
        assert self._up is not None, "it was not started"
        try:
            status = self._up.wait(PATIENCE)
        except subprocess.TimeoutExpired as e:
            raise RowError("`lightship up` was to die, and lives on") from e
        if status != -signal.SIGKILL:
            message = f"`lightship up` was to die of SIGKILL, and ended with {status}: {self._last_words()}"
            raise RowError(message)

    def is_up(self) -> bool:
        """Whether it has said where it listens, since it was started the last time."""
        return self._log.exists() and "dashboard " in self._log.read_text()

    def warns(self) -> bool:
        """Whether it has logged that the disk fails it."""
        return "storage." in self._log.read_text()

    def is_dead(self) -> bool:
        """Whether `lightship up` has ended."""
        return self._up is not None and self._up.poll() is not None

    def down(self) -> None:
        """Stop `lightship up` as a service manager does."""
        if self._up is None or self._up.poll() is not None:
            return
        # Before that it may not have taken the signals over.
        self.waits(self.is_up, "its addresses")
        self._up.send_signal(signal.SIGTERM)
        try:
            status = self._up.wait(PATIENCE)
        except subprocess.TimeoutExpired as e:
            raise RowError("`lightship up` does not stop") from e
        if status not in {0, 130, -signal.SIGINT}:
            message = f"`lightship up` stopped with {status}: {self._last_words()}"
            raise RowError(message)

    def close(self) -> None:
        """Leave no process behind."""
        if self._up is not None and self._up.poll() is None:
            self._up.kill()
            self._up.wait()
        for undo in self.at_end:
            undo()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "it said nothing"

    # What the repository says -----------------------------------------------------------------------------------------

    def listed(self) -> str:
        """The versions that a device which sees this repository for the first time would accept, each fetched."""
        home = Home.at(self.path)
        with tempfile.TemporaryDirectory(prefix="client-") as folder:
            client = Updater(
                folder, "tuf://metadata/", folder, "tuf://targets/", _Folder(self.path / "tuf"),
                bootstrap=home.releases.root_bytes(),
            )  # fmt: skip
            client.refresh()
            found = []
            for row in self.versions():
                bundle, packed = client.get_targetinfo(row.path), client.get_targetinfo(row.path + TRANSPORT_SUFFIX)
                if (bundle is None) != (packed is None):
                    message = f"{row.path} is half listed"
                    raise RowError(message)
                if bundle is None or packed is None:
                    continue
                data = Path(client.download_target(packed, f"{folder}/bundle")).read_bytes()
                unpack_transport(data, packed_sha256=sha256_hex(data), sha256=row.digest, length=row.length)
                bundle.verify_length_and_hashes(home.artifacts.get(row.digest))
                found.append(f"v{row.version}")
        home.close()
        return " ".join(found) or "nothing"

    def signed(self, role: str) -> int:
        """The version of a role's metadata that is in force."""
        folder = self.path / "tuf" / "metadata"
        timestamp = json.loads((folder / "timestamp.json").read_bytes())["signed"]
        return int(timestamp["version"] if role == "timestamp" else timestamp["meta"]["snapshot.json"]["version"])

    # What the database says -------------------------------------------------------------------------------------------

    def asks(self, question: Callable[[Any], Any]) -> Any:
        """What `question` finds in the database, which holds, as its audit chain does."""
        home = Home.at(self.path)
        try:
            with home.database.read() as session:
                if session.execute(text("PRAGMA integrity_check")).scalar() != "ok":
                    raise RowError("the database does not hold")
                audit.verify(session)
                return question(session)
        finally:
            home.close()

    def versions(self) -> list[ModelVersion]:
        """Every registered version."""
        found: list[ModelVersion] = self.asks(lambda s: list(s.scalars(select(ModelVersion).order_by("version"))))
        return found

    def state(self, version: int) -> str:
        """What the database says of a version."""
        return str(self.asks(lambda s: versions.get(s, bundles.NAME, version).state))

    def champion(self) -> str:
        """The version that is champion."""
        return f"v{self.asks(lambda s: versions.aliased(s, bundles.NAME, 'champion'))}"

    def events(self, verb: str) -> int:
        """How many acts of that kind are audited."""
        query = select(func.count()).select_from(AuditEvent).where(AuditEvent.verb == verb)
        return int(self.asks(lambda s: s.scalar(query)))

    def rollout(self) -> str:
        """The status of every rollout."""
        return " ".join(self.asks(lambda s: list(s.scalars(select(RolloutRow.status))))) or "none"

    def told(self) -> str:
        """What each device is told, with the number of its assignment: `v2#1`; `–` where it is told nothing."""
        rows = {r.device: f"v{r.version}#{r.seq}" for r in self.asks(lambda s: list(s.scalars(select(AssignmentRow))))}
        return " ".join(rows.get(d, "–") for d in DEVICES)

    def follow(self) -> None:
        """Every device runs what it is told, and has reported so."""
        home = Home.at(self.path)
        with home.database.write() as session:
            for row in session.scalars(select(AssignmentRow)):
                device = session.get(Device, row.device)
                assert device is not None
                _reports(device, row.model, row.version, row.digest)
        home.close()

    # What is left -----------------------------------------------------------------------------------------------------

    def names(self) -> set[str]:
        """Every file of the home, but for those that come and go with the database."""
        found = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()}
        return found - {"lightship.db-wal", "lightship.db-shm", "lightship.db-journal"}


class _Folder(FetcherInterface):
    """Reads where a web server would."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self._root / url.removeprefix("tuf://")
        if not path.is_file():
            message = f"no {url}"
            raise DownloadHTTPError(message, 404)
        return iter([path.read_bytes()])


# What homes are like to begin with ------------------------------------------------------------------------------------


def template(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """A home that is made once and copied often."""
    path = folder / f"home-{name}"
    with _MAKING:
        if not path.exists():
            draft = folder / f"home-{name}.draft"
            make(draft)
            draft.rename(path)
    return path


def two_versions(path: Path) -> None:
    """Version 1 is released, version 2 is registered."""
    home = Home.create(path)
    for version in (1, 2):
        _register(home, version)
    release.release(home, f"{bundles.NAME}@1", actor=ACTOR)
    home.close()


def two_releases(path: Path) -> None:
    """Both are released; three devices run version 1, the champion, and were told nothing yet."""
    two_versions(path)
    home = Home.at(path)
    release.release(home, f"{bundles.NAME}@2", actor=ACTOR)
    with home.database.write() as session:
        versions.set_alias(session, bundles.NAME, "champion", 1, actor=ACTOR)
        first = versions.get(session, bundles.NAME, 1)
        now = audit.now_ms()
        for device in DEVICES:
            row = Device(
                id=device, tenant="default", group="presses", labels={}, state="active", spki="0" * 64,
                cert_serial="1", cert_not_after=now + 86_400_000, enrolled_at=now, health={}, degraded=[],
            )  # fmt: skip
            _reports(row, first.model, first.version, first.digest)
            session.add(row)
    home.close()


def a_rollout(path: Path) -> None:
    """The same, and a rollout of version 2 has begun: two devices first, then the third, with no gate between."""
    two_releases(path)
    home = Home.at(path)
    with home.database.write() as session:
        selector = rollouts.Selector()
        waves = (WaveSpec(name="first", count=2, gate=False), WaveSpec(name="rest", gate=False))
        rules = Rules(offline_after=1e9, device_timeout=1e9)
        plan = rollouts.make_plan(
            session, model=bundles.NAME, version=2, selector=selector, waves=waves, rules=rules
        )  # fmt: skip
        rollouts.create(session, plan, selector=selector, rollout=ROLLOUT, actor=ACTOR)
    home.close()


def _register(home: Home, version: int) -> None:
    data = bundles.build(version)
    now = audit.now_ms()
    run = Run(
        id=secrets.token_hex(6), kind="train", model=bundles.NAME, status="finished", dataset_digest="0" * 64,
        recipe={}, recipe_digest="", environment={}, environment_digest="", code_revision="", seeds=[], metrics={},
        gate={}, parity={}, started_at=now, ended_at=now,
    )  # fmt: skip
    with home.database.write() as session:
        session.add(run)
        session.flush()
        row = ModelVersion(
            model=bundles.NAME, version=version, run_id=run.id, state="registered", digest=home.artifacts.put(data),
            length=len(data), metrics={}, created_at=now, released_at=None,
        )  # fmt: skip
        session.add(row)


def _reports(device: Device, model: str, version: int, digest: str) -> None:
    device.last_seen, device.phase = audit.now_ms(), "idle"
    device.running = [{"model": model, "version": version, "digest": digest}]
    device.running_model, device.running_version, device.running_digest = model, version, digest
