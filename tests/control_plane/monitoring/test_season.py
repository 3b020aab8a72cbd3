"""A stream is compared with the same hour of other weeks where its weeks resemble each other, and nowhere else."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from lightship.monitoring.drift import watch_stream
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.explain import explain
from lightship.monitoring.memory import Memory, pack, unpack
from lightship.monitoring.replay import replay
from lightship.monitoring.season import MAX_STREAMS, NO_TIME, SLOTS, Hour, Table, hours_of
from lightship.monitoring.simulate import normal_shares
from lightship.monitoring.verdict import Verdict
from lightship_agent.contract.codes import SettingsError

from .streams import Stream

HOUR_MS = 3_600_000
MONDAY_MS = 1_767_571_200_000
WEEK = SLOTS
BINS, REFERENCE, ROWS = 10, 10_000, 200
Counts = npt.NDArray[np.int64]


def hours(windows: int) -> list[Hour]:
    return hours_of([MONDAY_MS + HOUR_MS * i for i in range(windows)], 2**62)


def daily(size: float) -> npt.NDArray[np.float64]:
    return size * np.sin(2 * np.pi * np.arange(SLOTS) / 24)


WEEKENDS = np.where(np.arange(SLOTS) // 24 >= 5, 1.0, 0.0)


def seasonal_counts(
    rng: np.random.Generator,
    windows: int,
    streams: int,
    means: npt.NDArray[np.float64],
    shift: float = 0,
    onset: int = 0,
) -> tuple[Counts, Counts]:
    """Counts of a normal whose mean is the hour's, in the quantile bins of a reference drawn at all hours."""
    counts = np.empty((windows, streams, BINS), dtype=np.int64)
    for s in range(streams):
        reference = rng.standard_normal(REFERENCE) + means[rng.integers(0, SLOTS, REFERENCE)]
        cuts = np.quantile(reference, np.arange(1, BINS) / BINS)
        for w in range(windows):
            mean = means[w % SLOTS] + (shift if w >= onset else 0.0)
            counts[w, s] = rng.multinomial(ROWS, normal_shares(cuts, float(mean), 1.0))
    return counts, np.full((streams, BINS), REFERENCE // BINS)


# -- hours --------------------------------------------------------------------------------------------------------


def test_an_hour_of_the_week_begins_with_monday_in_utc() -> None:
    assert hours(1) == [Hour(0, hours(1)[0].week)]
    assert [h.slot for h in hours(2 * WEEK)] == [*range(WEEK)] * 2
    assert hours(WEEK + 1)[-1].week == hours(1)[0].week + 1


@pytest.mark.parametrize("wrong", [None, 0, 86_400_000, MONDAY_MS - HOUR_MS, 2**60])
def test_a_time_that_can_not_be_one_is_no_time(wrong: int | None) -> None:
    said = hours_of([MONDAY_MS, wrong, MONDAY_MS + HOUR_MS], MONDAY_MS + WEEK * HOUR_MS)
    assert said[1] == NO_TIME
    assert [said[0].slot, said[2].slot] == [0, 1]


# -- choosing -----------------------------------------------------------------------------------------------------


def followed(counts: Counts, reference: Counts, when: list[Hour]) -> Table:
    """The table after all windows, learnt as they come, with every stream ready."""
    streams = counts.shape[1]
    table, yes = Table.fresh(streams, BINS), np.ones(streams, dtype=np.bool_)
    for cells, hour in zip(counts, when, strict=True):
        table = table.compared(hour, cells).learnt(hour, cells, yes, 4)
        table = table.choose(yes, np.ones(streams), reference, 0.02)
    return table


def test_a_season_is_chosen_after_two_weeks_and_noise_never() -> None:
    rng = np.random.default_rng(1)
    cyclic, reference = seasonal_counts(rng, 2 * WEEK, 3, daily(0.5))
    plain, _ = seasonal_counts(rng, 2 * WEEK, 3, daily(0.0))
    counts = np.concatenate([cyclic, plain], axis=1)
    reference = np.concatenate([reference, reference])
    early = followed(counts[: WEEK + 48], reference, hours(WEEK + 48))
    assert not early.chosen.any()
    assert followed(counts, reference, hours(2 * WEEK)).chosen.tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("onset", [WEEK // 2, WEEK, WEEK + WEEK // 2])
def test_a_drift_that_stays_is_no_season(onset: int) -> None:
    counts, reference = seasonal_counts(np.random.default_rng(2), 4 * WEEK, 2, daily(0.0), shift=0.6, onset=onset)
    assert not followed(counts, reference, hours(4 * WEEK)).chosen.any()


def test_a_seasonal_stream_that_has_drifted_is_not_its_own_measure_of_health() -> None:
    counts, reference = seasonal_counts(np.random.default_rng(3), 4 * WEEK, 2, daily(0.8), shift=1.0, onset=WEEK // 2)
    assert not followed(counts, reference, hours(4 * WEEK)).chosen.any()


def test_windows_without_a_time_are_neither_compared_nor_learnt() -> None:
    counts, reference = seasonal_counts(np.random.default_rng(4), 3 * WEEK, 1, daily(0.5))
    table = followed(counts, reference, [NO_TIME] * (3 * WEEK))
    assert not table.counts.any()
    assert not table.chosen.any()


def test_the_table_closes_when_it_is_full_and_keeps_only_what_has_a_season() -> None:
    rng = np.random.default_rng(5)
    cyclic, reference = seasonal_counts(rng, 5 * WEEK, 1, daily(0.5))
    plain, _ = seasonal_counts(rng, 5 * WEEK, 1, daily(0.0))
    counts = np.concatenate([cyclic, plain], axis=1)
    table = followed(counts, np.concatenate([reference, reference]), hours(5 * WEEK))
    assert table.closed
    assert table.counts[:, 0].sum() == 4 * WEEK * ROWS
    assert table.counts[:, 1].sum() == 0


def test_wide_layouts_have_no_season_and_no_table() -> None:
    table = Table.fresh(MAX_STREAMS + 1, BINS)
    assert not table.useful
    assert table.counts.size == 0


def test_hours_are_mixed_as_the_rows_of_the_block_are() -> None:
    table = Table.fresh(1, 2)
    table.counts[0, 0], table.counts[1, 0] = (30, 70), (80, 20)
    one = table.expected([0], np.array([[50.0]]))
    assert one[0].tolist() == pytest.approx([30, 70])
    both = table.expected([0, 1], np.array([[150.0], [50.0]]))
    assert both[0] / both.sum() == pytest.approx([0.75 * 0.3 + 0.25 * 0.8, 0.75 * 0.7 + 0.25 * 0.2])
    assert both.sum() == pytest.approx(1 / (0.75**2 / 100 + 0.25**2 / 100))
    assert table.expected([0, 2], np.array([[50.0], [50.0]])).sum() == 0
    assert table.expected([0, 2], np.array([[50.0], [0.0]])).sum() > 0


# -- the whole rule -----------------------------------------------------------------------------------------------


def test_a_shift_under_a_large_daily_cycle_is_seen_within_hours_and_was_never_seen_before() -> None:
    onset = 5 * WEEK + 3
    counts, reference = seasonal_counts(np.random.default_rng(6), onset + 48, 6, daily(1.0), shift=0.5, onset=onset)
    settings = DriftSettings()
    ran = [
        replay(counts, reference, settings, per_device=1, budget_streams=30, recalibrate=12, hours=when)
        for when in ((), hours(onset + 48))
    ]
    without, within = ({h.stream for h in r.criticals if h.window >= onset} for r in ran)
    assert len(without) <= 1
    assert len(within) == 6
    assert not [h for h in ran[1].warnings if 3 * WEEK <= h.window < onset]


def test_a_daily_cycle_is_never_critical_and_a_repeated_shift_is_where_no_day_goes_by() -> None:
    counts, reference = seasonal_counts(np.random.default_rng(5), 3 * 24, 8, daily(1.5))

    def criticals(when: list[Hour]) -> int:
        return len(replay(counts, reference, DriftSettings(), per_device=8, hours=when).criticals)

    assert criticals(hours(3 * 24)) == 0
    assert criticals([]) > 0
    assert criticals(hours_of([MONDAY_MS + 1_000 * i for i in range(3 * 24)], 2**62)) > 0


def test_a_device_that_was_never_like_its_training_is_critical_when_its_first_days_are_over() -> None:
    stream, memory = Stream(seed=2), None
    settings = DriftSettings(warm_up=12, baseline=24)
    windows = stream.windows(20, shift=1.0)
    levels = []
    for w in range(len(windows)):
        verdict, memory = watch_stream(
            stream.profile, windows[: w + 1], 0, settings, memory, "pump-1", hours=hours(w + 1)
        )  # fmt: skip
        levels.append(verdict.level)

    assert "warning" in levels[:12]
    assert "critical" not in levels[:12]
    assert levels[13:] == ["critical"] * 7


def test_weekends_alarm_every_week_until_they_are_known() -> None:
    windows = 6 * WEEK
    counts, reference = seasonal_counts(np.random.default_rng(7), windows, 4, WEEKENDS)
    ran = [
        replay(counts, reference, DriftSettings(), per_device=4, budget_streams=30, recalibrate=12, hours=when)
        for when in ((), hours(windows))
    ]
    without, within = ([h for h in r.warnings if h.window >= 3 * WEEK] for r in ran)
    assert len(without) > 100
    assert within == []


@cache
def a_month() -> tuple[Stream, list[Verdict], Memory]:
    """A device with one feature that has days, and two that have none."""
    stream = Stream(48, features=3)
    settings = DriftSettings(levels=2)
    windows, when = [], hours(2 * WEEK + 24)
    for w in range(len(when)):
        rows = stream.draw()
        # As wide as the training data, all hours together.
        rows[:, 2] = np.float32(np.sqrt(0.875)) * rows[:, 2] + np.float32(daily(0.5)[w % WEEK])
        windows.append(stream.count(rows))
    verdicts, memory = [], None
    for w in range(len(when)):
        first = max(0, w + 1 - settings.history)
        verdict, memory = watch_stream(
            stream.profile, windows[first : w + 1], first, settings, memory, "k", hours=when[first : w + 1]
        )
        verdicts.append(verdict)
    assert memory is not None
    return stream, verdicts, memory


@pytest.mark.slow
def test_the_verdict_and_its_explanation_name_what_has_a_season() -> None:
    _, verdicts, _ = a_month()
    early, last = verdicts[WEEK], verdicts[-1]
    assert early.season is not None
    assert last.season is not None
    assert early.season.streams == ()
    assert last.season.streams == ("f2",)
    said = " ".join(explain("pump-1", last, DriftSettings()))
    assert "f2 has a season and is compared with the same hour of up to 3 other weeks" in said
    assert "at the earliest after two weeks" in " ".join(explain("pump-1", early, DriftSettings()))


@pytest.mark.slow
def test_a_memory_with_a_season_survives_storage() -> None:
    _, _, memory = a_month()
    data = pack(memory)
    again = unpack(data)
    assert pack(again) == data
    assert again.table is not None
    assert memory.table is not None
    assert (again.table.counts == memory.table.counts).all()
    assert again.chosen.tolist() == memory.chosen.tolist()
    assert len(data) < 60_000


def test_without_hours_nothing_is_remembered_of_them() -> None:
    stream = Stream(49, features=2)
    verdict, memory = watch_stream(stream.profile, stream.windows(1), 0, DriftSettings(), None, "k")
    assert verdict.season is None
    assert memory.table is None


@pytest.mark.parametrize("weeks", [-1, 1, 53])
def test_a_season_of_no_weeks_is_refused(weeks: int) -> None:
    with pytest.raises(SettingsError):
        DriftSettings(season_weeks=weeks)
