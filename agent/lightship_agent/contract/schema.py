"""Contract: the feature schema and the outputs of a model.

Rules:
* a model takes one float32 tensor `[rows, features]`; the order of features is the schema's order;
* the schema's digest is part of the identity of a telemetry stream: another schema is another stream;
* `low`/`high` are what the training data showed. They describe, and data quality counts against them;
  they don't refuse a request.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from .codes import DataError
from .names import check_name
from .wire import canonical_json, sha256_hex

MAX_FEATURES = 4_096


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """One column of the input tensor."""

    name: str
    dtype: Literal["float32"] = "float32"
    kind: Literal["numeric"] = "numeric"
    nullable: bool = False
    integer: bool = False
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        """Parse, don't validate later."""
        check_name("feature name", self.name)


class FeatureSchema(msgspec.Struct, frozen=True, kw_only=True):
    """Names, types and ranges of what goes into a model."""

    features: tuple[Feature, ...]
    input_name: str = "features"

    def __post_init__(self) -> None:
        """Names are unique, and there is at least one.

        Raises:
            DataError: data.empty, data.column-unexpected.
        """
        if not 0 < len(self.features) <= MAX_FEATURES:
            raise DataError("data.empty", f"Expected 1 to {MAX_FEATURES} features, found {len(self.features)}.")
        if len(set(self.names)) != len(self.names):
            raise DataError("data.column-unexpected", "Feature names must be unique.")

    @property
    def names(self) -> tuple[str, ...]:
        """Feature names in tensor order."""
        return tuple(f.name for f in self.features)

    @property
    def width(self) -> int:
        """The number of features."""
        return len(self.features)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return sha256_hex(canonical_json(self))

    def check_rows(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """`rows` as a C-contiguous float32 `[n, width]`, NaN only where nullable, no infinity.

        Raises:
            DataError: data.type, data.missing-value, data.range.
        """
        matrix = np.ascontiguousarray(rows, dtype=np.float32)
        if matrix.ndim != 2 or matrix.shape[1] != self.width:
            raise DataError("data.type", f"Expected shape [rows, {self.width}], found {list(matrix.shape)}.")
        finite = np.isfinite(matrix)
        if finite.all():
            return matrix
        required = np.array([not f.nullable for f in self.features])
        bad = np.isnan(matrix) & required
        if bad.any():
            row, col = (int(i[0]) for i in np.nonzero(bad))
            raise DataError("data.missing-value", f"Row {row}: feature {self.names[col]!r} has no value.")
        if np.isinf(matrix).any():
            row, col = (int(i[0]) for i in np.nonzero(np.isinf(matrix)))
            raise DataError("data.range", f"Row {row}: feature {self.names[col]!r} is infinite.")
        return matrix


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """What comes out: graph output names, and what they mean.

    A classifier has `label` (the class index, int64 `[n]`) and `scores` (float32 `[n, classes]`).
    A regressor has `value` (float32 `[n]` or `[n, 1]`).
    """

    task: Literal["classification", "regression"]
    labels: tuple[str, ...] = ()
    label_output: str = ""
    score_output: str = ""
    value_output: str = ""
    score_kind: Literal["probability", "score", "none"] = "none"
    threshold: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The graph outputs that are served, in order."""
        return tuple(n for n in (self.label_output, self.score_output, self.value_output) if n)
