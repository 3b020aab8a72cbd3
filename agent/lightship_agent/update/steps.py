"""Update: the carrying out of one action of the state machine.

Rules:
* it does what it is told and raises what went wrong; what follows is the machine's to decide;
* before anything is transferred, and before anything is installed, the gate is asked; what was carried here by hand is
  not asked whether this is the hour or the network for it, and still somebody on site may object;
* nothing here touches the model that serves, except the swap and the restore.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Protocol

import msgspec

from lightship_agent.contract.bundle import Bundle, read_bundle
from lightship_agent.contract.codes import LightshipError, UpdateError
from lightship_agent.fail_points import fail_point
from lightship_agent.link.client import ControlPlane
from lightship_agent.runtime.probe import probe

from . import machine as m
from .companions import BesideHost
from .fetch import Source, Ways, fetch
from .gate import Gate
from .store import BundleStore

log = logging.getLogger(__name__)


class Host(BesideHost, Protocol):
    """What the updater needs of the rest of the agent."""

    def serve(self, bundle: Bundle) -> None:
        """Load the bundle and serve it from now on; raise LightshipError and change nothing otherwise."""

    def settle(self, keep: Collection[str]) -> None:
        """An update came to its end: of what is in memory and does not serve, only these digests may stay."""

    def serve_nothing(self) -> None:
        """Stop serving: there is no model to go back to."""


class Timing(msgspec.Struct, frozen=True):
    """Durations in seconds."""

    poll: float
    soak: float
    reach: float


class Delivery(msgspec.Struct, frozen=True):
    """How the bundle that is wanted now may come here."""

    source: Source
    ways: Ways
    gated: bool  # whether hours and networks matter


class Steps:
    """Carries actions out, one at a time."""

    def __init__(
        self,
        host: Host,
        store: BundleStore,
        plane: ControlPlane,
        timing: Timing,
        gate: Gate,
        stop: threading.Event,
    ) -> None:
        """`stop` ends what takes long."""
        self._host = host
        self._store = store
        self._plane = plane
        self._timing = timing
        self._gate = gate
        self._stop = stop
        self.delivery: Delivery | None = None
        self.beside: Callable[[], tuple[str, ...]] = tuple  # digests that stay though the machine knows nothing of them

    def carry_out(self, action: m.Action, state: m.UpdateState) -> m.Event | None:
        """Do it; the event that follows, if any.

        Raises:
            LightshipError: whatever stood in the way.
            OSError: what the disk said.
        """
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
                self._restore(target, state.previous)
                self._host.settle(m.fit(state))
                return None
            case m.CollectGarbage(keep):
                self._host.settle(m.fit(state))
                self._store.collect_garbage((*keep, *self.beside()))
                return None
            case m.Report():
                self._host.report(action)
                return None
        return m.Advanced()

    def _fetch(self, target: m.Target) -> None:
        assert self.delivery is not None, "a bundle is fetched only for an assignment that was just verified"
        delivery = self.delivery

        def allowed() -> None:
            if delivery.gated:
                self._gate.check("download")

        fetch(self._store, delivery.source, target, delivery.ways, allowed)

    def _try(self, target: m.Target) -> None:
        self._gate.check("veto" if target.offline else "install")
        bundle = self._bundle(target)
        if (bundle.manifest.model, bundle.manifest.version) != (target.model, target.version):
            raise UpdateError("update.swap", "The bundle's manifest names another model or version than its release.")
        self._host.check_compatible(bundle)
        fail_point("probing")
        probe(self._store.path(target.sha256), bundle.manifest.requires, allowed=self._host.allowed)

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

    def _restore(self, target: m.Target | None, previous: m.Target | None) -> None:
        fail_point("restoring")
        if target is None:
            self._host.serve_nothing()
            return
        for one in (target, previous):
            if one is None:
                continue
            try:
                self._host.serve(self._bundle(one))
            except LightshipError as e:
                log.exception("restore: %s", e.code)
            else:
                return
        # Neither can be read: what was just found wanting must not go on answering in their place.
        self._host.serve_nothing()

    def _bundle(self, target: m.Target) -> Bundle:
        data = self._store.read(target.sha256)
        if data is None:
            raise UpdateError("update.swap", f"Bundle {target.sha256[:12]} is not in the store, or was altered there.")
        return read_bundle(data)
