"""Bench drift: what is measured.

Rules: seeds are fixed, the product's own code decides, and a year is 8,760 windows of 200 rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.groups import paired_p
from lightship.monitoring.joint import judge_products
from lightship.monitoring.performance import Labelled, judge_errors
from lightship.monitoring.replay import replay
from lightship.monitoring.simulate import Shift, gradual_shift, mean_shift, normal_shares, spread_shift, what_is_seen
from lightship.monitoring.tails import beta_binomial_sf, binom_sf
from lightship.monitoring.two_sample import two_sample

from .streams import NATURES, REFERENCE, ROWS, Counts, dependent, independent

YEAR: Final = 8_760
FEATURES: Final = 30
_GROUP: Final = 4  # device-years side by side
Floats = npt.NDArray[np.float64]


class Quiet(msgspec.Struct, frozen=True, kw_only=True):
    """Alarms of streams to which nothing happened, per device-year."""

    nature: str
    floor: float
    years: int
    bare: float  # the ladder without calibration
    warnings: float
    records: float
    criticals: float


class Delay(msgspec.Struct, frozen=True, kw_only=True):
    """Windows until a shift is seen; null: not within the time simulated."""

    shift: str
    floor: float
    effect: float
    warning: float | None
    warning_90: float | None
    critical: float | None
    critical_90: float | None


@dataclass(frozen=True)
class Size:
    """How much is simulated."""

    years: int
    dependent_years: int
    runs: int


def false_alarms(size: Size) -> list[Quiet]:
    """Every nature at the default floor; independent rows without a floor too, over all device-years."""
    found = [_quiet("independent", 0.0, size.years), _quiet("independent", 0.02, max(size.years // 5, 1))]
    return found + [_quiet(nature, 0.02, size.dependent_years) for nature in NATURES]


def _quiet(nature: str, floor: float, years: int) -> Quiet:
    settings = DriftSettings(effect_floor=floor)
    bare, hits = 0, np.zeros(3)
    group = _GROUP if nature == "independent" else 1
    for first in range(0, years, group):
        devices = min(group, years - first)
        rng = np.random.default_rng([7, first])
        make: Callable[..., tuple[Counts, Counts]]
        make = independent if nature == "independent" else lambda *a: dependent(nature, *a)
        counts, reference = make(rng, YEAR, FEATURES * devices)
        whole = replay(counts, reference, settings, per_device=FEATURES, key=f"{first}", recalibrate=12)
        hits += [len(whole.warnings), len(whole.records), len(whole.criticals)]
        bare += _bare(counts, reference, settings)
    w, r, c = (hits / years).tolist()
    print(
        f"  {nature}, floor {floor}: bare {bare / years:g}, warnings {w:g}, records {r:g}, critical {c:g}", flush=True
    )
    return Quiet(nature=nature, floor=floor, years=years, bare=bare / years, warnings=w, records=r, criticals=c)


def _bare(counts: Counts, reference: Counts, settings: DriftSettings) -> int:
    """Tests of single windows that cross the uncalibrated line."""
    tests = two_sample(counts, reference)
    return int((tests.p_value(settings.effect_floor) < settings.alpha(1, FEATURES)).sum())


def category_shift(distance: float) -> Shift:
    """A share of the rows moves from some categories to others: the total variation is `distance`."""

    def shares(cuts: Floats, _t: int) -> Floats:
        moved = normal_shares(cuts, 0.0, 1.0)
        given = max(1, round(distance / 0.05))  # categories that give; one more of them takes
        moved[:given] -= distance / given
        moved[-given - 1 :] += distance / (given + 1)
        return moved

    return Shift(f"category, total variation {distance:g}", shares)


def delays(size: Size) -> list[Delay]:
    """When each shift of one feature of thirty is seen, 200 rows an hour."""
    shifts = (
        mean_shift(0.1), mean_shift(0.25), mean_shift(0.5), mean_shift(1.0),
        spread_shift(1.25), spread_shift(1.5), spread_shift(0.8),
        gradual_shift(1.0, 500), category_shift(0.05), category_shift(0.1),
    )  # fmt: skip
    found = []
    for floor in (0.005, 0.02):
        settings = DriftSettings(effect_floor=floor)
        for seen in what_is_seen(shifts, settings, rows=ROWS, streams=FEATURES, runs=size.runs, drifting=200, seed=3):
            row = msgspec.to_builtins(seen)
            row["shift"] = row.pop("name")
            row.pop("analytic")
            found.append(msgspec.convert({**row, "floor": floor}, Delay))
            print(f"  {found[-1].shift}, floor {floor}: {found[-1].warning} / {found[-1].critical}", flush=True)
    return found + [_missing(before, after, size.runs) for before, after in ((0.01, 0.05), (0.0, 0.01))]


def _missing(before: float, after: float, runs: int) -> Delay:
    """A missing rate that rises, by the product's exact tail, on the ladder."""
    settings = DriftSettings()
    rng = np.random.default_rng(9)
    waited = []
    for _ in range(runs):
        known = int(rng.binomial(REFERENCE, before))
        a = known + 0.5 + settings.quality_floor * REFERENCE
        gone = rng.binomial(ROWS, after, size=512)
        waited.append(next((float(w) for w in range(1, 513) if _rises(gone[:w], known, a, settings)), np.inf))
    median, late = float(np.median(waited)), float(np.quantile(waited, 0.9, method="higher"))
    return Delay(
        shift=f"missing {before:.0%} to {after:.0%}",
        floor=settings.quality_floor,
        effect=after - before,
        warning=median if np.isfinite(median) else None,
        warning_90=late if np.isfinite(late) else None,
        critical=None,
        critical_90=None,
    )


