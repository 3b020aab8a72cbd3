"""Monitoring: how well the model does without labels, from what it says (confidence-based performance estimation).

Rules of this room:
* pure; counts in, estimates out. The device sends only the histogram of its top score per predicted class; what a
  score was worth is counted on held-out rows at training time, smoothed here, and can be refitted on old counts;
* every estimate carries its uncertainty, of the rows and of the calibration;
* it sees inputs that have become harder. It can't see that the truth has changed (the blind spot: flipped labels move
  it by nothing), and says so.

Source: the method of NannyML's CBPE (accuracy and F1 are linear in the calibrated histogram, AUC needs its order only).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from .verdict import Estimate

Floats = npt.NDArray[np.float64]

BLIND_SPOT: Final = "Estimated from scores: inputs that became harder show here, a truth that changed does not."
_Z: Final = 1.959963984540054


def calibration_table(hits: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Floats, Floats]:
    """The chance that a prediction of this class with this score is right, and its standard error.

    Isotonic in the score within each class (pool adjacent violators), shrunk by half a row each way.

    Args:
        hits: of the held-out rows, how many were right, int `[classes, bins]`.
        scores: how many there were, the same shape.
    """
    right, total = (np.asarray(v, dtype=np.float64) for v in (hits, scores))
    chance = np.stack([_isotonic((h + 0.5) / (n + 1.0), n + 1e-3) for h, n in zip(right, total, strict=True)])
    error = np.sqrt(chance * (1 - chance) / (total + 1.0))
    return chance, error


def estimate(scores: npt.ArrayLike, hits: npt.ArrayLike, reference: npt.ArrayLike) -> Estimate | None:
    """What a window's scores say about its performance; None where there are no scores or no table.

    Args:
        scores: top score by predicted class, int `[classes, bins]`.
        hits: of the reference's scores, how many were right.
        reference: the reference's scores.
    """
    n, known, base = (np.asarray(v, dtype=np.float64) for v in (scores, hits, reference))
    if n.ndim != 2 or not n.sum() or not base.sum() or n.shape != known.shape or n.shape != base.shape:
        return None
    chance, error = calibration_table(known, base)
    rows = n.sum()
    accuracy = float((n * chance).sum() / rows)
    spread = float((n * chance * (1 - chance)).sum()) / rows**2 + float(((n * error) ** 2).sum()) / rows**2
    half = _Z * math.sqrt(spread)
    expected = float(known.sum() / base.sum())
    f1, auc = _binary(n, chance) if len(n) == 2 else (None, None)
    return Estimate(
        rows=int(rows),
        accuracy=accuracy,
        low=max(0.0, accuracy - half),
        high=min(1.0, accuracy + half),
        expected=expected,
        f1=f1,
        auc=auc,
        blind_spot=BLIND_SPOT,
    )


def _binary(n: Floats, chance: Floats) -> tuple[float | None, float | None]:
    """F1 of class 1, and the area under the ROC curve."""
    true = (n[1] * chance[1]).sum()
    false = (n[1] * (1 - chance[1])).sum()
    missed = (n[0] * (1 - chance[0])).sum()
    f1 = float(2 * true / (2 * true + false + missed)) if true + false + missed > 0 else None
    # From "surely 0" to "surely 1": class 0 by falling score, then class 1 by rising score.
    rows = np.concatenate([n[0][::-1], n[1]])
    one = np.concatenate([1 - chance[0][::-1], chance[1]])
    positive, negative = rows * one, rows * (1 - one)
    pairs = positive.sum() * negative.sum()
    if pairs <= 0:
        return f1, None
    below = np.cumsum(negative) - negative
    return f1, float((positive * (below + negative / 2)).sum() / pairs)


def _isotonic(values: Floats, weights: Floats) -> Floats:
    """The nearest rising sequence: pool adjacent violators."""
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, heavy, length = blocks.pop()
            last = blocks[-1]
            total = last[1] + heavy
            last[:] = [(last[0] * last[1] + mean * heavy) / total, total, last[2] + length]
    return np.concatenate([np.full(int(length), mean) for mean, _, length in blocks])
