"""Labels find their window: late, out of order, twice, for rows long gone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.messages import LabelledRows, Labels
from lightship_agent.monitor.labels import PredictionLedger, StreamKey

KEY = StreamKey("pump", "a" * 64, "b" * 64, ("healthy", "worn"))
NUMBERS = StreamKey("pump", "c" * 64, "b" * 64, ())


def closed(_key: StreamKey, _window: int) -> bool:
    return True


def labels(ledger: PredictionLedger) -> dict[int, tuple[int, int]]:
    records = ledger.collect(9, closed)
    return {r.w: (r.labelled, r.errors) for r in records if isinstance(r, Labels)}


def code_of(ledger: PredictionLedger, prediction_id: str, label: str = "worn") -> str:
    with pytest.raises(ServingError) as refusal:
        ledger.resolve(prediction_id, label)
    return refusal.value.code


def test_a_label_counts_for_the_window_of_its_prediction() -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "a", [4], [1])
    ledger.remember(KEY, "b", [5], [1])
    assert ledger.resolve("b", "worn")
    assert ledger.resolve("a", "healthy")
    assert labels(ledger) == {4: (1, 1), 5: (1, 0)}
    assert labels(ledger) == {}


def test_the_second_label_of_a_prediction_is_a_duplicate_even_if_it_differs() -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "a", [0], [1])
    assert ledger.resolve("a", "worn")
    assert not ledger.resolve("a", "worn")
    assert not ledger.resolve("a", "healthy")
    assert labels(ledger) == {0: (1, 0)}


def test_a_row_of_a_batch_is_named_by_its_number() -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "batch", [0, 0, 1], [0, 1, 1])
    assert ledger.resolve("batch:2", "healthy")
    assert ledger.resolve("batch:0", "healthy")
    assert labels(ledger) == {0: (1, 0), 1: (1, 1)}
    assert code_of(ledger, "batch") == "serving.unknown-prediction"
    assert code_of(ledger, "batch:3") == "serving.unknown-prediction"
    assert code_of(ledger, "batch:-1") == "serving.unknown-prediction"


def test_rows_that_were_overwritten_are_unknown_and_the_others_keep_their_numbers() -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "batch", [7], [1], first=2, total=3)
    assert code_of(ledger, "batch:1") == "serving.unknown-prediction"
    assert ledger.resolve("batch:2", "worn")


def test_an_id_with_a_colon_of_its_own_is_taken_literally() -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "line:7", [0], [0])
    assert ledger.resolve("line:7", "healthy")


@pytest.mark.parametrize("unknown", ["", ":", "never", "never:1", "a:0", "a:" + "9" * 30, "a:٣"])
def test_an_unknown_id_is_told_so_and_counts_nothing(unknown: str) -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "a", [0], [0])
    assert code_of(ledger, unknown) == "serving.unknown-prediction"
    assert labels(ledger) == {}


def test_a_label_the_model_does_not_know_is_refused_and_may_be_corrected() -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "a", [0], [0])
    assert code_of(ledger, "a", "broken") == "serving.input"
    assert ledger.resolve("a", "healthy")


def test_labels_wait_until_their_window_is_closed() -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "a", [3], [0])
    ledger.resolve("a", "healthy")
    assert ledger.collect(1, lambda _key, _window: False) == []
    assert len(ledger.collect(2, closed)) == 1


def test_a_repeated_id_means_the_newer_prediction() -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "a", [0], [0])
    ledger.remember(KEY, "a", [1], [1])
    ledger.resolve("a", "worn")
    assert labels(ledger) == {1: (1, 0)}


@given(sizes=st.lists(st.integers(1, 9), max_size=60), capacity=st.integers(1, 30))
def test_memory_is_bounded_and_the_oldest_go_first(sizes: list[int], capacity: int) -> None:
    ledger = PredictionLedger(capacity)
    for i, n in enumerate(sizes):
        ledger.remember(KEY, f"r{i}", [i] * n, [0] * n)
        assert len(ledger) <= capacity
    kept = 0
    for i in reversed(range(len(sizes))):
        kept += sizes[i]
        name = f"r{i}" if sizes[i] == 1 else f"r{i}:0"
        if kept <= capacity:
            assert ledger.resolve(name, "healthy")
        else:
            assert code_of(ledger, name) == "serving.unknown-prediction"


@given(seed=st.integers(0, 1_000), n=st.integers(1, 60))
def test_any_order_with_repeats_gives_the_same_counts(seed: int, n: int) -> None:
    rng = random.Random(seed)
    truth = {f"p{i}": rng.randrange(2) for i in range(n)}
    predicted = {name: rng.randrange(2) for name in truth}
    ledger = PredictionLedger(n)
    for i, name in enumerate(truth):
        ledger.remember(KEY, name, [i // 10], [predicted[name]])
    told = [*truth, *rng.choices(list(truth), k=n)]
    rng.shuffle(told)

    counted = sum(ledger.resolve(name, KEY.labels[truth[name]]) for name in told)

    found = labels(ledger)
    assert counted == n == sum(labelled for labelled, _ in found.values())
    assert sum(errors for _, errors in found.values()) == sum(truth[name] != predicted[name] for name in truth)


def test_no_row_leaves_unless_sharing_is_on() -> None:
    ledger = PredictionLedger(10)
    ledger.remember(KEY, "a", [0], [0], np.ones((1, 2), np.float32))
    ledger.resolve("a", "worn")
    assert not [r for r in ledger.collect(1, closed) if isinstance(r, LabelledRows)]


def test_shared_rows_come_with_their_labels_and_no_more_than_agreed() -> None:
    ledger = PredictionLedger(10, share_rows=2)
    for i in range(4):
        ledger.remember(KEY, f"r{i}", [0], [0], np.array([[i, np.nan]], np.float32))
        ledger.resolve(f"r{i}", "worn")
    (shared,) = [r for r in ledger.collect(1, closed) if isinstance(r, LabelledRows)]
    assert shared.x == ((2.0, None), (3.0, None))
    assert shared.y == ("worn", "worn")
    assert not [r for r in ledger.collect(2, closed) if isinstance(r, LabelledRows)]


def test_the_truth_of_a_regressor_is_a_number_that_is_shared_but_not_counted() -> None:
    ledger = PredictionLedger(10, share_rows=5)
    ledger.remember(NUMBERS, "a", [0], [-1], np.ones((1, 1), np.float32))
    assert code_of(ledger, "a", "warm") == "serving.input"
    assert ledger.resolve("a", "21.5")
    (record,) = ledger.collect(1, closed)
    assert isinstance(record, LabelledRows)
    assert record.y == ("21.5",)
