"""Fleet: the reconciler, which brings what is towards what was decided.

Rules: one tick does everything once and can be repeated at any time; it runs under a lease, so that of several
replicas one works; an error in one rollout does not stop the others.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.home import Home
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.policy import PolicySettings
from lightship.monitoring.retrain import RetrainRunner
from lightship.monitoring.watch import Watch, watch_model
from lightship.monitoring.watch_common import watch_common
from lightship.registry.bundles import BundleCache
from lightship.settings import Settings
from lightship.storage import audit
from lightship.storage.audit import now_ms
from lightship.storage.models import Device
from lightship_agent.contract.codes import LightshipError

from . import asks, director, experiments, lease, rollouts
from .broker_guard import BrokerGuard

log = logging.getLogger(__name__)
RENEW_SECONDS: Final = 600.0
NOTE_SECONDS: Final = 3_600.0
LEASE: Final = "reconciler"
Poke = Callable[[tuple[str, ...]], None]


def drift_settings(settings: Settings) -> DriftSettings:
    """The drift decider's settings."""
    return DriftSettings(
        budget=settings.drift_budget,
        horizon_windows=settings.drift_horizon_windows,
        effect_floor=settings.drift_floor,
        common_floor=settings.drift_common_floor,
        levels=settings.drift_levels,
        min_rows=settings.drift_min_rows,
        exclude=tuple(name for n in settings.drift_exclude.split(",") if (name := n.strip())),
        warm_up=settings.drift_warm_up,
        baseline=settings.drift_baseline,
        segments=tuple(name for n in settings.drift_segments.split(",") if (name := n.strip())),
        season_weeks=settings.drift_season_weeks,
    )


