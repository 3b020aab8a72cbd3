"""Monitor: what was predicted, until somebody says what was true.

Rules:
* memory is bounded in rows; the oldest requests are forgotten first, and a label for them is told "unknown";
* a label counts once: the first one stands, the same id again is a duplicate;
* a label counts for the window in which its prediction was made, however late and in whatever order it comes,
  and whichever model serves by then;
* rows are kept beside a prediction only where the operator shares them.

The id of row i of a request is the request's id when it had one row, and `id:i` when it had more.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.messages import MAX_RECORDS, LabelledRows, Labels

from .residuals import ResidualMeter, Residuals
from .ring import Requests

_MAX_LABEL = 64  # characters, the bound of a shared label in the contract


@dataclass(frozen=True, slots=True)
class StreamKey:
    """Which stream a prediction belongs to, and what its classes are called; no labels for a regressor.

    A regressor whose profile knows residuals has a `meter` for them.
    """

    model: str
    digest: str
    schema: str
    labels: tuple[str, ...]
    meter: ResidualMeter | None = field(default=None, compare=False)


class _Found(NamedTuple):
    """A row that is remembered: which stream, and where."""

    key: StreamKey
    slot: int


class PredictionLedger:
    """Remembers predictions of one model name and joins labels to them.

    Args:
        capacity: rows that are remembered.
        share_rows: labelled rows handed out per collect; 0 keeps no row at all.
    """

    def __init__(self, capacity: int, share_rows: int = 0) -> None:
        self._capacity = capacity
        self._share = share_rows
        self._ids = _Ids(capacity)
        self._head = 0  # rows since the beginning; row i is at i % capacity
        self._windows = np.full(capacity, 0, dtype=np.int64)
        self._said = np.full(capacity, 0, dtype=np.float64)  # classes, or a regressor's values
        self._told = np.full(capacity, 0, dtype=np.bool_)
        self._rows: dict[int, npt.NDArray[np.float32]] = {}  # by slot, where rows are shared
        self._keys: list[StreamKey] = []
        self._counts: dict[tuple[StreamKey, int], _Labelled] = {}
        self._shared: deque[tuple[StreamKey, npt.NDArray[np.float32], str]] = deque(maxlen=max(1, share_rows))

    def __len__(self) -> int:
        """Rows that are remembered."""
        return min(self._head, self._capacity)

    def remember(
        self,
        key: StreamKey,
        request_id: str,
        windows: Sequence[int],
        said: Sequence[int] | Sequence[float],
        rows: npt.NDArray[np.float32] | None = None,
        *,
        first: int = 0,
        total: int | None = None,
    ) -> None:
        """Keep the predictions of one request.

        Args:
            key: the stream.
            request_id: a repeated id means the newer request.
            windows: window number of each row, n of them.
            said: predicted class of each row, or the value, n of them.
            rows: the rows, float32 `[n, width]`; kept only where rows are shared.
            first: the index in the request of the first of these rows.
            total: rows of the whole request, where some are no longer there.
        """
        whole = len(said) + first if total is None else total
        numbers = np.asarray(said, dtype=np.float64)
        request = Requests([request_id], np.array([-first], dtype=np.int64), np.array([whole], dtype=np.int64))
        self.remember_all(key, request, np.asarray(windows), numbers, rows)

    def remember_all(
        self,
        key: StreamKey,
        requests: Requests,
        windows: npt.NDArray[np.int64],
        said: npt.NDArray[np.float64],
        rows: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Keep the predictions of many requests, whose rows follow each other.

        Args:
            key: the stream.
            requests: where each one's rows are; a negative place is that of rows that are no longer there.
            windows: window number of each row, int64 `[n]`.
            said: predicted class of each row, or the value, float64 `[n]`.
            rows: float32 `[n, width]`; kept only where rows are shared.
        """
        if key not in self._keys:
            self._keys.append(key)
        self._ids.add(requests, self._head, self._keys.index(key))
        kept = min(len(said), self._capacity)
        slots = np.arange(self._head + len(said) - kept, self._head + len(said)) % self._capacity
        self._windows[slots], self._said[slots], self._told[slots] = windows[-kept:], said[-kept:], False
        if self._share and rows is not None:
            self._rows.update(zip(slots.tolist(), rows[-kept:].copy(), strict=True))
        self._head += len(said)

    def resolve(self, prediction_id: str, label: str) -> bool:
        """Join a label to its prediction; True when it counted, False for a duplicate.

        Raises:
            ServingError: serving.unknown-prediction; serving.input for a label the model does not have.
        """
        key, slot = self._find(prediction_id)
        truth = _truth(key, label)
        if self._told[slot]:
            return False
        self._told[slot] = True
        if key.labels or key.meter is not None:
            counts = self._counts.setdefault((key, int(self._windows[slot])), _Labelled())
            counts.add(key.meter, truth, float(self._said[slot]))
        row = self._rows.get(slot)
        if row is not None and len(label) <= _MAX_LABEL:
            self._shared.append((key, row, label))
        return True

    def collect(self, now_ms: int, is_closed: Callable[[StreamKey, int], bool]) -> list[Labels | LabelledRows]:
        """Counts per window since the last collect, and the shared rows; windows still open wait.

        Args:
            now_ms: wall milliseconds.
            is_closed: whether a window of a stream is closed, so that `Labels` never come before their window.
        """
        ready = sorted((place for place in self._counts if is_closed(*place)), key=lambda p: (p[0].digest, p[1]))
        records: list[Labels | LabelledRows] = []
        for key, window in ready:
            records.append(self._counts.pop((key, window)).record(key, window, now_ms))
        return [*records, *self._collect_rows(now_ms)]

    def _collect_rows(self, now_ms: int) -> list[LabelledRows]:
        by_stream: dict[StreamKey, list[tuple[npt.NDArray[np.float32], str]]] = {}
        for key, row, label in self._shared:
            by_stream.setdefault(key, []).append((row, label))
        self._shared.clear()
        return [
            LabelledRows(
                s=1,
                t=now_ms,
                model=key.model,
                digest=key.digest,
                schema=key.schema,
                x=tuple(_plain(row) for row, _ in pairs[at : at + MAX_RECORDS]),
                y=tuple(label for _, label in pairs[at : at + MAX_RECORDS]),
            )
            for key, pairs in by_stream.items()
            for at in range(0, len(pairs), MAX_RECORDS)
        ]

    def _find(self, prediction_id: str) -> _Found:
        oldest = self._head - self._capacity
        request = self._ids.find(prediction_id, oldest)
        index = 0
        if request is not None and request.rows > 1:
            message = f"The request {prediction_id[:128]!r} had {request.rows} rows; name one as id:row."
            raise ServingError("serving.unknown-prediction", message)
        if request is None:
            base, colon, text = prediction_id.rpartition(":")
            if colon and text.isdecimal() and len(text) < 9:
                request, index = self._ids.find(base, oldest), int(text)
            if request is None or request.rows == 1 or not request.missing <= index < request.rows:
                message = f"No recent prediction has the id {prediction_id[:140]!r}."
                raise ServingError("serving.unknown-prediction", message)
        return _Found(self._keys[request.stream], (request.start + index) % self._capacity)


