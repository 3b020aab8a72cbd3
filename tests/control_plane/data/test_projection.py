"""The directions along which a wide input is watched are the principal ones, and the same from the same rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from lightship.data.projection import fit_projection
from lightship_agent.contract.codes import DataError
from lightship_agent.contract.projection import Projector


def images(n: int = 60, *, seed: int = 0) -> np.ndarray:
    """Of three kinds of strokes in differing strength, and a little noise; float32 `[n, 1, 8, 8]`."""
    rng = np.random.default_rng(seed)
    strokes = np.zeros((3, 8, 8))
    strokes[0, 2], strokes[1, :, 5], strokes[2] = 1, 1, np.eye(8)
    strength = rng.normal(size=(n, 3)) * (3, 2, 1)
    return (np.einsum("ns,sij->nij", strength, strokes) + rng.normal(scale=0.05, size=(n, 8, 8)))[:, None].astype("f4")


def test_the_coordinates_are_those_of_the_principal_components() -> None:
    rows = images()

    found = Projector(fit_projection("image", rows, 3)).of(rows)

    expected = PCA(3).fit_transform(rows.reshape(len(rows), -1))
    for i in range(3):
        assert abs(np.corrcoef(found[:, 1 + i], expected[:, i])[0, 1]) > 0.9999
    assert np.allclose(found[:, 0], np.linalg.norm(rows.reshape(len(rows), -1), axis=1), rtol=1e-5)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 5))
@settings(max_examples=20)
def test_the_same_rows_give_the_same_bytes_and_every_direction_is_used(seed: int, count: int) -> None:
    rows = images(20, seed=seed)

    one, again = fit_projection("image", rows, count), fit_projection("image", rows.copy(), count)

    assert one == again
    directions = np.frombuffer(one.directions, dtype="<f2").reshape(count, 64)
    assert np.abs(directions).max(axis=1).tolist() == [1.0] * count


def test_wide_pixels_of_bytes_keep_their_digits() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, size=(40, 100_000)).astype(np.uint8)
    pixels[::2] //= 2

    found = Projector(fit_projection("image", pixels, 4)).of(pixels)[:, 1:]

    dark, light = found[::2, 0], found[1::2, 0]
    assert max(dark.min(), light.min()) > min(dark.max(), light.max())  # the first direction tells them apart


@pytest.mark.parametrize(
    ("rows", "count", "code"),
    [
        (images(4), 4, "data.empty"),  # four rows differ in three directions
        (np.ones((30, 8), dtype="f4"), 1, "data.empty"),
        (np.repeat(np.arange(30.0)[:, None], 8, axis=1), 2, "data.empty"),
        (images(), 33, "data.type"),
        (images(), 0, "data.type"),
        (np.zeros((8, 400_000), dtype=np.uint8), 2, "data.type"),
        (np.zeros((8, 1_000_000), dtype=np.uint8), 1, "data.type"),
    ],
)
def test_directions_that_cannot_be_are_refused(rows: np.ndarray, count: int, code: str) -> None:
    with pytest.raises(DataError) as refused:
        fit_projection("image", rows, count)
    assert refused.value.code == code
    assert "'image'" in str(refused.value)
