"""Monitor: from every prediction to a few records a minute.

Rules:
* `observe` is the hot path: it copies into a ring and returns; everything else happens in `collect`;
* a stream is (bundle digest, schema digest); when another bundle serves under the name, the old window is closed,
  and labels for the old bundle's predictions still find their way;
* window numbers of a stream only grow, also when a bundle comes back, and after a restart if `resume` is given;
* the clock is the caller's, and no finer than its calls: a window opens at the collect that first sees its rows;
* what is wrong with data beyond doubt is told at once, and stands in `faults` until it is over, with or without a
  network.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.messages import AnyRecord, Fault, Together, Window
from lightship_agent.contract.quality import QualityCount, merge_quality
from lightship_agent.runtime.model import LoadedModel, Prediction

from .faults import FAULT_CODES
from .labels import PredictionLedger, StreamKey
from .refusals import why_refused
from .residuals import ResidualMeter
from .ring import Block, RowRing
from .stream import StreamMonitor

#: Up to this many classes, Python's max of a list beats numpy's call overhead.
_FEW: Final = 32
#: A clock that goes back by less is being adjusted, as clocks are.
_SET_BACK_MS: Final = 1_000


class StandingFault(NamedTuple):
    """A hard fault of data: of which model's feature, and its kind."""

    model: str
    feature: str
    kind: str

    @property
    def code(self) -> str:
        """What the device is degraded by."""
        return FAULT_CODES[self.kind]


