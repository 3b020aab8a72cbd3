"""Small, complete contract values for these tests; no model is trained, so the model's bytes are any bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.bundle import BACKGROUND, CARD, GOLDEN, MODEL, PROFILE, Golden, Rows, encode_golden
from lightship_agent.contract.manifest import Manifest, Provenance, Requires
from lightship_agent.contract.profile import ReferenceProfile, profile_features
from lightship_agent.contract.schema import Feature, FeatureSchema, Outputs
from lightship_agent.contract.wire import encode

NAMES = ("temperature", "vibration")


def rows(n: int = 64) -> npt.NDArray[np.float32]:
    """The same float32 `[n, 2]` on every machine: no generator, only arithmetic that is exact in float32."""
    steps = np.arange(n, dtype=np.float32)
    return np.stack([steps / 4, (steps * 7) % 32 - 16], axis=1).astype(np.float32)


def manifest(**changes: object) -> Manifest:
    plain: dict[str, object] = {
        "model": "pump",
        "version": 3,
        "created": "2025-01-01T00:00:00Z",
        "input_schema": FeatureSchema(features=tuple(Feature(name=n, low=0.0, high=9.5, unit="K") for n in NAMES)),
        "outputs": Outputs(
            task="classification",
            labels=("healthy", "worn"),
            label_output="label",
            score_output="probabilities",
            score_kind="probability",
        ),
        "requires": Requires(ops=("LinearClassifier",), device_classes=("generic",)),
        "provenance": Provenance(dataset_digest="d" * 64, seeds=(1, 2), parent="pump@2"),
        "members": {},
        "metrics": {"accuracy": 0.96875},
    }
    return Manifest(**{**plain, **changes})  # type: ignore[arg-type]


def profile() -> ReferenceProfile:
    return ReferenceProfile(
        rows=64,
        features=profile_features(rows(), NAMES),
        labels=("healthy", "worn"),
        predictions=(40, 24),
        scores=(0,) * 42,
        labelled=16,
        errors=1,
    )


def golden() -> Golden:
    scores = np.tile(np.array([[0.25, 0.75]], dtype=np.float32), (4, 1))
    return Golden(inputs=Rows.of(rows(4)), values=Rows.of(scores), labels=(1, 1, 1, 1))


def members(model: bytes = b"not really a graph", **changes: bytes) -> dict[str, bytes]:
    """Every member, by the names the archive gives them; `card=b"…"` and the like replace one."""
    names = {"model": MODEL, "profile": PROFILE, "golden": GOLDEN, "background": BACKGROUND, "card": CARD}
    whole = {
        MODEL: model,
        PROFILE: encode(profile()),
        GOLDEN: encode_golden(golden()),
        BACKGROUND: encode(Rows.of(rows(2))),
        CARD: "# Pump, version 3 – ok".encode(),
    }
    return {**whole, **{names[k]: v for k, v in changes.items()}}
