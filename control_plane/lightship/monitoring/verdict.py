"""Monitoring: what one evaluation of one stream of windows says.

Rules of this room: plain facts, stored as JSON and shown to people; nothing is decided here.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .joint import JointShift

StreamKind = Literal["feature", "prediction", "score", "joint"]
AlarmKind = Literal["shift", "missing", "range", "stuck", "performance", "joint"]
Level = Literal["ok", "warning", "critical"]
ResidualSide = Literal["up", "down", "wider"]


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
    since: int | None = None  # the window in which the change seems to have begun
    evidence: float = 0.0  # of the alarm of record, relative to its line: raised at 1
    seasonal: bool = False  # against the same hours of other weeks, not the training data


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
    confirmed: bool  # the alarm of record stands too; before calibration: the same was seen on other rows before


class Calibrated(msgspec.Struct, frozen=True, kw_only=True):
    """How far the device's own history goes, and what it says."""

    windows: int  # learnt, of the stream with the fewest
    needed: int  # before the device is judged by its own history
    ready: int  # streams that are
    streams: int
    phi: float  # the largest of all streams: the mean of T over its degrees of freedom, 1 for independent rows
    phi_name: str  # and whose it is
    away: tuple[str, ...]  # streams that have differed from the training data since the device was looked at first
    lag: float = 0.0  # the largest correlation of a feature's neighbouring rows; 0 where none repeats
    lag_name: str = ""  # and whose it is
    every: int = 1  # one row in so many carries nearly the same information


class Season(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the hours of the week."""

    weeks: int  # learnt of the hour that was seen most often
    needed: int  # of every hour
    hours: int  # of the week that were seen at all
    streams: tuple[str, ...]  # that are compared with the same hour of other weeks
    over: bool  # all is learnt: who has no season now has none


class Performance(msgspec.Struct, frozen=True, kw_only=True):
    """What labels say."""

    labelled: int  # since `since`
    errors: int
    rate: float
    expected: float  # of the held-out rows
    tolerated: float  # and the floor above it
    since: int  # the window in which the errors seem to have risen, or the first one
    evidence: float  # relative to the line: an alarm at 1
    alarm: bool
    phi: float = 1.0  # how much more windows differ than chance has it: 1 for labels that are independent


class ResidualShift(msgspec.Struct, frozen=True, kw_only=True):
    """What labels say of a regressor's residuals (truth less prediction) on one side.

    Up: above the upper quartile of the held-out ones; down: below the lower one; wider: in the outer twentieths.
    """

    side: ResidualSide
    labelled: int  # since `since`
    share: float
    expected: float  # of the held-out rows
    tolerated: float
    bias: float | None  # in standard deviations of the held-out residuals, about; None: no sums came
    spread: float | None  # in multiples of theirs, about
    since: int  # the window in which they seem to have begun to move, or the first one
    evidence: float  # relative to the line: an alarm at 1
    alarm: bool
    phi: float = 1.0  # how much more windows differ than chance has it: 1 for labels that are independent


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What scores let expect where labels don't come."""

    rows: int
    accuracy: float
    low: float  # 95 % interval, of the rows and of the calibration
    high: float
    expected: float  # of the held-out rows
    f1: float | None  # of class 1 of two
    auc: float | None  # of two classes
    blind_spot: str


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
    calibrated: Calibrated | None = None  # None: judged without a memory
    performance: Performance | None = None  # None: no labels
    residuals: tuple[ResidualShift, ...] = ()  # of a regressor, the most evident first
    estimate: Estimate | None = None  # None: the model gives no scores, or nobody counted what they are worth
    joint: JointShift | None = None  # of the latest stretch of windows whose products came, with this window
    season: Season | None = None  # None: no window's hour was known
    leaning: tuple[str, ...] = ()  # streams that may have shifted: p < 0.05 in a latest block, or the record stands
    record: dict[str, int] = {}  # streams whose alarm of record stands, and since which window
