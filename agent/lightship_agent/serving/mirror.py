"""Serving: the shadow, challengers that are asked what the champion was asked, and whose answers nobody hears.

Rules:
* the hot path copies a row into a bounded queue and returns; when the queue is full the row is dropped and counted;
* one thread of the lowest priority asks the challengers, many rows at a time; nothing of a challenger reaches a client,
  and nothing that a challenger does is an error of the champion;
* what is compared is what the champion answered; only where a face did not say (a number), it is asked again;
* counts only, and additive: rows stay here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DataError, ServingError
from lightship_agent.contract.experiment import DIFFERENCE_EDGES, LATENCY_EDGES, MAX_CONFUSED, SAME_VALUE
from lightship_agent.contract.messages import Agreement
from lightship_agent.runtime.model import LoadedModel, Prediction

MAX_WAITING: Final = 1_024  # rows
_TOGETHER: Final = 256  # rows asked at once
_GATHER: Final = 0.005  # seconds in which more rows may come before the first is asked
log = logging.getLogger("lightship.serving")

Rows = npt.NDArray[np.float32]


class Challenger(msgspec.Struct, frozen=True):
    """A model in the shadow, for which experiment, and what share of the rows it is asked."""

    experiment: str
    model: LoadedModel
    share: float = 1.0


class _Asked(NamedTuple):
    """Rows that a champion has answered, or one row; `labels` None: it was not said what."""

    champion: LoadedModel
    rows: Rows
    labels: npt.NDArray[np.int64] | int | None
    tops: Rows | float | None
    size: int  # rows


class Mirror:
    """The challengers, the rows that wait for them, and the thread that asks.

    Args:
        max_waiting: rows; what comes beyond is dropped.
        clock: monotonic seconds.
    """

    def __init__(self, max_waiting: int = MAX_WAITING, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._max_waiting, self._clock = max_waiting, clock
        self._waiting: deque[_Asked] = deque()
        self._rows = 0  # that wait
        self._told_dropped = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._counts: dict[tuple[str, str, str], _Counts] = {}
        self._challengers: tuple[Challenger, ...] = ()
        self._thread: threading.Thread | None = None
        self.rows_total = self.same_total = self.failures_total = self.dropped_total = 0

    @property
    def challengers(self) -> tuple[Challenger, ...]:
        """Who is asked."""
        return self._challengers

    def set(self, challengers: Sequence[Challenger]) -> None:
        """Ask these from now on; what was counted of others is still reported."""
        self._challengers = tuple(challengers)
        if self._challengers and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
            self._thread.start()

    # The hot path ---------------------------------------------------------------------------------------------------

    def observe(self, model: LoadedModel, rows: Rows, prediction: Prediction, _request_id: str) -> None:
        """Note one answered request."""
        tops = None if prediction.scores is None else prediction.scores.max(axis=1)
        self._offer(_Asked(model, rows, prediction.labels, tops, len(rows)))

    def observe_row(self, model: LoadedModel, row: Rows, label: int, top: float, _request_id: str) -> None:
        """Note one answered row; the hottest path."""
        self._offer(_Asked(model, row, None if label < 0 else label, top, 1))

    def _offer(self, asked: _Asked) -> None:
        with self._lock:
            if self._rows + asked.size > self._max_waiting:
                self.dropped_total += asked.size
                return
            self._rows += asked.size
        self._waiting.append(asked._replace(rows=asked.rows.copy()))
        if not self._wake.is_set():
            self._wake.set()

    # The thread -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux: of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            self._wake.wait()
            time.sleep(_GATHER)
            self._wake.clear()
            while self._waiting:
                try:
                    self._ask(self._take())
                except Exception:  # whatever a challenger does, the next rows are asked
                    log.exception("The shadow failed in a way nobody foresaw.")

    def _take(self) -> list[_Asked]:
        """What waits of one champion, as many rows as are asked at once."""
        taken = [self._waiting.popleft()]
        rows = taken[0].size
        while self._waiting and rows < _TOGETHER and self._waiting[0].champion is taken[0].champion:
            taken.append(self._waiting.popleft())
            rows += taken[-1].size
        return taken

    def _ask(self, asked: list[_Asked]) -> None:
        champion = asked[0].champion
        try:
            said = _said(champion, asked)
            for challenger in self._challengers:
                if challenger.model.digest != champion.digest and challenger.model.name == champion.name:
                    self._compare(champion, challenger, _share_of(said, challenger.share))
        except ServingError as e:  # the champion, asked again, did not answer: there is nothing to compare with
            log.warning("shadow: %s: %s", e.code, e)
        finally:
            with self._lock:
                self._rows -= sum(a.size for a in asked)

    def _compare(self, champion: LoadedModel, challenger: Challenger, said: _Said) -> None:
        if not len(said.rows):
            return
        begun = self._clock()
        answered, found = _answers(challenger.model, said.rows)
        per_row_ms = (self._clock() - begun) * 1_000 / len(said.rows)
        counted = _Compared.of(champion, said.only(answered), found) if found is not None else None
        key = (challenger.experiment, challenger.model.digest, champion.digest)
        failures = len(said.rows) - int(answered.sum())
        with self._lock:
            counts = self._counts.setdefault(key, _Counts(challenger, champion, _now_ms()))
            counts.failures += failures
            self.failures_total += failures
            if counted is not None:
                counts.add(counted, per_row_ms)
                self.rows_total += counted.rows
                self.same_total += counted.same

    # Reports --------------------------------------------------------------------------------------------------------

    def collect(self, now_ms: int) -> list[Agreement]:
        """What was counted since the last time."""
        with self._lock:
            counts, self._counts = self._counts, {}
            if not counts:
                return []
            dropped, self._told_dropped = self.dropped_total - self._told_dropped, self.dropped_total
        return [c.record(now_ms, dropped) for c in counts.values()]

    def drain(self, seconds: float) -> bool:
        """Wait until nothing waits; False when that took too long."""
        end = time.monotonic() + seconds
        while self._rows and time.monotonic() < end:
            time.sleep(_GATHER)
        return not self._rows


class _Said(msgspec.Struct, frozen=True):
    """What a champion answered: labels and highest scores, or numbers."""

    rows: Rows
    labels: npt.NDArray[np.int64] | None
    tops: Rows | None
    values: Rows | None

    def only(self, chosen: npt.NDArray[np.bool_]) -> _Said:
        """Some of the rows."""
        parts = (None if p is None else p[chosen] for p in (self.labels, self.tops, self.values))
        return _Said(self.rows[chosen], *parts)  # type: ignore[arg-type]


def _said(champion: LoadedModel, asked: list[_Asked]) -> _Said:
    rows = np.concatenate([np.atleast_2d(a.rows) for a in asked])
    if champion.outputs.task == "regression" or any(a.labels is None for a in asked):
        again = champion.predict(rows)
        tops = None if again.scores is None else again.scores.max(axis=1)
        return _Said(rows, again.labels, tops, None if again.values is None else again.values.ravel())
    labels = np.concatenate([np.atleast_1d(np.asarray(a.labels, dtype=np.int64)) for a in asked])
    tops = None
    if champion.outputs.score_output:
        tops = np.concatenate([np.atleast_1d(np.asarray(a.tops, dtype=np.float32)) for a in asked])
    return _Said(rows, labels, tops, None)


def _share_of(said: _Said, share: float) -> _Said:
    if share >= 1:
        return said
    return said.only(np.array([random.random() < share for _ in range(len(said.rows))], dtype=bool))


def _answers(model: LoadedModel, rows: Rows) -> tuple[npt.NDArray[np.bool_], Prediction | None]:
    """Which rows the challenger answered, and what. One that it refuses does not cost the others."""
    all_of_them = np.ones(len(rows), dtype=bool)
    try:
        return all_of_them, model.predict(model.schema.check_rows(rows))
    except (DataError, ServingError):
        if len(rows) == 1:
            return ~all_of_them, None
    fit = np.array([_answers(model, rows[i : i + 1])[1] is not None for i in range(len(rows))], dtype=bool)
    try:
        return fit, model.predict(model.schema.check_rows(rows[fit])) if fit.any() else None
    except (DataError, ServingError):  # alone they could be answered, and together they can't
        return ~all_of_them, None


class _Compared(msgspec.Struct, frozen=True):
    """Some rows that both answered."""

    rows: int
    same: int
    confusion: npt.NDArray[np.int64] | None
    differences: npt.NDArray[np.float64]

    @classmethod
    def of(cls, champion: LoadedModel, said: _Said, found: Prediction) -> _Compared:
        """Compare what `champion` said with what was found."""
        if said.values is not None and found.values is not None:
            ours, theirs = said.values.astype(np.float64), found.values.ravel().astype(np.float64)
            larger = np.maximum(np.maximum(np.abs(ours), np.abs(theirs)), np.finfo(np.float64).tiny)
            apart = np.abs(ours - theirs) / larger
            return cls(len(apart), int((apart <= SAME_VALUE).sum()), None, apart)
        assert said.labels is not None
        assert found.labels is not None
        same = said.labels == found.labels
        classes = len(champion.outputs.labels)
        confusion = None
        if classes <= MAX_CONFUSED:
            confusion = np.bincount(said.labels * classes + found.labels, minlength=classes**2)
        apart = np.empty(0)
        if said.tops is not None and found.scores is not None:
            apart = np.abs(said.tops.astype(np.float64) - found.scores.max(axis=1))[same]
        return cls(len(same), int(same.sum()), confusion, apart[np.isfinite(apart)])


def _zeros(edges: Sequence[float]) -> npt.NDArray[np.int64]:
    """A count for each cell between and beyond edges."""
    return np.zeros(len(edges) + 1, np.int64)


class _Counts(msgspec.Struct):
    """Of one champion and one challenger, since the last report."""

    challenger: Challenger
    champion: LoadedModel
    opened_ms: int
    rows: int = 0
    same: int = 0
    failures: int = 0
    confusion: npt.NDArray[np.int64] | None = None
    differences: npt.NDArray[np.int64] = msgspec.field(default_factory=lambda: _zeros(DIFFERENCE_EDGES))
    difference_sum: float = 0.0
    difference_max: float = 0.0
    latency: npt.NDArray[np.int64] = msgspec.field(default_factory=lambda: _zeros(LATENCY_EDGES))

    def add(self, some: _Compared, per_row_ms: float) -> None:
        """Add rows that both answered."""
        self.rows += some.rows
        self.same += some.same
        if some.confusion is not None:
            self.confusion = some.confusion if self.confusion is None else self.confusion + some.confusion
        bins = np.searchsorted(DIFFERENCE_EDGES, some.differences, side="left")
        self.differences += np.bincount(bins, minlength=len(self.differences))
        self.difference_sum += float(some.differences.sum())
        self.difference_max = max(self.difference_max, float(some.differences.max(initial=0.0)))
        self.latency[int(np.searchsorted(LATENCY_EDGES, per_row_ms, side="left"))] += some.rows

    def record(self, now_ms: int, dropped: int) -> Agreement:
        """As it is reported."""
        return Agreement(
            s=1,
            t=now_ms,
            experiment=self.challenger.experiment,
            model=self.challenger.model.name,
            version=self.challenger.model.version,
            digest=self.challenger.model.digest,
            champion=self.champion.digest,
            opened=self.opened_ms,
            rows=self.rows,
            same=self.same,
            confusion=() if self.confusion is None else tuple(self.confusion.tolist()),
            differences=tuple(self.differences.tolist()),
            difference_sum=min(self.difference_sum, 1e15),
            difference_max=min(self.difference_max, 1e15),
            latency=tuple(self.latency.tolist()),
            failures=self.failures,
            dropped=dropped,
        )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
