"""Data: CSV files become datasets, or one error that says where to look.

Rules:
* comma-separated UTF-8 with a header line; a byte order mark is fine;
* nothing is guessed away: a gap, a text among numbers, a second column of the same title is named by line and column;
* a column in which no cell is a number is one of words, and few of them: categories, as the contract reads them;
* with a schema given, the columns must be the schema's, in any order.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.categories import MAX_CATEGORIES, MAX_INFERRED, category, infer_categories
from lightship_agent.contract.codes import DataError
from lightship_agent.contract.names import feature_name
from lightship_agent.contract.schema import Feature, FeatureSchema

from .dataset import Dataset, check_columns, named_features, observed_feature
from .failures import Failure, Failures
from .target import TaskChoice, encode_target, fits_float32, is_missing, parse_number

Unknown = Literal["error", "code"]
#: Numbers as some countries write them are not words.
_FOREIGN_NUMBER: Final = re.compile(r"[+-]?[\d.' ]*\d,\d+", re.ASCII)


@dataclass(frozen=True)
class _Table:
    """The texts of a file: `columns[j][i]` is the cell of row i; `lines[i]` is the line that row ends on."""

    titles: list[str]
    columns: list[tuple[str, ...]]
    lines: list[int]


def load_csv(
    path: Path,
    *,
    name: str,
    target: str,
    task: TaskChoice = "auto",
    schema: FeatureSchema | None = None,
    labels: tuple[str, ...] | None = None,
    allow_missing: bool = False,
    categorical: Collection[str] = (),
    unknown: Unknown = "error",
) -> Dataset:
    """Read `path` as a dataset.

    Args:
        path: a CSV file with a header line.
        name: the dataset's name.
        target: the title of the column to predict.
        task: "auto" takes text, or at most 20 distinct whole numbers, for classes.
        schema: of an existing model, when data is added to it: the columns must match.
        labels: the class names of an existing model; others are refused.
        allow_missing: make columns with gaps nullable. With `schema`, the schema decides instead.
        categorical: titles of columns of categories that look like numbers, or are many. With `schema`, it decides.
        unknown: what shall become of a word that is in none of these rows: see `Feature`.

    Raises:
        DataError: data.unreadable, data.empty, data.column-missing, data.column-unexpected, data.type,
            data.missing-value, data.range, data.category.
        InvalidNameError: name.invalid.
    """
    table = _read(path)
    at = _find_target(table.titles, target)
    encoded = encode_target(table.columns[at], table.lines, table.titles[at], task=task, labels=labels)
    others = [j for j in range(len(table.titles)) if j != at]
    if not others:
        raise DataError("data.empty", f"{path.name} has no columns besides the target {target!r}.")
    if schema is not None:
        others = _order(table.titles, others, schema)
    titles = [table.titles[j] for j in others]
    if schema is None:
        check_titles(titles, categorical)
        bases = tuple(
            _kind_of(base, table.columns[j], table.titles[j] in categorical, unknown)
            for base, j in zip(named_features(titles), others, strict=True)
        )
        nullable = [allow_missing] * len(others)
    else:
        bases, nullable = schema.features, [f.nullable for f in schema.features]
    matrix = _numbers(table, others, bases, nullable)
    if schema is None:
        _check_some_value(matrix, titles)
    seen = tuple(observed_feature(base, matrix[:, j]) for j, base in enumerate(bases))
    return Dataset(
        name=name,
        schema=FeatureSchema(features=seen) if schema is None else msgspec.structs.replace(schema, features=seen),
        task=encoded.task,
        target=table.titles[at],
        labels=encoded.labels,
        x=matrix,
        y=encoded.y,
        titles=tuple(titles),
    )


def load_columns(
    path: Path, *, schema: FeatureSchema | None = None, leave_out: Collection[str] = ()
) -> tuple[FeatureSchema, npt.NDArray[np.float32]]:
    """All columns of `path`, without a target: the schema, and the values, float32 `[n, columns]`.

    Args:
        path: a CSV file with a header line.
        schema: of another file; the columns must match. Words it doesn't know get a number of their own.
        leave_out: titles of columns to skip.

    Raises:
        DataError: as `load_csv`.
    """
    table = _read(path)
    columns = [j for j in range(len(table.titles)) if table.titles[j] not in leave_out]
    if not columns:
        raise DataError("data.empty", f"{path.name} has no columns to look at.")
    if schema is None:
        named = named_features([table.titles[j] for j in columns])
        bases = tuple(_kind_of(base, table.columns[j], False, "code") for base, j in zip(named, columns, strict=True))
    else:
        columns, bases = _order(table.titles, columns, schema), schema.features
    matrix = _numbers(table, columns, bases, [True] * len(columns))
    if schema is None:
        _check_some_value(matrix, [table.titles[j] for j in columns])
    return FeatureSchema(features=bases) if schema is None else schema, matrix


def load_rows(path: Path, schema: FeatureSchema) -> npt.NDArray[np.float32]:
    """The rows of `path` as a model with that schema takes them; other columns are stepped over.

    Raises:
        DataError: data.unreadable, data.empty, data.column-missing, data.type, data.missing-value, data.range,
            data.category.
    """
    table = _read(path)
    place: dict[str, int] = {}
    for j, title in enumerate(table.titles):
        place[feature_name(title, set(place))] = j
    missing = [name for name in schema.names if name not in place]
    if missing:
        message = f"{path.name} has no column for {', '.join(missing[:5])}."
        raise DataError("data.column-missing", message)
    columns = [place[name] for name in schema.names]
    return _numbers(table, columns, schema.features, [f.nullable for f in schema.features])


def check_titles(titles: Collection[str], categorical: Collection[str]) -> None:
    """Refuse a column of categories that is not there.

    Raises:
        DataError: data.column-missing.
    """
    absent = [title for title in categorical if title not in titles]
    if absent:
        raise DataError("data.column-missing", f"No column {absent[0]!r}. The columns are: {', '.join(titles)}.")


def _kind_of(base: Feature, cells: tuple[str, ...], is_categorical: bool, unknown: Unknown) -> Feature:
    """`base`, with the categories that are in `cells` where they are words."""
    words = [category(cell) for cell in cells]
    present = [word for word in words if word is not None]
    if not is_categorical and (not present or any(_is_like_a_number(word) for word in present)):
        return base
    found = infer_categories(base.name, words, most=MAX_CATEGORIES if is_categorical else MAX_INFERRED)
    return msgspec.structs.replace(base, kind="categorical", categories=found, unknown=unknown)


def _is_like_a_number(word: str) -> bool:
    return parse_number(word) is not None or _FOREIGN_NUMBER.fullmatch(word) is not None


def _read(path: Path) -> _Table:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            titles = [title.strip() for title in next(reader, [])]
            rows, lines = [], []
            for row in reader:
                if row or len(titles) == 1:
                    rows.append(row or [""])
                    lines.append(reader.line_num)
    except UnicodeDecodeError as e:
        message = f"{path.name}: expected UTF-8, found byte 0x{e.object[e.start]:02x} ({e.reason})."
        raise DataError("data.unreadable", message, remedy="Save the file as UTF-8.") from e
    except csv.Error as e:
        raise DataError("data.unreadable", f"{path.name}, line {reader.line_num}: {e}.") from e
    except OSError as e:
        raise DataError("data.unreadable", f"{path}: {e.strerror or e}.") from e
    _check_header(path.name, titles)
    _check_ragged(path.name, titles, rows, lines)
    return _Table(titles, list(zip(*rows, strict=True)), lines)


def _check_header(file: str, titles: list[str]) -> None:
    if not any(titles):
        raise DataError("data.empty", f"{file} is empty: expected a header line with column titles.")
    if len(titles) == 1:
        for mark, word in ((";", "semicolons"), ("\t", "tabs")):
            if mark in titles[0]:
                message = f"{file}: the header is one column that holds {word}: expected commas."
                raise DataError("data.unreadable", message, remedy="Save the file comma-separated.")
    untitled = [j + 1 for j, title in enumerate(titles) if not title]
    if untitled:
        message = f"{file}: column {untitled[0]} has no title."
        raise DataError("data.column-unexpected", message, remedy="Name it, or write the file without a row index.")
    twice = sorted({t for t in titles if titles.count(t) > 1})
    if twice:
        raise DataError("data.column-unexpected", f"{file}: column titles occur twice: {', '.join(twice[:20])}.")


def _check_ragged(file: str, titles: list[str], rows: list[list[str]], lines: list[int]) -> None:
    if not rows:
        raise DataError("data.empty", f"{file} has a header line and no rows.")
    ragged = [(line, len(row)) for line, row in zip(lines, rows, strict=True) if len(row) != len(titles)]
    if ragged:
        cases = ", ".join(f"line {line} has {found}" for line, found in ragged[:5])
        rest = f", and {len(ragged) - 5} more" if len(ragged) > 5 else ""
        message = f"{file}: expected {len(titles)} cells in every row; {cases}{rest}."
        raise DataError("data.unreadable", message, remedy="Quote cells that hold commas.")


def _find_target(titles: list[str], target: str) -> int:
    if target in titles:
        return titles.index(target)
    near = difflib.get_close_matches(target.lower(), [t.lower() for t in titles], n=1)
    nearest = next((t for t in titles if near and t.lower() == near[0]), "")
    message = f"No column {target!r}. The columns are: {', '.join(titles[:40])}."
    raise DataError("data.column-missing", message, remedy=f"Did you mean {nearest!r}?" if nearest else "")


def _order(titles: list[str], others: list[int], schema: FeatureSchema) -> list[int]:
    """The file's feature columns, in the schema's order."""
    place: dict[str, int] = {}
    for j in others:
        place[feature_name(titles[j], set(place))] = j
    check_columns(schema.names, tuple(place))
    return [place[n] for n in schema.names]


def _numbers(
    table: _Table, columns: list[int], features: tuple[Feature, ...], nullable: list[bool]
) -> npt.NDArray[np.float32]:
    """The cells of `columns` as float32 `[n, len(columns)]`."""
    failures = Failures()
    matrix = np.empty((len(table.lines), len(columns)), dtype=np.float32)
    for k, j in enumerate(columns):
        read = _codes if features[k].is_categorical else _values
        matrix[:, k] = read(table, j, features[k], nullable[k], failures)
    failures.check()
    return matrix


def _values(table: _Table, j: int, _feature: Feature, nullable: bool, failures: Failures) -> npt.NDArray[np.float64]:
    values = [parse_number(cell) for cell in table.columns[j]]
    for i, value in enumerate(values):
        if value is None or not fits_float32(value):
            found = _complaint(table.columns[j][i], value, nullable=nullable)
            if found:
                failures.add(Failure(table.lines[i], table.titles[j], *found))
            values[i] = float("nan")
    return np.array(values, dtype=np.float64)


def _codes(table: _Table, j: int, feature: Feature, nullable: bool, failures: Failures) -> npt.NDArray[np.float32]:
    words = [category(cell) for cell in table.columns[j]]
    known = frozenset(feature.levels)
    for i, word in enumerate(words):
        if word is None and not nullable:
            failures.add(Failure(table.lines[i], table.titles[j], "data.missing-value", "no value"))
        elif word is not None and word not in known and feature.unknown_code is None:
            sentence = f"expected one of {len(known)} categories, found {word[:60]!r}"
            failures.add(Failure(table.lines[i], table.titles[j], "data.category", sentence))
            words[i] = None
    return feature.encode(words)


def _complaint(cell: str, value: float | None, *, nullable: bool) -> tuple[str, str] | None:
    """Code and sentence for a cell that is no float32, or None for an allowed gap."""
    if is_missing(cell):
        return None if nullable else ("data.missing-value", "no value")
    if value is None:
        return "data.type", f"expected a number, found {cell[:60]!r}"
    return "data.range", f"{cell[:60]!r} can't be held by float32"


def _check_some_value(matrix: npt.NDArray[np.float32], titles: list[str]) -> None:
    void = np.isnan(matrix).all(axis=0)
    if void.any():
        title = titles[int(np.argmax(void))]
        raise DataError("data.missing-value", f"Column {title!r} has no value at all.", remedy="Drop the column.")