class _Place(NamedTuple):
    """Where a request's rows are: row i at `start + i`, of rows since the beginning, from `missing` on."""

    start: int
    missing: int
    rows: int
    stream: int


class _Ids:
    """Requests by their id, in arrays that are taken once: a dict of so many strings weighs ten times as much.

    Of an id its hash is kept, Python's own with the key of this process, 64 bits: that two among 20,000 are alike by
    chance is less likely than 10⁻¹⁰.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._head = 0
        self._hashes = np.full(capacity, 0, dtype=np.int64)
        self._starts = np.full(capacity, 0, dtype=np.int64)
        self._missing = np.full(capacity, 0, dtype=np.int32)
        self._rows = np.full(capacity, 0, dtype=np.int32)  # 0: nothing here yet
        self._streams = np.full(capacity, 0, dtype=np.int32)

    def add(self, requests: Requests, first_row: int, stream: int) -> None:
        """Requests whose rows begin at `first_row`."""
        newest = slice(-self._capacity, None)
        ids, firsts = requests.ids[newest], requests.firsts[newest]
        at = np.arange(self._head, self._head + len(ids)) % self._capacity
        self._hashes[at] = np.fromiter(map(hash, ids), np.int64, len(ids))
        self._starts[at] = first_row + firsts
        self._missing[at] = np.maximum(0, -firsts)
        self._rows[at] = requests.rows[newest]
        self._streams[at] = stream
        self._head += len(ids)

    def find(self, request_id: str, oldest: int) -> _Place | None:
        """The newest request of that id, if all that was kept of it is at `oldest` or after it."""
        places = np.flatnonzero((self._hashes == hash(request_id)) & (self._rows > 0))
        if not len(places):
            return None
        at = places[self._starts[places].argmax()]
        start, missing = int(self._starts[at]), int(self._missing[at])
        if start + missing < oldest:
            return None
        return _Place(start, missing, int(self._rows[at]), int(self._streams[at]))


class _Labelled:
    """The labels of one window so far."""

    def __init__(self) -> None:
        self.labelled = self.errors = 0
        self.residuals: Residuals | None = None

    def add(self, meter: ResidualMeter | None, truth: float, said: float) -> None:
        self.labelled += 1
        if meter is None:
            self.errors += said != truth
            return
        cell, steps, error = meter.measure(truth, said)
        self.errors += error
        self.residuals = self.residuals or Residuals(meter.cells)
        self.residuals.add(cell, steps)

    def record(self, key: StreamKey, window: int, now_ms: int) -> Labels:
        residuals = self.residuals
        return Labels(
            s=1,
            t=now_ms,
            model=key.model,
            digest=key.digest,
            schema=key.schema,
            w=window,
            labelled=self.labelled,
            errors=self.errors,
            residuals=tuple(residuals.cells) if residuals else (),
            residual_sums=(residuals.total, residuals.squares) if residuals else (),
        )


def _truth(key: StreamKey, label: str) -> float:
    """The index of a class, or the value of a regressor's label."""
    if key.labels:
        if label in key.labels:
            return key.labels.index(label)
        known = ", ".join(key.labels[:20])
        raise ServingError("serving.input", f"Expected one of the labels {known}; found {label[:64]!r}.")
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ServingError("serving.input", f"Expected a number as the true value, found {label[:64]!r}.")
    return value


def _plain(row: npt.NDArray[np.float32]) -> tuple[float | None, ...]:
    return tuple(None if value != value else value for value in row.tolist())  # noqa: PLR0124 - NaN alone differs from itself
