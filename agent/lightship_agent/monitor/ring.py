"""Monitor: the ring between a prediction and its bookkeeping.

Rules:
* memory is taken once; pushing copies a row and never waits for a reader, only for another push or a pointer swap;
* when the reader is late the oldest rows are overwritten, and counted as dropped;
* a reader gets copies: two buffers change places, so that it never reads what is being written.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec
import numpy as np
import numpy.typing as npt

NO_CLASS: Final = -1  # the label of a regressor's row


class Requests(msgspec.Struct, frozen=True):
    """Where requests' rows are in a block, oldest first: three columns, and not an object for each.

    Row i of request k is at `firsts[k] + i`; rows before the block's start (negative) were overwritten.
    """

    ids: Sequence[str]
    firsts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.ids)


class Block(msgspec.Struct, frozen=True):
    """Drained rows, oldest first: float32 `[n, width]`, int64 `[n]`, float32 `[n]`."""

    rows: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    top_scores: npt.NDArray[np.float32]
    requests: Requests

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)


class RowRing:
    """Keeps the newest `capacity` rows until they are drained.

    Args:
        capacity: rows.
        width: features.
    """

    def __init__(self, capacity: int, width: int) -> None:
        self._active = _Buffer(capacity, width)
        self._spare = _Buffer(capacity, width)
        self._push_lock = threading.Lock()
        self._drain_lock = threading.Lock()
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Rows overwritten before they were drained, since the beginning."""
        with self._push_lock:
            return self._dropped + self._active.dropped

    def push(
        self,
        rows: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int64] | None,
        top_scores: npt.NDArray[np.float32] | float | None,
        request_id: str,
    ) -> None:
        """Copy the rows of one request.

        Args:
            rows: float32 `[n, width]`.
            labels: predicted classes, int64 `[n]`; None for a regressor.
            top_scores: the highest score of each row, float32 `[n]` or a number for one row; None without scores.
            request_id: the id the client was given.
        """
        if len(rows) == 1:
            label = NO_CLASS if labels is None else labels.item()
            top = np.nan if top_scores is None else top_scores
            with self._push_lock:
                self._active.put_one(rows, label, top, request_id)
            return
        with self._push_lock:
            self._active.put_many(rows, labels, top_scores, request_id)

    def push_row(self, row: npt.NDArray[np.float32], label: int, top_score: float, request_id: str) -> None:
        """Copy one row, float32 `[width]`; its class (`NO_CLASS` of a regressor) and highest score (NaN without)."""
        with self._push_lock:
            self._active.put_row(row, label, top_score, request_id)

    def push_rows(
        self,
        rows: npt.NDArray[np.float32],
        labels: Sequence[int],
        top_scores: Sequence[float],
        request_ids: Sequence[str],
    ) -> None:
        """Copy rows, float32 `[n, width]`, each of a request of its own; the rest as `push_row`, n of each."""
        with self._push_lock:
            self._active.put_rows(rows, labels, top_scores, request_ids)

    def drain(self) -> Block:
        """Everything pushed since the last drain and not overwritten, as copies."""
        with self._drain_lock:
            with self._push_lock:
                if not self._active.head:  # the other buffer keeps the newest rows
                    return self._active.copy_out()
                full, self._active = self._active, self._spare
                self._dropped += full.dropped
            block = full.copy_out()
            full.clear()
            self._spare = full
            return block

    def newest(self, rows: int) -> npt.NDArray[np.float32]:
        """Copies of the last rows pushed, oldest first, float32 `[n, width]`; drained or not; maybe fewer."""
        with self._drain_lock, self._push_lock:
            fresh = self._active.last(rows)
            if self._active.dropped:  # what was between them and the other buffer's is gone
                return fresh
            return np.concatenate([self._spare.last(rows - len(fresh), cleared=True), fresh])


