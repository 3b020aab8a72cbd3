"""Serving: a model's place in the data plane, its counters, and the bound on requests that are inside at once."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final

import msgspec
import numpy as np

from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.latency import CELLS, EDGES
from lightship_agent.contract.messages import MAX_CODES
from lightship_agent.runtime.model import LoadedModel

from .hot import HotModel

_RECENT: Final = 512  # latencies kept per model
_RETRY: Final = "Try again after the time in Retry-After."


def most_frequent(errors: Mapping[str, int]) -> dict[str, int]:
    """As many codes as a report may tell apart."""
    return dict(sorted(errors.items(), key=lambda item: (-item[1], item[0]))[:MAX_CODES])


class ModelStats(msgspec.Struct, frozen=True):
    """Counters of one resident model since it was installed."""

    model: LoadedModel
    requests: int  # answered
    rows: int  # predicted
    failures: int  # requests that ended in serving.runtime
    errors: Mapping[str, int]  # refused or failed requests by code
    seconds: float  # spent in answered requests
    p50_ms: float  # of recent requests
    p95_ms: float
    used: float  # monotonic seconds: when it was last asked, or installed
    latencies: tuple[int, ...] = ()  # answered requests by cell of contract.latency


class Counters:
    """What is counted of a model."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self._lock = threading.Lock()
        self._requests = self._rows = self._failures = 0
        self._seconds = 0.0
        self._used = time.monotonic()
        self._errors: Counter[str] = Counter()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._cells = [0] * CELLS

    def answered(self, rows: int, seconds: float, requests: int = 1) -> None:
        """Count requests that were answered, together where they are more than one."""
        with self._lock:
            self._requests += requests
            self._rows += rows
            self._seconds += seconds
            self._used = time.monotonic()
            if requests == 1:
                self._cells[bisect_left(EDGES, seconds)] += 1
                self._recent.append(seconds)
            else:
                self._cells[bisect_left(EDGES, seconds / requests)] += requests
                self._recent.extend([seconds / requests] * requests)

    def failed(self, code: str) -> None:
        """Count a request that was refused or failed."""
        with self._lock:
            self._errors[code] += 1
            self._failures += code == "serving.runtime"

    def of(self, model: LoadedModel) -> ModelStats:
        """The counters as they are now."""
        with self._lock:
            recent, cells = list(self._recent), tuple(self._cells)
            requests, rows, failures = self._requests, self._rows, self._failures
            seconds, used, errors = self._seconds, self._used, dict(self._errors)
        p50, p95 = (np.percentile(recent, (50, 95)) * 1_000).tolist() if recent else (0.0, 0.0)
        return ModelStats(model, requests, rows, failures, errors, seconds, p50, p95, used, cells)


class Slot(msgspec.Struct, eq=False):
    """A resident model. Model and `watched` never change: whoever found the slot finishes with what it found."""

    model: LoadedModel
    watched: bool = True  # whether the observer is told of its answers
    counters: Counters = msgspec.field(default_factory=Counters)
    hot: HotModel | None = None

    def aside(self) -> Slot:
        """The same model and counters, once another version serves under the name."""
        return Slot(self.model, watched=False, counters=self.counters)

    def stats(self) -> ModelStats:
        """Its counters."""
        return self.counters.of(self.model)


class Admission:
    """A bound on requests that are inside at once: `with plane.admission: …`.

    Raises:
        ServingError: serving.overloaded on entry beyond the bound.
    """

    def __init__(self, limit: int, count_error: Callable[[str], None]) -> None:
        self._limit = limit
        self._inside = 0
        self._lock = threading.Lock()
        self._count_error = count_error

    @property
    def inside(self) -> int:
        """Requests that are being answered."""
        return self._inside

    def __enter__(self) -> None:
        with self._lock:
            if self._inside < self._limit:
                self._inside += 1
                return
        self._count_error("serving.overloaded")
        message = f"{self._limit} requests are being answered already."
        raise ServingError("serving.overloaded", message, remedy=_RETRY)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1
