"""Monitoring: is what this device sees still what the model was trained on?

Rules of this room:
* pure: profile, windows and settings in, a verdict out; no I/O, clock, thread or randomness;
* the test is T = min(X², G) on two samples of counts, against a noncentral χ² whose noncentrality is the effect
  floor: a shift smaller than the floor is tolerated at any sample size, and the reference's own noise counts;
* windows are tested alone and in aligned blocks of 2, 4, … windows. A block of 2^j is tested once, when its last
  window is in, at a level proportional to its length; the expected false alarms are the sum of the levels, which
  is the budget, whatever the dependence between tests;
* a window without rows is still a window: a gap is passed as `empty_counts`, so that blocks stay aligned;
* nothing depends on the order in which windows came over the network; sorting and removing duplicates is the
  caller's part.

The guarantee is for rows that are exchangeable with the reference. Strongly autocorrelated rows have to be thinned
by the device before they are counted, and a device with a lasting offset of its own above the floor does alarm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DataError, DriftError, SettingsError
from lightship_agent.contract.profile import SCORE_BINS, ReferenceProfile, WindowCounts

from .tails import beta_binomial_sf
from .two_sample import psi_debiased, psi_exceeds, two_sample

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
StreamKind = Literal["feature", "prediction", "score"]
AlarmKind = Literal["shift", "missing", "range", "stuck"]
Level = Literal["ok", "warning", "critical"]

#: Bins per feature that the tests keep: finer ones cost power and tell no more.
TEST_BINS: Final = 10
#: The name of the stream of predicted classes.
PREDICTIONS: Final = "prediction"


class DriftSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator may set."""

    budget: float = 1.0  # false alarms per device and horizon that are acceptable
    horizon_windows: int = 8_760  # a year of hours
    effect_floor: float = 0.02  # w0², on the scale of PSI; 0.02 is a mean shift of about 0.14 sd
    levels: int = 6  # blocks of 1, 2, 4, … 32 windows
    min_rows: int = 50  # a block of fewer rows isn't tested
    exclude: tuple[str, ...] = ()  # features that drift by nature: ids, clocks
    quality_share: float = 0.2  # of the budget, spent on missing, out-of-range and stuck features
    quality_floor: float = 0.005  # rise of a missing or out-of-range rate that is tolerated
    device_alpha: float = 0.01  # per device, when the drifting devices of a fleet are counted
    fleet_share: float = 0.5  # of the devices must drift together for it to be the fleet
    fleet_alpha: float = 0.001  # how unlikely that count must be by chance

    def __post_init__(self) -> None:
        """Refuse what can't work.

        Raises:
            SettingsError: settings.invalid.
        """
        shares = (self.quality_share, self.device_alpha, self.fleet_share, self.fleet_alpha)
        positive = self.budget > 0 and self.horizon_windows >= 1 and self.min_rows >= 1
        if not (positive and all(0 < s < 1 for s in shares)):
            raise SettingsError("settings.invalid", "Drift: budget, horizon and rows are positive, shares in (0, 1).")
        if not (1 <= self.levels <= 16 and self.effect_floor >= 0 and 0 <= self.quality_floor < 1):
            raise SettingsError("settings.invalid", "Drift: expected 1 to 16 levels, floors of at least 0.")

    @property
    def history(self) -> int:
        """Windows to hand to `judge_stream`: two of the longest blocks, so that dwell can be seen at every level."""
        return int(2**self.levels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths of the ladder's blocks, in windows, ascending."""
        return tuple(2**j for j in range(self.levels))

    def alpha(self, size: int, streams: int) -> float:
        """The level of one test of a block of `size` windows, one of `streams` that share the ladder's budget."""
        return (1 - self.quality_share) * self.budget * size / (self.levels * streams * self.horizon_windows)

    def quality_alpha(self, size: int, streams: int) -> float:
        """The same for one data-quality test."""
        return self.quality_share * self.budget * size / (self.levels * streams * self.horizon_windows)


class FeatureShift(msgspec.Struct, frozen=True, kw_only=True):
    """How one stream differs from the reference in its most telling block."""

    name: str
    kind: StreamKind
    psi: float  # debiased
    psi_low: float  # 95 % interval
    psi_high: float
    p_value: float  # of "no more than the floor"
    level_windows: int  # the block's length, in windows
    first_window: int  # its first window
    rows: int
    score: float  # importance × psi: what to look at first
    alarm: bool  # beyond the budget's line
    current: tuple[int, ...]  # unmerged cells, for plotting
    reference: tuple[int, ...]


class QualityFault(msgspec.Struct, frozen=True, kw_only=True):
    """A feature that is missing, out of range or stuck more often than the reference explains."""

    name: str
    kind: Literal["missing", "range", "stuck"]
    rate: float
    reference_rate: float
    p_value: float
    level_windows: int
    first_window: int
    rows: int


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """A test that crossed its line at this evaluation."""

    name: str
    kind: AlarmKind
    level_windows: int
    first_window: int
    confirmed: bool  # it also did at the evaluation, or the equal block, before


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What one evaluation of one stream of windows says.

    `level` and `alarms` speak of the tests that became due with this window, so that each is counted once.
    `evidence`, `quality` and `p_value` speak of the latest block of every length.
    """

    level: Level
    window: int  # number of the last window judged
    rows: int  # in it
    tested: tuple[int, ...]  # lengths of the blocks that were due and had enough rows
    alarms: tuple[Alarm, ...]
    evidence: tuple[FeatureShift, ...]  # what to look at first comes first
    quality: tuple[QualityFault, ...]
    p_value: float | None  # of the device as a whole, corrected for the number of tests; None: nothing to test


def judge_stream(
    profile: ReferenceProfile,
    windows: Sequence[WindowCounts],
    first_window: int,
    settings: DriftSettings,
    importances: Mapping[str, float] | None = None,
) -> Verdict:
    """Judge the last of `windows`, and the blocks that end with it.

    Warning: a test that is due now crosses its line. Critical: the same stream did so before, at the evaluated
    window before or in the block of the same length before, on rows the two tests don't share (one bad window makes
    the longer blocks around it alarm too), and the lower end of its debiased PSI is above the floor. For a
    data-quality fault the repetition is enough.

    Args:
        profile: the reference of the bundle that counted the windows.
        windows: consecutive windows of one device and one bundle; `settings.history` of them are enough.
        first_window: the number of the first one within the stream, from 0.
        settings: budget, floors, exclusions.
        importances: mean |attribution| per feature, from the manifest; ranks the evidence.

    Raises:
        DriftError: drift.unknown when there is no window.
        DataError: data.profile-mismatch when counts and profile have different layouts.
    """
    if not windows:
        raise DriftError("drift.unknown", "Expected at least one window, found none.")
    layout = _Layout(profile, settings, importances or {})
    ladder = _Ladder(layout, windows, first_window, settings)
    last = first_window + len(windows) - 1
    due = ladder.ending_at(last)
    before = next((found for e in range(last - 1, first_window - 1, -1) if (found := ladder.ending_at(e))), [])
    standing = [b for size in settings.sizes if (b := ladder.latest(size))]
    repeated = [b for block in due if (b := ladder.preceding(block))]
    ladder.test({*due, *before, *standing, *repeated})
    evidence = _evidence(layout, ladder, standing)
    alarms = _alarms(layout, ladder, due, before)
    return Verdict(
        level="critical" if any(a.confirmed for a in alarms) else "warning" if alarms else "ok",
        window=last,
        rows=windows[-1].rows,
        tested=tuple(b.size for b in due),
        alarms=alarms,
        evidence=evidence,
        quality=_quality(ladder, standing),
        p_value=_device_p(ladder, standing),
    )


def shift_table(
    profile: ReferenceProfile,
    counts: WindowCounts,
    settings: DriftSettings,
    importances: Mapping[str, float] | None = None,
) -> tuple[FeatureShift, ...]:
    """Every stream's shift in `counts`, the largest importance × shift first; for display, it raises no alarm.

    Raises:
        DataError: data.profile-mismatch.
    """
    layout = _Layout(profile, settings, importances or {})
    ladder = _Ladder(layout, [counts], 0, settings)
    block = _Block(0, 1)
    ladder.test({block})
    everything = [(s, block) for s in range(layout.streams)]
    return _shifts(layout, ladder, everything, alarms=False)


def merge_starts(bins: int) -> list[int]:
    """Where the merged cells of a feature with `bins` bins begin, in the layout [under, bins…, over, missing].

    Adjacent pairs are merged where there are more than `TEST_BINS`, an odd last bin stays alone; missing is kept. A
    function of the number alone: data never choose their own bins. For that reason under and over go with the outer
    bins: their borders are the reference's own extremes, so it is sure to have counted nothing there, and as cells
    of their own they made the test alarm up to 2.8 times too often. The exact range check sees to them.
    """
    step = 2 if bins > TEST_BINS else 1
    return [0, *range(1 + step, bins + 1, step), bins + 2]


class _Block(NamedTuple):
    """`size` windows beginning with `start`, aligned: `start` is a multiple of `size`."""

    start: int
    size: int


class _Layout:
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
        self.streams = len(self.names)
        self._place()
        vector = np.concatenate([profile.counts, np.asarray(profile.predictions, np.int64), scores.ravel()])
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
        return np.array(window.counts + window.predictions + window.scores, dtype=np.int64)

    def cells(self, vectors: Counts) -> Counts:
        """The streams' merged cells `[blocks, streams, depth]` of flat vectors `[blocks, cells]`; 0 where padded."""
        out = np.zeros((len(vectors), self.streams + 1, self._depth), dtype=np.int64)
        if len(self._starts):
            out[:, self._rows, self._columns] = np.add.reduceat(vectors[:, : self._end], self._starts, axis=1)
        return out[:, : self.streams]


