"""A device's own history makes alarms rarer, never louder; and its ranks decide what wakes someone up."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from lightship.monitoring import conformal
from lightship.monitoring.calibration import calibrate
from lightship.monitoring.drift import judge_stream, watch_stream
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.layout import Layout
from lightship.monitoring.memory import NEVER, Memory, pack, unpack
from lightship.monitoring.replay import replay
from lightship.monitoring.tails import f_sf
from lightship.monitoring.verdict import Verdict
from lightship_agent.contract.codes import DriftError, SettingsError
from lightship_agent.contract.profile import WindowCounts

from .streams import Stream

SETTINGS = DriftSettings()
BINS, REFERENCE = 10, 10_000


def follow(
    stream: Stream, windows: list[WindowCounts], drift: DriftSettings = SETTINGS, memory: Memory | None = None
) -> tuple[list[Verdict], Memory]:
    """The verdict after every window, and what is remembered at the end."""
    verdicts = []
    for w in range(len(windows)):
        first = max(0, w + 1 - drift.history)
        verdict, memory = watch_stream(stream.profile, windows[first : w + 1], first, drift, memory, "pump-1")
        verdicts.append(verdict)
    assert memory is not None
    return verdicts, memory


def quantile_counts(
    rng: np.random.Generator, windows: int, streams: int, rho: float = 0.0, rows: int = 200
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts of an AR(1) process of `rho` in the quantile bins of a reference of its own law."""
    out = np.empty((windows, streams, BINS), dtype=np.int64)
    for s in range(streams):
        edges = np.quantile(rng.standard_normal(REFERENCE), np.arange(1, BINS) / BINS)
        x = rng.standard_normal(windows * rows) * np.sqrt(1 - rho * rho)
        for i in range(1, len(x) if rho else 0):
            x[i] += rho * x[i - 1]
        at = np.searchsorted(edges, x) + BINS * np.repeat(np.arange(windows), rows)
        out[:, s] = np.bincount(at, minlength=windows * BINS).reshape(windows, BINS)
    return out, np.full((streams, BINS), REFERENCE // BINS)


# -- tails --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@example(exponent=-0.01, d1=0.3, d2=66.0)
@given(exponent=st.floats(-11, -0.01), d1=st.floats(0.3, 300), d2=st.floats(1.0, 5_000))
def test_f_tails_agree_with_scipy(exponent: float, d1: float, d2: float) -> None:
    x = float(stats.f.isf(10.0**exponent, d1, d2))
    expected = float(stats.f.sf(x, d1, d2))
    if np.isfinite(x) and 1e-12 <= expected < 1:
        assert float(f_sf(x, d1, d2)) == pytest.approx(expected, rel=1e-6)


# -- the conformal detector ---------------------------------------------------------------------------------------


def test_ranks_of_exchangeable_scores_are_uniform_ties_and_all() -> None:
    rng = np.random.default_rng(1)
    streams = 400
    history = np.zeros((streams, conformal.CELLS), dtype=np.int64)
    seen = []
    for w in range(60):
        cell = conformal.cell_of(np.round(rng.chisquare(9, streams)) + 1.0)
        seen.append(conformal.rank_p(history, cell, conformal.uniforms("s", w, streams)))
        history[np.arange(streams), cell] += 1
    p = np.concatenate(seen)
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(seen[40], seen[41])[0, 1]) < 0.2


def test_the_evidence_grows_by_no_more_than_one_per_window_on_average() -> None:
    rng = np.random.default_rng(2)
    r = np.zeros((200_000, len(conformal.EPSILONS)))
    for _ in range(3):
        r = conformal.bet(r, rng.random(len(r)))
    # ε = 0.1 has infinite variance: its mean is approached from below.
    assert r[:, 2:].mean(axis=0) == pytest.approx(3.0, rel=0.1)


@settings(deadline=None, max_examples=30)
@given(factor=st.floats(1e-2, 1e2), seed=st.integers(0, 99))
def test_only_the_order_of_scores_matters(factor: float, seed: int) -> None:
    # A factor of whole octaves moves every score by the same number of cells.
    factor = float(2.0 ** np.round(np.log2(factor)))
    scores = np.random.default_rng(seed).chisquare(9, 30) + 2
    ranks = []
    for scaled in (scores, scores * factor):
        history = np.zeros((1, conformal.CELLS), dtype=np.int64)
        for i, cell in enumerate(conformal.cell_of(scaled * 16)):
            ranks.append(float(conformal.rank_p(history, np.array([cell]), conformal.uniforms("k", i, 1))[0]))
            history[0, cell] += 1
    assert ranks[:30] == ranks[30:]


