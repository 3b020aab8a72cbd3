"""Monitoring: the conformal e-detector, the alarm of record.

Rules of this room:
* pure arrays in, arrays out; leading axes are streams (or devices × streams);
* a window's score is ranked among the scores of the windows before it, of the same device. If those are exchangeable,
  the ranks are independent and uniform, whatever the distribution: rows may be correlated, seasonal, offset;
* ties are broken by a number U that is derived from (stream, window): the same windows give the same verdict anywhere;
* e(p) = ε·p^(ε−1) has mean 1 for a uniform p, so R ← (1 + R)·e grows by at most 1 per window on average, and the mean
  run to a false alarm at R ≥ A is at least A windows (Shiryaev–Roberts). R is averaged over five ε;
* scores are kept as counts per cell of a geometric grid: small, and exact ranks of the cell.

Sources: Vovk, Nouretdinov, Gammerman 2003 and Vovk 2021 (conformal martingales, smoothed p-values); Shin, Ramdas,
Rinaldo 2022 (e-detectors).
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: The betting exponents that are averaged: small ones for large changes, large ones for small changes.
EPSILONS: Final = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
_PER_OCTAVE: Final = 8
_LOWEST: Final = -4  # log2 of the smallest score told apart
CELLS: Final = 24 * _PER_OCTAVE + 2
#: Evidence is kept below this: beyond, nothing more is decided by it.
_MOST: Final = 1e30


def cell_of(scores: Floats) -> Ints:
    """The cell of each score on the geometric grid, 0 for what is below it."""
    steps = (np.log2(np.maximum(scores, 2.0**_LOWEST / 2)) - _LOWEST) * _PER_OCTAVE
    return np.asarray(np.clip(np.floor(steps).astype(np.int64) + 1, 0, CELLS - 1))


def median(history: npt.NDArray[np.integer]) -> Floats:
    """The median score of each stream, to the grid's eighth of an octave; 0 where there is none."""
    cumulative = np.cumsum(history, axis=-1)
    total = cumulative[..., -1]
    cell = (2 * cumulative < total[..., None]).sum(axis=-1)
    return np.where(total > 0, 2.0 ** ((cell - 0.5) / _PER_OCTAVE + _LOWEST), 0.0)


def uniforms(key: str, window: int, count: int) -> Floats:
    """`count` numbers in (0, 1) that follow from the stream's key and the window's number alone."""
    raw = hashlib.shake_128(f"{key}\n{window}".encode()).digest(8 * count)
    return (np.frombuffer(raw, dtype="<u8").astype(np.float64) + 0.5) / 2.0**64


def rank_p(history: npt.NDArray[np.integer], cell: Ints, u: Floats) -> Floats:
    """The smoothed conformal p-value of a score among those before it.

    Args:
        history: counts per cell, int `[..., CELLS]`.
        cell: of the new score, int `[...]`.
        u: tie breakers in (0, 1), `[...]`.

    Returns:
        (#{past > new} + U·(#{past = new} + 1)) / (t + 1), which is uniform for exchangeable scores, ties included.
    """
    above = np.cumsum(history[..., ::-1], axis=-1)[..., ::-1]
    at = np.expand_dims(cell, -1)
    equal = np.take_along_axis(history, at, axis=-1)[..., 0]
    more = np.take_along_axis(above, at, axis=-1)[..., 0] - equal
    return np.asarray((more + u * (equal + 1)) / (above[..., 0] + 1))


def bet(r: Floats, p: Floats) -> Floats:
    """One step of the sums: R_ε ← (1 + R_ε)·ε·p^(ε−1).

    Args:
        r: `[..., len(EPSILONS)]`.
        p: `[...]`.
    """
    e = EPSILONS * np.power(np.expand_dims(np.maximum(p, 1e-300), -1), EPSILONS - 1)
    return np.asarray(np.minimum((1 + r) * e, _MOST))


def evidence(r: Floats) -> Floats:
    """The mean of the sums over the exponents: what is compared with the line A."""
    return np.asarray(r.mean(axis=-1))
