"""Bench drift: real rows that packages carry with them; nothing is fetched for it.

Rules: the files are read where pip put them; columns keep their names. What can't be read is left out, and said.
"""

from __future__ import annotations

import csv
import gzip
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from bench_serving.venvs import Environment

from .bench import Bench
from .venvs import environment

Rows = npt.NDArray[np.float32]
_OTHERS: Final = Path(__file__).with_name("others")


@dataclass(frozen=True)
class Dataset:
    """A table, and what in it is a change that nobody injected."""

    name: str
    source: str
    columns: tuple[str, ...]
    rows: Rows
    changed: Rows | None = None  # rows after something happened
    what_changed: str = ""
    later: Rows | None = None  # rows in the order of time, after `rows`
    predicted: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    truth: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def datasets(bench: Bench) -> list[Dataset]:
    """All that can be had."""
    cache = bench.folder / "environments"
    found = [_cancer(), _digits()]
    river, nannyml = environment(cache, "river"), environment(cache, "nannyml")
    if not river.why_not:
        found.append(_shuttle(river))
    if not nannyml.why_not:
        found += [_insurance(nannyml), _houses(nannyml), _census(nannyml, bench.folder / "census.npz")]
    return found


def _cancer() -> Dataset:
    from sklearn.datasets import load_breast_cancer

    told = load_breast_cancer()
    return Dataset("breast cancer", "scikit-learn", tuple(told.feature_names), told.data.astype(np.float32))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    rows = load_digits().data.astype(np.float32)
    moving = rows.std(axis=0) > 1
    names = tuple(f"pixel {i}" for i in np.flatnonzero(moving))
    return Dataset("digits", "scikit-learn", names, rows[:, moving])


def _shuttle(river: Environment) -> Dataset:
    (path,) = river.folder.glob("lib/python*/site-packages/river/datasets/shuttle.csv.gz")
    names, rows = _table(gzip.decompress(path.read_bytes()).decode())
    odd = rows[:, -1] > 0
    return Dataset(
        "shuttle", "river", names[:-1], rows[~odd, :-1], rows[odd, :-1], "7 % of the rows are the set's own anomalies"
    )


def _insurance(nannyml: Environment) -> Dataset:
    (path,) = nannyml.folder.glob("lib/python*/site-packages/statsmodels/datasets/randhie/randhie.csv")
    names, rows = _table(path.read_text())
    return Dataset("health insurance (randhie)", "statsmodels", names, rows)


def _houses(nannyml: Environment) -> Dataset:
    (folder,) = nannyml.folder.glob("lib/python*/site-packages/nannyml/datasets/data")
    tables = [_table((folder / f"california_housing_{part}.csv").read_text()) for part in ("reference", "analysis")]
    names = ("MedInc", "HouseAge", "AveRooms", "AveBedrms", "Population", "AveOccup", "Latitude", "Longitude")
    before, after = (rows[:, [columns.index(n) for n in names]] for columns, rows in tables)
    return Dataset("California housing", "nannyml", names, before, after, "blocks of other counties than before")


def _census(nannyml: Environment, place: Path) -> Dataset:
    if not place.exists():
        command = [str(nannyml.python), str(_OTHERS / "census_rows.py"), str(place)]
        subprocess.run(command, check=True, capture_output=True)
    told = np.load(place)
    n = int(told["reference"])
    return Dataset(
        "US census, employment", "nannyml", tuple(told["names"].tolist()), told["rows"][:n], later=told["rows"][n:],
        predicted=told["predicted"], truth=told["truth"],
    )  # fmt: skip


def _table(text: str) -> tuple[tuple[str, ...], Rows]:
    """The columns that are numbers throughout; true and false are 1 and 0."""
    head, *lines = list(csv.reader(text.splitlines()))
    columns = {name: _numbers([line[j] for line in lines]) for j, name in enumerate(head) if name not in ("", "id")}
    kept = {name: column for name, column in columns.items() if column is not None}
    return tuple(kept), np.stack(list(kept.values()), axis=1)


def _numbers(texts: list[str]) -> Rows | None:
    words = {"True": "1", "False": "0", "true": "1", "false": "0", "": "nan"}
    try:
        return np.array([float(words.get(t, t)) for t in texts], dtype=np.float32)
    except ValueError:
        return None
