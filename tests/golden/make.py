"""Write the golden files of the present contract version.

Run once per released contract version, and commit what it writes; never again for the same version:

    python tests/golden/make.py

Rules: every value is written out or computed without chance; released files are never overwritten; today's code must
read the files of every version (`test_golden.py`).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from lightship_agent.contract import CONTRACT_VERSION
from lightship_agent.contract.assignment import Assignment, assignment_bytes
from lightship_agent.contract.bundle import (
    BACKGROUND,
    CARD,
    GOLDEN,
    MANIFEST,
    MODEL,
    PROFILE,
    Golden,
    Rows,
    build_bundle,
    encode_golden,
    read_members,
)
from lightship_agent.contract.manifest import Manifest, Provenance, Requires
from lightship_agent.contract.media import MediaWriter, assignment_name, target_name
from lightship_agent.contract.messages import (
    Command,
    Envelope,
    Heartbeat,
    LabelledRows,
    Labels,
    Running,
    State,
    Update,
    Window,
)
from lightship_agent.contract.profile import ReferenceProfile, count_outputs, profile_features
from lightship_agent.contract.schema import Feature, FeatureSchema, Outputs
from lightship_agent.contract.transport import pack_transport
from lightship_agent.contract.wire import canonical_json, encode, pack, sha256_hex

HERE = Path(__file__).resolve().parent
NAMES = ("temperature", "vibration")
WEIGHTS = np.array([[0.5, -0.5], [-0.25, 0.25]], dtype=np.float32)


def rows() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Float32 `[32, 2]`, every value exact."""
    steps = np.arange(32, dtype=np.float32)
    return np.stack([steps / 4, (steps * 7) % 16 - 8], axis=1).astype(np.float32)


def graph() -> bytes:
    """A linear classifier: label is the larger of two soft-maxed sums."""
    model = helper.make_graph(
        [
            helper.make_node("MatMul", ["features", "weights"], ["sums"]),
            helper.make_node("Softmax", ["sums"], ["probabilities"], axis=1),
            helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
        ],
        "golden",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, 2])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, [None]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2]),
        ],
        initializer=[numpy_helper.from_array(WEIGHTS, "weights")],
    )
    whole = helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="")
    data: bytes = whole.SerializeToString(deterministic=True)
    return data


def bundle() -> bytes:
    """A complete bundle that a device can serve."""
    sums = rows() @ WEIGHTS
    shares = np.exp(sums) / np.exp(sums).sum(axis=1, keepdims=True)
    scores = np.round(shares, 6).astype(np.float32)
    labels = (scores[:, 1] > scores[:, 0]).astype(np.int64)
    predictions, cells = count_outputs(labels, scores, 2)
    profile = ReferenceProfile(
        rows=32,
        features=profile_features(rows(), NAMES),
        labels=("healthy", "worn"),
        predictions=tuple(predictions.tolist()),
        scores=tuple(cells.tolist()),
        labelled=16,
        errors=1,
    )
    manifest = Manifest(
        model="golden-pump",
        version=7,
        created="2025-01-02T03:04:05Z",
        input_schema=FeatureSchema(
            features=(
                Feature(name="temperature", low=0.0, high=7.75, unit="K"),
                Feature(name="vibration", nullable=True, integer=True, low=-8.0, high=7.0),
            )
        ),
        outputs=Outputs(
            task="classification",
            labels=("healthy", "worn"),
            label_output="label",
            score_output="probabilities",
            score_kind="probability",
        ),
        requires=Requires(ops=("ArgMax", "MatMul", "Softmax"), device_classes=("generic", "gateway")),
        provenance=Provenance(
            dataset_digest="1" * 64, recipe_digest="2" * 64, code_revision="abc", seeds=(1, 2), run="r7",
            parent="golden-pump@6",
        ),
        members={},
        metrics={"accuracy": 0.9375},
        importances={"temperature": 0.75, "vibration": 0.25},
        extra={"x_later": {"kept": True}},
    )  # fmt: skip
    first = slice(0, 8)
    golden = Golden(inputs=Rows.of(rows()[first]), values=Rows.of(scores[first]), labels=tuple(labels[first].tolist()))
    members = {
        MODEL: graph(),
        PROFILE: encode(profile),
        GOLDEN: encode_golden(golden),
        BACKGROUND: encode(Rows.of(rows()[8:12])),
        CARD: "# golden-pump, version 7\n\nFor the tests – nothing else.\n".encode(),
    }
    return build_bundle(manifest, members)


