"""Bench update: pairs of models, an old one and its successor, of every kind that a retrain leaves behind.

Rules: trained here, on the same synthetic machine; the successor sees the same data with 5 % of its rows exchanged for
newer ones, unless the kind says otherwise. Seeds are fixed.
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

WIDTH: Final = 24
ROWS: Final = 10_000
_OPSETS: Final = {"": 17, "ai.onnx.ml": 3}
_ANEW: Final = ROWS // 20
Table = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Pair:
    """An old model and its successor, as ONNX."""

    kind: str
    old: bytes
    new: bytes


def tables() -> tuple[Table, Table]:
    """The rows of the old training set, and of the new one."""
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(ROWS + _ANEW, WIDTH)).astype(np.float32)
    noise = rng.normal(0, 0.3, len(rows))
    truth = 2 * rows[:, 0] - rows[:, 1] * rows[:, 2] + np.sin(3 * rows[:, 3]) + np.maximum(rows[:, 4], 0) + noise
    labels = truth.astype(np.float32)
    return (rows[:ROWS], labels[:ROWS]), (rows[_ANEW:], labels[_ANEW:])


def pairs() -> Iterator[Pair]:
    """Every kind, one after the other: training them takes most of the time."""
    old, new = tables()
    yield from _forests(old, new)
    yield from _boosted(old, new)
    yield from _networks(old, new)


def forest(table: Table, trees: int = 60) -> Any:
    """A random forest on a table."""
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(trees, max_depth=11, random_state=3, n_jobs=1).fit(*table)


def to_onnx(estimator: Any, note: str = "") -> bytes:
    """The estimator as skl2onnx converts it."""
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType

    model = convert_sklearn(
        estimator,
        name="lightship",
        initial_types=[("features", FloatTensorType([None, WIDTH]))],
        target_opset=_OPSETS,
        final_types=[("value", FloatTensorType([None, 1]))],
    )
    model.doc_string = note
    data: bytes = model.SerializeToString()
    return data


def _forests(old: Table, new: Table) -> Iterator[Pair]:
    first = forest(old)
    before = to_onnx(first)
    yield Pair("random forest, metadata edit", before, to_onnx(first, "retrained by nobody"))
    again = forest(new)
    yield Pair("random forest, retrained", before, to_onnx(again))
    grown = copy.deepcopy(first).set_params(warm_start=True, n_estimators=66).fit(*new)
    yield Pair("random forest, 6 trees more (warm start)", before, to_onnx(grown))
    swapped = copy.deepcopy(first)
    swapped.estimators_ = first.estimators_[6:] + forest(new, 6).estimators_
    yield Pair("random forest, 6 of 60 trees swapped", before, to_onnx(swapped))


def _boosted(old: Table, new: Table) -> Iterator[Pair]:
    from sklearn.ensemble import GradientBoostingRegressor

    def boosted(table: Table) -> Any:
        return GradientBoostingRegressor(n_estimators=80, max_depth=5, subsample=0.5, random_state=3).fit(*table)

    first = boosted(old)
    before = to_onnx(first)
    yield Pair("gradient boosting, retrained", before, to_onnx(boosted(new)))
    grown = copy.deepcopy(first).set_params(warm_start=True, n_estimators=88).fit(*new)
    yield Pair("gradient boosting, 8 rounds more (warm start)", before, to_onnx(grown))


def _networks(old: Table, new: Table) -> Iterator[Pair]:
    first = _network(old)
    tuned = copy.deepcopy(first)
    tuned._optimizer.learning_rate_init = 1e-4  # noqa: SLF001 - the estimator itself goes on with the rate it began with
    tuned.partial_fit(*new)
    headed = copy.deepcopy(first)
    headed.coefs_[-1] = (headed.coefs_[-1] * 1.01).astype(np.float32)
    headed.intercepts_[-1] = (headed.intercepts_[-1] + 0.01).astype(np.float32)
    successors = {"retrained": _network(new), "fine-tuned": tuned, "only its head trained": headed}
    for name, quantise in _PRECISIONS.items():
        before = quantise(to_onnx(first))
        for how, successor in successors.items():
            yield Pair(f"network, {name}, {how}", before, quantise(to_onnx(successor)))


def _network(table: Table) -> Any:
    from sklearn.neural_network import MLPRegressor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, and need not
        return MLPRegressor(hidden_layer_sizes=(360, 360), max_iter=6, random_state=3).fit(*table)


def _to_8_bits(model: bytes) -> bytes:
    """The model with its weights in 8 bits, quantised dynamically by onnxruntime."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "q8.onnx"
        quantize_dynamic(onnx.load(io.BytesIO(model)), target, weight_type=QuantType.QUInt8)
        return target.read_bytes()


_PRECISIONS: Final[dict[str, Callable[[bytes], bytes]]] = {"float32": lambda model: model, "8 bit": _to_8_bits}