class Reconciler:
    """Ticks in a thread."""

    def __init__(
        self,
        home: Home,
        settings: Settings,
        poke: Poke,
        guard: BrokerGuard | None = None,
        ask: asks.Send | None = None,
        look: Callable[[], object] = lambda: None,
    ) -> None:
        """Prepare; `start` begins to tick.

        Args:
            home: the home.
            settings: of the control plane.
            poke: tells devices to look for an assignment.
            guard: keeps the broker's idea of who may connect up to date.
            ask: brings commands to devices at once; without it they wait for the devices' polls.
            look: sees whether people are to be told of something.
        """
        self._ask = ask
        self._home = home
        self._settings = settings
        self._poke = poke
        self._guard = guard
        self._look = look
        self._holder = secrets.token_hex(6)
        self._bundles = BundleCache(home.artifacts)
        policy = PolicySettings(propose=settings.retrain != "off")
        self._watch = Watch(self._bundles, drift_settings(settings), policy, rollouts.take_back)
        self._retrain = RetrainRunner(home, settings)
        self._stop = threading.Event()
        self._renewed = self._noted = 0.0
        self._epoch: int | None = None
        self._director = ""  # the key that signed every assignment, as far as was looked
        self.ticks = 0
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    def start(self) -> None:
        """Begin to tick."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the tick under way and give the lease back."""
        self._stop.set()
        self._thread.join(timeout=15)
        self._retrain.stop()
        with self._home.database.write() as session:
            lease.release(session, LEASE, self._holder)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._guarded("reconciler", self.tick)
            self._stop.wait(self._settings.reconcile_seconds)

    def tick(self) -> bool:
        """Do everything once; False while another replica holds the lease."""
        if not self._ours():
            return False
        steps = (
            self._guard_broker,
            self._ask_devices,
            self._renew_metadata,
            self._note_head,
            self._watch_models,
            self._advance_rollouts,
            self._assign,
            self._experiment,
            self._run_retrain,
            self._alert,
        )
        for step in steps:
            self._guarded(step.__name__.strip("_"), step)
            # What took longer than the lease may be another's work by now.
            if not self._ours():
                return False
        self.ticks += 1
        return True

    def _ours(self) -> bool:
        """Take or renew the lease; False when another replica has it, or had it in between."""
        with self._home.database.write() as session:
            epoch = lease.acquire(session, LEASE, self._holder, now_ms())
        before, self._epoch = self._epoch, epoch
        return epoch is not None and before in (None, epoch)

    def _guarded(self, what: str, step: Callable[[], object]) -> None:
        """What one step, one model or one rollout meets does not stop the others."""
        try:
            step()
        except LightshipError as e:
            log.warning("%s: %s: %s", what, e.code, e)
        except Exception:  # whatever it is, the rest must be done
            log.exception("%s failed", what)

    def _guard_broker(self) -> None:
        if self._guard is not None:
            self._guard.tick()

    def _ask_devices(self) -> None:
        if self._ask is not None:
            with self._home.database.write() as session:
                asks.send(session, self._ask)

    def _renew_metadata(self) -> None:
        if self._renewed and time.monotonic() - self._renewed < RENEW_SECONDS:
            return
        self._renewed = time.monotonic()
        try:
            renewed = self._home.releases.renew(datetime.now(UTC))
            if renewed:
                log.info("release metadata re-signed: %s", ", ".join(renewed))
                with self._home.database.write() as session:
                    for role in renewed:
                        audit.append(session, actor=rollouts.ACTOR, verb="release.renew", subject=role)
        finally:
            # Loudly, whether it could be renewed or not: a list that expires unnoticed is the likeliest outage.
            for role_health in self._home.releases.health(datetime.now(UTC)):
                if role_health.state != "ok":
                    level = logging.WARNING if role_health.state == "due" else logging.ERROR
                    log.log(level, "release metadata: %s", role_health.sentence)

    def _note_head(self) -> None:
        """Say the audit log's head into the service's log, which lies elsewhere: so a cut at its end shows."""
        if self._noted and time.monotonic() - self._noted < NOTE_SECONDS:
            return
        self._noted = time.monotonic()
        with self._home.database.read() as session:
            log.info("the audit log's head is %s", audit.head(session))

    def _watch_models(self) -> None:
        with self._home.database.read() as session:
            models = list(session.scalars(select(Device.running_model).where(Device.running_model != "").distinct()))
        for model in models:
            self._guarded(f"monitoring of {model}", partial(self._watch_model, model))

    def _watch_model(self, model: str) -> None:
        if watch_model(self._home.database, self._watch, model):
            watch_common(self._home.database, self._watch, model)

    def _advance_rollouts(self) -> None:
        with self._home.database.read() as session:
            ids = [row.id for row in rollouts.active(session)]
        for rollout in ids:
            self._guarded(f"rollout {rollout}", partial(self._advance, rollout))

    def _advance(self, rollout: str) -> None:
        with self._home.database.write() as session:
            row = rollouts.get(session, rollout)
            poked = rollouts.advance(session, row, self._home.keys, self._bundles)
        self._poke(poked)

    def _assign(self) -> None:
        with self._home.database.write() as session:
            newcomers = rollouts.default_assignments(session, self._home.keys)
            director.renew(session, self._home.keys, actor=rollouts.ACTOR)
            resigned = self._after_rotation(session)
        self._poke((*newcomers, *resigned))

    def _experiment(self) -> None:
        with self._home.database.write() as session:
            poked = experiments.reconcile(session, self._home.keys)
        self._poke(poked)

    def _after_rotation(self, session: Session) -> tuple[str, ...]:
        """At the start, and whenever the director's key is another: sign anew what the old one signed."""
        key = self._home.keys.signer("director").public_key.keyid
        if key == self._director:
            return ()
        resigned = director.resign(session, self._home.keys, actor=rollouts.ACTOR)
        if not resigned:
            self._director = key
        return resigned

    def _alert(self) -> None:
        self._look()

    def _run_retrain(self) -> None:
        if self._settings.retrain == "auto":
            self._retrain.tick()
