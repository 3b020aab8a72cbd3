"""Monitoring: has a rate that may not rise risen?

Rules of this room:
* pure; how often something was seen, window after window, in, evidence out; made anew from all windows each time;
* e-SR: R ← (1 + R)·LR over windows, LR the likelihood of a window's hits at a higher rate over that at the tolerated
  one, averaged over five higher rates. R ≥ A comes no more often than every A windows while the rate is tolerated;
* that holds for rows that are independent. Rows that follow each other are alike, and each window has an effect of its
  own: so the logarithm of LR is divided by φ, how much more neighbouring stretches of windows differ than chance has
  it. A rise shows in one pair of neighbours only, and the largest tenth of the pairs is left out. While there are few
  windows, φ is taken to be several times what they show.

Sources: Shiryaev-Roberts as an e-detector: Shin, Ramdas, Rinaldo 2022; φ is a quasi-likelihood's dispersion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

#: Odds ratios of the higher rates.
_ODDS: Final = (1.25, 1.5, 2.0, 3.0, 6.0)
#: Evidence is kept below so many times the line, so that it fades when the rate does.
_MOST: Final = 10.0
#: Logarithm of the largest likelihood ratio of one window.
_LARGEST: Final = 600.0
#: Windows in a stretch that is compared with the next one.
_STRETCHES: Final = (1, 2, 4, 8)
#: The share of the pairs that is left out, and what a χ² of one degree then has for its mean.
_LEFT_OUT: Final = 0.1
_TRIMMED: Final = 0.624
#: Pairs that chance is taken to have shown before there were any; and how many of longer stretches there must be.
_PRIOR: Final = 8
_ENOUGH: Final = 16
#: φ of m windows is taken to be 1 + so many / (m - 1) times what they show.
_FEW: Final = 6

Floats = npt.NDArray[np.float64]


class Trial(NamedTuple):
    """Rows of a window, and how many of them were what is watched for."""

    window: int
    rows: int
    hits: int


class Rate(NamedTuple):
    """What is made of it."""

    rows: int  # since `since`
    hits: int
    since: int
    evidence: float  # relative to the line
    phi: float


def watch_rate(trials: Sequence[Trial], tolerated: float, line: float) -> Rate:
    """Judge a rate by windows that ascend and each have rows; at least one.

    Args:
        trials: what was seen.
        tolerated: the rate up to which nothing is wrong.
        line: what the evidence must reach.
    """
    phi = dispersion(trials)
    logs = _logs(trials, tolerated) / (phi * _doubt(trials))
    path = _path(logs, line)
    # The most likely beginning is from where on everything together speaks most for a higher rate.
    upto = logs[::-1].cumsum(axis=0)[::-1]
    at = np.unravel_index(int(upto.argmax()), upto.shape)
    told = trials[int(at[0]) :] if upto[at] > 0 else trials
    return Rate(sum(t.rows for t in told), sum(t.hits for t in told), told[0].window, path[-1], phi)


def evidence_path(trials: Sequence[Trial], tolerated: float, line: float, *, independent: bool = False) -> list[float]:
    """The evidence after each window, relative to the line; `independent`: as if φ were known to be 1."""
    divisor = 1.0 if independent else dispersion(trials) * _doubt(trials)
    return _path(_logs(trials, tolerated) / divisor, line)


def _doubt(trials: Sequence[Trial]) -> float:
    """A φ of few windows may be far too small."""
    return 1 + _FEW / max(len(trials) - 1, 1)


def _path(logs: Floats, line: float) -> list[float]:
    ratios: list[list[float]] = np.exp(np.clip(logs, -_LARGEST, _LARGEST)).tolist()
    sums = [0.0] * len(_ODDS)
    path = []
    for window in ratios:
        sums = [min((1 + r) * x, _MOST * line) for r, x in zip(sums, window, strict=True)]
        path.append(sum(sums) / len(sums) / line)
    return path


def _logs(trials: Sequence[Trial], tolerated: float) -> Floats:
    """Per window the logarithm of the likelihood ratio of each higher rate."""
    table = np.array(trials, dtype=np.float64)
    rows, hits = table[:, 1:2], table[:, 2:3]
    odds = np.array(_ODDS)
    higher = odds * tolerated / (1 - tolerated + odds * tolerated)
    return np.asarray(hits * np.log(higher / tolerated) + (rows - hits) * np.log((1 - higher) / (1 - tolerated)))


def dispersion(trials: Sequence[Trial]) -> float:
    """φ: how much more neighbouring stretches of windows differ than chance has it; at least 1.

    Of a pair of stretches with k hits together, those of the first are hypergeometric by chance: its squared difference
    from the mean has a known expectation whatever the rate. Longer stretches tell what windows have in common.
    """
    table = np.array(trials, dtype=np.float64)[:, 1:]
    found = 1.0
    for size in _STRETCHES:
        stretches = len(table) // size
        if stretches <= _ENOUGH and size > 1:
            break
        # The newest windows are in every stretch length, so the oldest are left over.
        sums = table[len(table) - stretches * size :].reshape(stretches, size, 2).sum(axis=1)
        found = max(found, _pairs_dispersion(sums[:-1], sums[1:]))
    return found


def _pairs_dispersion(first: Floats, second: Floats) -> float:
    (n1, k1), (n2, k2) = first.T, second.T
    n, k = n1 + n2, k1 + k2
    telling = (k > 0) & (k < n) & (n > 1)
    n1, k1, n2, n, k = (a[telling] for a in (n1, k1, n2, n, k))
    squares = (k1 - n1 * k / n) ** 2 / (n1 * n2 * k * (n - k) / (n**2 * (n - 1)))
    left = np.sort(squares)[: len(squares) - int(np.ceil(_LEFT_OUT * len(squares)))]
    return float((_PRIOR + left.sum() / _TRIMMED) / (_PRIOR + len(left)))