def _rises(gone: npt.NDArray[np.int64], known: int, a: float, settings: DriftSettings) -> bool:
    for block in settings.sizes:
        if len(gone) % block == 0:
            x = int(gone[-block:].sum())
            p = beta_binomial_sf(x - 1, block * ROWS, a, REFERENCE - known + 0.5)
            if p < settings.quality_alpha(block, 3 * FEATURES):
                return True
    return False


def joint_drift() -> dict[str, float]:
    """The share of 1,000-row windows in which a change that no histogram shows is seen at p < 1e-6."""
    rng = np.random.default_rng(11)
    base = np.kron(np.eye(FEATURES // 3), np.full((3, 3), 0.5))
    np.fill_diagonal(base, 1.0)
    pair = base.copy()
    pair[0, 5] = pair[5, 0] = 0.3
    parted = base.copy()
    parted[0, 1] = parted[1, 0] = 0.0
    parted[0, 2] = parted[2, 0] = 0.25
    swap = np.arange(FEATURES)
    swap[[1, 7]] = 7, 1
    cases: dict[str, tuple[Floats, npt.NDArray[np.int64] | None]]
    cases = {"nothing": (base, None), "one pair 0 to 0.3": (pair, None), "one pair apart": (parted, None)}
    cases["two columns swapped"] = (base, swap)
    names = tuple(map(str, range(FEATURES)))
    found = {}
    for what, (covariance, order) in cases.items():
        seen = 0
        for _ in range(40):
            then, now = (_products(rng, c, n) for c, n in ((base, REFERENCE), (covariance, 1_000)))
            if order is not None:
                now = now[np.ix_(order, order)]
            shift = judge_products(now, 1_000, then, REFERENCE, names)
            seen += shift is not None and shift.p_value < 1e-6
        found[what] = seen / 40
    return found


def _products(rng: np.random.Generator, covariance: Floats, rows: int) -> Floats:
    drawn = rng.multivariate_normal(np.zeros(FEATURES), covariance, size=rows, method="cholesky")
    return np.asarray(drawn.T @ drawn)


def fleets() -> dict[str, float]:
    """A hundred devices with offsets of their own (sd 0.3), 200 rows an hour each."""
    rng = np.random.default_rng(13)
    line = 1 / YEAR / FEATURES
    alarms = sum(_paired(rng, np.zeros(100)) < line for _ in range(720))
    common = _first(lambda: _paired(rng, np.full(100, 0.05)) < line)
    part = np.where(np.arange(100) < 5, 1.0, 0.0)
    few = _first(lambda: _counted(rng, part) < line)
    return {"false alarms per fleet-month": float(alarms), "0.05 sd on all": common, "1 sd on 5 of 100": few}


_CUTS: Final = np.array([-1.28155, -0.84162, -0.52440, -0.25335, 0.0, 0.25335, 0.52440, 0.84162, 1.28155])


def _fleet(rng: np.random.Generator, shift: Floats) -> tuple[Counts, Counts]:
    offsets = 0.3 * rng.standard_normal(len(shift))
    now = np.stack(
        [rng.multinomial(ROWS, normal_shares(_CUTS, o + s, 1.0)) for o, s in zip(offsets, shift, strict=True)]
    )
    past = np.stack([rng.multinomial(ROWS * 336, normal_shares(_CUTS, o, 1.0)) for o in offsets])
    return now, past


def _paired(rng: np.random.Generator, shift: Floats) -> float:
    return paired_p(*_fleet(rng, shift))


def _counted(rng: np.random.Generator, shift: Floats) -> float:
    now, past = _fleet(rng, shift)
    p = two_sample(now, past).p_value()
    drifting = int((p < 0.01).sum())
    return binom_sf(drifting - 1, len(shift), 0.01)


def _first(seen: Callable[[], bool]) -> float:
    waited = [next((h for h in range(1, 73) if seen()), 99) for _ in range(5)]
    return float(np.median(waited))


def concept_drift() -> dict[str, float]:
    """Labels until a rise of the error rate from 10 % is critical, 100 a window; and false alarms at 10 %."""
    settings = DriftSettings()
    rng = np.random.default_rng(17)
    found = {f"0.10 to {rate:.2f}": _labels(rng, rate, settings) for rate in (0.15, 0.20, 0.30)}
    alarms = 0
    for _ in range(20):
        healthy = [Labelled(w, 100, int(k)) for w, k in enumerate(rng.binomial(100, 0.1, size=YEAR // 4))]
        said = judge_errors(healthy, 1_000, 10_000, settings)
        alarms += said is not None and said.alarm
    return {**found, "false alarms per device-year": alarms / 5}


def _labels(rng: np.random.Generator, rate: float, settings: DriftSettings) -> float:
    waited = []
    for _ in range(20):
        before = [Labelled(w, 100, int(k)) for w, k in enumerate(rng.binomial(100, 0.1, size=100))]
        after = [Labelled(100 + w, 100, int(k)) for w, k in enumerate(rng.binomial(100, rate, size=60))]
        seen = (judge_errors([*before, *after[:n]], 1_000, 10_000, settings) for n in range(1, 61))
        waited.append(next((100 * n for n, s in enumerate(seen, 1) if s is not None and s.alarm), 9_999))
    return float(np.median(waited))


def cost() -> dict[str, float]:
    """CPU of one evaluation of a device with thirty features, and the bytes of what is remembered of it."""
    from lightship.monitoring.drift import watch_stream
    from lightship.monitoring.memory import Memory, pack
    from lightship_agent.contract.profile import Binner, ReferenceProfile, WindowCounts, profile_features

    rng = np.random.default_rng(19)
    rows = rng.standard_normal((REFERENCE, FEATURES)).astype(np.float32)
    profile = ReferenceProfile(rows=REFERENCE, features=profile_features(rows, [f"f{i}" for i in range(FEATURES)]))
    binner, settings = Binner(profile.features), DriftSettings()
    windows = []
    for _ in range(64):
        drawn = rng.standard_normal((ROWS, FEATURES)).astype(np.float32)
        windows.append(WindowCounts(rows=ROWS, counts=tuple(int(c) for c in binner.count(drawn))))
    memory: Memory | None = None
    began = time.process_time()
    for w in range(64):
        memory = watch_stream(profile, windows[: w + 1], 0, settings, memory, "k").memory
    spent = time.process_time() - began
    assert memory is not None
    return {"ms per evaluation": 1_000 * spent / 64, "bytes remembered per device": float(len(pack(memory)))}
