"""Real bundles for the agent's tests: a tiny model is trained, converted and packed, once per shape of request."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression

from lightship.data.moments import reference_moments, reference_residuals
from lightship_agent.contract.bundle import (
    BACKGROUND,
    GOLDEN,
    MODEL,
    PROFILE,
    Bundle,
    Golden,
    Rows,
    build_bundle,
    encode_golden,
    read_bundle,
)
from lightship_agent.contract.manifest import Manifest, Provenance, Requires
from lightship_agent.contract.profile import ReferenceProfile, count_outputs, profile_features
from lightship_agent.contract.schema import Feature, FeatureSchema, Outputs
from lightship_agent.contract.wire import encode
from lightship_agent.runtime.model import LoadedModel, load_model

Floats = npt.NDArray[np.float32]
Kind = Literal["classifier", "three-classes", "regressor"]
FEATURES = ("temperature", "vibration", "current", "speed")


def training_rows(n: int = 400, seed: int = 7) -> Floats:
    """Four plain features, float32 `[n, 4]`."""
    return np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)


@functools.cache
def _fit(kind: Kind, flip: bool) -> bytes:
    rows = training_rows()
    target = rows[:, 0] + 0.5 * rows[:, 1]
    if kind == "regressor":
        model: Any = LinearRegression().fit(rows, target)
        options: dict[str, Any] = {}
    else:
        cuts = [0.0] if kind == "classifier" else [-0.5, 0.5]
        classes = np.digitize(target, cuts)
        model = LogisticRegression().fit(rows, len(cuts) - classes if flip else classes)
        options = {"zipmap": False}
    types = [("features", FloatTensorType([None, 4]))]
    onnx = to_onnx(model, initial_types=types, target_opset={"": 17, "ai.onnx.ml": 3}, options=options)
    data: bytes = onnx.SerializeToString()
    return data


def outputs_of(kind: Kind) -> Outputs:
    """How the converted models name what they answer."""
    if kind == "regressor":
        return Outputs(task="regression", value_output="variable")
    labels = ("healthy", "worn") if kind == "classifier" else ("healthy", "worn", "broken")
    return Outputs(
        task="classification",
        labels=labels,
        label_output="label",
        score_output="probabilities",
        score_kind="probability",
    )


def answers(onnx: bytes, rows: Floats, outputs: Outputs) -> dict[str, npt.NDArray[Any]]:
    """What onnxruntime itself says, by output name."""
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    return dict(zip(outputs.names, session.run(list(outputs.names), {"features": rows}), strict=True))


def pack_bundle(
    onnx: bytes,
    outputs: Outputs,
    golden: Golden,
    profile: ReferenceProfile,
    *,
    name: str = "pump",
    version: int = 1,
    requires: Requires | None = None,
    nullable: tuple[str, ...] = (),
    width: int = 4,
    background: Floats | None = None,
) -> bytes:
    """A real archive around any ONNX bytes."""
    names = FEATURES if width == 4 else tuple(f"f{i}" for i in range(width))
    manifest = Manifest(
        model=name,
        version=version,
        created="2025-01-01T00:00:00Z",
        input_schema=FeatureSchema(features=tuple(Feature(name=n, nullable=n in nullable) for n in names)),
        outputs=outputs,
        requires=requires or Requires(),
        provenance=Provenance(dataset_digest="0" * 64),
        members={},
    )
    usual = {} if background is None else {BACKGROUND: encode(Rows.of(background))}
    return build_bundle(manifest, {MODEL: onnx, PROFILE: encode(profile), GOLDEN: encode_golden(golden), **usual})


def _regressor_profile(rows: Floats, said: Floats) -> ReferenceProfile:
    """As for a model that is off by half a unit on the average."""
    features = profile_features(rows, FEATURES)
    (values,) = profile_features(said[:, None], ("value",))
    truth = said + np.random.default_rng(1).normal(scale=0.6, size=len(said)).astype(np.float32)
    residuals = reference_residuals(said, truth)
    assert residuals is not None
    return ReferenceProfile(
        rows=len(rows),
        features=features,
        moments=reference_moments(features, rows),
        values=values,
        residuals=residuals,
        labelled=len(rows),
        errors=int((np.abs(truth - said) > residuals.bound).sum()),
    )


def build(
    version: int = 1,
    *,
    name: str = "pump",
    kind: Kind = "classifier",
    flip: bool = False,
    requires: Requires | None = None,
    nullable: tuple[str, ...] = (),
    golden_shift: float = 0.0,
    background: bool = True,
) -> bytes:
    """A bundle's bytes; `flip` trains a model that says the opposite, `golden_shift` makes the golden rows lie."""
    onnx, outputs, rows = _fit(kind, flip), outputs_of(kind), training_rows()
    said = answers(onnx, rows, outputs)
    if kind == "regressor":
        values, labels = said["variable"].reshape(-1, 1), ()
        profile = _regressor_profile(rows, said["variable"].ravel())
    else:
        values, labels = said["probabilities"], tuple(said["label"][:16].tolist())
        predictions, scores = count_outputs(said["label"], values, len(outputs.labels))
        profile = ReferenceProfile(
            rows=len(rows),
            features=(features := profile_features(rows, FEATURES)),
            moments=reference_moments(features, rows),
            labels=outputs.labels,
            predictions=tuple(predictions.tolist()),
            scores=tuple(scores.tolist()),
        )
    golden = Golden(inputs=Rows.of(rows[:16]), values=Rows.of(values[:16] + np.float32(golden_shift)), labels=labels)
    return pack_bundle(
        onnx,
        outputs,
        golden,
        profile,
        name=name,
        version=version,
        requires=requires,
        nullable=nullable,
        background=rows[:24] if background else None,
    )


@pytest.fixture(scope="session")
def forest_bundle() -> Callable[[int], bytes]:
    """`forest_bundle(version) -> bytes`: a forest of 100 trees on 30 features, another for each version; 2 to 3 MB."""

    @functools.cache
    def make(version: int) -> bytes:
        rows = np.random.default_rng(version).normal(size=(4_000, 30)).astype(np.float32)
        noise = np.random.default_rng(version + 100).normal(size=len(rows))
        classes = (rows[:, 0] + 0.5 * rows[:, 1] ** 2 + 0.3 * noise > 0.3).astype(np.int64)
        forest = RandomForestClassifier(100, n_jobs=1, random_state=version).fit(rows, classes)
        types, opset = [("features", FloatTensorType([None, 30]))], {"": 17, "ai.onnx.ml": 3}
        onnx = to_onnx(forest, initial_types=types, target_opset=opset, options={"zipmap": False}).SerializeToString()
        outputs = outputs_of("classifier")
        said = answers(onnx, rows[:16], outputs)
        profile = ReferenceProfile(rows=len(rows), features=profile_features(rows, [f"f{i}" for i in range(30)]))
        golden = Golden(
            inputs=Rows.of(rows[:16]), values=Rows.of(said["probabilities"]), labels=tuple(said["label"].tolist())
        )
        return pack_bundle(onnx, outputs, golden, profile, version=version, width=30)

    return make


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., bytes]:
    """`make_bundle(version=1, name=…, kind=…, flip=…, requires=…, nullable=…, golden_shift=…) -> bytes`."""
    return build


@pytest.fixture(scope="session")
def open_bundle() -> Callable[..., Bundle]:
    """The same arguments, already read and verified."""
    return lambda *args, **kwargs: read_bundle(build(*args, **kwargs))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LoadedModel]:
    """The same arguments, already loaded."""
    return lambda *args, **kwargs: load_model(read_bundle(build(*args, **kwargs)), since_ms=1_000)
