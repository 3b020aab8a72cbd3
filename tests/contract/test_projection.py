"""A wide input is seen through its length and a few fixed directions."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from lightship_agent.contract.codes import DataError
from lightship_agent.contract.projection import MAX_DIRECTIONS, Projection, Projector, projected_names

CENTER = np.array([1.0, 0.0, 0.0, 2.0], dtype="<f4")
DIRECTIONS = np.array([[1, 0, 0, 0], [0, 0.5, 0.5, 0]], dtype="<f2")
PROJECTION = Projection(input="image", width=4, count=2, center=CENTER.tobytes(), directions=DIRECTIONS.tobytes())


def test_the_numbers_are_the_length_and_the_coordinates() -> None:
    rows = np.array([[3, 0, 4, 0], [1, 2, 2, 0]], dtype=np.float32)

    assert Projector(PROJECTION).of(rows).tolist() == [[5.0, 2.0, 2.0], [3.0, 0.0, 2.0]]
    assert projected_names(2) == ("norm", "pc1", "pc2")


def test_an_image_of_bytes_is_taken_as_it_is() -> None:
    image = np.array([[[3, 0], [4, 0]]], dtype=np.uint8)

    assert Projector(PROJECTION).of(image).tolist() == [[5.0, 2.0, 2.0]]


@pytest.mark.parametrize(
    "change", [{"width": 5}, {"count": 3}, {"count": 0}, {"center": b""}, {"count": MAX_DIRECTIONS + 1}]
)
def test_a_projection_of_another_size_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(DataError) as refused:
        msgspec.structs.replace(PROJECTION, **change)
    assert refused.value.code == "data.profile-mismatch"


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    center = np.array([1, number, 0, 2], dtype="<f4").tobytes()
    directions = np.array([[1, 0, number, 0], [0, 1, 0, 0]], dtype="<f2").tobytes()
    for change in ({"center": center}, {"directions": directions}):
        with pytest.raises(DataError, match="finite"):
            msgspec.structs.replace(PROJECTION, **change)
