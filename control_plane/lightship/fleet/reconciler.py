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
from typing import Final

from sqlalchemy import select

from lightship.home import Home
from lightship.monitoring.drift import DriftSettings
from lightship.monitoring.policy import PolicySettings
from lightship.monitoring.retrain import RetrainRunner
from lightship.monitoring.watch import Watch, watch_model
from lightship.registry.bundles import BundleCache
from lightship.settings import Settings
from lightship.storage.audit import now_ms
from lightship.storage.models import Device
from lightship_agent.contract.codes import LightshipError

from . import lease, rollouts

log = logging.getLogger(__name__)
RENEW_SECONDS: Final = 600.0
Poke = Callable[[tuple[str, ...]], None]


def drift_settings(settings: Settings) -> DriftSettings:
    """The drift decider's settings."""
    return DriftSettings(
        budget=settings.drift_budget,
        horizon_windows=settings.drift_horizon_windows,
        effect_floor=settings.drift_floor,
        levels=settings.drift_levels,
        min_rows=settings.drift_min_rows,
    )


class Reconciler:
    """Ticks in a thread."""

    def __init__(self, home: Home, settings: Settings, poke: Poke) -> None:
        """Prepare; `start` begins to tick."""
        self._home = home
        self._settings = settings
        self._poke = poke
        self._holder = secrets.token_hex(6)
        self._bundles = BundleCache(home.artifacts)
        policy = PolicySettings(propose=settings.retrain != "off")
        self._watch = Watch(bundle_of=self._bundles, drift=drift_settings(settings), policy=policy)
        self._retrain = RetrainRunner(home, settings)
        self._stop = threading.Event()
        self._renewed = 0.0
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
            lease.release(session, "reconciler", self._holder)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.tick()
            except LightshipError as e:
                log.warning("reconciler: %s: %s", e.code, e)
            except Exception:  # whatever one tick met, the next one must come
                log.exception("reconciler: tick failed")
            self._stop.wait(self._settings.reconcile_seconds)

    def tick(self) -> bool:
        """Do everything once; False while another replica holds the lease."""
        with self._home.database.write() as session:
            if lease.acquire(session, "reconciler", self._holder, now_ms()) is None:
                return False
        self._renew_metadata()
        self._watch_models()
        self._advance_rollouts()
        if self._settings.retrain == "auto":
            self._retrain.tick()
        self.ticks += 1
        return True

    def _renew_metadata(self) -> None:
        if time.monotonic() - self._renewed < RENEW_SECONDS and self._renewed:
            return
        renewed = self._home.releases.renew(datetime.now(UTC))
        self._renewed = time.monotonic()
        if renewed:
            log.info("release metadata re-signed: %s", ", ".join(renewed))

    def _watch_models(self) -> None:
        with self._home.database.read() as session:
            models = list(session.scalars(select(Device.running_model).where(Device.running_model != "").distinct()))
        for model in models:
            watch_model(self._home.database, self._watch, model)

    def _advance_rollouts(self) -> None:
        with self._home.database.read() as session:
            ids = [row.id for row in rollouts.active(session)]
        for rollout in ids:
            try:
                with self._home.database.write() as session:
                    row = rollouts.get(session, rollout)
                    poked = rollouts.advance(session, row, self._home.keys, self._bundles)
            except LightshipError as e:
                log.warning("rollout %s: %s: %s", rollout, e.code, e)
                continue
            self._poke(poked)
        with self._home.database.write() as session:
            newcomers = rollouts.default_assignments(session, self._home.keys)
        self._poke(newcomers)
