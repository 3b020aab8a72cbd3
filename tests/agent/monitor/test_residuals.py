"""A regressor's labels are counted in the cells of its profile, as training would count them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.data.moments import reference_residuals
from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.messages import Labels
from lightship_agent.contract.profile import Binner
from lightship_agent.monitor.labels import PredictionLedger, StreamKey
from lightship_agent.monitor.residuals import ResidualMeter

RNG = np.random.default_rng(5)
TRUTH = RNG.normal(size=500).astype(np.float32)
SAID = (TRUTH + RNG.normal(scale=0.3, size=500)).astype(np.float32)
FOUND = reference_residuals(SAID, TRUTH)
assert FOUND is not None
REFERENCE = FOUND
METER = ResidualMeter(REFERENCE)
KEY = StreamKey("furnace", "a" * 64, "b" * 64, (), METER)


@given(truth=st.floats(-1e30, 1e30), said=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_one_residual_lands_where_a_block_of_them_would(truth: float, said: float) -> None:
    cell, steps, error = METER.measure(truth, said)

    residual = np.array([[truth - said]], dtype=np.float32)
    assert np.flatnonzero(Binner([REFERENCE.bins]).count(residual)).tolist() == [cell]
    assert abs(steps) <= 127
    assert error == (abs(residual.item()) > REFERENCE.bound)


def test_a_model_that_answers_nonsense_is_wrong() -> None:
    assert METER.measure(1.0, float("nan")) == (REFERENCE.bins.cells - 1, 0, True)


def test_one_in_ten_of_the_rows_held_out_is_an_error_by_definition() -> None:
    errors = sum(METER.measure(float(t), float(s))[2] for t, s in zip(TRUTH, SAID, strict=True))
    assert errors == pytest.approx(50, abs=2)


@given(order=st.permutations(range(30)), repeats=st.lists(st.integers(0, 29), max_size=10))
def test_late_shuffled_and_repeated_labels_count_once_in_their_window(order: list[int], repeats: list[int]) -> None:
    ledger = PredictionLedger(100)
    for i in range(30):
        ledger.remember(KEY, f"p{i}", [i // 10], [float(SAID[i])])
    counted = [ledger.resolve(f"p{i}", repr(float(TRUTH[i]))) for i in [*order, *repeats]]

    records = [r for r in ledger.collect(9, lambda _k, _w: True) if isinstance(r, Labels)]
    residuals = (TRUTH[:30].astype(np.float64) - SAID[:30]).astype(np.float32)[:, None]
    cells = np.sum([r.residuals for r in records], axis=0)
    assert sum(counted) == 30
    assert [(r.w, r.labelled) for r in records] == [(0, 10), (1, 10), (2, 10)]
    assert cells.tolist() == Binner([REFERENCE.bins]).count(residuals).tolist()
    assert all(sum(r.residuals) == r.labelled and len(r.residual_sums) == 2 for r in records)


@pytest.mark.parametrize("label", ["warm", "nan", "inf", "-inf", ""])
def test_a_truth_that_is_no_number_is_refused_and_counts_nothing(label: str) -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "a", [0], [1.0])
    with pytest.raises(ServingError) as refused:
        ledger.resolve("a", label)
    assert refused.value.code == "serving.input"
    assert ledger.collect(1, lambda _k, _w: True) == []
    assert ledger.resolve("a", "1.5")


def test_a_model_that_was_never_wrong_has_no_residuals_to_compare_with() -> None:
    assert reference_residuals(TRUTH, TRUTH) is None
    assert reference_residuals(TRUTH[:0], TRUTH[:0]) is None
