"""Monitoring: what the operator may set about drift, and how the budget is shared out.

Rules of this room: pure; every default is safe; a value that can't work is refused with its name.
"""

from __future__ import annotations

import msgspec

from lightship_agent.contract.codes import SettingsError


class DriftSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator may set."""

    budget: float = 1.0  # false alarms per device and horizon that are acceptable
    horizon_windows: int = 8_760  # a year of hours
    effect_floor: float = 0.02  # w0², on the scale of PSI; 0.02 is a mean shift of about 0.14 sd
    levels: int = 6  # blocks of 1, 2, 4, … 32 windows
    min_rows: int = 50  # a block of fewer rows isn't tested
    exclude: tuple[str, ...] = ()  # features that drift by nature: ids, clocks
    quality_share: float = 0.2  # of the budget, spent on missing, out-of-range and stuck features
    performance_share: float = 0.1  # of the budget, spent on labelled errors and residuals
    joint_share: float = 0.05  # of the budget, spent on pairs of features that go together otherwise
    quality_floor: float = 0.005  # rise of a missing or out-of-range rate that is tolerated
    performance_floor: float = 0.01  # rise of the error rate that is tolerated
    residual_floor: float = 0.1  # bias of residuals in held-out sd, and growth of their spread, that are tolerated
    warm_up: int = 48  # windows of its own that a device is calibrated on, at least
    baseline: int = 336  # and at most: two weeks of hours
    season_weeks: int = 4  # in which each hour of the week is learnt; 0: no seasons
    device_alpha: float = 0.01  # per device, when the drifting devices of a fleet are counted
    fleet_share: float = 0.5  # of the devices must drift together for it to be the fleet
    segments: tuple[str, ...] = ()  # labels of devices by which they are also judged
    segment_devices: int = 3  # that have a value of a label, at least
    fleet_alpha: float = 0.001  # how unlikely that count must be by chance
    common_floor: float = 0.005  # w² of a shift of all devices together that is tolerated: a mean shift of 0.07 sd

    def __post_init__(self) -> None:
        """Refuse what can't work.

        Raises:
            SettingsError: settings.invalid.
        """
        parts = (self.quality_share, self.performance_share, self.joint_share)
        shares = (*parts, self.device_alpha, self.fleet_share, self.fleet_alpha)
        positive = self.budget > 0 and self.horizon_windows >= 1 and self.min_rows >= 1
        if not (positive and all(0 < s < 1 for s in shares) and self.ladder_share > 0):
            raise SettingsError("settings.invalid", "Drift: budget, horizon and rows are positive, shares in (0, 1).")
        floors = (self.quality_floor, self.performance_floor, self.residual_floor)
        sound = min(self.effect_floor, self.common_floor, *floors) >= 0 and max(floors) < 1
        if not (1 <= self.levels <= 16 and sound):
            raise SettingsError("settings.invalid", "Drift: expected 1 to 16 levels, floors of at least 0.")
        if not 0 <= self.season_weeks <= 52 or self.season_weeks == 1:
            raise SettingsError("settings.invalid", "Drift: a season takes 2 to 52 weeks, or 0 to look for none.")
        if not 8 <= self.warm_up <= self.baseline:
            raise SettingsError("settings.invalid", "Drift: expected 8 ≤ warm-up ≤ baseline, in windows.")

    @property
    def history(self) -> int:
        """Windows to hand to `judge_stream`: two of the longest blocks, so that dwell can be seen at every level."""
        return int(2**self.levels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths of the ladder's blocks, in windows, ascending."""
        return tuple(2**j for j in range(self.levels))

    @property
    def ladder_share(self) -> float:
        """The ladder's part of the budget."""
        return 1 - self.quality_share - self.performance_share - self.joint_share

    def alpha(self, size: int, streams: int) -> float:
        """The level of one test of a block of `size` windows, one of `streams` that share the ladder's budget."""
        return self.ladder_share * self.budget * size / (self.levels * streams * self.horizon_windows)

    def quality_alpha(self, size: int, streams: int) -> float:
        """The same for one data-quality test."""
        return self.quality_share * self.budget * size / (self.levels * streams * self.horizon_windows)

    def joint_alpha(self, windows: int) -> float:
        """The level of one test of all pairs of features over so many windows."""
        return self.joint_share * self.budget * windows / self.horizon_windows

    def record_line(self, streams: int) -> float:
        """What the evidence of a stream's alarm of record must reach: the mean run of windows between false alarms."""
        return streams * self.horizon_windows / self.budget

    def performance_line(self, streams: int = 1) -> float:
        """The same for the evidence of one of `streams` that labels tell of: errors, and sides of the residuals."""
        return streams * self.horizon_windows / (self.performance_share * self.budget)
