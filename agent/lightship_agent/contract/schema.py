"""Contract: the feature schema and the outputs of a model.

Rules:
* a model takes one float32 tensor `[rows, features]`; the order of features is the schema's order;
* the schema's digest is part of the identity of a telemetry stream: another schema is another stream;
* `low`/`high` are what the training data showed. They describe, and data quality counts against them;
  they don't refuse a request;
* a categorical feature is a column of numbers that stand for words; no other numbers are taken there;
* fields that came later are absent where they say nothing, so that older schemas keep their digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from .categories import check_categories, encode_words
from .codes import DataError
from .names import check_name
from .wire import canonical_json, sha256_hex

MAX_FEATURES = 4_096


class Feature(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """One column of the input tensor.

    In a categorical column `categories[i]` is the number i. `unknown` says what becomes of a word that is no category:
    it is refused ("error", as when nothing is said), or it is the number `len(categories)` ("code").
    """

    name: str
    dtype: Literal["float32"] = "float32"
    kind: Literal["numeric", "categorical"] = "numeric"
    nullable: bool = False
    integer: bool = False
    low: float | None = None
    high: float | None = None
    unit: str = ""
    categories: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    unknown: Literal["error", "code"] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        """Parse, don't validate later.

        Raises:
            InvalidNameError: name.invalid.
            DataError: data.category.
        """
        check_name("feature name", self.name)
        if self.kind == "categorical":
            check_categories(self.name, self.levels)
        elif self.categories is not msgspec.UNSET or self.unknown is not msgspec.UNSET:
            message = f"Feature {self.name!r} is numeric: it has no categories."
            raise DataError("data.category", message)

    @property
    def is_categorical(self) -> bool:
        """Whether its numbers stand for words."""
        return self.kind == "categorical"

    @property
    def levels(self) -> tuple[str, ...]:
        """The word of each number; none for a numeric feature."""
        return self.categories or ()

    @property
    def unknown_code(self) -> int | None:
        """The number of a word that is no category; None where it is refused, and for a numeric feature."""
        return len(self.levels) if self.unknown == "code" else None

    def encode(self, words: Sequence[str | None]) -> npt.NDArray[np.float32]:
        """The numbers of `words`, float32 `[n]`, as `categories.category` read them; NaN for None.

        Raises:
            DataError: data.category for a word that is refused.
        """
        return encode_words(self.name, words, self._index, unknown=self.unknown_code)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.levels)}


class FeatureSchema(msgspec.Struct, frozen=True, kw_only=True, dict=True):
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
        """`rows` as a C-contiguous float32 `[n, width]`, NaN only where nullable, no infinity, codes of categories.

        Raises:
            DataError: data.type, data.missing-value, data.range, data.category.
        """
        matrix = np.ascontiguousarray(rows, dtype=np.float32)
        if matrix.ndim != 2 or matrix.shape[1] != self.width:
            raise DataError("data.type", f"Expected shape [rows, {self.width}], found {list(matrix.shape)}.")
        finite = np.isfinite(matrix)
        if not finite.all():
            self._check_gaps(matrix)
        if self.has_categories:
            self._check_codes(matrix)
        return matrix

    @cached_property
    def has_categories(self) -> bool:
        """Whether any feature is categorical."""
        return any(f.is_categorical for f in self.features)

    def _check_gaps(self, matrix: npt.NDArray[np.float32]) -> None:
        required = np.array([not f.nullable for f in self.features])
        bad = np.isnan(matrix) & required
        if bad.any():
            row, col = (int(i[0]) for i in np.nonzero(bad))
            raise DataError("data.missing-value", f"Row {row}: feature {self.names[col]!r} has no value.")
        if np.isinf(matrix).any():
            row, col = (int(i[0]) for i in np.nonzero(np.isinf(matrix)))
            raise DataError("data.range", f"Row {row}: feature {self.names[col]!r} is infinite.")

    def _check_codes(self, matrix: npt.NDArray[np.float32]) -> None:
        for col, feature in enumerate(self.features):
            if not feature.is_categorical:
                continue
            most = len(feature.levels) - 1 if feature.unknown_code is None else feature.unknown_code
            codes = matrix[:, col]
            bad = (codes < 0) | (codes > most) | (codes != np.floor(codes)) & ~np.isnan(codes)
            if bad.any():
                row = int(np.argmax(bad))
                message = (
                    f"Row {row}: feature {feature.name!r} is a category: expected a whole number from 0 to {most}, "
                )
                message += f"found {float(codes[row])}."
                raise DataError("data.category", message)


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """What comes out: graph output names, and what they mean.

    A classifier has `label` (the class index, int64 `[n]`) and `scores` (float32 `[n, classes]`).
    A regressor has `value` (float32 `[n]` or `[n, 1]`). The task `tensors` has none of these, only declared outputs.
    """

    task: Literal["classification", "regression", "tensors"]
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
