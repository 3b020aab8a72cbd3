"""Serving: rows as people have them, records by feature name and CSV, in and out.

Rules:
* pure: bytes in, an inference request out, and back;
* the schema decides: every feature by its name, null or no entry only where it is nullable, no other names;
* a number may come with its unit, and is converted where both units are known and measure the same; any other unit, and
  any unit for a feature that has none, is refused: a guess would be served as a measurement;
* numbers are JSON numbers, or plain decimals in CSV: no strings, no booleans, no NaN;
* a category is its word as a string, read as training read it.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from lightship_agent.contract.categories import category
from lightship_agent.contract.codes import DataError, ServingError
from lightship_agent.contract.schema import Feature, FeatureSchema
from lightship_agent.runtime.model import LoadedModel

from .keys import check_value_keys
from .tensors import MAX_ROWS, InferRequest, InferResponse, Tensor

_NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_MAX_CELL: Final = 64  # characters
#: Unit → (what it measures, factor, offset): base = value · factor + offset.
UNITS: Final[dict[str, tuple[str, float, float]]] = {
    "K": ("temperature", 1.0, 0.0),
    "C": ("temperature", 1.0, 273.15), "°C": ("temperature", 1.0, 273.15), "degC": ("temperature", 1.0, 273.15),
    "F": ("temperature", 5 / 9, 459.67 * 5 / 9), "°F": ("temperature", 5 / 9, 459.67 * 5 / 9),
    "degF": ("temperature", 5 / 9, 459.67 * 5 / 9),
    "Pa": ("pressure", 1.0, 0.0), "hPa": ("pressure", 1e2, 0.0), "kPa": ("pressure", 1e3, 0.0),
    "MPa": ("pressure", 1e6, 0.0), "mbar": ("pressure", 1e2, 0.0), "bar": ("pressure", 1e5, 0.0),
    "psi": ("pressure", 6894.757293168361, 0.0),
    "um": ("length", 1e-6, 0.0), "µm": ("length", 1e-6, 0.0), "mm": ("length", 1e-3, 0.0), "cm": ("length", 1e-2, 0.0),
    "m": ("length", 1.0, 0.0), "km": ("length", 1e3, 0.0), "in": ("length", 0.0254, 0.0), "ft": ("length", 0.3048, 0.0),
    "mm/s": ("speed", 1e-3, 0.0), "m/s": ("speed", 1.0, 0.0), "km/h": ("speed", 1 / 3.6, 0.0),
    "mph": ("speed", 0.44704, 0.0),
    "m/s²": ("acceleration", 1.0, 0.0), "m/s2": ("acceleration", 1.0, 0.0), "g0": ("acceleration", 9.80665, 0.0),
    "Hz": ("frequency", 1.0, 0.0), "kHz": ("frequency", 1e3, 0.0), "rpm": ("frequency", 1 / 60, 0.0),
    "ms": ("time", 1e-3, 0.0), "s": ("time", 1.0, 0.0), "min": ("time", 60.0, 0.0), "h": ("time", 3600.0, 0.0),
    "g": ("mass", 1e-3, 0.0), "kg": ("mass", 1.0, 0.0), "t": ("mass", 1e3, 0.0), "lb": ("mass", 0.45359237, 0.0),
    "mV": ("voltage", 1e-3, 0.0), "V": ("voltage", 1.0, 0.0), "kV": ("voltage", 1e3, 0.0),
    "mA": ("current", 1e-3, 0.0), "A": ("current", 1.0, 0.0),
    "W": ("power", 1.0, 0.0), "kW": ("power", 1e3, 0.0), "MW": ("power", 1e6, 0.0),
    "%": ("share", 1e-2, 0.0), "1": ("share", 1.0, 0.0),
}  # fmt: skip


class Records(NamedTuple):
    """What was asked: an inference request, and whether one record was meant or a list of them."""

    request: InferRequest
    is_list: bool


def decode_records(body: bytes, content_type: str, model: LoadedModel, request_id: str = "") -> Records:
    """The rows in `body`, JSON or `text/csv` with a header.

    Raises:
        ServingError: serving.malformed, serving.input, serving.too-large.
    """
    if content_type.partition(";")[0].strip().lower() == "text/csv":
        names, table = _csv(body, model.schema)
        records: list[Any] = [dict(zip(names, row, strict=True)) for row in table]
        is_list = True
    else:
        found = _json(body)
        is_list = isinstance(found, list)
        records = found if isinstance(found, list) else [found]
    return Records(request_of(records, model, request_id), is_list)


def request_of(records: list[Any], model: LoadedModel, request_id: str = "") -> InferRequest:
    """The inference request that says what `records` say.

    Raises:
        ServingError: serving.input, serving.too-large.
    """
    if not 0 < len(records) <= MAX_ROWS:
        code = "serving.too-large" if records else "serving.input"
        raise ServingError(code, f"Expected 1 to {MAX_ROWS} records, found {len(records)}.")
    schema = model.schema
    features = {f.name: f for f in schema.features}
    rows = np.array([_row(i, record, schema, features) for i, record in enumerate(records)], dtype=np.float64)
    tensor = Tensor(schema.input_name, "FP64", rows.shape, rows)
    return InferRequest((tensor,), model.name, None, request_id)


def answers(response: InferResponse, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """One record per row: `{label, scores, id, …}` of a classifier, `{value, id, …}` of a regressor."""
    outputs = {tensor.name: tensor.data for tensor in response.outputs}
    source = {"model": response.model_name, "version": int(response.model_version), **response.parameters}
    if "value" in outputs:
        told: list[dict[str, Any]] = [{"value": v} for v in outputs["value"].ravel().tolist()]
    else:
        told = [{"label": word} for word in outputs["label"]]
        if "scores" in outputs:
            for record, scores in zip(told, outputs["scores"].tolist(), strict=True):
                record["scores"] = dict(zip(labels, scores, strict=True))
    for i, record in enumerate(told):
        record["id"] = response.id if len(told) == 1 else f"{response.id}:{i}"
        record.update(source)
    return told


def _row(index: int, record: Any, schema: FeatureSchema, features: Mapping[str, Feature]) -> list[float]:
    if not isinstance(record, dict):
        raise ServingError(
            "serving.input", f"Record {index}: expected an object by feature name, found {_short(record)}."
        )
    unknown = [name for name in record if name not in features]
    if unknown:
        message = f"Record {index}: no feature {_short(unknown[0])}; expected {', '.join(schema.names[:20])}."
        raise ServingError("serving.input", message)
    return [(_word if f.is_categorical else _number)(index, f, record.get(f.name)) for f in schema.features]


def _word(index: int, feature: Feature, value: Any) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, str):
        message = f"Record {index}: {feature.name!r}: expected one of its categories as text, found {_short(value)}."
        raise ServingError("serving.input", message)
    try:
        return float(feature.encode([category(value)])[0])
    except DataError:
        known = ", ".join(repr(word[:20]) for word in feature.levels[:10]) + (" …" if len(feature.levels) > 10 else "")
        message = f"Record {index}: {feature.name!r}: expected one of {known}; found {_short(value)}."
        raise ServingError("serving.input", message) from None


def _number(index: int, feature: Feature, value: Any) -> float:
    if isinstance(value, dict):
        value = _converted(index, feature, value)
    if value is None:
        return math.nan  # the data plane refuses it where it may not be, and has it counted
    if isinstance(value, bool) or not isinstance(value, int | float):
        message = f"Record {index}: {feature.name!r}: expected a number, found {_short(value)}."
        raise ServingError("serving.input", message)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ServingError("serving.input", f"Record {index}: {feature.name!r}: expected a finite number.")
    return number


def _converted(index: int, feature: Feature, told: dict[Any, Any]) -> Any:
    """The value in `{"value": …, "unit": …}`, in the schema's unit."""
    if set(told) != {"value", "unit"}:
        message = f"Record {index}: {feature.name!r}: expected a number, or its value and unit, found {_short(told)}."
        raise ServingError("serving.input", message)
    value, unit = told["value"], told["unit"]
    if unit == feature.unit and unit:
        return value
    here, there = UNITS.get(unit) if isinstance(unit, str) else None, UNITS.get(feature.unit)
    if not feature.unit or here is None or there is None or here[0] != there[0]:
        expected = f"its unit, {feature.unit!r}" if feature.unit else "no unit, for the schema has none"
        if there is not None:
            expected += f", or another of {there[0]} ({', '.join(u for u, k in UNITS.items() if k[0] == there[0])})"
        raise ServingError(
            "serving.input", f"Record {index}: {feature.name!r}: expected {expected}; found {_short(unit)}."
        )
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return value
    try:
        return (float(value) * here[1] + here[2] - there[2]) / there[1]
    except OverflowError:
        return math.inf


