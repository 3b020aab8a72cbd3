"""Monitoring: what is remembered of one device and bundle between windows.

Rules of this room:
* pure; a memory is never changed, `learn` gives the next one; learning the same window again, or an older one, gives
  the memory itself;
* it holds sums and counts, no rows: about 6 KB for 30 features, whatever the device's age;
* everything is by stream, in the layout's order; another set of streams starts afresh;
* a device with a season has two: what its comparisons with the training data amount to, and in `seasonal` what those
  with the same hour of other weeks do. The table of hours is as large as a hundred windows while it is learnt, and
  keeps only the streams that have a season.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DriftError

from . import conformal
from .calibration import Calibration, calibrate
from .drift_settings import DriftSettings
from .joint import JointHistory
from .layout import Block, Counts, Layout
from .season import Table

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

#: The number of no window.
NEVER: Final = -1
#: What of a memory decides about a stream.
_DECIDE: Final = ("learnt", "history", "sums", "walk", "began", "since")
_LARGEST: Final = 16_000_000


@dataclass(frozen=True)
class Memory:
    """The baseline and the detectors of record; arrays begin with the streams' axis unless said otherwise."""

    names: tuple[str, ...]
    window: int  # the last one learnt
    learnt: Ints  # windows in the baseline
    unbroken: Ints  # the first window from which learning was not interrupted: blocks must begin there or later
    moments: Floats  # [levels, streams, 3]: blocks, sum and sum of squares of T
    pooled: Ints  # [streams, cells]: counts over the baseline
    history: Ints  # [streams, conformal.CELLS]: scores seen
    sums: Floats  # [streams, exponents]: the evidence
    walk: Floats  # log evidence since it was last nothing, for dating the change
    began: Ints  # the window after that: since when
    since: Ints  # when the alarm of record was raised, or NEVER
    table: Table | None = None  # the hours of the week; None until a window comes whose hour is known
    seasonal: Memory | None = None  # of the comparisons with them
    joint: JointHistory = field(default_factory=JointHistory)  # of features together

    @classmethod
    def fresh(cls, layout: Layout, settings: DriftSettings) -> Memory:
        """Nothing seen yet."""
        streams, nothing = layout.streams, np.zeros(layout.streams, dtype=np.int64)
        return cls(
            names=tuple(layout.names),
            window=NEVER,
            learnt=nothing,
            unbroken=nothing,
            moments=np.zeros((settings.levels, streams, 3)),
            pooled=np.zeros_like(layout.reference),
            history=np.zeros((streams, conformal.CELLS), dtype=np.int64),
            sums=np.zeros((streams, len(conformal.EPSILONS))),
            walk=np.zeros(streams),
            began=nothing,
            since=np.full(streams, NEVER, dtype=np.int64),
        )

    def fits(self, layout: Layout, settings: DriftSettings) -> bool:
        """Whether it was made with this layout and as many block lengths."""
        shapes = len(self.moments) == settings.levels and self.pooled.shape == layout.reference.shape
        return self.names == tuple(layout.names) and shapes

    @property
    def active(self) -> Bools:
        """Streams whose alarm of record stands."""
        return np.asarray(self.since != NEVER)

    def calibration(self, layout: Layout, settings: DriftSettings, *, seasonal: bool = False) -> Calibration:
        """What the baseline amounts to now; a `seasonal` one is not asked whether it is the training data."""
        return calibrate(
            self.moments,
            self.learnt,
            self.history.sum(axis=1),
            conformal.median(self.history),
            layout.reference if seasonal else self.pooled,
            layout.reference,
            warm_up=settings.warm_up,
            floor=settings.effect_floor,
        )

    @property
    def chosen(self) -> Bools:
        """Streams that are judged by their season."""
        return np.zeros(len(self.names), dtype=np.bool_) if self.table is None else self.table.chosen

    def deciding(self) -> Memory:
        """The detectors that decide: per stream those of its season, or those of the training data."""
        if self.seasonal is None or not self.chosen.any():
            return self
        pairs = ((getattr(self, n), getattr(self.seasonal, n)) for n in _DECIDE)
        mixed = {
            name: np.where(self.chosen if a.ndim == 1 else self.chosen[:, None], b, a)
            for name, (a, b) in zip(_DECIDE, pairs, strict=True)
        }
        return replace(self, **mixed)

    def ranked(self, window: int, scores: Floats, testable: Bools, key: str, line: float) -> Memory:
        """With a window's scores ranked among those before, and bet on.

        Args:
            window: its number.
            scores: T of the window alone, float `[streams]`.
            testable: streams that had enough rows, bool `[streams]`.
            key: of the stream, from which the tie breakers follow.
            line: A, at which the alarm of record is raised.
        """
        open_ = testable & ~self.active
        cell = conformal.cell_of(scores)
        p = conformal.rank_p(self.history, cell, conformal.uniforms(key, window, len(scores)))
        sums = np.where(open_[:, None], conformal.bet(self.sums, p), self.sums)
        step = np.log(0.5) - 0.5 * np.log(np.maximum(p, 1e-300))  # of ε = ½
        walk = np.where(open_, np.maximum(self.walk + step, 0.0), self.walk)
        began = np.where(open_ & (walk <= 0), window + 1, self.began)
        raised = open_ & (conformal.evidence(sums) >= line)
        history = self.history.copy()
        seen = np.flatnonzero(open_ & ~raised)
        history[seen, cell[seen]] += 1
        since = np.where(raised, window, self.since)
        return replace(self, sums=sums, walk=walk, began=began, since=since, history=history)

    def learn(
        self,
        blocks: dict[Block, Floats],
        counts: Counts,
        window: int,
        *,
        healthy: Bools,
        quiet: Bools,
        settings: DriftSettings,
    ) -> Memory:
        """With a window learnt, and alarms of record that have had their time taken back.

        Args:
            blocks: T per stream of the blocks that end with it and had enough rows.
            counts: the window's cells, int `[streams, cells]`.
            window: its number.
            healthy: streams without a fault in this window.
            quiet: streams in which no latest block is beyond its line.
            settings: how long baselines are, and alarms of record stand.
        """
        over = self.active & quiet & (window - self.since >= settings.history)
        since = np.where(over, NEVER, self.since)
        sums, walk = np.where(over[:, None], 0.0, self.sums), np.where(over, 0.0, self.walk)
        began = np.where(over, window + 1, self.began)
        learning = healthy & ~self.active & (self.learnt < settings.baseline)
        unbroken = np.where(healthy & ~self.active, self.unbroken, window + 1)
        moments = self.moments.copy()
        for block, statistic in blocks.items():
            taken = learning & (block.start >= unbroken)
            level = block.size.bit_length() - 1
            step = np.stack([np.ones_like(statistic), statistic, statistic**2], axis=-1)
            moments[level] += np.where(taken[:, None], step, 0.0)
        base = any(block.size == 1 for block in blocks)
        learnt = self.learnt + (learning & base)
        pooled = self.pooled + np.where((learning & base)[:, None], counts, 0)
        return replace(
            self,
            window=window,
            learnt=learnt,
            unbroken=unbroken,
            moments=moments,
            pooled=pooled,
            sums=sums,
            walk=walk,
            began=began,
            since=since,
        )


