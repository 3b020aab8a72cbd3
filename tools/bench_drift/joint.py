"""Bench drift: features that go together otherwise than before, while no histogram moves.

Thirty features in blocks of three, correlated 0.5 within a block. What is seen at p < 1e-6 in one window, by the
product's own code on the device's own sums: the correlations, and the histogram of D².
"""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship.data.profile import reference_profile
from lightship.monitoring.joint import judge_products
from lightship.monitoring.two_sample import two_sample
from lightship_agent.contract.moments import Distance, Standardiser, products_of
from lightship_agent.contract.profile import Binner, ReferenceProfile

from .bench import FEATURES, Bench
from .streams import REFERENCE

Floats = npt.NDArray[np.float64]
_LINE: Final = 1e-6
_SIZES: Final = (200, 1_000)
_BLOCK: Final = 3
_SWAPPED: Final = (1, 7)


def changes() -> dict[str, tuple[Floats, tuple[int, int] | None]]:
    """Correlations after the change, and columns that are exchanged."""
    base = _blocks(0.5)
    pair, half = _together(base, 0, 5, 0.3), _together(base, 0, 5, 0.5)
    parted = _together(_together(base, 0, 1, 0.0), 0, 2, 0.25)
    loose = base.copy()
    loose[:_BLOCK, :_BLOCK] = np.eye(_BLOCK)
    return {
        "nothing": (base, None),
        "one pair 0 to 0.3": (pair, None),
        "one pair 0 to 0.5": (_definite(half), None),
        "a pair of a block 0.5 to 0": (parted, None),
        "one block falls apart": (loose, None),
        "all blocks 0.5 to 0.4": (_blocks(0.4), None),
        "two columns swapped": (base, _SWAPPED),
    }


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Per change and rows of the window: the shares of windows in which it is seen, and named."""
    rng = np.random.default_rng(11)
    names = [f"f{i}" for i in range(FEATURES)]
    profile = reference_profile(_rows(rng, _blocks(0.5), REFERENCE), names)
    assert profile.moments is not None
    assert profile.moments.products is not None
    reference = profile.moments.products.matrix(FEATURES)
    found = []
    for change, (covariance, swapped) in changes().items():
        for rows in _SIZES:
            seen = np.zeros(4)
            for _ in range(bench.sizes.repeats):
                drawn = _rows(rng, covariance, rows)
                if swapped is not None:
                    drawn[:, list(swapped)] = drawn[:, list(reversed(swapped))]
                seen += _judged(profile, reference, drawn, tuple(names), swapped)
            marginal, distance, pairs, named = (seen / bench.sizes.repeats).tolist()
            found.append(
                {"change": change, "rows": rows, "histograms": marginal, "distance": distance, "pairs": pairs,
                 "named": named if swapped else None}
            )  # fmt: skip
    return found


def _judged(
    profile: ReferenceProfile, reference: npt.NDArray[np.int64], drawn: npt.NDArray[np.float32],
    names: tuple[str, ...], swapped: tuple[int, int] | None,
) -> Floats:  # fmt: skip
    moments = profile.moments
    assert moments is not None
    assert moments.distance is not None
    steps = Standardiser(moments.scales).steps(drawn)
    sums = np.zeros((FEATURES, FEATURES), dtype=np.int64)
    sums[np.triu_indices(FEATURES)] = products_of(steps)
    sums = np.triu(sums) + np.triu(sums, 1).T
    shift = judge_products(sums, len(drawn), reference, profile.rows, names)
    cells = Binner([moments.distance]).count(Distance(moments.inverse, FEATURES).of(steps))
    far = two_sample(cells, np.asarray(moments.distance.counts)).p_value() < _LINE
    counts = Binner(profile.features).count(drawn)
    ends = profile.offsets
    alone = [
        float(two_sample(counts[a:b], profile.counts[a:b]).p_value()) * FEATURES < _LINE
        for a, b in itertools.pairwise(ends)
    ]
    seen = shift is not None and shift.p_value < _LINE
    pair = tuple(names[i] for i in swapped) if swapped else None
    named = shift is not None and pair is not None and shift.swapped == pair
    return np.array([any(alone), bool(far), seen, named], dtype=np.float64)


def _rows(rng: np.random.Generator, covariance: Floats, rows: int) -> npt.NDArray[np.float32]:
    drawn = rng.multivariate_normal(np.zeros(FEATURES), covariance, size=rows, method="cholesky")
    return np.asarray(drawn, dtype=np.float32)


def _blocks(rho: float) -> Floats:
    base = np.kron(np.eye(FEATURES // _BLOCK), np.full((_BLOCK, _BLOCK), rho))
    np.fill_diagonal(base, 1.0)
    return base


def _together(base: Floats, i: int, j: int, rho: float) -> Floats:
    out = base.copy()
    out[i, j] = out[j, i] = rho
    return out


def _definite(covariance: Floats) -> Floats:
    """The nearest correlations that can be, to within a little."""
    values, vectors = np.linalg.eigh(covariance)
    near = (vectors * np.maximum(values, 0.02)) @ vectors.T
    scale = np.sqrt(np.diag(near))
    return np.asarray(near / np.outer(scale, scale))
