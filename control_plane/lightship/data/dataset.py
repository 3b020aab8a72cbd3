"""Data: the dataset, an immutable value with a digest.

Rules:
* rows are rounded to float32 when they come in, and training uses them as they are: what the device computes
  with is what the model learnt from;
* the bytes are canonical: the same rows under the same name give the same digest on any machine;
* nothing here reads a file or a clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.bundle import Rows
from lightship_agent.contract.codes import BundleError, DataError, InvalidNameError, WireError
from lightship_agent.contract.names import check_name, feature_name
from lightship_agent.contract.schema import Feature, FeatureSchema
from lightship_agent.contract.wire import decode, encode, sha256_hex

from .failures import Failure, Failures
from .target import Task, TaskChoice, encode_target

#: MessagePack holds at most 2³² - 1 bytes in one value.
_NO_WORD: Final = "\x00"  # is no category of any schema
MAX_DATASET: Final = 4 * 1024**3 - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Rows and targets with their meaning.

    Attributes:
        name: the dataset's name in the registry.
        schema: one feature per column of `x`, with observed ranges.
        task: classification or regression.
        target: the title of the target column.
        labels: class names in index order; empty for regression.
        x: float32 `[n, width]`, read-only (some estimators insist on writable rows: give them a copy); NaN only
            where the schema is nullable.
        y: int64 `[n]` class indices, or float32 `[n]` values; read-only.
        titles: the original column title of each feature.
    """

    name: str
    schema: FeatureSchema
    task: Task
    target: str
    labels: tuple[str, ...]
    x: npt.NDArray[np.float32]
    y: npt.NDArray[Any]
    titles: tuple[str, ...]

    def __post_init__(self) -> None:
        """Shapes and meanings agree; the arrays are frozen.

        Raises:
            DataError: data.empty, data.type, data.missing-value, data.range.
            InvalidNameError: name.invalid.
        """
        check_name("dataset name", self.name)
        if not len(self.x):
            raise DataError("data.empty", f"Dataset {self.name!r} has no rows.")
        x = self.schema.check_rows(self.x)
        kind = np.dtype(np.int64 if self.task == "classification" else np.float32)
        if self.y.shape != (len(x),) or self.y.dtype != kind or len(self.titles) != self.schema.width:
            message = f"Expected a {kind} target [{len(x)}], found {self.y.dtype} {list(self.y.shape)}."
            raise DataError("data.type", message)
        if self.task == "classification" and not 0 <= int(self.y.min()) <= int(self.y.max()) < len(self.labels):
            raise DataError("data.type", f"Class indices must be within 0..{len(self.labels) - 1}.")
        # Copies, so that nobody's later write changes a digest; one NaN and one zero, so that bits follow values.
        frozen_x, frozen_y = np.where(np.isnan(x), np.float32(np.nan), x + np.float32(0)), self.y.copy()
        frozen_x.flags.writeable = frozen_y.flags.writeable = False
        object.__setattr__(self, "x", frozen_x)
        object.__setattr__(self, "y", frozen_y)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.x)

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical bytes: the dataset's identity."""
        return sha256_hex(canonical_bytes(self))

    def take(self, indices: npt.NDArray[np.int64], name: str | None = None) -> Dataset:
        """The rows at `indices` as a dataset with the same schema and labels.

        Raises:
            DataError: data.empty when `indices` is empty.
        """
        return replace(self, name=name or self.name, x=self.x[indices], y=self.y[indices])


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes' layout; field order is part of the digest and never changes within a version."""

    version: int
    name: str
    task: Task
    target: str
    labels: tuple[str, ...]
    titles: tuple[str, ...]
    schema: FeatureSchema
    x: Rows
    y: bytes


def canonical_bytes(dataset: Dataset) -> bytes:
    """Deterministic MessagePack: fields in fixed order, arrays little-endian and row-major.

    Raises:
        DataError: data.range when the dataset is too large for one value.
    """
    if dataset.x.nbytes + dataset.y.nbytes > MAX_DATASET // 2:
        raise DataError("data.range", f"Expected at most {MAX_DATASET // 2} bytes of rows, found {dataset.x.nbytes}.")
    return encode(
        _Stored(
            version=1,
            name=dataset.name,
            task=dataset.task,
            target=dataset.target,
            labels=dataset.labels,
            titles=dataset.titles,
            schema=dataset.schema,
            x=Rows.of(dataset.x),
            y=dataset.y.astype("<i8" if dataset.task == "classification" else "<f4").tobytes(),
        )
    )


def parse_dataset(data: bytes) -> Dataset:
    """The dataset in `data`; `parse_dataset(canonical_bytes(d))` has the digest of `d`.

    Raises:
        DataError: data.unreadable when the bytes are not a dataset; data.* when its parts disagree.
    """
    try:
        stored = decode(data, _Stored, max_bytes=MAX_DATASET)
        if stored.version != 1:
            raise DataError("data.unreadable", f"Expected dataset version 1, found {stored.version}.")
        kind = "<i8" if stored.task == "classification" else "<f4"
        return Dataset(
            name=stored.name,
            schema=stored.schema,
            task=stored.task,
            target=stored.target,
            labels=stored.labels,
            x=stored.x.matrix(),
            y=np.frombuffer(stored.y, dtype=kind).astype(kind[1:]),
            titles=stored.titles,
        )
    except (WireError, BundleError, InvalidNameError, ValueError) as e:
        raise DataError("data.unreadable", f"Expected the bytes of a dataset: {e}") from e


