"""Sums of steps are whole numbers: exact, whatever is counted with what, in whichever order."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightship_agent.contract.codes import DataError, WireError
from lightship_agent.contract.moments import (
    BLOCK,
    LIMIT,
    STEPS,
    Distance,
    Floats,
    Moments,
    Products,
    Scales,
    Standardiser,
    moments_of,
    pack_triangle,
    products_of,
    unpack_triangle,
)
from lightship_agent.contract.wire import decode, encode

ANY = st.floats(width=32)
SCALES = Scales(low=(-5.0, 0.0, 0.0), high=(5.0, 9.0, 0.0), center=(0.5, 3.0, 0.0), scale=(2.0, 0.125, 0.0))


def steps_of(seed: int, rows: int, width: int = 3) -> Floats:
    return np.random.default_rng(seed).integers(-LIMIT, LIMIT + 1, (rows, width)).astype(np.float32)


@given(rows=hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.just(3)), elements=ANY))
def test_every_value_becomes_a_whole_number_of_bounded_steps(rows: Floats) -> None:
    steps = Standardiser(SCALES).steps(rows)

    assert (steps == np.rint(steps)).all()
    assert np.abs(steps).max() <= LIMIT
    assert (steps[np.isnan(rows)] == 0).all()
    assert (steps[:, 2] == 0).all()


def test_a_wild_value_counts_for_no_more_than_the_end_of_its_range() -> None:
    rows = np.array([[1e30, 1e30, 1], [5.0, 9.0, 1], [np.inf, np.inf, np.inf], [0.5, 3.0, np.nan]], dtype=np.float32)

    steps = Standardiser(SCALES).steps(rows)

    assert steps.tolist() == [[4.5 / 2 * STEPS, LIMIT, 0]] * 3 + [[0, 0, 0]]


@given(seed=st.integers(0, 2**32), rows=st.integers(0, 60), cut=st.integers(0, 60))
def test_moments_of_two_parts_are_those_of_the_whole(seed: int, rows: int, cut: int) -> None:
    steps = steps_of(seed, rows)
    first, second = steps[:cut], steps[cut:]

    pairs, whole = moments_of(steps)
    pairs_1, one = moments_of(first)
    pairs_2, two = moments_of(second, first[-1] if len(first) else None)

    assert (one + two).tolist() == whole.tolist()
    assert pairs_1 + pairs_2 == pairs == max(0, rows - 1)


def test_the_largest_steps_of_several_blocks_are_summed_exactly() -> None:
    steps = np.full((2 * BLOCK + 77, 2), LIMIT, dtype=np.float32)
    steps[:, 1] = -LIMIT
    n = len(steps)

    assert products_of(steps).tolist() == [n * LIMIT**2, -n * LIMIT**2, n * LIMIT**2]
    assert moments_of(steps)[1].tolist() == [[n * LIMIT, -n * LIMIT], [n * LIMIT**2] * 2, [(n - 1) * LIMIT**2] * 2]


@given(seed=st.integers(0, 2**32), order=st.randoms(use_true_random=False))
def test_products_do_not_depend_on_the_order_of_rows(seed: int, order: object) -> None:
    steps = steps_of(seed, 3_000, width=5)
    shuffled = steps.copy()
    np.random.default_rng(seed + 1).shuffle(shuffled)

    exact = steps.astype(np.int64).T @ steps.astype(np.int64)

    assert products_of(steps).tolist() == products_of(shuffled).tolist() == exact[np.triu_indices(5)].tolist()


def test_the_distance_is_that_of_mahalanobis() -> None:
    inverse = np.array([[2.0, -0.5], [-0.5, 1.0]])
    steps = np.array([[STEPS, 0], [2 * STEPS, STEPS], [0, 0]], dtype=np.float32)

    found = Distance(pack_triangle(inverse), 2).of(steps)

    assert found.ravel().tolist() == pytest.approx([2.0, 2 * 4 - 0.5 * 2 * 2 + 1, 0.0])


def test_a_triangle_of_another_size_is_refused() -> None:
    for broken in (b"", b"123", b"1234"):
        with pytest.raises(DataError) as refused:
            Distance(broken, 2)
        assert refused.value.code == "data.profile-mismatch"


def test_a_packed_matrix_comes_back_symmetric() -> None:
    matrix = np.arange(9.0).reshape(3, 3)
    matrix = matrix + matrix.T
    packed = np.frombuffer(pack_triangle(matrix), dtype="<f4")

    assert unpack_triangle(packed, 3).tolist() == matrix.tolist()
    assert Products(rows=1, sums=(1, 2, 3)).matrix(2).tolist() == [[1, 2], [2, 3]]


def test_moments_of_other_widths_do_not_merge() -> None:
    def narrow(width: int) -> Moments:
        return Moments(rows=1, pairs=0, sums=(1,) * width, squares=(1,) * width, lags=(0,) * width)

    with pytest.raises(DataError, match="Can't merge 2 counts with 3"):
        narrow(2) + narrow(3)
    with pytest.raises(DataError, match="Can't merge 1 counts with 3"):
        Products(rows=1, sums=(1,)) + Products(rows=1, sums=(1, 2, 3))


@pytest.mark.parametrize("change", [{"low": (0.0,)}, {"scale": (1.0, -1.0, 0.0)}, {"center": (0.0, float("nan"), 0.0)}])
def test_scales_that_contradict_themselves_are_refused(change: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(DataError) as refused:
        msgspec.structs.replace(SCALES, **change)
    assert refused.value.code == "data.profile-mismatch"


def test_a_sum_that_no_column_holds_is_refused_on_the_wire() -> None:
    moments = Moments(rows=1, pairs=0, sums=(2**63,), squares=(1,), lags=(0,))

    with pytest.raises(WireError):
        decode(encode(moments), Moments)
