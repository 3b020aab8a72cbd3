"""Datasets: values with a digest, that split and join."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightship.data.dataset import Dataset, canonical_bytes, concat, from_arrays, parse_dataset, split
from lightship.data.profile import reference_profile
from lightship.data.summary import summarise, summary_lines
from lightship_agent.contract.codes import DataError

SMALL = st.floats(-1e6, 1e6, width=32)


def tiny(**changes: object) -> Dataset:
    given_ = {"x": [[1, 2], [3, 4.5], [5, 6]], "y": ["b", "a", "b"], "feature_names": ["One", "Two"]} | changes
    return from_arrays("tiny", target="kind", **given_)  # type: ignore[arg-type]


def test_the_digest_is_a_promise_and_does_not_change_with_the_code() -> None:
    assert tiny().digest == "6854d707e4192350c9e4283bf1b9211dd92d5cdcdced3152a2b8fbcc4ae2d5da"


def test_units_titles_and_ranges_are_kept() -> None:
    made = tiny(units={"Two": "bar"})
    assert made.schema.features[1].unit == "bar"
    assert made.titles == ("One", "Two")
    assert made.schema.features[1].high == 6.0
    assert made.schema.features[0].integer
    assert not made.schema.features[1].integer


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=SMALL))
def test_bytes_give_the_dataset_back_with_the_same_digest(x: np.ndarray) -> None:
    made = from_arrays("any", x, np.arange(len(x)) % 2, [f"c{j}" for j in range(x.shape[1])], "t", labels=("0", "1"))
    again = parse_dataset(canonical_bytes(made))
    assert again.digest == made.digest
    assert np.array_equal(again.x, made.x)
    assert (again.schema, again.labels, again.titles) == (made.schema, made.labels, made.titles)


def test_the_layout_of_memory_and_the_sign_of_zero_do_not_change_the_digest() -> None:
    fortran = np.asfortranarray(np.array([[0.0, 2], [3, 4]]))
    negative = np.array([[-0.0, 2], [3, 4]])
    digests = {from_arrays("same", x, [0, 1], ["a", "b"], "t").digest for x in (fortran, negative)}
    assert len(digests) == 1


def test_titles_and_class_names_may_be_numpy_strings() -> None:
    made = from_arrays("np", [[1.0], [2.0]], np.array(["b", "a"]), np.array(["One"]), "t")  # type: ignore[arg-type]
    assert parse_dataset(canonical_bytes(made)).labels == ("a", "b")


def test_rows_cannot_be_written_to_and_the_callers_array_is_not_held() -> None:
    x = np.array([[1.0, 2], [3, 4]], dtype=np.float32)
    made = from_arrays("own", x, [0, 1], ["a", "b"], "t")
    x[0, 0] = 99
    assert made.x[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        made.x[0, 0] = 5


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"x": [[1, 2], [3, np.nan], [5, 6]]}, "data.missing-value"),
        ({"x": [[1, 2], [3, 1e39], [5, 6]]}, "data.range"),
        ({"x": [["a", 2], [3, 4], [5, 6]]}, "data.type"),
        ({"x": [[1], [3], [5]]}, "data.type"),
        ({"x": np.zeros((0, 2)), "y": []}, "data.empty"),
        ({"y": ["a", "b"]}, "data.type"),
        ({"feature_names": ["One", "One"]}, "data.column-unexpected"),
        ({"y": ["a", "b", ""]}, "data.missing-value"),
    ],
)
def test_arrays_that_make_no_dataset_are_refused(changes: dict[str, object], code: str) -> None:
    with pytest.raises(DataError) as caught:
        tiny(**changes)
    assert caught.value.code == code


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff" * 40])
def test_bytes_that_are_no_dataset_are_refused(data: bytes) -> None:
    with pytest.raises(DataError) as caught:
        parse_dataset(data)
    assert caught.value.code == "data.unreadable"


@given(st.binary(min_size=1, max_size=3), st.integers(0, 10_000))
def test_damaged_bytes_are_refused_or_parse_but_never_crash(noise: bytes, at: int) -> None:
    data = bytearray(canonical_bytes(tiny()))
    at %= len(data)
    data[at : at + len(noise)] = noise
    with contextlib.suppress(DataError):
        parse_dataset(bytes(data))


def test_joining_widens_ranges_and_maps_classes() -> None:
    more = from_arrays("more", [[100, 4], [7, -8]], ["a", "a"], ["One", "Two"], "kind")
    joined = concat(tiny(), more, "both")
    assert joined.rows == 5
    assert joined.y.tolist() == [1, 0, 1, 0, 0]
    assert (joined.schema.features[0].high, joined.schema.features[1].low) == (100.0, -8.0)
    assert joined.name == "both"


def test_joining_puts_columns_in_the_first_ones_order() -> None:
    more = from_arrays("more", [[4, 100]], ["a"], ["Two", "One"], "kind")
    assert concat(tiny(), more, "both").x[-1].tolist() == [100, 4]


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (from_arrays("more", [[1, 2]], ["z"], ["One", "Two"], "kind"), "data.type"),
        (from_arrays("more", [[1]], ["a"], ["One"], "kind"), "data.column-missing"),
        (from_arrays("more", [[1, 2, 3]], ["a"], ["One", "Two", "X"], "kind"), "data.column-unexpected"),
        (from_arrays("more", [[1, 2]], ["a"], ["One", "Two"], "sort"), "data.type"),
        (from_arrays("more", [[1, 2]], [0.5], ["One", "Two"], "kind"), "data.type"),
        (
            from_arrays(
                "more", [[float("nan"), 2.0], [1.0, 2.0]], ["a", "a"], ["One", "Two"], "kind", allow_missing=True
            ),
            "data.missing-value",
        ),
    ],
)
def test_what_means_something_else_is_not_joined(more: Dataset, code: str) -> None:
    with pytest.raises(DataError) as caught:
        concat(tiny(), more, "both")
    assert caught.value.code == code


def test_other_units_are_not_joined() -> None:
    more = tiny(units={"One": "mbar"})
    with pytest.raises(DataError, match="mbar"):
        concat(tiny(units={"One": "bar"}), more, "both")


@given(st.lists(st.integers(0, 3), min_size=8, max_size=200), st.floats(0.05, 0.9), st.integers(0, 5))
def test_a_split_loses_no_row_and_leaves_every_class_in_training(y: list[int], share: float, seed: int) -> None:
    made = from_arrays("any", np.zeros((len(y), 1)), y, ["a"], "t", labels=("0", "1", "2", "3"))
    parts = split(made, share, seed)
    assert sorted([*parts.train.tolist(), *parts.heldout.tolist()]) == list(range(len(y)))
    assert set(made.y[parts.train].tolist()) == set(y)
    again = split(made, share, seed)
    assert np.array_equal(again.heldout, parts.heldout)


def test_a_split_of_values_holds_out_low_and_high_ones() -> None:
    made = from_arrays("values", np.zeros((100, 1)), (np.arange(100) / 7).tolist(), ["a"], "t")
    heldout = made.y[split(made, 0.2, 1).heldout]
    assert len(heldout) == 20
    assert heldout.min() < 100 / 7 * 0.1
    assert heldout.max() > 100 / 7 * 0.9


def test_one_row_can_not_be_split() -> None:
    one = from_arrays("one", [[1.0]], [0.5], ["a"], "t")
    with pytest.raises(DataError) as caught:
        split(one, 0.25, 0)
    assert caught.value.code == "data.empty"


def test_a_profile_counts_every_row_and_every_answer() -> None:
    made = tiny()
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]], dtype=np.float32)
    predicted = scores.argmax(axis=1)
    profile = reference_profile(made.x, made.schema.names, predicted, scores, made.labels, labelled=2, errors=1)
    assert profile.rows == 3
    assert all(sum(f.counts) == 3 for f in profile.features)
    assert profile.predictions == (1, 2)
    assert sum(profile.scores) == 3
    assert (profile.labelled, profile.errors) == (2, 1)


def test_a_profile_of_a_regressor_counts_inputs_only() -> None:
    profile = reference_profile(tiny().x, tiny().schema.names)
    assert (profile.labels, profile.predictions, profile.scores) == ((), (), ())


@pytest.mark.parametrize(
    "arguments",
    [
        (np.zeros((3, 2), np.float32), ("a",)),
        (np.zeros((3, 1), np.float32), ("a",), np.array([0, 2, 0]), None, ("x", "y")),
        (np.zeros((3, 1), np.float32), ("a",), np.array([0, 1]), None, ("x", "y")),
        (np.zeros((3, 1), np.float32), ("a",), None, None, ("x", "y")),
        (np.zeros((0, 1), np.float32), ("a",)),
    ],
)
def test_a_profile_refuses_what_does_not_fit(arguments: tuple[object, ...]) -> None:
    with pytest.raises(DataError):
        reference_profile(*arguments)  # type: ignore[arg-type]


def test_a_summary_shows_ranges_gaps_and_classes() -> None:
    made = tiny(x=[[1, 2], [np.nan, 4.5], [5, 2]], allow_missing=True)
    summary = summarise(made)
    assert summary.features[0].missing == 1
    assert summary.features[1].distinct == 2
    assert summary.classes == {"a": 1, "b": 2}
    assert "kind: a: 1, b: 2" in summary_lines(summary)[-1]


def test_a_summary_of_values_shows_their_range() -> None:
    made = from_arrays("values", [[1.0], [2.0]], [0.5, 1.5], ["a"], "t")
    assert summary_lines(summarise(made))[-1] == "t: 0.5 to 1.5"


def test_a_dataset_is_checked_however_it_is_made() -> None:
    with pytest.raises(DataError):
        dataclasses.replace(tiny(), y=np.array([0, 1, 7]))
