"""Update: the shell that has companions run beside what serves, as `beside` decides.

    <state>/beside.json    which companions are wanted, which were tried, which are under trial, and penalties

Rules:
* it acts in the updater's thread, while the machine of what serves is at rest, and never touches that;
* state is made durable before anything that might kill this process is begun; where it can't be, nothing is begun;
* a companion that fails is reported with its digest and a code, once per code, and what serves goes on;
* after a restart what ran runs again from disk, without a network, and is under trial again for a while;
* a state that can't be read is no state: what is wanted comes with the next assignment.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from lightship_agent.contract.assignment import Beside
from lightship_agent.contract.bundle import Bundle, read_bundle
from lightship_agent.contract.codes import LightshipError, StorageError, UpdateError
from lightship_agent.contract.messages import BESIDE_STEPS
from lightship_agent.fail_points import fail_point
from lightship_agent.files import storage_error, write_durably
from lightship_agent.runtime.probe import probe
from lightship_agent.runtime.session import Allowed

from . import beside as b
from . import machine as m
from .check import CheckedBeside
from .fetch import Source, Ways, fetch
from .gate import DeferredError, Gate, Kind
from .store import BundleStore

log = logging.getLogger(__name__)

FILE: Final = "beside.json"
#: Steps as they are reported; the control plane knows by their beginning that they are not those of what serves.
UP, GONE, FAILED, WAITING = (f"{BESIDE_STEPS}{step}" for step in ("up", "gone", "failed", "waiting"))


class BesideHost(Protocol):
    """What companions need of the rest of the agent."""

    @property
    def allowed(self) -> Allowed:
        """What this device allows of a manifest's wishes for its session."""

    def check_compatible(self, bundle: Bundle) -> None:
        """Raise BundleError (bundle.incompatible) if this device can't run it."""

    def stand_beside(self, beside: Beside, bundle: Callable[[], Bundle]) -> None:
        """Have the bundle run beside what serves, or change how it does.

        Raises:
            UpdateError: update.beside, update.swap; then nothing has changed.
            LightshipError: what loading it met.
        """

    def step_aside(self, experiment: str) -> None:
        """Have it run no longer."""

    def failures(self, digest: str) -> int:
        """Server errors while serving that digest."""

    def report(self, action: m.Report) -> None:
        """Queue a step for the control plane."""


class _Look(msgspec.Struct):
    """What one assignment brought: where the bundles of companions may come from."""

    ways: dict[str, CheckedBeside] = msgspec.field(default_factory=dict)
    source: Source | None = None
    gated: bool = True
    refused: set[str] = msgspec.field(default_factory=set)