def from_arrays(
    name: str,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    feature_names: Sequence[str],
    target: str,
    *,
    units: Mapping[str, str] | None = None,
    task: TaskChoice = "auto",
    labels: tuple[str, ...] | None = None,
    allow_missing: bool = False,
) -> Dataset:
    """A dataset from arrays in memory.

    Args:
        name: the dataset's name.
        x: numbers `[n, width]`; NaN is a missing value.
        y: class names or numbers `[n]`.
        feature_names: a title per column; feature names are derived from them.
        target: the target's title.
        units: unit by title.
        task: as in `encode_target`.
        labels: the class names, in order, where they are known already.
        allow_missing: make columns with missing values nullable instead of refusing them.

    Raises:
        DataError: data.empty, data.type, data.missing-value, data.range, data.column-unexpected.
        InvalidNameError: name.invalid.
    """
    try:
        wide = np.asarray(x, dtype=np.float64)
    except (ValueError, TypeError) as e:
        raise DataError("data.type", f"Expected numbers: {e}.") from e
    if wide.ndim != 2 or wide.shape[1] != len(feature_names):
        message = f"Expected shape [rows, {len(feature_names)}], found {list(wide.shape)}."
        raise DataError("data.type", message)
    feature_names = [str(title) for title in feature_names]  # numpy's own strings are not text on the wire
    if len(set(feature_names)) != len(feature_names):
        raise DataError("data.column-unexpected", "Column titles must be unique.")
    if not len(wide):
        raise DataError("data.empty", f"Dataset {name!r} has no rows.")
    matrix = _narrow(wide, feature_names, allow_missing=allow_missing)
    texts = _texts(y)
    if len(texts) != len(wide):
        raise DataError("data.type", f"Expected {len(wide)} targets, found {len(texts)}.")
    encoded = encode_target(texts, range(len(texts)), target, task=task, labels=labels, place="row")
    return Dataset(
        name=name,
        schema=observed_schema(matrix, feature_names, units or {}),
        task=encoded.task,
        target=target,
        labels=encoded.labels,
        x=matrix,
        y=encoded.y,
        titles=tuple(feature_names),
    )


def _narrow(wide: npt.NDArray[np.float64], titles: Sequence[str], *, allow_missing: bool) -> npt.NDArray[np.float32]:
    """Round float64 `[n, width]` to float32, refusing what does not fit."""
    failures = Failures("row")
    with np.errstate(over="ignore"):
        matrix = wide.astype(np.float32)
    for row, col in np.argwhere(np.isinf(matrix)):
        failures.add(Failure(int(row), titles[col], "data.range", f"{wide[row, col]!r} can't be held by float32"))
    if not allow_missing:
        for row, col in np.argwhere(np.isnan(matrix)):
            failures.add(Failure(int(row), titles[col], "data.missing-value", "no value"))
    failures.check()
    return matrix


def _texts(y: npt.ArrayLike) -> list[str]:
    plain = np.asarray(y)
    if plain.ndim == 2 and plain.shape[1] == 1:
        plain = plain.ravel()
    if plain.ndim != 1:
        raise DataError("data.type", f"Expected one target per row, found shape {list(plain.shape)}.")
    return [str(v) for v in plain.tolist()]


def observed_schema(matrix: npt.NDArray[np.float32], titles: Sequence[str], units: Mapping[str, str]) -> FeatureSchema:
    """The schema that rows (float32 `[n, width]`) show: derived names, ranges, whole numbers, gaps.

    Raises:
        DataError: data.empty for too few or too many columns.
    """
    named = named_features(titles, units)
    return FeatureSchema(features=tuple(observed_feature(base, matrix[:, j]) for j, base in enumerate(named)))


def named_features(titles: Sequence[str], units: Mapping[str, str] | None = None) -> tuple[Feature, ...]:
    """A plain feature per column title, its name derived from it."""
    taken: set[str] = set()
    features = []
    for title in titles:
        name = feature_name(title, taken)
        taken.add(name)
        features.append(Feature(name=name, unit=(units or {}).get(title, "")))
    return tuple(features)


def observed_feature(base: Feature, column: npt.NDArray[np.float32]) -> Feature:
    """`base` with the gaps of `column` (float32 `[n]`), and of a number its range and wholeness."""
    present = column[~np.isnan(column)]
    if base.is_categorical:
        return msgspec.structs.replace(base, nullable=base.nullable or len(present) < len(column))
    return msgspec.structs.replace(
        base,
        nullable=base.nullable or len(present) < len(column),
        integer=bool(len(present)) and bool((present == np.round(present)).all()),
        low=float(present.min()) + 0.0 if len(present) else None,  # no negative zero: one digest
        high=float(present.max()) + 0.0 if len(present) else None,
    )


