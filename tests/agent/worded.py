"""The pump with words: its vibration is a material, its speed one of two gears."""

from __future__ import annotations

from typing import Any

import msgspec
from tests.agent.conftest import build

from lightship_agent.contract.bundle import GOLDEN, MODEL, PROFILE, build_bundle, encode_golden, read_bundle
from lightship_agent.contract.schema import Feature, FeatureSchema
from lightship_agent.contract.wire import encode

MATERIALS = ("brass", "iron", "stål")


def worded_bundle(version: int = 1, **material: Any) -> bytes:
    """The bundle; keywords are further fields of the material."""
    whole = read_bundle(build(version))
    features = (
        Feature(name="temperature"),
        msgspec.convert({"name": "material", "kind": "categorical", "categories": MATERIALS, **material}, Feature),
        Feature(name="current", nullable=True),
        Feature(name="gear", kind="categorical", categories=("1", "2")),
    )
    bins = tuple(msgspec.structs.replace(b, name=f.name) for b, f in zip(whole.profile.features, features, strict=True))
    profile = msgspec.structs.replace(whole.profile, features=bins)
    manifest = msgspec.structs.replace(whole.manifest, input_schema=FeatureSchema(features=features), members={})
    return build_bundle(manifest, {MODEL: whole.model, PROFILE: encode(profile), GOLDEN: encode_golden(whole.golden)})
