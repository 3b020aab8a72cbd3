"""Shares of an answer are Shapley's, near enough; they add up; and the seed decides all chance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship_agent.runtime.explain import BATCH_BYTES, MAX_BATCH, Predict, evaluations, explain

Floats = npt.NDArray[np.float32]
WIDTH = 5
RNG = np.random.default_rng(3)
BACKGROUND = RNG.normal(size=(8, WIDTH)).astype(np.float32)
ROWS = RNG.normal(size=(3, WIDTH)).astype(np.float32) * 2
ZEROS = np.zeros(3, dtype=np.int64)


def bent(rows: Floats) -> npt.NDArray[np.float64]:
    """Products, steps, and a feature that says nothing: not additive at all."""
    x = rows.astype(np.float64)
    first = x[:, 0] * x[:, 1] + np.where(x[:, 2] > 0.3, 2.0, -1.0) + 0.5 * np.tanh(x[:, 0] + x[:, 3])
    return np.stack([first, -first], axis=1)


def straight(rows: Floats) -> npt.NDArray[np.float64]:
    return rows.astype(np.float64) @ np.array([[1.0], [-2.0], [0.5], [0.0], [3.0]])


def exact(predict: Predict, row: Floats, background: Floats, target: int) -> npt.NDArray[np.float64]:
    """Shapley's own sum, over every subset of the features and every background row."""

    def worth(chosen: tuple[int, ...]) -> float:
        mixed = background.copy()
        mixed[:, list(chosen)] = row[list(chosen)]
        return float(predict(mixed)[:, target].mean())

    shares = np.zeros(len(row))
    for j in range(len(row)):
        others = [i for i in range(len(row)) if i != j]
        for size in range(len(row)):
            weight = math.factorial(size) * math.factorial(len(row) - size - 1) / math.factorial(len(row))
            for chosen in itertools.combinations(others, size):
                shares[j] += weight * (worth((*chosen, j)) - worth(chosen))
    return shares


def test_many_walks_come_near_the_exact_shares() -> None:
    found = explain(bent, ROWS, BACKGROUND, ZEROS, permutations=2_000, seed=1)

    for i, row in enumerate(ROWS):
        known = exact(bent, row, BACKGROUND, 0)
        assert found.shares[i] == pytest.approx(known, abs=0.06 * np.abs(known).max())


def test_ten_walks_rank_features_as_the_exact_shares_do() -> None:
    found = explain(bent, ROWS, BACKGROUND, ZEROS, permutations=10)

    for i, row in enumerate(ROWS):
        known = exact(bent, row, BACKGROUND, 0)
        assert np.argmax(np.abs(found.shares[i])) == np.argmax(np.abs(known))


def test_of_a_sum_the_shares_are_its_terms_when_every_background_row_has_its_walks() -> None:
    found = explain(straight, ROWS, BACKGROUND, ZEROS, permutations=2 * len(BACKGROUND))

    weights = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    assert found.shares == pytest.approx((ROWS - BACKGROUND.mean(axis=0)) * weights, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(permutations=st.integers(1, 12), seed=st.integers(0, 99), used=st.integers(1, 8))
def test_the_shares_add_up_to_the_answer_less_the_usual_one(permutations: int, seed: int, used: int) -> None:
    usual = BACKGROUND[:used]
    found = explain(bent, ROWS, usual, ZEROS, permutations=permutations, seed=seed)

    assert found.answers == pytest.approx(bent(ROWS)[:, 0])
    assert found.base == pytest.approx([bent(usual)[:, 0].mean()] * 3)
    assert found.shares.sum(axis=1) + found.base == pytest.approx(found.answers, abs=1e-9)
    assert np.abs(found.gap).max() < 1e-9
    assert (found.shares[:, 4] == 0).all()  # it moves nothing


def test_the_other_class_has_the_opposite_reasons() -> None:
    one = explain(bent, ROWS, BACKGROUND, ZEROS)
    other = explain(bent, ROWS, BACKGROUND, ZEROS + 1)

    assert other.shares == pytest.approx(-one.shares)


def test_the_same_seed_gives_the_same_shares_whatever_else_is_asked() -> None:
    alone = explain(bent, ROWS[2:], BACKGROUND, ZEROS[:1], seed=5)
    together = explain(bent, ROWS, BACKGROUND, ZEROS, seed=5)
    another = explain(bent, ROWS, BACKGROUND, ZEROS, seed=6)

    assert alone.shares[0].tolist() == together.shares[2].tolist()
    assert another.shares.tolist() != together.shares.tolist()


def test_a_row_that_is_the_only_background_row_needs_no_reasons() -> None:
    found = explain(bent, BACKGROUND[:1], BACKGROUND[:1], ZEROS[:1])

    assert (found.shares.tolist(), found.gap.tolist()) == ([[0.0] * WIDTH], [0.0])


def test_missing_values_are_values_like_others() -> None:
    def counts_gaps(rows: Floats) -> npt.NDArray[np.float64]:
        return np.isnan(rows).sum(axis=1, keepdims=True).astype(np.float64)

    row = np.array([[np.nan, 1, np.nan, 1, 1]], dtype=np.float32)
    found = explain(counts_gaps, row, BACKGROUND, ZEROS[:1])

    assert found.shares.tolist() == [[1, 0, 1, 0, 0]]


@pytest.mark.parametrize(("width", "permutations"), [(1, 1), (5, 10), (700, 3)])
def test_no_more_rows_are_predicted_than_were_announced_and_never_many_at_once(width: int, permutations: int) -> None:
    sizes: list[int] = []

    def seen(rows: Floats) -> npt.NDArray[np.float64]:
        sizes.append(len(rows))
        assert rows.flags.c_contiguous
        assert rows.dtype == np.float32
        return rows.sum(axis=1, keepdims=True).astype(np.float64)

    rows = np.ones((2, width), np.float32)
    explain(seen, rows, np.zeros((4, width), np.float32), ZEROS[:2], permutations=permutations)

    assert sum(sizes) == evaluations(2, width, permutations, 4)
    assert max(sizes) <= min(MAX_BATCH, max(1, BATCH_BYTES // (4 * width)))