def _json(body: bytes) -> Any:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise ServingError("serving.malformed", f"Expected a record in JSON, or a list of them: {e}.") from e
    check_value_keys(body, found)
    return found


def _csv(body: bytes, schema: FeatureSchema) -> tuple[list[str], list[list[float | str | None]]]:
    try:
        lines = list(csv.reader(body.decode("utf-8-sig").splitlines(), strict=True))
    except (UnicodeDecodeError, csv.Error) as e:
        raise ServingError("serving.malformed", f"Expected CSV in UTF-8: {e}.") from e
    lines = [line for line in lines if line]
    if len(lines) < 2:
        raise ServingError("serving.input", f"Expected a header and 1 to {MAX_ROWS} lines, found {len(lines)} lines.")
    if len(lines) - 1 > MAX_ROWS:
        raise ServingError("serving.too-large", f"Expected at most {MAX_ROWS} lines, found {len(lines) - 1}.")
    names = [name.strip() for name in lines[0]]
    if len(set(names)) != len(names):
        raise ServingError("serving.malformed", "Expected each column once in the header.")
    words = frozenset(f.name for f in schema.features if f.is_categorical)
    return names, [_cells(i, line, names, words) for i, line in enumerate(lines[1:])]


def _cells(index: int, line: list[str], names: list[str], words: frozenset[str]) -> list[float | str | None]:
    if len(line) != len(names):
        message = f"Record {index}: expected {len(names)} cells, as in the header, found {len(line)}."
        raise ServingError("serving.input", message)
    found: list[float | str | None] = []
    for name, cell in zip(names, map(str.strip, line), strict=True):
        if name in words:
            found.append(cell)
            continue
        if cell and (len(cell) > _MAX_CELL or not _NUMBER.fullmatch(cell)):
            message = f"Record {index}: {name[:64]!r}: expected a plain decimal number, found {_short(cell)}."
            raise ServingError("serving.input", message)
        found.append(float(cell) if cell else None)
    return found


def _short(value: object) -> str:
    return f"{value!r:.60}"