def concat(old: Dataset, new: Dataset, name: str) -> Dataset:
    """`old` followed by `new`, for retraining: ranges widen, meanings must agree.

    `new` may lack classes of `old`, never add one; it may have gaps only where `old` allows them.

    Raises:
        DataError: data.column-missing, data.column-unexpected, data.type, data.missing-value, data.category.
    """
    if (old.task, old.target) != (new.task, new.target):
        message = f"Expected {old.task} of {old.target!r}, found {new.task} of {new.target!r}."
        raise DataError("data.type", message)
    check_columns(old.schema.names, new.schema.names)
    unknown = sorted(set(new.labels) - set(old.labels))
    if unknown:
        raise DataError("data.type", f"Expected the classes {', '.join(old.labels)}; found also {', '.join(unknown)}.")
    order = [new.schema.names.index(n) for n in old.schema.names]
    x = np.concatenate([old.x, _recoded(old.schema, new, order)])
    features = []
    for j, before in enumerate(old.schema.features):
        after = new.schema.features[order[j]]
        if before.unit != after.unit and before.unit and after.unit:
            raise DataError("data.type", f"Feature {before.name!r}: expected {before.unit!r}, found {after.unit!r}.")
        if not before.nullable and np.isnan(x[:, j]).any():
            raise DataError(
                "data.missing-value", f"Feature {before.name!r} has gaps, which {old.name!r} does not allow."
            )
        features.append(observed_feature(before, x[:, j]))
    remap = np.array([old.labels.index(label) for label in new.labels] or [0], dtype=np.int64)
    added = remap[new.y] if old.task == "classification" else new.y
    schema = msgspec.structs.replace(old.schema, features=tuple(features))
    return replace(old, name=name, schema=schema, x=x, y=np.concatenate([old.y, added]))


def _recoded(schema: FeatureSchema, new: Dataset, order: Sequence[int]) -> npt.NDArray[np.float32]:
    """The rows of `new` in the order of `schema`, their words as the numbers that it gives them."""
    rows = new.x[:, order].copy()
    for j, before in enumerate(schema.features):
        after = new.schema.features[order[j]]
        if before.kind != after.kind:
            raise DataError("data.type", f"Feature {before.name!r}: expected {before.kind}, found {after.kind}.")
        if before.levels != after.levels:
            told = [None if np.isnan(code) else int(code) for code in rows[:, j]]
            beyond = len(after.levels)  # a word that `new` did not know either
            if any(code == beyond for code in told) and before.unknown_code is None:
                message = f"Feature {before.name!r}: {new.name!r} has words that are none of its categories."
                raise DataError("data.category", message)
            words = [None if code is None else (*after.levels, _NO_WORD)[code] for code in told]
            rows[:, j] = before.encode(words)
    return rows


def check_columns(expected: Sequence[str], found: Sequence[str]) -> None:
    """Refuse column sets that differ, naming the columns.

    Raises:
        DataError: data.column-missing, data.column-unexpected.
    """
    missing = [n for n in expected if n not in found]
    if missing:
        message = f"Missing columns: {', '.join(missing[:20])}. The data has: {', '.join(found[:20])}."
        raise DataError("data.column-missing", message)
    extra = [n for n in found if n not in expected]
    if extra:
        message = f"Columns the schema does not know: {', '.join(extra[:20])}."
        raise DataError("data.column-unexpected", message, remedy=f"Expected exactly: {', '.join(expected[:20])}.")


@dataclass(frozen=True, eq=False)
class Split:
    """Row indices (int64, ascending) of the two parts of a dataset."""

    train: npt.NDArray[np.int64]
    heldout: npt.NDArray[np.int64]


def split(dataset: Dataset, test_share: float, seed: int) -> Split:
    """Stratified split: each class (or each tenth of a regression target) gives its share to both parts.

    A class with a single row keeps it for training; a class with two or more gives at least one to each part.

    Args:
        dataset: what to split.
        test_share: the held-out share, within (0, 1).
        seed: the same seed splits the same rows the same way.

    Raises:
        DataError: data.empty when either part would be empty.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    if dataset.task == "classification":
        strata = dataset.y
    else:
        tenths = np.quantile(dataset.y, np.arange(1, 10) / 10)
        strata = np.searchsorted(tenths, dataset.y, side="right")
    heldout: list[npt.NDArray[np.int64]] = []
    for stratum in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == stratum))
        count = min(max(round(len(members) * test_share), 1), len(members) - 1)
        heldout.append(members[:count])
    test = np.sort(np.concatenate(heldout)).astype(np.int64)
    train = np.setdiff1d(np.arange(dataset.rows, dtype=np.int64), test)
    if not len(test) or not len(train):
        raise DataError("data.empty", f"{dataset.rows} rows are too few to hold out a share of {test_share}.")
    return Split(train, test)
