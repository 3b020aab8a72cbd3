"""Every row lands in exactly one cell per feature, on both sides alike; windows merge by addition and nothing else."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightship_agent.contract.codes import DataError
from lightship_agent.contract.moments import Moments, Products
from lightship_agent.contract.profile import (
    EXTRA_CELLS,
    MAX_BINS,
    SCORE_BINS,
    Binner,
    FeatureBins,
    ReferenceProfile,
    WindowCounts,
    count_outputs,
    cut_points,
    empty_counts,
    profile_features,
)
from lightship_agent.contract.quality import QualityCount, merge_quality

Floats = npt.NDArray[np.float32]
ANY = st.floats(width=32)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def matrices(elements: st.SearchStrategy[float], least: int = 1) -> st.SearchStrategy[Floats]:
    return hnp.arrays(np.float32, st.tuples(st.integers(least, 40), st.just(3)), elements=elements)


NAMES = ("a", "b", "c")


def per_feature(reference: Floats, rows: Floats) -> list[npt.NDArray[np.int64]]:
    features = profile_features(reference, NAMES)
    counts = Binner(features).count(rows)
    ends = np.cumsum([0, *(f.cells for f in features)])
    return [counts[a:z] for a, z in itertools.pairwise(ends)]


@given(reference=matrices(FINITE), rows=matrices(ANY))
def test_every_row_lands_in_exactly_one_cell_of_each_feature(reference: Floats, rows: Floats) -> None:
    for j, cells in enumerate(per_feature(reference, rows)):
        column = rows[:, j]
        low, high = reference[:, j].min(), reference[:, j].max()
        assert cells.sum() == len(rows)
        assert cells[-1] == np.isnan(column).sum()
        assert cells[-2] == (column > high).sum()
        assert cells[0] == (column < low).sum()


@given(reference=matrices(FINITE))
def test_the_reference_itself_has_nothing_under_over_or_missing(reference: Floats) -> None:
    for feature in profile_features(reference, NAMES):
        assert sum(feature.counts) == len(reference)
        assert (feature.counts[0], feature.counts[-2], feature.counts[-1]) == (0, 0, 0)
        assert len(feature.edges) < MAX_BINS
        assert all(count > 0 for count in feature.counts[1:-2])


@given(reference=matrices(FINITE, least=2))
def test_a_value_at_an_edge_and_its_float32_neighbours_fall_on_the_right_sides(reference: Floats) -> None:
    features = profile_features(reference, NAMES)
    for j, feature in enumerate(features):
        edges = np.array(feature.edges, dtype=np.float32)
        for i, edge in enumerate(edges):
            below = np.nextafter(edge, np.float32(-np.inf), dtype=np.float32)
            rows = np.tile(reference[:1], (2, 1))
            rows[:, j] = below, edge
            cells = per_feature(reference, rows)[j]
            expected = np.zeros_like(cells)
            expected[i + 1 if below >= np.float32(feature.low) else 0] += 1
            expected[i + 2] += 1
            assert cells.tolist() == expected.tolist()


@given(reference=matrices(FINITE))
def test_infinities_are_beyond_every_bin_and_nan_is_missing(reference: Floats) -> None:
    rows = np.array([[-np.inf] * 3, [np.inf] * 3, [np.nan] * 3], dtype=np.float32)

    for cells in per_feature(reference, rows):
        assert (cells[0], cells[-2], cells[-1]) == (1, 1, 1)
        assert cells[1:-2].sum() == 0


@given(reference=matrices(FINITE), rows=matrices(ANY), at=st.integers(0, 40))
def test_counting_in_two_parts_is_counting_at_once(reference: Floats, rows: Floats, at: int) -> None:
    binner = Binner(profile_features(reference, NAMES))

    assert (binner.count(rows[:at]) + binner.count(rows[at:])).tolist() == binner.count(rows).tolist()


@given(column=hnp.arrays(np.float32, st.integers(1, 300), elements=FINITE))
def test_cut_points_are_values_of_the_sample_and_ascend(column: Floats) -> None:
    cuts = cut_points(column)

    assert set(cuts.edges) <= {float(v) for v in column}
    assert list(cuts.edges) == sorted(set(cuts.edges))
    assert (cuts.low, cuts.high) == (float(column.min()), float(column.max()))


def test_ties_share_a_bin_and_a_constant_column_has_one() -> None:
    assert cut_points(np.full(100, 7.0, np.float32)).edges == ()
    assert len(cut_points(np.array([0, 1] * 50, np.float32)).edges) == 1


@pytest.mark.parametrize("column", [[], [np.nan, np.nan], [np.inf]])
def test_a_column_without_a_value_cannot_be_profiled(column: list[float]) -> None:
    with pytest.raises(DataError) as refused:
        cut_points(np.array(column, dtype=np.float32))
    assert refused.value.code == "data.empty"


# Categories ----------------------------------------------------------------------------------------------------------

COLOURS = tuple(f"colour {i}" for i in range(60))


def test_a_category_is_a_bin_and_a_new_one_is_over() -> None:
    codes = np.array([[0, 5], [59, 6], [59, 7], [60, 5], [-1, 5], [np.nan, 5], [250, 5], [1e9, 5]], dtype=np.float32)
    reference = np.stack([np.arange(60), np.arange(60)], axis=1).astype(np.float32)
    features = profile_features(reference, ("colour", "b"), {"colour": COLOURS})

    cells = Binner(features).count(codes)[: features[0].cells]

    assert features[0].categories == COLOURS
    assert features[0].counts == (0, *(1,) * 60, 0, 0)
    assert (cells[0], cells[1], cells[60], cells[-2], cells[-1]) == (1, 1, 2, 3, 1)
    assert cells.sum() == len(codes)


@given(rows=hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.just(2)), elements=ANY))
def test_every_code_lands_in_exactly_one_cell(rows: Floats) -> None:
    features = profile_features(np.zeros((3, 2), np.float32), ("a", "b"), {"a": COLOURS[:7], "b": COLOURS[:1]})
    counts = Binner(features).count(rows)

    for j, cells in enumerate(np.split(counts, [features[0].cells])):
        column, last = rows[:, j], len(features[j].categories) - 1
        assert cells.sum() == len(rows)
        assert (cells[0], cells[-2], cells[-1]) == ((column < 0).sum(), (column > last).sum(), np.isnan(column).sum())


def test_hundreds_of_categories_have_cells_of_their_own() -> None:
    many = tuple(f"word {i}" for i in range(700))
    codes = np.array([[0], [255], [256], [699], [700], [np.nan]], dtype=np.float32)

    cells = Binner(profile_features(codes[:1], ("word",), {"word": many})).count(codes)

    assert np.flatnonzero(cells).tolist() == [1, 256, 257, 700, 701, 702]
    assert set(cells.tolist()) == {0, 1}


def test_bins_of_categories_that_are_not_their_codes_are_refused() -> None:
    with pytest.raises(DataError) as refused:
        FeatureBins(name="c", low=0.0, high=2.0, edges=(1.0,), counts=(0,) * 5, categories=("x", "y"))
    assert refused.value.code == "data.profile-mismatch"


# Merge ---------------------------------------------------------------------------------------------------------------

NUMBER = st.integers(0, 2**60)


def window_counts(cells: int = 5, classes: int = 2) -> st.SearchStrategy[WindowCounts]:
    def cell(n: int) -> st.SearchStrategy[tuple[int, ...]]:
        return st.lists(NUMBER, min_size=n, max_size=n).map(tuple)

    def maybe(n: int) -> st.SearchStrategy[tuple[int, ...]]:
        return st.just(()) | cell(n)

    signed = st.lists(st.integers(-(2**60), 2**60), min_size=2, max_size=2).map(tuple)
    moments = st.builds(Moments, rows=NUMBER, pairs=NUMBER, sums=signed, squares=signed, lags=signed)
    return st.builds(
        WindowCounts, rows=NUMBER, counts=cell(cells), predictions=cell(classes), scores=cell(3), labelled=NUMBER,
        errors=NUMBER, invalid=NUMBER, distances=maybe(3), values=maybe(4), moments=st.none() | moments,
        products=st.none() | st.builds(Products, rows=NUMBER, sums=signed), residuals=maybe(2),
        residual_sums=st.just(()) | signed,
        quality=st.lists(
            st.builds(QualityCount, st.sampled_from(["stuck", "type"]), st.integers(-1, 1), NUMBER), max_size=3
        ).map(lambda some: merge_quality(tuple(some), ())),
    )  # fmt: skip


@given(a=window_counts(), b=window_counts(), c=window_counts())
def test_merge_is_associative_commutative_and_exact(a: WindowCounts, b: WindowCounts, c: WindowCounts) -> None:
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert sum((a + b).counts) == sum(a.counts) + sum(b.counts)


@given(windows=st.lists(window_counts(), min_size=1, max_size=6), order=st.randoms())
def test_the_order_of_merging_does_not_matter(windows: list[WindowCounts], order: object) -> None:
    shuffled = list(windows)
    order.shuffle(shuffled)  # type: ignore[attr-defined]

    assert functools.reduce(WindowCounts.__add__, shuffled) == functools.reduce(WindowCounts.__add__, windows)


def test_nothing_merged_with_a_window_is_the_window() -> None:
    reference = np.arange(30, dtype=np.float32).reshape(10, 3)
    profile = ReferenceProfile(
        rows=10, features=profile_features(reference, NAMES), predictions=(4, 6), scores=(0,) * 42
    )
    nothing = empty_counts(profile)
    window = WindowCounts(
        rows=10, counts=tuple(profile.counts.tolist()), predictions=(1, 2), scores=(1,) * 42, labelled=3, errors=1
    )

    assert window + nothing == nothing + window == window
    assert len(nothing.counts) == sum(f.cells for f in profile.features)
    assert all(f.cells == len(f.edges) + 1 + EXTRA_CELLS for f in profile.features)


@given(a=window_counts(5), b=window_counts(6))
def test_windows_of_different_layouts_do_not_merge(a: WindowCounts, b: WindowCounts) -> None:
    with pytest.raises(DataError) as refused:
        a + b
    assert refused.value.code == "data.profile-mismatch"


# Outputs -------------------------------------------------------------------------------------------------------------


@given(data=st.data(), classes=st.integers(2, 6), n=st.integers(0, 50))
def test_each_prediction_is_counted_once_and_its_score_in_one_cell(data: st.DataObject, classes: int, n: int) -> None:
    labels = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, classes - 1)))
    scores = data.draw(hnp.arrays(np.float32, (n, classes), elements=st.floats(-3, 3, width=32)))

    predictions, cells = count_outputs(labels, scores, classes)

    assert predictions.tolist() == [(labels == k).sum() for k in range(classes)]
    assert cells.reshape(classes, SCORE_BINS).sum(axis=1).tolist() == predictions.tolist()
    assert count_outputs(labels, None, classes)[1].sum() == 0
