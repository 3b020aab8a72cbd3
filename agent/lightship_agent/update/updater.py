"""Update: the shell that carries out what the state machine decides.

Rules:
* one thread; state is made durable before its actions run; every error becomes an event with a code;
* a step forward that can't be made durable is not taken; a step back is, for the disk then still holds a state from
  which a restart leads back too;
* fail points (`LIGHTSHIP_FAIL_POINT=<name>`) kill this process at a named instruction, for the crash tests;
* nothing here touches the model that serves, except the swap and the restore it is told to do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lightship_agent.contract.assignment import check_assignment
from lightship_agent.contract.bundle import Bundle, read_bundle
from lightship_agent.contract.codes import LightshipError, LinkError, StorageError, UpdateError
from lightship_agent.contract.device_api import Paths
from lightship_agent.contract.transport import TRANSPORT_SUFFIX, unpack_transport
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.fail_points import fail_point
from lightship_agent.files import storage_error
from lightship_agent.link.client import ControlPlane
from lightship_agent.link.identity import Identity
from lightship_agent.runtime.probe import probe

from . import machine as m
from .store import BundleStore, StateFile

log = logging.getLogger(__name__)


class Host(Protocol):
    """What the updater needs of the rest of the agent."""

    def check_compatible(self, bundle: Bundle) -> None:
        """Raise BundleError (bundle.incompatible) if this device can't run it."""

    def serve(self, bundle: Bundle) -> None:
        """Load the bundle and serve it from now on; raise UpdateError (update.swap) and change nothing otherwise."""

    def serve_nothing(self) -> None:
        """Stop serving: there is no model to go back to."""

    def failures(self, digest: str) -> int:
        """Server errors while serving that digest."""

    def report(self, action: m.Report) -> None:
        """Queue an update step for the control plane."""


@dataclass(frozen=True)
class Timing:
    """Durations in seconds."""

    poll: float
    soak: float
    reach: float