class _Ladder:
    """Block sums of a run of windows, and the tests made on them."""

    def __init__(self, layout: _Layout, windows: Sequence[WindowCounts], first: int, settings: DriftSettings) -> None:
        self.layout, self.settings, self.first = layout, settings, first
        self.end = first + len(windows)
        matrix = np.stack([layout.flat(w) for w in windows])
        self._sums = np.concatenate([np.zeros((1, matrix.shape[1]), dtype=np.int64), np.cumsum(matrix, axis=0)])
        self._rows = np.concatenate([[0], np.cumsum([w.rows for w in windows], dtype=np.int64)])
        self.p_values: dict[_Block, Floats] = {}
        self.over: dict[_Block, npt.NDArray[np.bool_]] = {}  # beyond the line
        self.faults: dict[_Block, tuple[QualityFault, ...]] = {}

    def rows(self, block: _Block) -> int:
        """Rows in a block."""
        return int(self._rows[block.start + block.size - self.first] - self._rows[block.start - self.first])

    def counts(self, block: _Block) -> Counts:
        """A block's flat counts."""
        summed: Counts = self._sums[block.start + block.size - self.first] - self._sums[block.start - self.first]
        return summed

    def _testable(self, block: _Block) -> bool:
        within = block.start >= self.first and block.start + block.size <= self.end
        return within and self.rows(block) >= self.settings.min_rows

    def ending_at(self, window: int) -> list[_Block]:
        """The testable blocks whose last window is `window`."""
        blocks = (_Block(window + 1 - s, s) for s in self.settings.sizes if (window + 1) % s == 0)
        return [b for b in blocks if self._testable(b)]

    def latest(self, size: int) -> _Block | None:
        """The last complete block of `size`, if it is testable."""
        block = _Block(self.end // size * size - size, size)
        return block if self._testable(block) else None

    def preceding(self, block: _Block) -> _Block | None:
        """The block of the same length before, if it is testable."""
        earlier = _Block(block.start - block.size, block.size)
        return earlier if self._testable(earlier) else None

    def test(self, blocks: set[_Block]) -> None:
        """Test all streams of all `blocks` in one go."""
        ordered = sorted(blocks)
        if not ordered:
            return
        cells = self.layout.cells(np.stack([self.counts(b) for b in ordered]))
        tests = two_sample(cells, self.layout.reference)
        p = tests.p_value(self.settings.effect_floor)
        p[(tests.current < self.settings.min_rows) | (tests.reference < self.settings.min_rows)] = 1.0
        for block, values in zip(ordered, p, strict=True):
            self.p_values[block] = values
            self.over[block] = values < self.settings.alpha(block.size, max(self.layout.streams, 1))
            self.faults[block] = _quality_faults(self.layout, block, self.counts(block), self.settings)

    def crossed(self, block: _Block) -> list[tuple[AlarmKind, str]]:
        """What crossed its line in a tested block."""
        keys: list[tuple[AlarmKind, str]] = [("shift", self.layout.names[s]) for s in np.flatnonzero(self.over[block])]
        return keys + [(fault.kind, fault.name) for fault in self.faults[block]]


def _alarms(layout: _Layout, ladder: _Ladder, due: list[_Block], before: list[_Block]) -> tuple[Alarm, ...]:
    """The tests that cross their line now, and whether others did so before on rows that these don't share."""
    found: list[Alarm] = []
    for block in due:
        disjoint = [b for b in before if b.start + b.size <= block.start]
        previous = ladder.preceding(block)
        earlier = {key for b in [*disjoint, *([previous] if previous else [])] for key in ladder.crossed(b)}
        for kind, name in ladder.crossed(block):
            confirmed = (kind, name) in earlier and (kind != "shift" or _material(layout, ladder, block, name))
            found.append(
                Alarm(name=name, kind=kind, level_windows=block.size, first_window=block.start, confirmed=confirmed)
            )
    return tuple(found)


def _material(layout: _Layout, ladder: _Ladder, block: _Block, name: str) -> bool:
    """Whether the shift's lower end is above the floor."""
    s = layout.names.index(name)
    cells = layout.cells(ladder.counts(block)[None, :])[0, s]
    return bool(psi_exceeds(cells, layout.reference[s], ladder.settings.effect_floor))


def _evidence(layout: _Layout, ladder: _Ladder, standing: list[_Block]) -> tuple[FeatureShift, ...]:
    """The streams that stand out in their most telling block."""
    tests = max(1, len(standing) * layout.streams)
    chosen: list[tuple[int, _Block]] = []
    for s in range(layout.streams):
        # Every length has its own line: compare p-values relative to it.
        block = min(standing, key=lambda b: (ladder.p_values[b][s] / b.size, b.size), default=None)
        if block and (ladder.over[block][s] or ladder.p_values[block][s] * tests < ladder.settings.device_alpha):
            chosen.append((s, block))
    return _shifts(layout, ladder, chosen, alarms=True)


def _shifts(
    layout: _Layout, ladder: _Ladder, chosen: list[tuple[int, _Block]], *, alarms: bool
) -> tuple[FeatureShift, ...]:
    if not chosen:
        return ()
    vectors = [ladder.counts(b) for _, b in chosen]
    cells = layout.cells(np.stack(vectors))[np.arange(len(chosen)), [s for s, _ in chosen]]
    psi, low, high = psi_debiased(cells, layout.reference[[s for s, _ in chosen]])
    shifts = [
        FeatureShift(
            name=layout.names[s],
            kind=layout.kinds[s],
            psi=float(psi[i]),
            psi_low=float(low[i]),
            psi_high=float(high[i]),
            p_value=float(ladder.p_values[block][s]),
            level_windows=block.size,
            first_window=block.start,
            rows=int(cells[i].sum()),
            score=layout.weights[s] * float(psi[i]),
            alarm=alarms and bool(ladder.over[block][s]),
            current=tuple(int(c) for c in vectors[i][layout.raw[s]]),
            reference=tuple(int(c) for c in layout.raw_reference[layout.raw[s]]),
        )
        for i, (s, block) in enumerate(chosen)
    ]
    return tuple(sorted(shifts, key=lambda e: (-e.score, -e.psi, e.name)))


def _quality(ladder: _Ladder, standing: list[_Block]) -> tuple[QualityFault, ...]:
    """The faults of the latest blocks, one per feature and kind: that of the shortest block."""
    faults: dict[tuple[str, str], QualityFault] = {}
    for block in standing:
        for fault in ladder.faults[block]:
            faults.setdefault((fault.name, fault.kind), fault)
    return tuple(faults.values())


def _device_p(ladder: _Ladder, standing: list[_Block]) -> float | None:
    """The smallest p-value of the latest blocks times their number (Bonferroni)."""
    if not standing or not ladder.layout.streams:
        return None
    values = np.concatenate([ladder.p_values[b] for b in standing])
    return min(1.0, float(values.min()) * len(values))


def _quality_faults(
    layout: _Layout, block: _Block, counts: Counts, settings: DriftSettings
) -> tuple[QualityFault, ...]:
    """Missing, out-of-range and stuck features of one block, from its flat counts."""
    alpha = settings.quality_alpha(block.size, 3 * max(len(layout.kept), 1))
    faults: list[QualityFault] = []
    # Plain integers: a few cells at a time are quicker without numpy.
    plain: list[int] = counts.tolist()
    for s, reference in enumerate(layout.quality_reference):
        held = plain[layout.raw[s]]
        rows = sum(held)
        if rows < settings.min_rows or sum(reference) < settings.min_rows:
            continue
        for kind, seen, known, p in _quality_tests(held, reference, settings.quality_floor):
            if p < alpha:
                faults.append(
                    QualityFault(
                        name=layout.names[s],
                        kind=kind,
                        rate=seen,
                        reference_rate=known,
                        p_value=p,
                        level_windows=block.size,
                        first_window=block.start,
                        rows=rows,
                    )
                )
    return tuple(faults)


def _quality_tests(
    current: Sequence[int], reference: Sequence[int], floor: float
) -> list[tuple[Literal["missing", "range", "stuck"], float, float, float]]:
    """(kind, rate, reference rate, p) of each check that could fail, by exact beta-binomial tails.

    Missing after r of N reference rows: X ~ BetaBinomial(n; r + ½ + δN, N − r + ½), δ the tolerated rise. Out of
    range: low and high are the reference's own extremes, and the share of new rows beyond both is Beta(2, N − 1).
    Stuck: all present values in one cell, which held r of the reference's values.
    """
    n, big = sum(current), sum(reference)
    tolerated = floor * big
    found: list[tuple[Literal["missing", "range", "stuck"], float, float, float]] = []
    missing, known = current[-1], reference[-1]
    if missing / n > known / big + floor:
        p = beta_binomial_sf(missing - 1, n, known + 0.5 + tolerated, max(big - known + 0.5, 1.0))
        found.append(("missing", missing / n, known / big, p))
    beyond, was = current[0] + current[-2], reference[0] + reference[-2]
    if beyond / n > was / big + floor:
        p = beta_binomial_sf(beyond - 1, n, was + 2.0 + tolerated, max(big - was - 1.0, 1.0))
        found.append(("range", beyond / n, was / big, p))
    present, present_reference = n - missing, big - known
    fullest = max(current[:-1])
    held = reference[current.index(fullest)]
    if fullest == present >= 2 and held < present_reference:
        p = beta_binomial_sf(present - 1, present, held + 0.5, max(present_reference - held + 0.5, 1.0))
        found.append(("stuck", 1.0, held / present_reference, p))
    return found


def _label(profile: ReferenceProfile, index: int) -> str:
    return profile.labels[index] if index < len(profile.labels) else f"class {index}"
