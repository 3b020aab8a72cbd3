"""Monitor: the rows of one model become windows of counts.

Rules:
* a stream is one bundle and one schema; a window closes when it has `window_rows` rows and is `min_age_ms` old, and
  takes more rows until then: whoever predicts a thousand times as often sends no more windows. Without a least age, row
  k belongs to window k // window_rows, however the rows were pushed;
* `flush` closes it early; a window number is never used twice;
* time comes from the caller; counts are those of the contract and nothing else;
* products of features travel with every `TOGETHER`th window, for all since the last time.

Source of the design: fixed reference-quantile bins, additive counts, windows by sequence.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.messages import Fault, PackedMoments, Together, Window, packed
from lightship_agent.contract.quality import FOUND, WHOLE, Quality, QualityCount, merge_quality
from lightship_agent.runtime.model import LoadedModel

from .faults import MIN_ROWS, Change, FaultBook, FaultFinder, Found
from .tally import Tally

#: Rows that are counted at once: enough for numpy to be fast, few enough for its temporaries to be small.
_TOGETHER_ROWS: Final = 512
#: Windows whose products travel together.
TOGETHER: Final = 8


class _Part(NamedTuple):
    """The next rows that go into one window, and whether it closes after them."""

    window: int
    rows: int
    closes: bool


class StreamMonitor:
    """Counts one stream.

    Args:
        model: whose profile gives the bins.
        window_rows: rows per window, 1 or more.
        first_window: the number of the first window, above any this stream has used before.
        min_age_ms: wall milliseconds that a window is open at least, unless it is flushed.
    """

    def __init__(self, model: LoadedModel, window_rows: int, *, first_window: int = 0, min_age_ms: int = 0) -> None:
        self.model = model
        self._window_rows = window_rows
        self._min_age_ms = min_age_ms
        #: The number of the window the next row belongs to, unless `is_due`: all below are closed.
        self.window = first_window
        self._tally = Tally(model.profile)
        self._finder = FaultFinder(model.profile)
        self._faults = FaultBook()
        self._aside: list[Together | Fault] = []
        self._first_product = first_window  # the first window whose products have not been told
        self._opened: int | None = None
        self._invalid = 0
        self._quality: tuple[QualityCount, ...] = ()

    @property
    def open_rows(self) -> int:
        """Rows counted in the window that is open."""
        return self._tally.rows

    @property
    def opened_ms(self) -> int | None:
        """When the open window got its first row or refusal, None while it is empty."""
        return self._opened

    def is_due(self, now_ms: int) -> bool:
        """Whether the open window has all its rows and its age."""
        full = self._opened is not None and self._tally.rows >= self._window_rows
        return full and now_ms - (self._opened or 0) >= self._min_age_ms

    def windows_of(self, rows: int, now_ms: int) -> npt.NDArray[np.int64]:
        """The window numbers, int64 `[rows]`, of the next rows, if they are pushed at that time."""
        parts = self._parts(rows, now_ms)
        return np.repeat(np.array([p.window for p in parts], dtype=np.int64), [p.rows for p in parts])

    def push(
        self,
        rows: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int64],
        tops: npt.NDArray[np.float32],
        now_ms: int,
    ) -> list[Window]:
        """Count rows and return the windows they closed.

        Args:
            rows: float32 `[n, width]`.
            labels: predicted classes, int64 `[n]`; negative for a regressor.
            tops: float32 `[n]`: highest scores, NaN without; the values of a regressor.
            now_ms: wall milliseconds.
        """
        closed, at = [], 0
        for part in self._parts(len(rows), now_ms):
            end = at + part.rows
            if part.rows:
                self._open(now_ms)
            for some in range(at, end, _TOGETHER_ROWS):
                rest = slice(some, min(end, some + _TOGETHER_ROWS))
                self._tally.count(rows[rest], labels[rest], tops[rest])
            if part.closes:
                closed.append(self._close(now_ms))
            at = end
        return closed

    def _parts(self, rows: int, now_ms: int) -> list[_Part]:
        """How the next rows are shared out among windows."""
        parts, window, held = [], self.window, self._tally.rows
        opened = now_ms if self._opened is None else self._opened
        if self.is_due(now_ms):
            parts.append(_Part(window, 0, closes=True))
            window, held, opened = window + 1, 0, now_ms
        while rows:
            young = now_ms - opened < self._min_age_ms
            taken = rows if young else min(rows, max(1, self._window_rows - held))
            closes = not young and held + taken >= self._window_rows
            parts.append(_Part(window, taken, closes))
            rows -= taken
            window, held, opened = window + 1, 0, now_ms
        return parts

    def refuse(self, rows: int, now_ms: int, why: Quality = ()) -> None:
        """Note rows that did not fit the schema in the open window."""
        self._open(now_ms)
        self._invalid += rows
        self._quality = merge_quality(self._quality, why)

    def set_back(self, now_ms: int) -> None:
        """Note that the clock was set back while the window was open, whose age counts from now on."""
        if self._opened is not None:
            self._opened = min(self._opened, now_ms)
            self._quality = merge_quality(self._quality, (QualityCount("clock", WHOLE, 1),))

    @property
    def faults(self) -> list[tuple[str, str]]:
        """The hard faults that stand: kind, and the feature's name."""
        return [(kind, self._name(j)) for kind, j in self._faults.standing]

    def take_aside(self) -> list[Together | Fault]:
        """What is to be told besides windows, since the last time."""
        told, self._aside = self._aside, []
        return told

    def flush(self, now_ms: int, *, last: bool = False) -> list[Window]:
        """Close the open window early, if it holds anything.

        Args:
            now_ms: wall milliseconds.
            last: nothing follows soon, so products don't wait for their eighth window.
        """
        if self._opened is None:
            if last:
                self._tell_products(self.window - 1, now_ms)
            return []
        return [self._close(now_ms, last=last)]

    def _open(self, now_ms: int) -> None:
        if self._opened is None:
            self._opened = now_ms

    def _close(self, now_ms: int, *, last: bool = False) -> Window:
        assert self._opened is not None
        number = self.window
        self.window += 1
        counts, extremes = self._tally.take()
        found = self._finder.find(counts, extremes)
        for change in self._faults.note(found, telling=counts.rows >= MIN_ROWS):
            self._aside.append(self._fault(change, number, now_ms))
        if last or (number + 1) % TOGETHER == 0:
            self._tell_products(number, now_ms)
        window = Window(
            s=1,  # the outbox numbers records
            t=now_ms,
            model=self.model.name,
            version=self.model.version,
            digest=self.model.digest,
            schema=self.model.schema_digest,
            w=number,
            opened=self._opened,
            rows=counts.rows,
            counts=packed(counts.counts),
            predictions=packed(counts.predictions),
            scores=packed(counts.scores),
            invalid=self._invalid,
            distances=packed(counts.distances),
            values=packed(counts.values),
            moments=PackedMoments.of(counts.moments),
            quality=merge_quality(self._quality, _counted(found)),
        )
        self._opened, self._invalid, self._quality = None, 0, ()
        return window

    def _tell_products(self, number: int, now_ms: int) -> None:
        products = self._tally.take_products()
        if products is not None:
            together = Together(
                s=1,
                t=now_ms,
                model=self.model.name,
                digest=self.model.digest,
                schema=self.model.schema_digest,
                first=self._first_product,
                w=number,
                products=products,
            )
            self._aside.append(together)
        self._first_product = number + 1

    def _fault(self, change: Change, number: int, now_ms: int) -> Fault:
        return Fault(
            s=1,
            t=now_ms,
            model=self.model.name,
            digest=self.model.digest,
            schema=self.model.schema_digest,
            w=number,
            kind=change.kind,
            feature=self._name(change.feature),
            raised=change.raised,
            rate=round(change.rate, 4),
        )

    def _name(self, feature: int) -> str:
        return self.model.profile.features[feature].name


def _counted(found: list[Found]) -> tuple[QualityCount, ...]:
    """Of the findings, those that no cell counts."""
    return tuple(QualityCount(f.kind, f.feature, 1) for f in found if f.kind in FOUND)
