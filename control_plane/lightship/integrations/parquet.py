"""Integrations: the history as Parquet files, for DuckDB, Spark and what else reads columns.

Rules: rows are written as they are read, some thousands at a time; the file appears whole under its name, or not at
all; the library is an extra, `pip install 'lightship[parquet]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from lightship.monitoring.history import Report, Rollup, numbers_of
from lightship_agent.contract.codes import StorageError
from lightship_agent.files import storage_error

_ROWS: Final = 10_000
_T = TypeVar("_T")


def write_reports(path: Path, reports: Iterable[Report]) -> int:
    """Write reports; how many.

    Raises:
        StorageError: storage.unwritable where the library is missing, storage.full.
    """
    pa = _library()
    at = pa.timestamp("ms", tz="UTC")
    numbers = pa.map_(pa.string(), pa.float64())
    schema = pa.schema([
        ("device", pa.string()), ("ts", at), ("received", at), ("clock_trusted", pa.bool_()), ("kind", pa.string()),
        ("epoch", pa.string()), ("seq", pa.int64()), ("numbers", numbers), ("record", pa.string()),
    ])  # fmt: skip

    def row(r: Report) -> tuple[Any, ...]:
        said = msgspec.json.encode(msgspec.msgpack.decode(r.body)).decode()
        return (r.device, r.ts, r.recv, not r.approx, r.kind, r.epoch, r.seq, list(numbers_of(r).items()), said)

    return _write(pa, path, schema, reports, row)


def write_rollups(path: Path, rollups: Iterable[Rollup]) -> int:
    """Write rollups, a row for each number; how many rollups.

    Raises:
        StorageError: storage.unwritable where the library is missing, storage.full.
    """
    pa = _library()
    one = pa.struct([("n", pa.int64()), ("sum", pa.float64()), ("min", pa.float64()), ("max", pa.float64())])
    schema = pa.schema([
        ("device", pa.string()), ("begins", pa.timestamp("ms", tz="UTC")), ("numbers", pa.map_(pa.string(), one)),
    ])  # fmt: skip

    def row(r: Rollup) -> tuple[Any, ...]:
        names = ("n", "sum", "min", "max")
        return (r.device, r.begins, [(name, dict(zip(names, v, strict=True))) for name, v in r.numbers.items()])

    return _write(pa, path, schema, rollups, row)


def _library() -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as e:
        remedy = "pip install 'lightship[parquet]'"
        raise StorageError("storage.unwritable", "The Parquet library is not installed.", remedy=remedy) from e
    return pa


def _write(pa: Any, path: Path, schema: Any, things: Iterable[_T], row: Callable[[_T], tuple[Any, ...]]) -> int:
    part, written = path.with_name(f".{path.name}.part"), 0
    try:
        with pa.parquet.ParquetWriter(part, schema, compression="zstd") as writer:
            for some in _batches(things):
                columns = zip(*(row(thing) for thing in some), strict=True)
                arrays = [pa.array(list(c), type=f.type) for c, f in zip(columns, schema, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
                written += len(some)
        part.replace(path)
    except OSError as e:
        raise storage_error(e, path) from e
    finally:
        part.unlink(missing_ok=True)
    return written


def _batches(things: Iterable[_T]) -> Iterable[list[_T]]:
    some: list[_T] = []
    for thing in things:
        some.append(thing)
        if len(some) == _ROWS:
            yield some
            some = []
    if some:
        yield some
