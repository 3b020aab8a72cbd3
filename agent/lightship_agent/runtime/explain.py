"""Runtime: why a model answered so: how much each feature moved the answer from what it is on the average.

Rules:
* pure: a function that predicts, rows and background rows in, shares of the answer out; the seed decides all chance;
* the shares add up: their sum is the answer less the mean answer to all background rows, and `gap` says by how much
  it is not, which is float32's doing;
* a feature that the walk never saw move the answer has a share of exactly 0;
* memory is bounded by `BATCH_BYTES`, whatever the width; the rows predicted are `evaluations` and no more.

A permutation is a walk from a background row to the row that is explained, one feature at a time, and back in the other
order; what the answer does at each step is that feature's share. Walks from some background rows leave a remainder
against the mean of all of them; it goes to the features by how much they moved.

Source: Štrumbelj and Kononenko, "Explaining prediction models and individual predictions with feature contributions",
Knowledge and Information Systems 41, 2014; Shapley values by sampled permutations, here in antithetic pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
#: Numbers `[n, outputs]` for rows `[n, width]`.
Predict = Callable[[Floats], Doubles]

BATCH_BYTES: Final = 4 << 20
MAX_BATCH: Final = 512  # rows: another request's prediction does not wait longer for its turn


class Explanation(msgspec.Struct, frozen=True, eq=False):
    """Of n rows."""

    shares: Doubles  # [n, width]
    base: Doubles  # [n]: the mean answer to the background rows
    answers: Doubles  # [n]: what is explained
    gap: Doubles  # [n]: answers - base - Σ shares


def evaluations(rows: int, width: int, permutations: int, background: int) -> int:
    """How many rows an explanation predicts."""
    return rows * (permutations * (width - 1) + 1) + background


def explain(
    predict: Predict,
    rows: Floats,
    background: Floats,
    targets: npt.NDArray[np.int64],
    *,
    permutations: int = 10,
    seed: int = 0,
) -> Explanation:
    """Shapley values of `rows` against `background`, by sampled permutations.

    Args:
        predict: the model.
        rows: float32 `[n, width]`.
        background: what is usual, float32 `[m, width]`, one row or more.
        targets: which output is explained of each row, `[n]`.
        permutations: walks per row; an odd one has no counterpart.
        seed: the same seed and rows give the same shares, whatever else is asked in the same call.
    """
    whole = _in_batches(predict, background)
    shares, base, answers = np.zeros(rows.shape), np.zeros(len(rows)), np.zeros(len(rows))
    for i, row in enumerate(rows):
        target = int(targets[i])
        usual = whole[:, target]
        base[i] = usual.mean()
        answers[i] = float(_in_batches(predict, row[None, :])[0, target])
        rng = np.random.Generator(np.random.PCG64(seed))
        starts = np.resize(rng.permutation(len(background)), (permutations + 1) // 2)
        moved = np.zeros((permutations, rows.shape[1]))
        order = np.arange(rows.shape[1])
        for p in range(permutations):
            order = rng.permutation(rows.shape[1]) if p % 2 == 0 else order[::-1]
            start = starts[p // 2]
            moved[p, order] = np.diff(_walk(predict, row, background[start], order, (usual[start], answers[i], target)))
        shares[i] = _settled(moved, answers[i] - base[i])
    return Explanation(shares, base, answers, answers - base - shares.sum(axis=1))


def _walk(
    predict: Predict, row: Floats, start: Floats, order: npt.NDArray[np.int64], known: tuple[float, float, int]
) -> Doubles:
    """The answers from `start` to `row`, `[width + 1]`; `known` are the first, the last, and which output is meant."""
    first, last, target = known
    width = len(row)
    rank = np.empty(width, dtype=np.int64)
    rank[order] = np.arange(width)
    answers = np.empty(width + 1)
    answers[0], answers[-1] = first, last
    step = _batch(width)
    for at in range(1, width, step):
        taken = np.arange(at, min(width, at + step))[:, None]
        block = np.where(rank < taken, row, start)
        answers[at : at + len(block)] = predict(np.ascontiguousarray(block))[:, target]
    return answers


def _settled(moved: Doubles, total: float) -> Doubles:
    """The mean of the walks, and what is missing to `total` in proportion to how much each feature moved."""
    shares: Doubles = moved.mean(axis=0)
    weights = np.abs(moved).mean(axis=0)
    if weights.sum() > 0:
        shares = shares + (total - shares.sum()) * weights / weights.sum()
    return shares


def _in_batches(predict: Predict, rows: Floats) -> Doubles:
    step = _batch(rows.shape[1])
    parts = [predict(np.ascontiguousarray(rows[at : at + step])) for at in range(0, len(rows), step)]
    return np.concatenate(parts)


def _batch(width: int) -> int:
    return max(1, min(MAX_BATCH, BATCH_BYTES // (4 * width)))
