"""Data: scikit-learn's bundled datasets as CSV files, for tutorials and demos."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightship_agent.files import write_durably


def write_example(name: str, out: Path) -> int:
    """Write dataset `name` (wine, breast-cancer, digits or iris) to `out`; the number of rows.

    The last column, `target`, holds class names (digits: the digit).

    Raises:
        StorageError: storage.full, storage.unwritable.
    """
    loaded = _load(name)
    names = [str(n) for n in loaded.feature_names]
    classes = [str(c) for c in loaded.target_names]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "target"])
    for row, label in zip(loaded.data, loaded.target, strict=True):
        writer.writerow([*(repr(float(v)) for v in row), classes[int(label)]])
    write_durably(out, text.getvalue().encode())
    return len(loaded.data)


def _load(name: str) -> Any:
    from sklearn import datasets

    loaders = {
        "wine": datasets.load_wine,
        "breast-cancer": datasets.load_breast_cancer,
        "digits": datasets.load_digits,
        "iris": datasets.load_iris,
    }
    return loaders[name]()
