"""Bench serving: three models of 30 features and two classes, and what a row of them is.

Rules: made here, from seeds; converted as the product converts; every server serves the bytes that are in the bundle.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lightship.convert.converter import Converted, convert
from lightship_agent.contract.bundle import GOLDEN, MODEL, PROFILE, Golden, Rows, build_bundle, encode_golden
from lightship_agent.contract.manifest import Manifest, Provenance
from lightship_agent.contract.profile import ReferenceProfile, profile_features
from lightship_agent.contract.schema import Feature, FeatureSchema
from lightship_agent.contract.wire import encode
from lightship_agent.files import write_durably

WIDTH: Final = 30
NAMES: Final = ("hgb", "rf", "mlp")
TITLES: Final = {"hgb": "gradient boosting, 100 iterations", "rf": "forest of 100 trees", "mlp": "network 64-32"}
_ROWS: Final = 8_000
_FEATURES: Final = tuple(f"sensor_{i}" for i in range(WIDTH))
_LABELS: Final = ("healthy", "worn")
#: How many versions of a model there are to be swapped; each was trained with another seed.
VERSIONS: Final = 2


@dataclass(frozen=True)
class Made:
    """One version of a model: its bundle, and the graph in it."""

    name: str
    version: int
    bundle: bytes
    onnx: bytes


def rows(count: int = _ROWS, seed: int = 5) -> NDArray[np.float32]:
    """So many rows."""
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def make(folder: Path, name: str, version: int = 1) -> Made:
    """That version of that model; made once, and then found in `folder`."""
    stem = folder / f"{name}-{version}"
    graph, bundle = stem.with_suffix(".onnx"), stem.with_suffix(".tar")
    if not bundle.exists():
        folder.mkdir(parents=True, exist_ok=True)
        converted = _converted(name, version)
        write_durably(graph, converted.onnx)
        write_durably(bundle, _bundle(name, version, converted))
    return Made(name, version, bundle.read_bytes(), graph.read_bytes())


def reversioned(folder: Path, name: str, number: int) -> Made:
    """Version `number`, which answers as one of the `VERSIONS` that were trained, in turn."""
    of = make(folder, name, 1 + (number - 1) % VERSIONS)
    if number <= VERSIONS:
        return of
    from lightship_agent.contract.bundle import read_bundle

    read = read_bundle(of.bundle)
    outputs, schema, requires = read.manifest.outputs, read.manifest.input_schema, read.manifest.requires
    again = Converted(onnx=of.onnx, schema=schema, outputs=outputs, requires=requires, versions={})
    return Made(name, number, _bundle(name, number, again), of.onnx)


def _converted(name: str, version: int) -> Converted:
    table = rows(seed=5 + version)
    noise = np.random.default_rng(version).normal(0, 0.5, len(table))
    truth = 2 * table[:, 0] - table[:, 1] * table[:, 2] + np.sin(3 * table[:, 3]) + noise > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the network has not converged, and need not
        estimator = _estimator(name, version).fit(table, truth.astype(np.int64))
    schema = FeatureSchema(features=tuple(Feature(name=n) for n in _FEATURES))
    return convert(estimator, schema, _LABELS, "classification")


def _estimator(name: str, seed: int) -> Any:
    if name == "hgb":
        from sklearn.ensemble import HistGradientBoostingClassifier

        return HistGradientBoostingClassifier(max_iter=100, early_stopping=False, random_state=seed)
    if name == "rf":
        from sklearn.ensemble import RandomForestClassifier

        return RandomForestClassifier(n_estimators=100, random_state=seed, n_jobs=1)
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier(hidden_layer_sizes=(64, 32), max_iter=20, random_state=seed)


def _bundle(name: str, version: int, converted: Converted) -> bytes:
    import onnxruntime

    table = rows(2_000)
    session = onnxruntime.InferenceSession(converted.onnx, providers=["CPUExecutionProvider"])
    found = session.run(list(converted.outputs.names), {converted.schema.input_name: table[:32]})
    golden = Golden(inputs=Rows.of(table[:32]), values=Rows.of(found[1]), labels=tuple(found[0].tolist()))
    manifest = Manifest(
        model=name,
        version=version,
        created=f"2026-01-01T00:{version // 60:02d}:{version % 60:02d}Z",
        input_schema=converted.schema,
        outputs=converted.outputs,
        requires=converted.requires,
        provenance=Provenance(dataset_digest=f"{version:064x}"),
        members={},
    )
    profile = ReferenceProfile(rows=len(table), features=profile_features(table, _FEATURES))
    members = {MODEL: converted.onnx, PROFILE: encode(profile), GOLDEN: encode_golden(golden)}
    return build_bundle(manifest, members)