class Updater:
    """Looks for assignments, and brings this device to what they say."""

    def __init__(self, state_dir: Path, identity: Identity, plane: ControlPlane, host: Host, timing: Timing) -> None:
        """Read the durable state; `start` begins to act."""
        self._dir = state_dir
        self._identity = identity
        self._plane = plane
        self._host = host
        self._timing = timing
        self._file = StateFile(state_dir)
        self.store = BundleStore(state_dir)
        self.state = self._file.load()
        self._etag = ""  # of the last envelope that is settled,
        self._etag_until = 0.0  # and until when it is, in Unix seconds
        self._stop = threading.Event()
        self._poke = threading.Event()
        self._thread = threading.Thread(target=self._run, name="updater", daemon=True)
        self.on_acknowledged: Callable[[str, int], None] = lambda _epoch, _seq: None
        self.trust_code = ""  # why updates stand still, if they do
        self.reached_at = 0.0  # Unix seconds of the last answer of the control plane

    def recover(self) -> None:
        """Settle what a restart cut short, and serve what was committed. Call before `start`."""
        wanted = [t.sha256 for t in (self.state.current, self.state.previous) if t is not None]
        absent = tuple(digest for digest in wanted if not self.store.holds(digest))
        if absent:
            log.error("update: the store no longer holds %s", ", ".join(d[:12] for d in absent))
        self._apply(m.Started(absent))

    def start(self) -> None:
        """Begin to look for assignments."""
        self._thread.start()

    def stop(self) -> None:
        """Stop between two steps."""
        self._stop.set()
        self._poke.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def poke(self) -> None:
        """Look for an assignment now."""
        self._poke.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._look()
            except LightshipError as e:
                self._standstill(e)
            except Exception:  # the agent must go on serving and looking, whatever went wrong here
                log.exception("updater: unexpected error")
            self._poke.wait(self._timing.poll)
            self._poke.clear()

    def _standstill(self, e: LightshipError) -> None:
        if e.code != self.trust_code:
            log.warning("updater: %s: %s", e.code, e)
        self.trust_code = e.code

    def _look(self) -> None:
        desired = self._plane.desired(self._etag if time.time() < self._etag_until else "")
        self.reached_at = time.time()
        self.on_acknowledged(desired.acked_epoch, desired.acked_seq)
        if desired.envelope is None:
            # Nothing is wanted of us, or what is settled: whatever stood in the way before, nothing does now.
            self.trust_code = ""
            return
        from .releases import Releases  # heavy, and only needed when there is something new

        releases = Releases(
            self._dir / "tuf", self._plane.http, f"{self._plane.server}{Paths.METADATA}", self._identity.tuf_root
        )
        assignment = releases.open_assignment(desired.envelope)
        check_assignment(assignment, device=self._identity.device, floor=self.state.floor, now=time.time())
        releases.check_released(assignment)
        self.trust_code = ""
        self._releases = releases
        self._apply(m.Assigned(m.Target.of(assignment)))
        # Only what is settled need not be sent again: a failed try comes back with the next look.
        self._etag, self._etag_until = sha256_hex(desired.envelope)[:32], self._settled_until(assignment.sha256)

    def _settled_until(self, digest: str) -> float:
        if self.state.current is not None and self.state.current.sha256 == digest:
            return float("inf")
        return self.state.penalties.get(digest, m.Penalty()).until

    def _apply(self, event: m.Event) -> None:
        """Run the machine until it rests: durable state first, then its actions, whose outcome is the next event."""
        pending: m.Event | None = event
        while pending is not None:
            before = self.state
            after, actions = m.step(before, pending, time.time())
            try:
                self._save(before, after)
            except StorageError as e:
                if not isinstance(pending, m.Failed | m.Started):
                    if before.candidate is None:
                        raise
                    pending = m.Failed(e.code, str(e)[:1_000])
                    continue
                log.warning("update: %s: %s", e.code, e)
            self.state = after
            pending = None
            for action in actions:
                pending = self._perform(action) or pending

    def _save(self, before: m.UpdateState, after: m.UpdateState) -> None:
        if after != before:
            fail_point(f"before-save-{after.phase}")
            self._file.save(after)
            fail_point(f"after-save-{after.phase}")

    def _perform(self, action: m.Action) -> m.Event | None:
        """Carry out one action; what follows from it, if anything."""
        try:
            return self._carry_out(action)
        except LightshipError as e:
            error = e
        except OSError as e:
            error = storage_error(e, self._dir)
        except Exception as e:  # whatever it was: an attempt that nobody ends would stop all updates for good
            log.exception("update: unexpected error")
            error = UpdateError("update.swap", f"Unexpected: {type(e).__name__}: {e}.")
        log.warning("update: %s: %s", error.code, error)
        return m.Failed(error.code, str(error)[:1_000])

    def _carry_out(self, action: m.Action) -> m.Event | None:
        match action:
            case m.Fetch(target):
                self._fetch(target)
            case m.Try(target):
                self._try(target)
            case m.Swap(target):
                self._swap(target)
            case m.Reach():
                self._reach()
            case m.Restore(target):
                self._restore(target)
                return None
            case m.CollectGarbage(keep):
                self.store.collect_garbage(keep)
                return None
            case m.Report():
                self._host.report(action)
                return None
        return m.Advanced()

    def _fetch(self, target: m.Target) -> None:
        if self.store.holds(target.sha256):
            return
        from .download import download

        fail_point("fetching")
        packed_file = self._releases.find(target.path + TRANSPORT_SUFFIX)
        part = self.store.staging / f"{target.sha256}.part"
        url = f"{self._plane.server}{Paths.TARGETS}{packed_file.url_path}"
        packed = download(self._plane.http, url, part, packed_file.length, pause=self._pause)
        try:
            fail_point("unpacking")
            data = unpack_transport(
                packed, packed_sha256=packed_file.sha256, sha256=target.sha256, length=target.length
            )
            read_bundle(data)
            fail_point("before-store")
            self.store.put(target.sha256, data)
        finally:
            part.unlink(missing_ok=True)

    def _try(self, target: m.Target) -> None:
        bundle = self._bundle(target)
        if (bundle.manifest.model, bundle.manifest.version) != (target.model, target.version):
            raise UpdateError("update.swap", "The bundle's manifest names another model or version than its release.")
        self._host.check_compatible(bundle)
        fail_point("probing")
        probe(self.store.path(target.sha256), bundle.manifest.requires)

    def _swap(self, target: m.Target) -> None:
        bundle = self._bundle(target)
        self._host.serve(bundle)
        fail_point("soaking")
        end = time.monotonic() + self._timing.soak
        while time.monotonic() < end and not self._stop.wait(0.1):
            failures = self._host.failures(target.sha256)
            if failures:
                raise UpdateError("update.soak", f"{failures} requests failed while soaking.")
        if self._stop.is_set():
            raise UpdateError("update.interrupted", "The agent was stopped while soaking.")

    def _reach(self) -> None:
        fail_point("reaching")
        end = time.monotonic() + self._timing.reach
        while not self._plane.reachable():
            if self._stop.wait(1.0):
                raise UpdateError("update.interrupted", "The agent was stopped before the control plane was reached.")
            if time.monotonic() > end:
                message = f"The control plane did not answer within {self._timing.reach:.0f} s of the swap."
                raise UpdateError("update.server-unreachable", message)

    def _restore(self, target: m.Target | None) -> None:
        fail_point("restoring")
        if target is None:
            self._host.serve_nothing()
            return
        try:
            self._host.serve(self._bundle(target))
        except LightshipError as e:
            log.exception("restore: %s", e.code)
            previous = self.state.previous
            if previous is not None and previous.sha256 != target.sha256:
                self._host.serve(self._bundle(previous))

    def _bundle(self, target: m.Target) -> Bundle:
        data = self.store.read(target.sha256)
        if data is None:
            raise UpdateError("update.swap", f"Bundle {target.sha256[:12]} is not in the store, or was altered there.")
        return read_bundle(data)

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise LinkError("link.unreachable", "The agent is stopping.")
