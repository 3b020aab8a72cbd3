"""The reference a device's moments and distances are compared with is what fresh rows of the same kind would show."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lightship.data.moments import reference_moments
from lightship_agent.contract.moments import LIMIT, MAX_JOINT, STEPS, Distance, Standardiser
from lightship_agent.contract.profile import Binner, MomentReference, profile_features
from lightship_agent.contract.wire import decode, encode

Floats = npt.NDArray[np.float32]
RNG = np.random.default_rng(11)
MIX = RNG.normal(size=(8, 8)) * 0.4 + np.eye(8)


def world(n: int, seed: int) -> Floats:
    return (np.random.default_rng(seed).normal(size=(n, 8)) @ MIX).astype(np.float32)


def reference_of(rows: Floats, categories: dict[str, tuple[str, ...]] | None = None) -> MomentReference:
    names = [f"f{i}" for i in range(rows.shape[1])]
    return reference_moments(profile_features(rows, names, categories), rows)


def test_steps_have_the_reference_as_their_unit() -> None:
    reference = reference_of(world(2_000, 1))
    n = reference.moments.rows

    mean = np.array(reference.moments.sums) / n / STEPS
    variance = np.array(reference.moments.squares) / n / STEPS**2

    assert (n, reference.moments.pairs) == (2_000, 1_999)
    assert np.abs(mean).max() < 0.01
    assert variance == pytest.approx(np.ones(8), abs=0.01)


@pytest.mark.parametrize("rows", [300, 2_000])
def test_fresh_rows_are_as_far_away_as_the_reference_says(rows: int) -> None:
    reference = reference_of(world(rows, 2))
    assert reference.distance is not None

    distances = Distance(reference.inverse, 8).of(Standardiser(reference.scales).steps(world(20_000, 3)))
    fresh = Binner([reference.distance]).count(distances) / 20_000
    known = np.array(reference.distance.counts) / rows

    shift = ((fresh - known) ** 2 / np.maximum(known, 1 / rows)).sum()
    assert shift < 3 * 20 / rows  # no more than the reference's own noise


def test_what_moves_together_no_longer_is_far_away() -> None:
    reference = reference_of(world(2_000, 4))
    swapped = world(1_000, 5)[:, [1, 0, 2, 3, 4, 5, 6, 7]]

    near, far = (
        Distance(reference.inverse, 8).of(Standardiser(reference.scales).steps(rows)).mean()
        for rows in (world(1_000, 5), swapped)
    )

    assert near == pytest.approx(8, rel=0.15)
    assert far > 1.5 * near


def test_one_wild_row_of_the_training_data_changes_no_scale() -> None:
    clean, wild = world(2_000, 6), world(2_000, 6)
    wild[7] = 1e9

    one, other = reference_of(clean).scales, reference_of(wild).scales

    assert other.scale == pytest.approx(one.scale, rel=0.02)


def test_two_copies_of_a_column_a_constant_and_a_category_do_no_harm() -> None:
    rows = world(500, 7)
    rows[:, 1] = rows[:, 0]
    rows[:, 2] = 3.0
    rows[:, 3] = np.random.default_rng(8).integers(0, 2, 500)
    rows[::7, 4] = np.nan

    reference = reference_of(rows, {"f3": ("no", "yes")})

    assert (reference.scales.scale[2], reference.scales.scale[3]) == (0.0, 0.0)
    assert np.isfinite(np.frombuffer(reference.inverse, dtype="<f4")).all()
    assert reference.distance is not None
    assert sum(reference.distance.counts) == 500
    assert reference.distance.counts[-1] == 0


def test_the_longest_run_of_a_value_is_kept() -> None:
    rows = world(200, 9)
    rows[20:55, 3] = 1.25

    assert reference_of(rows).runs == (1, 1, 1, 35, 1, 1, 1, 1)


def test_a_reference_of_very_few_rows_is_still_one() -> None:
    for n in (1, 2, 5):
        reference = reference_of(world(n, 10))
        assert reference.distance is not None
        assert sum(reference.distance.counts) == n
        assert max(map(abs, reference.moments.sums)) <= n * LIMIT


def test_a_model_too_wide_for_products_has_moments_all_the_same() -> None:
    wide = np.random.default_rng(12).normal(size=(50, MAX_JOINT + 1)).astype(np.float32)

    reference = reference_of(wide)

    assert (reference.products, reference.distance, reference.inverse) == (None, None, b"")
    assert len(reference.moments.lags) == MAX_JOINT + 1
    assert decode(encode(reference), MomentReference) == reference