def envelope(digest: str, filler: int) -> Envelope:
    """One record of every kind; `filler` lengthens it until it is worth compressing."""
    schema = "b" * 64
    running = Running(
        model="golden-pump", version=7, digest=digest, since=1_000, requests=5, failures=1, latency_ms=0.5
    )
    records = (
        Heartbeat(
            s=11, t=1_700_000_000_000, q=2, running=(running,), update_state="idle", assignment_seq=4, agent="0.1.0",
            onnxruntime="1.27.0", machine="aarch64", health={"cpu": 0.25},
        ),
        Window(
            s=12, t=1_700_000_000_001, model="golden-pump", version=7, digest=digest, schema=schema, w=3, opened=1,
            rows=6, counts=(1, 2, 3, *range(filler)), predictions=(4, 2), scores=(0, 6), invalid=1,
        ),
        Labels(s=13, t=2, q=0, model="golden-pump", digest=digest, schema=schema, w=2, labelled=9, errors=1),
        Update(s=14, t=3, rollout="ro-1", seq=4, digest=digest, state="failed", code="update.golden", detail="Row 3."),
        LabelledRows(
            s=15, t=4, model="golden-pump", digest=digest, schema=schema, x=((1.5, None), (0.0, -2.0)),
            y=("worn", "healthy"),
        ),
    )  # fmt: skip
    return Envelope(e="0123456789abcdef", b=2, us=60_000, lo=9, r=records)


def assignment(archive: bytes) -> Assignment:
    """What a director signs."""
    return Assignment(
        device="press-1", seq=4, issued=1_700_000_000, expires=1_707_776_000, model="golden-pump", version=7,
        path="bundles/golden-pump/7.tar", sha256=sha256_hex(archive), length=len(archive), rollout="ro-1",
    )  # fmt: skip


def media(packed: bytes) -> bytes:
    """What is carried to a device without a network; the container does not look into its parts."""
    out = io.BytesIO()
    writer = MediaWriter(out)
    members = {
        "metadata/1.root.json": b'{"signed":"root"}',
        "metadata/4.snapshot.json": b'{"signed":"snapshot"}',
        "metadata/timestamp.json": b'{"signed":"timestamp"}',
        assignment_name("press-1"): b'{"payload":""}',
        target_name(sha256_hex(packed)): packed,
    }
    for name, data in members.items():
        writer.add(name, len(data), [data])
    writer.finish()
    return out.getvalue()


def files() -> dict[str, bytes]:
    """Every golden file of this version, by name."""
    archive = bundle()
    digest = sha256_hex(archive)
    parts = read_members(archive)
    return {
        "bundle.tar": archive,
        "bundle.tar.zst": pack_transport(archive),
        "manifest.json": parts[MANIFEST],
        "profile.msgpack": parts[PROFILE],
        "golden.msgpack": parts[GOLDEN],
        "envelope.msgpack": pack(envelope(digest, 0)),
        "envelope-large.zlib": pack(envelope(digest, 900)),
        "state.msgpack": encode(State(on=True, n=2, agent="0.1.0")),
        "command.msgpack": encode(Command(id="c-1", expires=1_700_000_060, e="0123456789abcdef", first=9)),
        "assignment.json": assignment_bytes(assignment(archive)),
        "export.media": media(pack_transport(archive)),
        "canonical.json": canonical_json({"b": [1, 2.5, None], "a": {"ü": "–"}}),
    }


def main() -> int:
    """Write `v<contract version>/`, once."""
    folder = HERE / f"v{CONTRACT_VERSION}"
    if folder.exists() and any(folder.iterdir()):
        sys.stderr.write(f"{folder} is there already, and what is released is never written again.\n")
        return 1
    folder.mkdir(exist_ok=True)
    for name, data in files().items():
        (folder / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
