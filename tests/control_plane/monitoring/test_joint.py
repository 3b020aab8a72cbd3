"""What no histogram shows: features that part, or change places; and what many devices share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lightship.monitoring.groups import between_p, differences, more_drift_p, paired_p
from lightship.monitoring.joint import JointShift, inflation, judge_products

FEATURES = 12
NAMES = tuple(f"f{i}" for i in range(FEATURES))
Matrix = npt.NDArray[np.float64]


def blocks(rho: float = 0.5) -> Matrix:
    """Three features each go together."""
    together = np.kron(np.eye(FEATURES // 3), np.full((3, 3), rho))
    np.fill_diagonal(together, 1.0)
    return together


def products(rng: np.random.Generator, covariance: Matrix, rows: int, swap: tuple[int, int] | None = None) -> Matrix:
    drawn = rng.multivariate_normal(np.zeros(FEATURES), covariance, size=rows, method="cholesky")
    if swap:
        drawn[:, list(swap)] = drawn[:, list(reversed(swap))]
    return np.asarray(drawn.T @ drawn)


def judge(rng: np.random.Generator, covariance: Matrix, swap: tuple[int, int] | None = None) -> JointShift:
    reference = products(rng, blocks(), 10_000)
    found = judge_products(products(rng, covariance, 1_000, swap), 1_000, reference, 10_000, NAMES)
    assert found is not None
    return found


def test_correlations_that_stay_raise_nothing_more_often_than_they_may() -> None:
    rng = np.random.default_rng(1)
    p = [judge(rng, blocks()).p_value for _ in range(200)]
    assert np.mean(np.array(p) < 0.05) <= 0.05 + 3 * np.sqrt(0.05 / 200)


def test_one_pair_that_comes_together_is_named() -> None:
    covariance = blocks()
    covariance[0, 5] = covariance[5, 0] = 0.3
    found = judge(np.random.default_rng(2), covariance)
    assert found.pair == ("f0", "f5")
    assert found.p_value < 1e-6
    assert found.swapped is None


def test_swapped_columns_are_named_within_a_thousand_rows() -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        found = judge(rng, blocks(), swap=(1, 7))
        assert found.p_value < 1e-9
        assert found.swapped == ("f1", "f7")


def test_heavy_tails_are_paid_for_by_what_healthy_windows_show() -> None:
    rng = np.random.default_rng(4)

    def heavy(rows: int) -> Matrix:
        drawn = rng.multivariate_normal(np.zeros(FEATURES), blocks(), size=rows, method="cholesky")
        drawn *= np.sqrt(3 / rng.chisquare(3, rows))[:, None]
        drawn = np.clip(drawn, -8, 8)
        return np.asarray(drawn.T @ drawn)

    reference = heavy(10_000)
    factor = inflation([(heavy(500), 500) for _ in range(40)], reference, 10_000)
    assert factor > 1.5
    found = [judge_products(heavy(500), 500, reference, 10_000, NAMES, factor) for _ in range(100)]
    assert np.mean([f is not None and f.p_value < 0.01 for f in found]) <= 0.08


def test_constant_features_are_left_out() -> None:
    empty = np.zeros((FEATURES, FEATURES))
    assert judge_products(empty, 100, empty, 100, NAMES) is None


# -- fleets -------------------------------------------------------------------------------------------------------


def fleet(rng: np.random.Generator, devices: int, shift: float, spread: float = 0.3) -> tuple[Matrix, Matrix]:
    """Counts now and of the baseline, of devices that each have an offset of their own."""
    edges = np.array([-1.28, -0.84, -0.52, -0.25, 0.0, 0.25, 0.52, 0.84, 1.28])
    now, past = np.empty((devices, 10)), np.empty((devices, 10))
    for i, offset in enumerate(rng.standard_normal(devices) * spread):
        past[i] = np.bincount(np.searchsorted(edges, rng.standard_normal(5_000) + offset), minlength=10)
        now[i] = np.bincount(np.searchsorted(edges, rng.standard_normal(500) + offset + shift), minlength=10)
    return now, past


@pytest.mark.parametrize("devices", [12, 100])
def test_offsets_of_devices_are_no_shift_of_the_fleet(devices: int) -> None:
    rng = np.random.default_rng(5)
    p = np.array([paired_p(*fleet(rng, devices, 0.0)) for _ in range(1_200 // devices)])
    assert (p < 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 / len(p)) + 1 / len(p)
    assert (p < 1.0).all()


def test_a_shift_that_no_device_could_show_alone_is_seen_by_a_hundred() -> None:
    rng = np.random.default_rng(6)
    assert np.median([paired_p(*fleet(rng, 100, 0.05)) for _ in range(20)]) < 1e-3


def test_too_few_devices_say_nothing() -> None:
    assert paired_p(*fleet(np.random.default_rng(7), 8, 3.0)) == 1.0
    assert paired_p(np.zeros((20, 10)), np.zeros((20, 10))) == 1.0


def test_canary_and_control_are_compared_in_the_same_season() -> None:
    rng = np.random.default_rng(8)
    # Everything has moved by half a standard deviation since the baseline; the canary by a little more.
    alike = [between_p(differences(*fleet(rng, 15, 0.5)), differences(*fleet(rng, 40, 0.5))) for _ in range(100)]
    unlike = [between_p(differences(*fleet(rng, 15, 0.7)), differences(*fleet(rng, 40, 0.5))) for _ in range(20)]
    assert np.mean(np.array(alike) < 0.05) <= 0.05 + 3 * np.sqrt(0.05 / 100)
    assert np.median(unlike) < 0.01
    assert more_drift_p(3, 5, 0, 20) < 0.01
