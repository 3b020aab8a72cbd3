"""Monitoring: which cells of a window make which stream, and what the reference counted in them.

Rules of this room:
* pure; the layout follows from the profile and the exclusions alone: data never choose their own bins;
* at most `TEST_BINS` cells and missing per feature; finer ones cost power and tell no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DataError
from lightship_agent.contract.profile import SCORE_BINS, FeatureBins, ReferenceProfile, WindowCounts

from .drift_settings import DriftSettings
from .verdict import StreamKind

Counts = npt.NDArray[np.int64]

#: Bins per feature that the tests keep: finer ones cost power and tell no more.
TEST_BINS: Final = 10
#: The name of the stream of predictions: classes, or a regressor's values.
PREDICTIONS: Final = "prediction"
#: The name of the stream of D², the distance of a row from the middle of the reference: how features go together.
TOGETHER: Final = "features together"


class Block(NamedTuple):
    """`size` windows beginning with `start`, aligned: `start` is a multiple of `size`."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """The window after the last one."""
        return self.start + self.size


def merge_starts(bins: int) -> list[int]:
    """Where the merged cells of a feature with `bins` bins begin, in the layout [under, bins…, over, missing].

    Adjacent pairs are merged where there are more than `TEST_BINS`, an odd last bin stays alone; missing is kept. A
    function of the number alone: data never choose their own bins. For that reason under and over go with the outer
    bins: their borders are the reference's own extremes, so it is sure to have counted nothing there, and as cells
    of their own they made the test alarm up to 2.8 times too often. The exact range check sees to them.
    """
    step = 2 if bins > TEST_BINS else 1
    return [0, *range(1 + step, bins + 1, step), bins + 2]


class Layout:
    """Which cells make which stream, and what the reference counted in them."""

    def __init__(self, profile: ReferenceProfile, settings: DriftSettings, importances: Mapping[str, float]) -> None:
        self.profile = profile
        self.classes = len(profile.predictions)
        self.offsets = profile.offsets
        self.kept = [i for i, f in enumerate(profile.features) if f.name not in settings.exclude]
        self.names: list[str] = [profile.features[i].name for i in self.kept]
        self.kinds: list[StreamKind] = ["feature"] * len(self.kept)
        self._predicts = sum(profile.predictions) >= settings.min_rows
        if len(profile.scores) not in (0, self.classes * SCORE_BINS):
            message = f"Expected {self.classes} × {SCORE_BINS} score counts, found {len(profile.scores)}."
            raise DataError("data.profile-mismatch", message)
        scores = np.asarray(profile.scores, dtype=np.int64).reshape(-1, SCORE_BINS)
        self._scored = np.flatnonzero(scores.sum(axis=1) >= settings.min_rows)
        if self._predicts:
            self.names.append(PREDICTIONS)
            self.kinds.append("prediction")
        self.names += [f"score of {_label(profile, int(c))}" for c in self._scored]
        self.kinds += ["score"] * len(self._scored)
        self._further = [(name, kind, bins) for name, kind, bins in _further(profile) if bins.counts]
        self.names += [name for name, _, _ in self._further]
        self.kinds += [kind for _, kind, _ in self._further]
        self.streams = len(self.names)
        self._place()
        more = [np.asarray(bins.counts, np.int64) for _, _, bins in self._further]
        vector = np.concatenate([profile.counts, np.asarray(profile.predictions, np.int64), scores.ravel(), *more])
        self.raw_reference = vector
        self.reference = self.cells(vector[None, :])[0]
        self.quality_reference = [vector[part].tolist() for part in self.raw[: len(self.kept)]]
        self.weights = self._weights(importances)

    def _place(self) -> None:
        """Lay out the merged cells: where each begins in the flat vector, and its (stream, column)."""
        starts: list[int] = []
        rows: list[int] = []
        columns: list[int] = []
        self.raw: list[slice] = []
        end = 0

        def place(at: int, relative: list[int], length: int) -> None:
            # An excluded stretch before this one becomes a cell that no stream takes.
            nonlocal end
            if at > end:
                starts.append(end)
                rows.append(self.streams)
                columns.append(0)
            starts.extend(at + s for s in relative)
            rows.extend([len(self.raw)] * len(relative))
            columns.extend(range(len(relative)))
            self.raw.append(slice(at, at + length))
            end = at + length

        for i in self.kept:
            cells = self.profile.features[i].cells
            place(self.offsets[i], merge_starts(cells - 3), cells)
        base = self.offsets[-1]
        if self._predicts:
            place(base, list(range(self.classes)), self.classes)
        for c in self._scored:
            place(base + self.classes + int(c) * SCORE_BINS, list(range(0, SCORE_BINS, 2)), SCORE_BINS)
        at = base + self.classes + len(self.profile.scores)
        for _, _, bins in self._further:
            place(at, merge_starts(bins.cells - 3), bins.cells)
            at += bins.cells
        self._starts = np.asarray(starts, dtype=np.intp)
        self._rows = np.asarray(rows, dtype=np.intp)
        self._columns = np.asarray(columns, dtype=np.intp)
        self._end = end
        self._depth = max(columns, default=0) + 1

    def _weights(self, importances: Mapping[str, float]) -> list[float]:
        """Each stream's importance, relative to the largest; 1 where the manifest says nothing."""
        largest = max((v for v in importances.values()), default=0.0)
        if not largest > 0:
            return [1.0] * self.streams
        known = [max(importances.get(n, 0.0), 0.0) / largest for n in self.names]
        return [w if kind == "feature" else 1.0 for w, kind in zip(known, self.kinds, strict=True)]

    def flat(self, window: WindowCounts) -> Counts:
        """All of a window's counts in one vector.

        Raises:
            DataError: data.profile-mismatch.
        """
        expected = (self.offsets[-1], self.classes, len(self.profile.scores))
        found = (len(window.counts), len(window.predictions), len(window.scores))
        if found != expected:
            raise DataError("data.profile-mismatch", f"Expected {expected} counts, found {found}.")
        told = {TOGETHER: window.distances, PREDICTIONS: window.values}
        more: list[Sequence[int]] = []
        for name, _, bins in self._further:
            # What a window doesn't tell, or tells of other bins, is not counted: it has no rows there.
            counts = told[name]
            more.append(counts if len(counts) == bins.cells else (0,) * bins.cells)
        parts = (window.counts, window.predictions, window.scores, *more)
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])

    def cells(self, vectors: Counts) -> Counts:
        """The streams' merged cells `[blocks, streams, depth]` of flat vectors `[blocks, cells]`; 0 where padded."""
        out = np.zeros((len(vectors), self.streams + 1, self._depth), dtype=np.int64)
        if len(self._starts):
            out[:, self._rows, self._columns] = np.add.reduceat(vectors[:, : self._end], self._starts, axis=1)
        return out[:, : self.streams]


def _further(profile: ReferenceProfile) -> list[tuple[str, StreamKind, FeatureBins]]:
    """The streams besides features, classes and scores."""
    found: list[tuple[str, StreamKind, FeatureBins]] = []
    if profile.moments is not None and profile.moments.distance is not None:
        found.append((TOGETHER, "joint", profile.moments.distance))
    if profile.values is not None:
        found.append((PREDICTIONS, "prediction", profile.values))
    return found


def _label(profile: ReferenceProfile, index: int) -> str:
    return profile.labels[index] if index < len(profile.labels) else f"class {index}"