class Monitor:
    """Watches every model the data plane serves.

    Args:
        window_rows: rows per window.
        share_rows: labelled rows sent per collect; 0, the default, sends none and keeps none.
        ring_rows: rows a ring holds between two collects.
        remember_rows: predictions per model name that labels may still come for.
        min_age_ms: a window younger than this takes more rows than `window_rows`.
        max_age_ms: a window older than this is closed with the rows it has; None waits for all of them.
        resume: next window number by bundle digest, from `positions` of an earlier life.
    """

    def __init__(
        self,
        window_rows: int,
        share_rows: int = 0,
        *,
        ring_rows: int = 4_096,
        remember_rows: int = 20_000,
        min_age_ms: int = 0,
        max_age_ms: int | None = None,
        resume: Mapping[str, int] | None = None,
    ) -> None:
        self._window_rows = window_rows
        self._share_rows = share_rows
        self._ring_rows = ring_rows
        self._remember_rows = remember_rows
        self._min_age_ms, self._max_age_ms = min_age_ms, max_age_ms
        self._next_window: dict[str, int] = dict(resume or {})
        self._streams: dict[str, _Stream] = {}
        self._serving: dict[str, _Stream] = {}
        self._ledgers: dict[str, PredictionLedger] = {}
        self._beside: frozenset[str] = frozenset()
        self._closed: list[Window] = []
        self._aside: list[Together | Fault] = []
        self._now_ms = 0
        self._retired_drops = 0
        self._lock = threading.RLock()  # all but the hot path

    def watch_beside(self, digests: frozenset[str]) -> None:
        """These bundles answer beside the one that serves under their name: none of them replaces another."""
        self._beside = digests

    @property
    def dropped_rows(self) -> int:
        """Rows that were overwritten before they were counted."""
        with self._lock:
            return self._retired_drops + sum(stream.ring.dropped for stream in self._streams.values())

    def observe(
        self, model: LoadedModel, rows: npt.NDArray[np.float32], prediction: Prediction, request_id: str
    ) -> None:
        """Note one answered request; the hot path.

        Args:
            model: that answered.
            rows: float32 `[n, width]`.
            prediction: its answer.
            request_id: the id the client knows it by.
        """
        stream = self._streams.get(model.digest) or self._begin(model)
        self._serving[model.name] = stream
        stream.ring.push(rows, prediction.labels, _tops(prediction), request_id)

    def observe_row(
        self, model: LoadedModel, row: npt.NDArray[np.float32], label: int, top: float, request_id: str
    ) -> None:
        """Note one answered row; the hottest path.

        Args:
            model: that answered.
            row: float32 `[width]`.
            label: the predicted class; -1 of a regressor.
            top: the highest score, NaN without scores; the value of a regressor.
            request_id: the id the client knows it by.
        """
        stream = self._streams.get(model.digest) or self._begin(model)
        self._serving[model.name] = stream
        stream.ring.push_row(row, label, top, request_id)

    def observe_rows(
        self,
        model: LoadedModel,
        rows: npt.NDArray[np.float32],
        labels: Sequence[int],
        tops: Sequence[float],
        request_ids: Sequence[str],
    ) -> None:
        """Note rows, float32 `[n, width]`, each asked for alone and answered together; n of the rest, as above."""
        stream = self._streams.get(model.digest) or self._begin(model)
        self._serving[model.name] = stream
        stream.ring.push_rows(rows, labels, tops, request_ids)

    def refused(self, model: LoadedModel, rows: int, data: object = None) -> None:
        """Note rows the schema refused.

        Args:
            model: whose schema.
            rows: how many.
            data: what stood in their place: an array, or anything.
        """
        why = why_refused(data, rows, model.schema)
        stream = self._streams.get(model.digest) or self._begin(model)
        self._serving[model.name] = stream
        with self._lock:
            stream.invalid += rows
            stream.why = merge_quality(stream.why, why)

    def faults(self) -> tuple[StandingFault, ...]:
        """The hard faults that stand in what is being served."""
        with self._lock:
            serving = [s for s in self._streams.values() if self._serving.get(s.key.model) is s]
            return tuple(StandingFault(s.key.model, name, kind) for s in serving for kind, name in s.counts.faults)

    def newest(self, model: LoadedModel, rows: int) -> npt.NDArray[np.float32]:
        """The last rows that `model` answered, float32 `[n, width]`, oldest first: `rows`, or as many as are held."""
        stream = self._streams.get(model.digest)
        if stream is None:
            return np.empty((0, model.schema.width), dtype=np.float32)
        return stream.ring.newest(rows)

    def feedback(self, model: str, prediction_id: str, label: str) -> bool:
        """Join a label to its prediction; True when it counted, False for a duplicate.

        Raises:
            ServingError: serving.unknown-prediction, serving.input.
        """
        with self._lock:
            # The prediction may be a moment old, and still in a ring.
            self._drain()
            ledger = self._ledgers.get(model)
            if ledger is None:
                raise ServingError("serving.unknown-prediction", f"{model[:64]!r} has predicted nothing yet.")
            return ledger.resolve(prediction_id, label)

    def count(self, now_ms: int) -> None:
        """Take what was predicted out of the rings and count it, before they overflow."""
        with self._lock:
            self._note_time(now_ms)
            self._drain()

    def collect(self, now_ms: int) -> list[AnyRecord]:
        """What is to be reported since the last collect: closed windows, products, faults, labels, shared rows.

        Args:
            now_ms: wall milliseconds.
        """
        with self._lock:
            self._note_time(now_ms)
            self._drain()
            for stream in list(self._streams.values()):
                self._settle(stream)
            for stream in self._streams.values():
                self._aside += stream.counts.take_aside()
            records: list[AnyRecord] = [*self._closed, *self._aside]
            self._closed, self._aside = [], []
            for ledger in self._ledgers.values():
                records += ledger.collect(now_ms, self._is_closed)
            return records

    def flush(self, now_ms: int) -> list[AnyRecord]:
        """As `collect`, with every window closed: for a stop of the agent."""
        with self._lock:
            self._note_time(now_ms)
            self._drain()
            for stream in self._streams.values():
                self._closed += stream.counts.flush(now_ms, last=True)
            return self.collect(now_ms)

    def positions(self) -> dict[str, int]:
        """The next unused window number by bundle digest, to be kept over a restart."""
        with self._lock:
            used = {
                digest: stream.counts.window + (stream.counts.opened_ms is not None)
                for digest, stream in self._streams.items()
            }
            return {**self._next_window, **used}

    def _begin(self, model: LoadedModel) -> _Stream:
        with self._lock:
            stream = self._streams.get(model.digest)
            if stream is None:
                first = self._next_window.get(model.digest, 0)
                counts = StreamMonitor(
                    model.described(), self._window_rows, first_window=first, min_age_ms=self._min_age_ms
                )
                stream = _Stream(counts, self._ring_rows)
                # Assigned whole, so that `observe` may read without the lock.
                self._streams = {**self._streams, model.digest: stream}
                self._ledgers.setdefault(model.name, PredictionLedger(self._remember_rows, self._share_rows))
            return stream

    def _note_time(self, now_ms: int) -> None:
        if now_ms < self._now_ms - _SET_BACK_MS:
            for stream in self._streams.values():
                stream.counts.set_back(now_ms)
        self._now_ms = now_ms

    def _drain(self) -> None:
        for stream in self._streams.values():
            now = max(self._now_ms, stream.counts.model.since_ms)
            if stream.invalid:
                stream.counts.refuse(stream.invalid, now, stream.why)
                stream.invalid, stream.why = 0, ()
            block = stream.ring.drain()
            stream.idle = not len(block)
            if len(block):
                self._remember(stream, block, now)
                self._closed += stream.counts.push(block.rows, block.labels, block.top_scores, now)

    def _remember(self, stream: _Stream, block: Block, now_ms: int) -> None:
        ledger = self._ledgers[stream.key.model]
        said = (block.labels if stream.key.labels else block.top_scores).astype(np.float64)
        windows = stream.counts.windows_of(len(block), now_ms)
        ledger.remember_all(stream.key, block.requests, windows, said, block.rows if self._share_rows else None)

    def _settle(self, stream: _Stream) -> None:
        """Close what is too old or no longer serves; let go of a stream that has been silent since."""
        counts, now = stream.counts, self._now_ms
        latest = self._serving.get(stream.key.model)
        together = {stream.key.digest, *((latest.key.digest,) if latest else ())} & self._beside
        replaced = latest is not stream and not together
        expired = (
            self._max_age_ms is not None and counts.opened_ms is not None and now - counts.opened_ms >= self._max_age_ms
        )
        if replaced or expired or counts.is_due(now):
            self._closed += counts.flush(now, last=replaced)
        if replaced and stream.idle:
            self._aside += counts.take_aside()
            self._next_window[stream.key.digest] = counts.window
            self._retired_drops += stream.ring.dropped
            self._streams = {d: s for d, s in self._streams.items() if s is not stream}

    def _is_closed(self, key: StreamKey, window: int) -> bool:
        stream = self._streams.get(key.digest)
        return stream is None or window < stream.counts.window


class _Stream:
    """What belongs to one bundle."""

    def __init__(self, counts: StreamMonitor, ring_rows: int) -> None:
        model = counts.model
        labels = model.outputs.labels if model.outputs.task == "classification" else ()
        residuals = model.profile.residuals
        meter = None if labels or residuals is None else ResidualMeter(residuals)
        self.key = StreamKey(model.name, model.digest, model.schema_digest, labels, meter)
        self.ring = RowRing(ring_rows, model.schema.width)
        self.counts = counts
        self.invalid = 0
        self.why: tuple[QualityCount, ...] = ()
        self.idle = False


def _tops(prediction: Prediction) -> npt.NDArray[np.float32] | float | None:
    """Highest scores of a classifier, values of a regressor."""
    scores = prediction.values if prediction.scores is None else prediction.scores
    if scores is None:
        return None
    if len(scores) == 1 and scores.shape[1] <= _FEW:
        return float(max(scores[0].tolist()))
    top: npt.NDArray[np.float32] = scores.max(axis=1)
    return top
