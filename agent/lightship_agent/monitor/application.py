"""Monitor: the application's own numbers, from whoever tells them to the next report.

Rules: they are kept in memory, and begin anew with the agent (`since` says when); a report is made only where something
was told since the last one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lightship_agent.contract.app_metrics import AppNumbers, AppSample, Registry
from lightship_agent.contract.messages import Application


class ApplicationNumbers:
    """Safe to use from several threads.

    Args:
        since: wall milliseconds of the agent's start.
    """

    def __init__(self, since: int) -> None:
        self._since = since
        self._registry = Registry()
        self._lock = threading.Lock()
        self._reported = self._registry.numbers

    def take(self, told: Sequence[AppSample]) -> None:
        """Count what was told, all of it.

        Raises:
            ServingError: serving.metric-name, serving.metric-kind, serving.metric-value, serving.metric-full; then
                nothing has changed.
        """
        with self._lock:
            self._registry.take(told)

    @property
    def numbers(self) -> AppNumbers:
        """As they are now."""
        with self._lock:
            return self._registry.numbers

    def collect(self, now_ms: int) -> list[Application]:
        """The report of them, if something was told since the last one."""
        numbers = self.numbers
        if numbers is self._reported:
            return []
        self._reported = numbers
        return [Application(s=1, t=now_ms, since=self._since, numbers=numbers)]
