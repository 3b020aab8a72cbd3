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

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.messages import MAX_RECORDS, LabelledRows, Labels

from .residuals import ResidualMeter, Residuals

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


@dataclass(slots=True)
class _Remembered:
    """The rows of one request that were not overwritten: row `first + i` of it is at index i."""

    key: StreamKey
    first: int
    total: int
    windows: tuple[int, ...]
    said: tuple[int, ...] | tuple[float, ...]  # classes, or a regressor's values
    rows: npt.NDArray[np.float32] | None
    told: set[int] | None = None  # made when the first label comes: an empty set weighs more than all the rest


class PredictionLedger:
    """Remembers predictions of one model name and joins labels to them.

    Args:
        capacity: rows that are remembered.
        share_rows: labelled rows handed out per collect; 0 keeps no row at all.
    """

    def __init__(self, capacity: int, share_rows: int = 0) -> None:
        self._capacity = capacity
        self._share = share_rows
        self._size = 0
        self._requests: dict[str, _Remembered] = {}
        self._counts: dict[tuple[StreamKey, int], _Labelled] = {}
        self._shared: deque[tuple[StreamKey, npt.NDArray[np.float32], str]] = deque(maxlen=max(1, share_rows))

    def __len__(self) -> int:
        """Rows that are remembered."""
        return self._size

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
            request_id: a repeated id replaces the older request.
            windows: window number of each row, n of them.
            said: predicted class of each row, or the value, n of them.
            rows: the rows, float32 `[n, width]`; kept only where rows are shared.
            first: the index in the request of the first of these rows.
            total: rows of the whole request, where some are no longer there.
        """
        self._forget(request_id)
        kept = rows.copy() if rows is not None and self._share else None
        whole = len(said) + first if total is None else total
        self._requests[request_id] = _Remembered(key, first, whole, tuple(windows), tuple(said), kept)
        self._size += len(said)
        while self._size > self._capacity:
            self._forget(next(iter(self._requests)))

    def resolve(self, prediction_id: str, label: str) -> bool:
        """Join a label to its prediction; True when it counted, False for a duplicate.

        Raises:
            ServingError: serving.unknown-prediction; serving.input for a label the model does not have.
        """
        request, index = self._find(prediction_id)
        truth = _truth(request.key, label)
        request.told = request.told or set()
        if index in request.told:
            return False
        request.told.add(index)
        if request.key.labels or request.key.meter is not None:
            counts = self._counts.setdefault((request.key, request.windows[index]), _Labelled())
            counts.add(request.key.meter, truth, request.said[index])
        if request.rows is not None and len(label) <= _MAX_LABEL:
            self._shared.append((request.key, request.rows[index].copy(), label))
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

    def _find(self, prediction_id: str) -> tuple[_Remembered, int]:
        request = self._requests.get(prediction_id)
        if request is not None and request.total == 1:
            return request, 0
        if request is not None:
            message = f"The request {prediction_id[:128]!r} had {request.total} rows; name one as id:row."
            raise ServingError("serving.unknown-prediction", message)
        base, colon, text = prediction_id.rpartition(":")
        request = self._requests.get(base) if colon and text.isdecimal() and len(text) < 9 else None
        if request is not None and request.total > 1:
            index = int(text) - request.first
            if 0 <= index < len(request.said):
                return request, index
        message = f"No recent prediction has the id {prediction_id[:140]!r}."
        raise ServingError("serving.unknown-prediction", message)

    def _forget(self, request_id: str) -> None:
        old = self._requests.pop(request_id, None)
        if old is not None:
            self._size -= len(old.said)


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
