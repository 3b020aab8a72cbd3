"""Client: the application's own numbers, counted in its program and told to the agent now and then.

    from lightship_agent import Metrics

    metrics = Metrics("unix:/run/lightship-agent/http.sock")
    parts = metrics.counter("parts_made")
    parts.add()

Rules:
* counting takes no I/O and never fails for want of an agent: what can't be told is kept, added up, and told later;
* names, kinds and edges are checked where a number is made, with the codes the agent would refuse it with;
* each growth is told once: what may have arrived is not told again.
"""

from __future__ import annotations

import logging
import math
import threading
from bisect import bisect_left
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from lightship_agent.contract.app_metrics import EDGES, MAX_METRICS, AppSample, Registry, check_name
from lightship_agent.contract.codes import LightshipError, LinkError, ServingError

from .sync import Client

log = logging.getLogger(__name__)

EVERY_SECONDS: Final = 10.0


class Counter:
    """Grows."""

    def __init__(self, name: str, lock: threading.Lock) -> None:
        self._name, self._lock = name, lock
        self._grown = 0.0

    def add(self, by: float = 1.0) -> None:
        """Grow by so much.

        Raises:
            ServingError: serving.metric-value for what is negative, or no number.
        """
        if not 0 <= by < math.inf:
            raise ServingError("serving.metric-value", f"{self._name}: a counter grows; found {by!r} to add.")
        with self._lock:
            self._grown += by

    def take(self) -> AppSample | None:
        """What was not told yet, which counts as told from now on."""
        grown, self._grown = self._grown, 0.0
        return AppSample(name=self._name, kind="counter", value=grown) if grown else None

    def give_back(self, told: AppSample) -> None:
        """It was not told after all."""
        self._grown += told.value or 0.0


class Gauge:
    """Is what it was last set to."""

    def __init__(self, name: str, lock: threading.Lock) -> None:
        self._name, self._lock = name, lock
        self._value: float | None = None  # that was not told yet

    def set(self, value: float) -> None:
        """It is this now.

        Raises:
            ServingError: serving.metric-value for what is no number.
        """
        if not math.isfinite(value):
            raise ServingError("serving.metric-value", f"{self._name}: expected a finite value, found {value!r}.")
        with self._lock:
            self._value = float(value)

    def take(self) -> AppSample | None:
        """What was not told yet, which counts as told from now on."""
        value, self._value = self._value, None
        return AppSample(name=self._name, kind="gauge", value=value) if value is not None else None

    def give_back(self, told: AppSample) -> None:
        """It was not told after all."""
        self._value = told.value if self._value is None else self._value


class Histogram:
    """Counts values by their size."""

    def __init__(self, name: str, lock: threading.Lock, edges: tuple[float, ...]) -> None:
        self._name, self._lock, self.edges = name, lock, edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value.

        Raises:
            ServingError: serving.metric-value for what is no number.
        """
        if not math.isfinite(value):
            raise ServingError("serving.metric-value", f"{self._name}: expected a finite value, found {value!r}.")
        with self._lock:
            self._counts[bisect_left(self.edges, value)] += 1
            self._sum += value

    def take(self) -> AppSample | None:
        """What was not told yet, which counts as told from now on."""
        counts, total = tuple(self._counts), self._sum
        self._counts, self._sum = [0] * len(counts), 0.0
        if not any(counts):
            return None
        return AppSample(name=self._name, kind="histogram", edges=self.edges, counts=counts, sum=total)

    def give_back(self, told: AppSample) -> None:
        """It was not told after all."""
        self._counts = [a + b for a, b in zip(self._counts, told.counts, strict=True)]
        self._sum += told.sum


class Metrics:
    """An application's numbers; safe to use from several threads.

    Args:
        address: the agent's, `unix:/path` or `http://host:port`; or a client.
        every: seconds between two times of telling; 0: only `flush` tells.
        token: what `lightship-agent token` printed, where the agent wants one.
    """

    def __init__(self, address: str | Client, *, every: float = EVERY_SECONDS, token: str = "") -> None:
        """Nothing is connected yet.

        Raises:
            LinkError: link.unreachable for an address that can't be one.
        """
        self._client = address if isinstance(address, Client) else Client(address, token=token)
        self._every = every
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def counter(self, name: str) -> Counter:
        """The counter of that name.

        Raises:
            ServingError: serving.metric-name, serving.metric-kind, serving.metric-full.
        """
        found = self._find(name, Counter(name, self._lock))
        assert isinstance(found, Counter)
        return found

    def gauge(self, name: str) -> Gauge:
        """The gauge of that name.

        Raises:
            ServingError: serving.metric-name, serving.metric-kind, serving.metric-full.
        """
        found = self._find(name, Gauge(name, self._lock))
        assert isinstance(found, Gauge)
        return found

    def histogram(self, name: str, edges: Sequence[float] = EDGES) -> Histogram:
        """The histogram of that name; `edges` are the upper ones of its cells.

        Raises:
            ServingError: serving.metric-name, serving.metric-kind, serving.metric-value, serving.metric-full.
        """
        given = tuple(float(edge) for edge in edges)
        Registry().take([AppSample(name=name, kind="histogram", edges=given)])
        found = self._find(name, Histogram(name, self._lock, given))
        assert isinstance(found, Histogram)
        if found.edges != given:
            raise ServingError("serving.metric-kind", f"{name}: its edges are {list(found.edges)}, found others.")
        return found

    def flush(self) -> int:
        """Tell the agent what it was not told yet; of how many numbers.

        Raises:
            ServingError: what the agent refused it with; it is not told again.
            LinkError: link.unreachable: it is kept for the next time; link.slow, link.status: it is not told again.
        """
        with self._telling:
            with self._lock:
                told = [sample for made in self._made.values() if (sample := made.take()) is not None]
            if not told:
                return 0
            try:
                self._tell(told)
            except LinkError as e:
                if e.code == "link.unreachable":
                    with self._lock:
                        for sample in told:
                            self._made[sample.name].give_back(sample)
                raise
            return len(told)

    def _tell(self, told: list[AppSample]) -> None:
        """All at once; where the agent refuses one of them, each for itself."""
        try:
            self._client.tell(*told)
        except ServingError as e:
            if len(told) == 1:
                raise
            refusal = e
            for sample in told:
                try:
                    self._client.tell(sample)
                except ServingError as one:
                    refusal = one
            raise refusal from None

    def close(self) -> None:
        """Tell what is left, and stop."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=30)
        self._try_to_tell()
        self._client.close()

    def _find(self, name: str, new: Counter | Gauge | Histogram) -> Counter | Gauge | Histogram:
        check_name(name)
        with self._lock:
            found = self._made.get(name)
            if found is None:
                if len(self._made) >= MAX_METRICS:
                    message = f"Expected at most {MAX_METRICS} names, found {name!r} beyond them."
                    raise ServingError("serving.metric-full", message)
                found = self._made[name] = new
                self._begin()
            if type(found) is not type(new):
                kind = type(found).__name__.lower()
                raise ServingError("serving.metric-kind", f"{name} is a {kind}.", remedy="Give it another name.")
            return found

    def _begin(self) -> None:
        if self._every > 0 and self._thread is None:
            self._thread = threading.Thread(target=self._tell_now_and_then, name="lightship-metrics", daemon=True)
            self._thread.start()

    def _tell_now_and_then(self) -> None:
        while not self._stop.wait(self._every):
            self._try_to_tell()

    def _try_to_tell(self) -> None:
        try:
            self.flush()
        except LightshipError as e:
            log.warning("the agent was not told the application's numbers: %s: %s", e.code, e)