class _Buffer:
    """One of the two buffers; `head` counts rows since it was cleared."""

    def __init__(self, capacity: int, width: int) -> None:
        self.capacity = capacity
        # Written to, so that the memory is there from the beginning.
        self.rows = np.full((capacity, width), 0, dtype=np.float32)
        self.labels = np.full(capacity, 0, dtype=np.int64)
        self.tops = np.full(capacity, 0, dtype=np.float32)
        # The same memory, past numpy: between requests its code leaves the processor's caches, and costs 2 µs a row.
        self._width = width
        self._cells: Any = self.rows.ravel().data  # takes an array as it takes bytes, which its type does not say
        self._classes: memoryview[Any] = self.labels.data
        self._highest: memoryview[Any] = self.tops.data
        self.head = 0
        self.held = 0  # rows, when it was cleared
        #: Of each row the id of its request; None of a request with more rows, which is among `several`.
        self.ids: list[str | None] = [None] * capacity
        # Each has a row or more, so no more than `capacity` of them can still have one here.
        self.several: deque[tuple[int, int, str]] = deque(maxlen=capacity)

    @property
    def dropped(self) -> int:
        return max(0, self.head - self.capacity)

    def put_row(self, row: npt.NDArray[np.float32], label: int, top: float, request_id: str) -> None:
        at = self.head % self.capacity
        self._cells[at * self._width : (at + 1) * self._width] = row
        self._classes[at] = label
        self._highest[at] = top
        self.ids[at] = request_id
        self.head += 1

    def put_rows(
        self, rows: npt.NDArray[np.float32], labels: Sequence[int], tops: Sequence[float], request_ids: Sequence[str]
    ) -> None:
        at = self.head % self.capacity
        end = at + len(rows)
        if end > self.capacity:
            for one in zip(rows, labels, tops, request_ids, strict=True):
                self.put_row(*one)
            return
        self.rows[at:end] = rows
        self.labels[at:end] = labels
        self.tops[at:end] = tops
        self.ids[at:end] = request_ids
        self.head += len(rows)

    def put_one(
        self,
        row: npt.NDArray[np.float32],
        label: int,
        top: npt.NDArray[np.float32] | float,
        request_id: str,
    ) -> None:
        at = self.head % self.capacity
        self.rows[at] = row[0]
        self.labels[at] = label
        self.tops[at : at + 1] = top  # a number, or an array of one
        self.ids[at] = request_id
        self.head += 1

    def put_many(
        self,
        rows: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int64] | None,
        tops: npt.NDArray[np.float32] | float | None,
        request_id: str,
    ) -> None:
        n = len(rows)
        if not n:
            return
        skip = max(0, n - self.capacity)
        at = np.arange(self.head + skip, self.head + n) % self.capacity
        self.rows[at] = rows[skip:]
        self.labels[at] = NO_CLASS if labels is None else labels[skip:]
        self.tops[at] = np.nan if tops is None else np.broadcast_to(tops, (n,))[skip:]
        first, more = int(at[0]), int(at[-1]) + 1
        if first < more:
            self.ids[first:more] = [None] * (more - first)
        else:  # round the end
            self.ids[first:], self.ids[:more] = [None] * (self.capacity - first), [None] * more
        self.several.append((self.head, n, request_id))
        self.head += n

    def copy_out(self) -> Block:
        start = self.dropped
        at = np.arange(start, self.head) % self.capacity
        return Block(self.rows[at], self.labels[at], self.tops[at], self._requests(start))

    def _requests(self, start: int) -> Requests:
        oldest = start % self.capacity
        ids = self.ids[oldest:] + self.ids[:oldest] if start else self.ids[: self.head]
        if not self.several:
            return Requests(cast("list[str]", ids), np.arange(len(ids)), np.ones(len(ids), dtype=np.int64))
        found = [(at, 1, one) for at, one in enumerate(ids) if one is not None]
        found += [(first - start, n, one) for first, n, one in self.several if first + n > start]
        firsts, rows, names = zip(*sorted(found), strict=True)
        return Requests(names, np.array(firsts, dtype=np.int64), np.array(rows, dtype=np.int64))

    def last(self, rows: int, *, cleared: bool = False) -> npt.NDArray[np.float32]:
        head = self.held if cleared else self.head
        return self.rows[np.arange(max(0, head - min(rows, self.capacity)), head) % self.capacity]

    def clear(self) -> None:
        self.held, self.head = self.head, 0
        self.ids = [None] * self.capacity
        self.several.clear()
