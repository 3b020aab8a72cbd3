"""Monitoring: a shift that many devices share, each measured against its own past.

Rules of this room:
* pure; counts per device in, p-values out;
* devices are paired with themselves: d = shares now − shares in the baseline. Every device's own offset drops out,
  where pooled counts would alarm on it. Hotelling's T² asks whether the mean of d is 0, with the devices' own spread
  as the noise: a shift that is common shows at a size that no single device could;
* it needs three devices per free cell; where there are fewer, cells are merged to four, and below that it says nothing;
* between two groups (canary and control) the same statistic asks whether the two means differ: season and news cancel.

Source: Hotelling 1931; the count of drifting devices, which sees what few share, is `fleet`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .tails import f_sf, fisher_greater

Floats = npt.NDArray[np.float64]

#: Devices per free cell.
_PER_CELL: Final = 3
_MERGED: Final = 4


def differences(now: npt.ArrayLike, baseline: npt.ArrayLike) -> Floats:
    """Per device, shares now less those of its own baseline, `[devices, cells]`; devices without rows are left out."""
    c, b = np.asarray(now, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    n, m = c.sum(axis=-1), b.sum(axis=-1)
    held = (n > 0) & (m > 0)
    return np.asarray(c[held] / n[held, None] - b[held] / m[held, None])


class Paired(NamedTuple):
    """What devices have in common, each against its own past."""

    ratio: float  # the F ratio, 1 on the average where nothing is shared; 0 with too few devices
    p_value: float  # of so large a common shift when there is none; 1 with too few devices
    effect: float  # w² of the mean shift, less what chance makes of it
    devices: int  # that had rows


def paired(now: npt.ArrayLike, baseline: npt.ArrayLike) -> Paired:
    """Have the devices moved together?

    Args:
        now: `[devices, cells]`, counts.
        baseline: the same devices' own baselines, `[devices, cells]`, counts.
    """
    c, b = np.asarray(now, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    all_ = differences(c, b)
    moved = _few_cells(all_)
    if moved is None:
        return Paired(0.0, 1.0, 0.0, len(all_))
    devices, free = moved.shape
    spread = np.cov(moved, rowvar=False, ddof=1).reshape(free, free)
    t2 = devices * _quadratic(moved.mean(axis=0), spread)
    ratio = (devices - free) * t2 / ((devices - 1) * free)
    return Paired(ratio, float(f_sf(ratio, free, devices - free)), _effect(all_, c, b), devices)


def paired_p(now: npt.ArrayLike, baseline: npt.ArrayLike) -> float:
    """How likely so large a common shift is when there is none; 1 with too few devices: see `paired`."""
    return paired(now, baseline).p_value


def _effect(moved: Floats, now: Floats, baseline: Floats) -> float:
    """w² = Σ d²/q of the mean shift d, less its variance, at the mean shares q of both; never below 0."""
    held = (now.sum(axis=-1) > 0) & (baseline.sum(axis=-1) > 0)
    shares = [c[held] / c[held].sum(axis=-1, keepdims=True) for c in (now, baseline)]
    q = (shares[0] + shares[1]).mean(axis=0) / 2
    noise = moved.var(axis=0, ddof=1) / len(moved)
    return float(max(((moved.mean(axis=0) ** 2 - noise)[q > 0] / q[q > 0]).sum(), 0.0))


def between_p(canary: Floats, control: Floats) -> float:
    """How likely such a difference of two groups' mean `differences` is when there is none; 1 with too few devices."""
    both = _few_cells(np.concatenate([canary, control]), spare=1)
    if both is None or min(len(canary), len(control)) < 2:
        return 1.0
    a, b = both[: len(canary)], both[len(canary) :]
    devices, free = both.shape
    pooled = sum(np.cov(g, rowvar=False, ddof=1).reshape(free, free) * (len(g) - 1) for g in (a, b)) / (devices - 2)
    t2 = len(a) * len(b) / devices * _quadratic(a.mean(axis=0) - b.mean(axis=0), np.asarray(pooled))
    rest = devices - free - 1
    return float(f_sf(rest * t2 / ((devices - 2) * free), free, rest))


def more_drift_p(drifting_canary: int, canary: int, drifting_control: int, control: int) -> float:
    """How likely so many more drifting devices in the canary are by chance: Fisher's exact test, one-sided."""
    return fisher_greater(drifting_canary, canary, drifting_control, control)


def _few_cells(moved: Floats, spare: int = 0) -> Floats | None:
    """Differences in as many free cells as the devices can bear, less the redundant last; None: too few devices."""
    used = moved[:, np.abs(moved).max(axis=0) > 0] if len(moved) else moved
    devices, cells = used.shape
    if cells > _MERGED and devices < _PER_CELL * (cells - 1) + spare:
        used = np.add.reduceat(used, np.linspace(0, cells, _MERGED, endpoint=False).astype(int), axis=1)
        cells = _MERGED
    if cells < 2 or devices < _PER_CELL * (cells - 1) + spare:
        return None
    return np.asarray(used[:, :-1])


def _quadratic(mean: Floats, spread: Floats) -> float:
    return float(mean @ np.linalg.pinv(spread, rcond=1e-10, hermitian=True) @ mean)
