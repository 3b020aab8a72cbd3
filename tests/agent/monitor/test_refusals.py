"""What was refused is counted by what was wrong with it."""

from __future__ import annotations

import numpy as np
import pytest

from lightship_agent.contract.codes import DataError
from lightship_agent.contract.quality import WHOLE, QualityCount
from lightship_agent.contract.schema import Feature, FeatureSchema
from lightship_agent.monitor.refusals import why_refused

SCHEMA = FeatureSchema(
    features=(
        Feature(name="speed"),
        Feature(name="load", nullable=True),
        Feature(name="colour", kind="categorical", categories=("red", "blue")),
    )
)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[np.nan, np.nan, 0], [np.nan, 1, 1]], [("missing", 0, 2)]),
        ([[1, np.inf, 0], [1, -np.inf, 7]], [("category", 2, 1), ("infinite", 1, 2)]),
        ([[1, 1, 0.5]], [("category", 2, 1)]),
        ([[1, 1, -1], [1e39, 1, np.nan]], [("category", 2, 1), ("infinite", 0, 1), ("missing", 2, 1)]),
    ],
)
def test_each_row_counts_for_what_is_wrong_with_it(
    rows: list[list[float]], expected: list[tuple[str, int, int]]
) -> None:
    data = np.array(rows, dtype=np.float64)

    with pytest.raises(DataError), np.errstate(over="ignore"):
        SCHEMA.check_rows(data)
    assert why_refused(data, len(rows), SCHEMA) == tuple(QualityCount(*e) for e in expected)


@pytest.mark.parametrize("data", [None, "rows", ["a"], np.array(["a", "b", "c"]), np.zeros((1, 3))])
def test_what_can_not_be_looked_at_is_of_a_wrong_type(data: object) -> None:
    assert why_refused(data, 1, SCHEMA) == (QualityCount("type", WHOLE, 1),)


@pytest.mark.parametrize("shape", [(2, 2), (4,), (0, 3), (1, 6)])
def test_another_width_is_another_shape(shape: tuple[int, ...]) -> None:
    assert why_refused(np.zeros(shape), 1, SCHEMA) == (QualityCount("shape", WHOLE, 1),)
