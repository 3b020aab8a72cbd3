"""Bench update: whole bundles around a model, as they travel: manifest, profile, golden rows."""

from __future__ import annotations

import numpy as np

from lightship_agent.contract.bundle import GOLDEN, MODEL, PROFILE, Golden, Rows, build_bundle, encode_golden
from lightship_agent.contract.manifest import Manifest, Provenance, Requires
from lightship_agent.contract.profile import ReferenceProfile, profile_features
from lightship_agent.contract.schema import Feature, FeatureSchema, Outputs
from lightship_agent.contract.wire import encode

from .kinds import WIDTH, tables

NAME = "pump"
NAMES = tuple(f"sensor_{i}" for i in range(WIDTH))


def bundle(onnx: bytes, version: int) -> bytes:
    """A bundle of that model."""
    import onnxruntime

    rows = tables()[0][0][:2_000]
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    said = session.run(None, {"features": rows[:32]})[0].astype(np.float32).reshape(-1, 1)
    manifest = Manifest(
        model=NAME,
        version=version,
        created=f"2026-01-{version:02d}T00:00:00Z",
        input_schema=FeatureSchema(features=tuple(Feature(name=n) for n in NAMES)),
        outputs=Outputs(task="regression", value_output="value"),
        requires=Requires(),
        provenance=Provenance(dataset_digest=f"{version:064x}"),
        members={},
    )
    profile = ReferenceProfile(rows=len(rows), features=profile_features(rows, NAMES))
    golden = Golden(inputs=Rows.of(rows[:32]), values=Rows.of(said))
    return build_bundle(manifest, {MODEL: onnx, PROFILE: encode(profile), GOLDEN: encode_golden(golden)})