def test_the_tie_breakers_follow_from_the_stream_and_the_window_alone() -> None:
    assert (conformal.uniforms("a", 1, 5) == conformal.uniforms("a", 1, 5)).all()
    assert not (conformal.uniforms("a", 1, 5) == conformal.uniforms("a", 2, 5)).any()
    assert not (conformal.uniforms("a", 1, 5) == conformal.uniforms("b", 1, 5)).any()


# -- calibration --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), statistic=st.floats(1, 300), level=st.integers(0, 5))
def test_a_larger_statistic_is_never_less_surprising(seed: int, statistic: float, level: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [336 // 2**j for j in range(6)]
    moments = np.zeros((6, 1, 3))
    for j, m in enumerate(sizes):
        t = rng.chisquare(9, m) * rng.uniform(1, 6)
        moments[j, 0] = (m, t.sum(), (t**2).sum())
    counts = np.full((1, BINS), 6_720)
    seen = np.array([336])
    c = calibrate(moments, seen, seen, np.array([8.3]), counts, counts, warm_up=48, floor=0.02)
    assert c.ready.all()
    low, high = (float(c.p_value(level, np.array([t]), np.array([3.0]))[0]) for t in (statistic, statistic * 1.3))
    assert 0 <= high <= low <= 1


def test_a_device_that_was_drifting_from_the_start_is_not_its_own_measure_of_health() -> None:
    stream = Stream(41)
    windows = stream.windows(60, shift=0.8)
    verdicts, _ = follow(stream, windows)
    last = verdicts[-1]
    assert last.calibrated is not None
    assert last.calibrated.away == ("f5",)
    assert last.calibrated.ready == last.calibrated.streams - 1
    assert last.level == "critical"
    assert {v.level for v in verdicts[8:]} == {"critical"}


def test_a_healthy_history_is_learnt_once_and_then_frozen() -> None:
    stream = Stream(42, features=3)
    small = DriftSettings(warm_up=10, baseline=20)
    verdicts, memory = follow(stream, stream.windows(40), small)
    assert verdicts[9].calibrated is not None
    assert verdicts[9].calibrated.ready == 0
    assert verdicts[10].calibrated is not None
    assert verdicts[10].calibrated.ready == verdicts[10].calibrated.streams
    assert memory.learnt.tolist() == [20] * len(memory.names)
    assert memory.pooled[0].sum() == 20 * 200
    assert {v.level for v in verdicts} == {"ok"}


def test_nothing_is_said_about_a_stream_that_was_hardly_seen() -> None:
    stream = Stream(43)
    verdicts, _ = follow(stream, stream.windows(14, shift=0.9))
    assert [v.level for v in verdicts[:6]] == ["ok"] * 6
    assert verdicts[13].level == "critical"


def test_what_is_missing_is_a_fault_from_the_first_window_on() -> None:
    stream = Stream(44)
    rows = stream.draw()
    rows[:60, 3] = np.nan
    verdicts, memory = follow(stream, [stream.count(rows)] * 2)
    assert [v.level for v in verdicts] == ["warning", "critical"]
    assert memory.learnt[3] == 0  # a fault is not learnt from
    assert memory.learnt[0] == 2


# -- the joined rule ----------------------------------------------------------------------------------------------


def test_a_shift_after_a_healthy_history_is_a_warning_at_once_and_critical_by_rank() -> None:
    stream = Stream(45, features=3)
    verdicts, memory = follow(stream, [*stream.windows(120), *stream.windows(14, shift=1.0, feature=2)])
    assert {v.level for v in verdicts[:120]} == {"ok"}
    levels = [v.level for v in verdicts[120:]]
    assert levels[0] == "warning"
    assert levels.index("critical") in range(1, 9)
    shift = verdicts[-1].evidence[0]
    assert shift.name == "f2"
    assert shift.since is not None
    assert abs(shift.since - 120) <= 15
    assert shift.evidence >= 1.0
    assert verdicts[-1].record == {"f2": int(memory.since[2])}


def test_one_bad_window_after_a_healthy_history_is_never_critical() -> None:
    stream = Stream(46, features=3)
    windows = [*stream.windows(100), stream.window(3.0, feature=2), *stream.windows(40)]
    verdicts, _ = follow(stream, windows)
    assert verdicts[100].level == "warning"
    assert "critical" not in {v.level for v in verdicts}


def test_an_alarm_of_record_learns_nothing_and_ends_when_the_stream_has_been_quiet() -> None:
    stream = Stream(47, features=3)
    short = DriftSettings(levels=3)
    drifted = [*stream.windows(80), *stream.windows(30, shift=1.5, feature=2)]
    _, drifting = follow(stream, drifted, short)
    assert drifting.since[2] != NEVER
    learnt = drifting.history[2].sum()
    _, after = follow(stream, [*drifted, *stream.windows(40)], short)
    assert after.since[2] == NEVER
    assert learnt <= 80 + 8
    assert after.sums[2].max() < 1e3


# -- state --------------------------------------------------------------------------------------------------------


@cache
def half_way() -> tuple[Stream, list[WindowCounts], Memory]:
    stream = Stream(48)
    windows = stream.windows(30)
    return stream, windows, follow(stream, windows)[1]


def test_a_memory_survives_storage_and_is_small() -> None:
    stream, windows, memory = half_way()
    data = pack(memory)
    assert len(data) < 4_000
    more = [*windows, *stream.windows(1)]
    straight = watch_stream(stream.profile, more, 0, SETTINGS, memory, "pump-1")
    resumed = watch_stream(stream.profile, more, 0, SETTINGS, unpack(data), "pump-1")
    assert straight.verdict == resumed.verdict
    assert pack(straight.memory) == pack(resumed.memory)


def test_a_window_that_was_judged_already_changes_nothing() -> None:
    stream, windows, memory = half_way()
    again = watch_stream(stream.profile, windows, 0, SETTINGS, memory, "pump-1")
    assert pack(again.memory) == pack(memory)


def test_a_change_of_exclusions_starts_afresh() -> None:
    stream, windows, memory = half_way()
    other = watch_stream(stream.profile, windows, 0, DriftSettings(exclude=("f0",)), memory, "pump-1")
    assert other.memory.learnt.max() == 1
    assert "f0" not in other.memory.names


@settings(deadline=None, max_examples=40)
@given(data=st.binary(max_size=200), at=st.integers(0, 3_000), flip=st.integers(1, 255))
def test_bytes_that_are_no_memory_are_refused(data: bytes, at: int, flip: int) -> None:
    with pytest.raises(DriftError):
        unpack(data)
    broken = bytearray(pack(half_way()[2]))
    broken[at % len(broken)] ^= flip
    try:
        unpack(bytes(broken))
    except DriftError:
        return
    # A byte that is not looked at, or a count that is another one: it is a memory all the same.
    assert unpack(bytes(broken)).names == half_way()[2].names


def test_without_a_memory_the_verdict_is_the_bare_ladders() -> None:
    stream, windows, _ = half_way()
    assert judge_stream(stream.profile, windows, 0, SETTINGS).calibrated is None


@pytest.mark.parametrize(
    "bad", [{"warm_up": 3}, {"warm_up": 400}, {"performance_share": 0.9}, {"performance_floor": 1}]
)
def test_baselines_that_can_not_work_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        DriftSettings(**bad)  # type: ignore[arg-type]


# -- long runs ----------------------------------------------------------------------------------------------------


def test_correlated_rows_flood_the_bare_ladder_and_hardly_ever_wake_anyone_once_calibrated() -> None:
    counts, reference = quantile_counts(np.random.default_rng(5), 500, 6, rho=0.9, rows=100)
    bare = replay(counts, reference, SETTINGS, per_device=6, calibrated=False)
    known = replay(counts, reference, SETTINGS, per_device=6)
    assert len(bare.warnings) > 300
    assert len(known.warnings) <= 5
    assert known.criticals == []


def test_independent_rows_keep_the_budget_with_and_without_a_floor() -> None:
    rng = np.random.default_rng(6)
    shares = rng.dirichlet(np.full(BINS, REFERENCE / BINS), size=60)
    counts = rng.multinomial(200, shares, size=(800, 60))
    reference = np.full((60, BINS), REFERENCE // BINS)
    generous = DriftSettings(budget=40.0, effect_floor=0.0)
    found = replay(counts, reference, generous, per_device=30)
    expected = 2 * 40 * 0.7 * 800 / 8_760  # of two devices
    assert len(found.warnings) <= expected + 3 * np.sqrt(expected)
    assert len(found.criticals) <= len(found.warnings)
    assert replay(counts, reference, DriftSettings(), per_device=30).warnings == []


def test_the_replay_says_what_the_verdicts_say() -> None:
    stream = Stream(50, features=2)
    windows = [*stream.windows(70), *stream.windows(20, shift=0.8, feature=1)]
    only = DriftSettings()
    layout = Layout(stream.profile, only, {})
    cells = np.stack([layout.cells(layout.flat(w)[None, :])[0] for w in windows])
    replayed = replay(cells, layout.reference, only, per_device=layout.streams, key="pump-1")
    verdicts, _ = follow(stream, windows, only)
    said = {(v.window, a.name, a.level_windows) for v in verdicts for a in v.alarms if a.kind == "shift"}
    assert {(h.window, layout.names[h.stream], h.size) for h in replayed.warnings} == said
    confirmed = {(v.window, a.name) for v in verdicts for a in v.alarms if a.kind == "shift" and a.confirmed}
    assert {(h.window, layout.names[h.stream]) for h in replayed.criticals} == confirmed


# -- what a baseline is worth -------------------------------------------------------------------------------------


def test_what_a_calibrated_ladder_pays_for_its_history_is_little_where_rows_are_independent() -> None:
    from lightship.monitoring.simulate import mean_shift, what_is_seen

    drift = DriftSettings(effect_floor=0.02)
    (seen,) = what_is_seen((mean_shift(0.25),), drift, rows=200, streams=30, runs=60, drifting=160, seed=5)
    assert seen.analytic == 16.0
    assert seen.warning is not None
    assert seen.warning <= 30


@given(st.floats(1.0, 200.0), st.floats(0.0, 100.0), st.integers(0, 5))
def test_a_larger_statistic_is_never_likelier_and_a_tolerated_shift_never_makes_it_less_likely(
    statistic: float, noncentrality: float, level: int
) -> None:
    rng = np.random.default_rng(8)
    t = rng.chisquare(9, size=(6, 336, 1))
    count = np.array([336 // 2**j for j in range(6)], dtype=float)[:, None]
    sums = np.stack([t[j, : int(count[j, 0])].sum(axis=0) for j in range(6)])
    squares = np.stack([(t[j, : int(count[j, 0])] ** 2).sum(axis=0) for j in range(6)])
    moments = np.stack([count, sums, squares], axis=-1)
    seen, pooled, reference = np.array([336]), np.full((1, BINS), 6_720), np.full((1, BINS), 1_000)
    found = calibrate(moments, seen, seen, np.array([8.3]), pooled, reference, warm_up=48, floor=0.02)
    at, more = np.array([statistic]), np.array([statistic * 1.05])
    shift, larger = np.array([noncentrality]), np.array([noncentrality + 1.0])
    p = found.p_value(level, at, shift)[0]
    assert found.p_value(level, more, shift)[0] <= p * (1 + 1e-6)
    assert found.p_value(level, at, larger)[0] >= p * (1 - 1e-6)


def test_lines_of_a_finished_calibration_say_what_its_p_values_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long replay inverts a calibration that no longer changes: the alarms are those of a run that never does."""
    counts, reference = quantile_counts(np.random.default_rng(12), 900, 3, rho=0.6)
    counts[600:, 0] = (
        counts[600:, 0][:, ::-1] + np.arange(10) - np.arange(10)[::-1]
    )  # a shift, so that something alarms
    counts = np.maximum(counts, 0)
    found = replay(counts, reference, SETTINGS, per_device=3, recalibrate=4)
    monkeypatch.setattr("lightship.monitoring.replay._SETTLED", 10**9)
    slowly = replay(counts, reference, SETTINGS, per_device=3, recalibrate=4)
    assert found == slowly
    assert any(hit.window >= 600 for hit in found.warnings)
