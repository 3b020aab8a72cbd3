"""Bench telemetry: what a device sends in a day, with the agent's own monitor, health, outbox and sender.

Rules: a model of 30 features predicts five rows a minute; the cadence is the agent's default. Bytes are those of MQTT 5
packets in TLS 1.3 records, both ways, with acknowledgements and pings; what TCP and IP add is said beside it.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from lightship.data.moments import reference_moments
from lightship_agent.contract import topics
from lightship_agent.contract.bundle import (
    GOLDEN,
    MODEL,
    PROFILE,
    Golden,
    Rows,
    build_bundle,
    encode_golden,
    read_bundle,
)
from lightship_agent.contract.manifest import Manifest, Provenance, Requires
from lightship_agent.contract.messages import Heartbeat
from lightship_agent.contract.profile import ReferenceProfile, count_outputs, profile_features
from lightship_agent.contract.schema import Feature, FeatureSchema, Outputs
from lightship_agent.contract.wire import encode
from lightship_agent.link.outbox import Outbox
from lightship_agent.link.quality import LinkQuality
from lightship_agent.link.sender import Sender
from lightship_agent.monitor.health import read_health
from lightship_agent.monitor.monitor import Monitor
from lightship_agent.runtime.model import load_model
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.oip import decode_infer
from lightship_agent.serving.slot import most_frequent
from lightship_agent.settings import load_settings

FEATURES: Final = 30
ROWS: Final = 5  # a minute
_BEGAN: Final = 1_780_000_000_000
_DAY: Final = 86_400
_TLS: Final = 22  # bytes a record of TLS 1.3 adds
_TCP: Final = 40  # bytes a segment of TCP and IP adds; a message has two, and so has its acknowledgement
_PUBACK: Final = 4
_PING: Final = 2 * (2 + _TLS)
_VITALS: Final = {
    "agent_uptime_s": 86_400.1, "queue_depth": 0.0, "outbox_records": 3.0, "outbox_dropped": 0.0,
    "ring_dropped_rows": 0.0, "throttled": 0.0,
}  # fmt: skip
_KEEPALIVE: Final = 30  # s, the agent's own: a ping where nothing was said for so long


@dataclass(frozen=True)
class Day:
    """A day of one device."""

    report_seconds: float
    send_seconds: float
    reports: int
    messages: int
    payload: int  # bytes of packed envelopes
    wire: int  # the same as MQTT packets in TLS records, both ways, with pings
    tcp: int  # what TCP and IP add
    kinds: dict[str, int]  # bytes of records by kind, before they are packed


def measure(folder: Path, report_seconds: float = 0.0) -> Day:
    """A day; `report_seconds`: another cadence than the default."""
    defaults = load_settings({"LIGHTSHIP_AGENT_STATE_DIR": str(folder)}, {})
    step = report_seconds or defaults.report_seconds
    model = load_model(read_bundle(_bundle()), since_ms=_BEGAN)
    monitor = Monitor(
        defaults.window_rows,
        min_age_ms=int(defaults.window_min_seconds * 1_000),
        max_age_ms=int(defaults.window_max_seconds * 1_000),
    )
    plane = DataPlane(monitor.observe, observe_row=monitor.observe_row, observe_rows=monitor.observe_rows)
    plane.install(model)
    clock = [0.0]
    outbox = Outbox(folder / "outbox", limit_bytes=defaults.outbox_mb * 1_000_000, clock=lambda: clock[0])
    sender = Sender((("tele", outbox),), 1, 0.0, clock=lambda: clock[0])
    topic = len(topics.telemetry("default", "press-hall-2-07"))
    kinds: Counter[str] = Counter()
    rows = _rows(ROWS * _DAY // 60, seed=2)
    reports = messages = payload = wire = 0
    for minute in range(_DAY // 60):
        clock[0] = minute * 60.0
        for n in range(ROWS):
            plane.infer(decode_infer(_asked(rows[minute * ROWS + n]))[0])
        at = _BEGAN + minute * 60_000
        if minute * 60 % step:
            monitor.count(at)
            continue
        records = [*monitor.collect(at), _beat(plane, at, folder)]
        for record in records:
            kinds[str(record.__struct_config__.tag)] += len(encode(record))
        outbox.append(records)
        reports += len(records)
        while (parcel := sender.next_batch()) is not None:
            sender.sent()
            messages += 1
            payload += len(parcel.packed)
            wire += len(parcel.packed) + 2 + topic + 2 + 1 + 4 + _TLS + _PUBACK + _TLS
        outbox.acknowledge(outbox.epoch, outbox.last)
    # Between two messages, the agent's library pings where it has heard nothing for a while.
    wire += max(0, int(_DAY / _KEEPALIVE) - messages) * _PING
    outbox.close()
    shutil.rmtree(folder / "outbox")
    return Day(step, step, reports, messages, payload, wire, 4 * _TCP * messages, dict(kinds))


def _asked(row: npt.NDArray[np.float32]) -> bytes:
    tensor = {"name": "features", "shape": [1, FEATURES], "datatype": "FP32", "data": row.tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def _beat(plane: DataPlane, at: int, folder: Path) -> Heartbeat:
    """As the agent puts it together."""
    health = {**read_health(folder), **_VITALS, **LinkQuality().numbers()}
    return Heartbeat(
        s=1, t=at, running=plane.running(), agent="0.1.0", onnxruntime="1.32.0", machine=platform.machine(),
        health=health, errors=most_frequent(plane.errors()),
    )  # fmt: skip


def _rows(count: int, seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)


def _bundle() -> bytes:
    """A classifier of thirty features with the profile that `lightship train` writes."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.linear_model import LogisticRegression

    rows, names = _rows(10_000, seed=1), [f"sensor_{n}" for n in range(FEATURES)]
    fitted = LogisticRegression().fit(rows, rows[:, 0] + rows[:, 1] > 0)
    types, opset = [("features", FloatTensorType([None, FEATURES]))], {"": 17, "ai.onnx.ml": 3}
    options = {"zipmap": False}
    onnx = to_onnx(fitted, initial_types=types, target_opset=opset, options=options).SerializeToString()
    labels = ("healthy", "worn")
    said, scores = fitted.predict(rows).astype(np.int64), fitted.predict_proba(rows).astype(np.float32)
    predictions, counted = count_outputs(said, scores, len(labels))
    features = profile_features(rows, names)
    profile = ReferenceProfile(
        rows=len(rows),
        features=features,
        moments=reference_moments(features, rows),
        labels=labels,
        predictions=tuple(predictions.tolist()),
        scores=tuple(counted.tolist()),
    )
    manifest = Manifest(
        model="pump",
        version=1,
        created="2026-01-01T00:00:00Z",
        input_schema=FeatureSchema(features=tuple(Feature(name=n) for n in names)),
        outputs=Outputs(
            task="classification", labels=labels, label_output="label", score_output="probabilities",
            score_kind="probability",
        ),
        requires=Requires(),
        provenance=Provenance(dataset_digest="0" * 64),
        members={},
    )  # fmt: skip
    golden = Golden(inputs=Rows.of(rows[:16]), values=Rows.of(scores[:16]), labels=tuple(said[:16].tolist()))
    return build_bundle(manifest, {MODEL: onnx, PROFILE: encode(profile), GOLDEN: encode_golden(golden)})