class _Stored(msgspec.Struct, frozen=True):
    """A memory as bytes: arrays little-endian, in the order of the class."""

    names: tuple[str, ...]
    window: int
    levels: int
    cells: int
    arrays: tuple[bytes, ...]
    table: tuple[bytes, ...] = ()
    closed: bool = False
    seasonal: bytes = b""
    joint: JointHistory = JointHistory()


def pack(memory: Memory) -> bytes:
    """The memory as bytes."""
    integers = (memory.learnt, memory.unbroken, memory.pooled, memory.history, memory.began, memory.since)
    arrays = tuple(a.astype("<i8").tobytes() for a in integers)
    arrays += tuple(a.astype("<f8").tobytes() for a in (memory.moments, memory.sums, memory.walk))
    stored = _Stored(
        memory.names,
        memory.window,
        len(memory.moments),
        memory.pooled.shape[-1],
        arrays,
        table=() if memory.table is None else _table_bytes(memory.table),
        closed=memory.table is not None and memory.table.closed,
        seasonal=b"" if memory.seasonal is None else pack(memory.seasonal),
        joint=memory.joint,
    )
    return zlib.compress(msgspec.msgpack.encode(stored), 1)


def _table_bytes(table: Table) -> tuple[bytes, ...]:
    # What nobody has learnt takes no room: the counts are by stream, and of one without any, none are kept.
    some = table.counts.any(axis=(0, 2))
    return (
        some.astype("<u1").tobytes(),
        table.counts[:, some].astype("<u4").tobytes(),
        *(a.astype("<i8").tobytes() for a in (table.weeks, table.last)),
        *(a.astype("<f8").tobytes() for a in (table.agreement, table.size)),
        table.chosen.astype("<u1").tobytes(),
    )


def _table_of(stored: _Stored) -> Table | None:
    if not stored.table:
        return None
    fresh = Table.fresh(len(stored.names), stored.cells)
    some, counts, weeks, last, agreement, size, chosen = stored.table
    fresh.counts[:, np.frombuffer(some, "<u1").astype(np.bool_)] = np.frombuffer(counts, "<u4").reshape(
        len(fresh.counts), -1, stored.cells
    )
    table = Table(
        counts=fresh.counts,
        weeks=np.frombuffer(weeks, "<i8"),
        last=np.frombuffer(last, "<i8"),
        agreement=np.frombuffer(agreement, "<f8").reshape(fresh.agreement.shape),
        size=np.frombuffer(size, "<f8"),
        chosen=np.frombuffer(chosen, "<u1").astype(np.bool_),
        closed=stored.closed,
    )
    if any(getattr(table, n).shape != getattr(fresh, n).shape for n in ("weeks", "last", "size", "chosen")):
        raise ValueError("The table of hours is of another size.")
    return table


def unpack(data: bytes) -> Memory:
    """The memory that `pack` made bytes of.

    Raises:
        DriftError: drift.unknown when the bytes are not a memory; it can be made again from the windows.
    """
    try:
        inflater = zlib.decompressobj()
        stored = msgspec.msgpack.decode(inflater.decompress(data, _LARGEST), type=_Stored)
        learnt, unbroken, pooled, history, began, since = (np.frombuffer(a, "<i8") for a in stored.arrays[:6])
        moments, sums, walk = (np.frombuffer(a, "<f8") for a in stored.arrays[6:])
        streams = len(stored.names)
        return Memory(
            names=stored.names,
            window=stored.window,
            learnt=learnt,
            unbroken=unbroken,
            moments=moments.reshape(stored.levels, streams, 3),
            pooled=pooled.reshape(streams, stored.cells),
            history=history.reshape(streams, conformal.CELLS),
            sums=sums.reshape(streams, len(conformal.EPSILONS)),
            walk=walk,
            began=began,
            since=since,
            table=_table_of(stored),
            seasonal=unpack(stored.seasonal) if stored.seasonal else None,
            joint=stored.joint,
        )
    except (zlib.error, msgspec.MsgspecError, ValueError) as e:
        raise DriftError("drift.unknown", f"The remembered state of a stream is not readable: {e}") from e