class Companions:
    """What runs beside the model that serves."""

    def __init__(
        self, state_dir: Path, store: BundleStore, host: BesideHost, gate: Gate, soak: float, now: Callable[[], float]
    ) -> None:
        """Read the durable state; `recover` begins.

        Args:
            state_dir: holds the file.
            store: of bundles, shared with what serves.
            host: the rest of the agent.
            gate: asked before a download and before a trial.
            soak: seconds that a companion is under trial once it runs.
            now: Unix seconds.
        """
        self._path = state_dir / FILE
        self._store, self._host, self._gate, self._soak, self._now = store, host, gate, soak, now
        self.state = self._load_state()
        self._up: dict[str, Beside] = {}
        self._since: dict[str, float] = {}  # monotonic seconds, of those under trial
        self._said: dict[str, str] = {}  # the last step and code by experiment
        self._serving = ""
        #: What may not be done now, as the last look found, and until when in Unix seconds if that is known.
        self.deferred: tuple[Kind, float | None] | None = None

    @property
    def up(self) -> tuple[Beside, ...]:
        """What runs beside, now."""
        return tuple(self._up.values())

    @property
    def kept(self) -> tuple[str, ...]:
        """Digests that are wanted: nobody removes them but for want of room."""
        return tuple(x.sha256 for x in self.state.wanted)

    def view(self) -> list[dict[str, object]]:
        """Every companion that is wanted, and how it stands with it: for people."""
        return [
            {
                **{name: getattr(x, name) for name in ("experiment", "model", "version", "mode", "share")},
                "digest": x.sha256,
                "state": self._standing(x),
                "code": self._said.get(x.experiment, "").partition(" ")[2],
            }
            for x in self.state.wanted
        ]

    def _standing(self, beside: Beside) -> str:
        if beside.experiment in self._up:
            return "up"
        return "serving" if beside.sha256 == self._serving else "out"

    def settled_until(self) -> float:
        """0 while something wanted does not run and should be tried again; else when to look again, in Unix seconds."""
        ends = b.open_until(self.state, self._seen(_Look()), self._now())
        return 0.0 if ends is None else ends

    def recover(self, serving: str) -> None:
        """After a start: have run what ran, from disk."""
        cut = b.started(self.state, self._now())
        for experiment in self.state.trying:
            log.error("beside: experiment %s was cut while it was tried", experiment)
        self._act(serving, _Look(), cut)

    def follow(
        self, wanted: tuple[CheckedBeside, ...], seq: int, serving: str, source: Source | None, *, gated: bool
    ) -> None:
        """Bring what runs beside to what an accepted assignment says. Raises nothing: what fails is reported.

        Args:
            wanted: the companions it names, each found released or refused.
            seq: of the assignment.
            serving: the digest of what serves; "" for nothing.
            source: where bundles come from; None where they can't be had.
            gated: whether hours and networks matter.
        """
        look = _Look({c.beside.experiment: c for c in wanted if not c.code}, source, gated)
        state = b.wants(self.state, tuple(c.beside for c in wanted), seq)
        for refused in (c for c in wanted if c.code):
            experiment = refused.beside.experiment
            look.refused.add(experiment)
            state = b.failed(state, experiment, refused.code, self._now())
            self._say(refused.beside, FAILED, refused.code, refused.message)
        self._act(serving, look, state)

    def settle(self) -> None:
        """Free from trial what has run long enough; take out what has failed meanwhile."""
        for experiment, since in list(self._since.items()):
            beside = self._up[experiment]
            if self._host.failures(beside.sha256):
                error = UpdateError("update.soak", "Requests failed while it was on trial.")
                self._fail(beside, error, _Look())
                self._take_out(beside)
            elif time.monotonic() - since >= self._soak:
                self._since.pop(experiment)
                self._keep(b.settled(self.state, experiment))

    def stop(self) -> None:
        """A stop in good order: what is under trial is not to blame for it."""
        self._keep(b.stopped(self.state))

    # One thing after the other ------------------------------------------------------------------------------------

    def _act(self, serving: str, look: _Look, state: b.BesideState) -> None:
        self._serving, self.deferred = serving, None
        self._keep(state)
        while (action := b.next_action(self.state, self._seen(look), self._now())) is not None:
            try:
                self._carry_out(action, look)
            except DeferredError as e:
                self.deferred = ("download" if isinstance(action, b.Fetch) else "install", e.until)
                self._fail(action.beside, e, look)
            except LightshipError as e:
                self._fail(action.beside, e, look)
            except OSError as e:
                self._fail(action.beside, storage_error(e, self._path.parent), look)
            except Exception as e:  # whatever it was, what serves goes on, and so do the other companions
                log.exception("beside: unexpected error")
                unexpected = UpdateError("update.beside", f"Unexpected: {type(e).__name__}: {e}.")
                self._fail(action.beside, unexpected, look)

    def _carry_out(self, action: b.Action, look: _Look) -> None:
        beside = action.beside
        match action:
            case b.Fetch():
                self._fetch(beside, look)
            case b.Try():
                self._gate.check("install" if look.gated else "veto")
                bundle = self._bundle(beside)
                self._host.check_compatible(bundle)
                self._save(b.begun(self.state, beside.experiment))
                fail_point("probing")
                probe(self._store.path(beside.sha256), bundle.manifest.requires, allowed=self._host.allowed)
                self._save(b.proven(self.state, beside))
            case b.Load():
                self._save(b.begun(self.state, beside.experiment))
                fail_point("standing-beside")
                self._host.stand_beside(beside, lambda: self._bundle(beside))
                self._up[beside.experiment] = beside
                self._since[beside.experiment] = time.monotonic()
                self._say(beside, UP)
            case b.Drop():
                self._take_out(beside)
                if all(w.experiment != beside.experiment for w in self.state.wanted):
                    self._say(beside, GONE)
                    self._said.pop(beside.experiment, None)

    def _fetch(self, beside: Beside, look: _Look) -> None:
        checked = look.ways[beside.experiment]
        assert checked.transport is not None
        assert look.source is not None

        def allowed() -> None:
            if look.gated:
                self._gate.check("download")

        keep = (*self.kept, self._serving)
        ways = Ways(checked.transport, checked.delta, self._serving, keep)
        fetch(self._store, look.source, b.target_of(beside, self.state.seq), ways, allowed)

    def _take_out(self, beside: Beside) -> None:
        self._up.pop(beside.experiment, None)
        self._since.pop(beside.experiment, None)
        self._host.step_aside(beside.experiment)

    def _fail(self, beside: Beside, e: LightshipError, look: _Look) -> None:
        log.warning("beside: %s@%d: %s: %s", beside.model, beside.version, e.code, e)
        look.refused.add(beside.experiment)
        self._keep(b.failed(self.state, beside.experiment, e.code, self._now()))
        self._say(beside, WAITING if m.blameless(e.code) else FAILED, e.code, str(e)[:1_000])

    def _say(self, beside: Beside, step: str, code: str = "", detail: str = "") -> None:
        if self._said.get(beside.experiment) != f"{step} {code}":
            self._said[beside.experiment] = f"{step} {code}"
            self._host.report(m.Report(b.target_of(beside, self.state.seq), step, code, detail))

    def _seen(self, look: _Look) -> b.Seen:
        return b.Seen(
            serving=self._serving,
            held=frozenset(x.sha256 for x in self.state.wanted if self._store.path(x.sha256).exists()),
            up=self._up,
            within_reach=frozenset(look.ways) if look.source is not None else frozenset(),
            refused=frozenset(look.refused),
        )

    def _bundle(self, beside: Beside) -> Bundle:
        data = self._store.read(beside.sha256)
        if data is None:
            with contextlib.suppress(OSError):  # what is altered counts as absent, and is fetched anew
                self._store.path(beside.sha256).unlink(missing_ok=True)
            message = f"Bundle {beside.sha256[:12]} is not in the store, or was altered there."
            raise UpdateError("update.beside", message)
        bundle = read_bundle(data)
        if (bundle.manifest.model, bundle.manifest.version) != (beside.model, beside.version):
            message = "The bundle's manifest names another model or version than its release."
            raise UpdateError("update.beside", message)
        return bundle

    # The file -----------------------------------------------------------------------------------------------------

    def _load_state(self) -> b.BesideState:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=b.BesideState)
        except FileNotFoundError:
            return b.BesideState()
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as e:
            log.warning("storage.corrupt: %s is set aside: %s.", self._path, e)
            with contextlib.suppress(OSError):  # on a read-only disk it stays where it is
                self._path.rename(self._path.with_name(f"{self._path.name}.broken"))
            return b.BesideState()

    def _save(self, state: b.BesideState) -> None:
        """Make `state` durable.

        Raises:
            StorageError: storage.full, storage.unwritable; then it is not the state.
        """
        if state != self.state:
            write_durably(self._path, msgspec.json.encode(state))
            self.state = state

    def _keep(self, state: b.BesideState) -> None:
        """The same for what is so, whether it can be made durable or not."""
        try:
            self._save(state)
        except StorageError as e:
            log.warning("beside: %s: %s", e.code, e)
            self.state = state
