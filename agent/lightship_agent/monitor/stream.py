"""Monitor: the rows of one model become windows of counts.

Rules:
* a stream is one bundle and one schema; its rows have positions from 0, and row k belongs to window
  k // window_rows, however the rows were pushed;
* a window closes when its last position is taken, or early by `flush`, after which the next row starts the next
  window: a window number is never used twice;
* time comes from the caller; counts are those of the contract and nothing else.

Source of the design: fixed reference-quantile bins, additive counts, windows by sequence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.messages import Window
from lightship_agent.contract.profile import SCORE_BINS, Binner, count_outputs
from lightship_agent.runtime.model import LoadedModel


class StreamMonitor:
    """Counts one stream.

    Args:
        model: whose profile gives the bins.
        window_rows: rows per window, 1 or more.
        first_window: the number of the first window, above any this stream has used before.
    """

    def __init__(self, model: LoadedModel, window_rows: int, *, first_window: int = 0) -> None:
        self.model = model
        self._window_rows = window_rows
        self._position = first_window * window_rows
        self._binner = Binner(model.profile.features)
        self._classes = len(model.profile.predictions)
        self._has_scores = len(model.profile.scores) == self._classes * SCORE_BINS and self._classes > 0
        self._opened: int | None = None
        self._reset()

    @property
    def position(self) -> int:
        """The position the next row will have."""
        return self._position

    @property
    def window(self) -> int:
        """The number of the window the next row belongs to: all below are closed."""
        return self._position // self._window_rows

    @property
    def open_rows(self) -> int:
        """Rows counted in the window that is open."""
        return self._rows

    @property
    def opened_ms(self) -> int | None:
        """When the open window got its first row or refusal, None while it is empty."""
        return self._opened

    def windows_of(self, rows: int) -> list[int]:
        """The window numbers the next `rows` rows will belong to."""
        windows: list[int] = []
        at, end = self._position, self._position + rows
        while at < end:
            window = at // self._window_rows
            stop = min(end, (window + 1) * self._window_rows)
            windows += [window] * (stop - at)
            at = stop
        return windows

    def push(
        self,
        rows: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int64],
        top_scores: npt.NDArray[np.float32],
        now_ms: int,
    ) -> list[Window]:
        """Count rows and return the windows they closed.

        Args:
            rows: float32 `[n, width]`.
            labels: predicted classes, int64 `[n]`; negative for a regressor.
            top_scores: float32 `[n]`; NaN without scores.
            now_ms: wall milliseconds.
        """
        closed, at = [], 0
        while at < len(rows):
            room = self._window_rows - self._position % self._window_rows
            end = min(len(rows), at + room)
            self._open(now_ms)
            self._count(rows[at:end], labels[at:end], top_scores[at:end])
            self._position += end - at
            if end - at == room:
                closed.append(self._close(now_ms))
            at = end
        return closed

    def refuse(self, rows: int, now_ms: int) -> None:
        """Note rows that did not fit the schema in the open window."""
        self._open(now_ms)
        self._invalid += rows

    def flush(self, now_ms: int) -> list[Window]:
        """Close the open window early, if it holds anything."""
        if self._opened is None:
            return []
        # An open window always has room for a row, so its successor begins above the position.
        self._position = (self.window + 1) * self._window_rows
        return [self._close(now_ms)]

    def _open(self, now_ms: int) -> None:
        if self._opened is None:
            self._opened = now_ms

    def _count(
        self, rows: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], tops: npt.NDArray[np.float32]
    ) -> None:
        self._rows += len(rows)
        self._counts += self._binner.count(rows)
        if not self._classes:
            return
        known = labels >= 0
        scores = np.nan_to_num(tops[known, None]) if self._has_scores else None
        predictions, cells = count_outputs(labels[known], scores, self._classes)
        self._predictions += predictions
        if self._has_scores:
            self._scores += cells

    def _close(self, now_ms: int) -> Window:
        """The window just completed: the position already stands at its successor's start."""
        assert self._opened is not None
        window = Window(
            s=1,  # the outbox numbers records
            t=now_ms,
            model=self.model.name,
            version=self.model.version,
            digest=self.model.digest,
            schema=self.model.schema_digest,
            w=self.window - 1,
            opened=self._opened,
            rows=self._rows,
            counts=tuple(self._counts.tolist()),
            predictions=tuple(self._predictions.tolist()),
            scores=tuple(self._scores.tolist()),
            invalid=self._invalid,
        )
        self._reset()
        return window

    def _reset(self) -> None:
        self._opened = None
        self._rows = self._invalid = 0
        self._counts = np.zeros(self._binner.cells, dtype=np.int64)
        self._predictions = np.zeros(self._classes, dtype=np.int64)
        self._scores = np.zeros(self._classes * SCORE_BINS if self._has_scores else 0, dtype=np.int64)
