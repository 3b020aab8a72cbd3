"""Monitoring: ingest workers as processes of their own, and what keeps the history in order.

Rules:
* a worker is `lightship ingest --worker N`, under a name that it keeps, so that what the broker holds for it is there
  after a restart; one that died is started again, soon, and then less soon;
* rollups and pruning are done in one place, by `lightship up`, a minute apart.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

from lightship.settings import Settings
from lightship.storage.audit import now_ms
from lightship_agent.contract.codes import LightshipError

from .history import DAY_MS, History, Keep, roll_up

log = logging.getLogger(__name__)

LONGEST_PAUSE: Final = 30.0
#: A worker that ran for so long is started again at once.
_STEADY_SECONDS: Final = 60.0
KEEP_SECONDS: Final = 60.0


class WorkerProcesses:
    """So many processes, for as long as we run."""

    def __init__(self, home: Path, count: int, log_level: str, log_format: str = "text") -> None:
        """Nothing runs yet."""
        self._command = [sys.executable, "-m", "lightship", "--home", str(home), "ingest"]
        self._logging = ["--log-level", log_level, "--log-format", log_format]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep_up, args=(n,), name=f"ingest-{n}", daemon=True) for n in range(count)
        ]

    def start(self) -> None:
        """Start them."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End them; what they have received is stored first."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=20)

    def _keep_up(self, number: int) -> None:
        pause = 0.5
        while not self._stop.is_set():
            began = time.monotonic()
            process = subprocess.Popen([*self._command, "--worker", str(number), *self._logging])
            while process.poll() is None and not self._stop.wait(0.2):
                pass
            if self._stop.is_set():
                _end(process)
                return
            pause = 0.5 if time.monotonic() - began > _STEADY_SECONDS else min(LONGEST_PAUSE, pause * 2)
            log.error("ingest worker %d ended with %s; again in %.1f s", number, process.returncode, pause)
            self._stop.wait(pause)


class HistoryKeeper:
    """Rolls up and prunes, once a minute."""

    def __init__(self, history: History, settings: Settings) -> None:
        """Nothing runs yet."""
        self._history = history
        self._keep = Keep(
            raw=int(settings.history_raw_days * DAY_MS),
            hourly=int(settings.history_hourly_days * DAY_MS),
            daily=int(settings.history_daily_days * DAY_MS),
            raw_bytes=int(settings.history_raw_mb * 1_000_000),
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def start(self) -> None:
        """Begin in the background."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.tick()
            except LightshipError as e:
                log.warning("history: %s: %s", e.code, e)
            except Exception:  # whatever it met, the rest of the control plane goes on
                log.exception("history: unexpected error")
            self._stop.wait(KEEP_SECONDS)

    def tick(self) -> None:
        """Roll up what is due, and drop what is too old."""
        now = now_ms()
        roll_up(self._history, now)
        self._history.prune(now, self._keep)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
