"""What every released contract version has written, today's code reads, with the values that were meant."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightship_agent.contract import CONTRACT_VERSION, bundle
from lightship_agent.contract.assignment import parse_assignment
from lightship_agent.contract.bundle import Golden, read_bundle, read_members
from lightship_agent.contract.manifest import manifest_bytes, parse_manifest
from lightship_agent.contract.media import MediaWriter, read_chunks, read_index, read_member, target_name
from lightship_agent.contract.messages import Command, Envelope, Heartbeat, LabelledRows, Labels, State, Update, Window
from lightship_agent.contract.profile import Binner, ReferenceProfile
from lightship_agent.contract.transport import decompress
from lightship_agent.contract.wire import canonical_json, decode, sha256_hex, unpack
from lightship_agent.runtime.compat import check_compatible
from lightship_agent.runtime.golden import check_golden
from lightship_agent.runtime.model import load_model

HERE = Path(__file__).resolve().parent
V1 = HERE / "v1"
#: What devices in the field know this bundle by.
V1_DIGEST = "c0a380ae11fb75f48d4da5a22787ff553b1e4bdfee36a6e053fa20e5f8f22571"


def test_every_contract_version_up_to_now_has_its_files() -> None:
    assert [p.name for p in sorted(HERE.glob("v*"))] == [f"v{n}" for n in range(1, CONTRACT_VERSION + 1)]


def test_released_files_are_not_written_a_second_time() -> None:
    before = {p.name: p.read_bytes() for p in V1.iterdir()}

    done = subprocess.run([sys.executable, str(HERE / "make.py")], capture_output=True, text=True, check=False)

    assert (done.returncode, "never written again" in done.stderr) == (1, True)
    assert {p.name: p.read_bytes() for p in V1.iterdir()} == before


# Version 1 -----------------------------------------------------------------------------------------------------------


def test_the_bundle_of_version_1_is_read_and_known_by_its_digest() -> None:
    read = read_bundle((V1 / "bundle.tar").read_bytes())

    assert read.digest == V1_DIGEST
    assert (read.manifest.model, read.manifest.version, read.manifest.contract) == ("golden-pump", 7, 1)
    assert read.manifest.requires.device_classes == ("generic", "gateway")
    assert read.manifest.provenance.parent == "golden-pump@6"
    assert read.manifest.input_schema.names == ("temperature", "vibration")
    assert [f.nullable for f in read.manifest.input_schema.features] == [False, True]
    assert read.golden.inputs.matrix().shape == (8, 2)
    assert read.background is not None
    assert read.background.tolist()[0] == [2.0, 0.0]
    assert read.card == "# golden-pump, version 7\n\nFor the tests – nothing else.\n"


def test_the_archive_of_version_1_is_what_todays_writer_writes_of_its_members() -> None:
    data = (V1 / "bundle.tar").read_bytes()

    assert bundle._write_archive(read_members(data)) == data


def test_the_bundle_of_version_1_still_travels() -> None:
    archive = (V1 / "bundle.tar").read_bytes()

    assert decompress((V1 / "bundle.tar.zst").read_bytes(), len(archive)) == archive


def test_the_model_of_version_1_is_still_served_with_the_same_answers() -> None:
    read = read_bundle((V1 / "bundle.tar").read_bytes())
    check_compatible(read.manifest, agent_version="0.1.0", onnxruntime_version="1.27", device_class="generic")
    model = load_model(read, since_ms=1)

    assert check_golden(model, read.golden, read.manifest.golden_tolerance) < 1e-5
    assert model.predict(np.array([[4.0, 1.0]], dtype=np.float32)).labels is not None


def test_the_manifest_of_version_1_keeps_what_it_does_not_know() -> None:
    data = (V1 / "manifest.json").read_bytes()
    manifest = parse_manifest(data)

    assert manifest.extra == {"x_later": {"kept": True}}
    assert manifest.metrics == {"accuracy": 0.9375}
    assert json.loads(manifest_bytes(manifest)).items() >= json.loads(data).items()


def test_the_schema_digest_of_version_1_is_the_same_stream_today() -> None:
    manifest = parse_manifest((V1 / "manifest.json").read_bytes())

    assert manifest.input_schema.digest == "d11169e868eba4bd90ae1b7ad12d3caea5f0d54f38793be2f629c5ea16328f96"


def test_the_profile_of_version_1_counts_as_it_did() -> None:
    profile = decode((V1 / "profile.msgpack").read_bytes(), ReferenceProfile)
    rows = np.array([[0.0, -8.0], [8.0, np.nan], [-1.0, 7.0]], dtype=np.float32)

    counted = Binner(profile.features).count(rows)

    assert (profile.rows, profile.labelled, profile.errors) == (32, 16, 1)
    assert int(profile.counts.sum()) == 64
    first, second = counted[: profile.offsets[1]], counted[profile.offsets[1] :]
    assert (first[0], first[1], first[-2], first[-1]) == (1, 1, 1, 0)
    assert (second[1], second[-3], second[-1]) == (1, 1, 1)


def test_the_golden_rows_of_version_1_are_read() -> None:
    golden = decode((V1 / "golden.msgpack").read_bytes(), Golden)

    assert golden.labels == (0, 0, 1, 0, 1, 0, 0, 0)
    assert golden.values.matrix().shape == (8, 2)


@pytest.mark.parametrize(("name", "filler"), [("envelope.msgpack", 0), ("envelope-large.zlib", 900)])
def test_the_envelope_of_version_1_is_read_record_by_record(name: str, filler: int) -> None:
    read = unpack((V1 / name).read_bytes(), Envelope)
    beat, window, labels, update, shared = read.r

    assert (read.e, read.b, read.us, read.lo, read.v) == ("0123456789abcdef", 2, 60_000, 9, 1)
    assert [r.s for r in read.r] == [11, 12, 13, 14, 15]
    assert isinstance(beat, Heartbeat)
    assert (beat.running[0].digest, beat.running[0].latency_ms, beat.machine) == (V1_DIGEST, 0.5, "aarch64")
    assert isinstance(window, Window)
    assert window.counts == (1, 2, 3, *range(filler))
    assert isinstance(labels, Labels)
    assert (labels.w, labels.labelled, labels.errors, labels.q) == (2, 9, 1, 0)
    assert isinstance(update, Update)
    assert (update.state, update.code, update.rollout) == ("failed", "update.golden", "ro-1")
    assert isinstance(shared, LabelledRows)
    assert (shared.x, shared.y) == (((1.5, None), (0.0, -2.0)), ("worn", "healthy"))


def test_the_small_messages_of_version_1_are_read() -> None:
    assert decode((V1 / "state.msgpack").read_bytes(), State) == State(on=True, n=2, agent="0.1.0")
    # It was written with a field that is gone since: what we don't know, we step over.
    assert decode((V1 / "command.msgpack").read_bytes(), Command) == Command(
        id="c-1", expires=1_700_000_060, e="0123456789abcdef", first=9
    )


def test_the_assignment_of_version_1_is_read() -> None:
    read = parse_assignment((V1 / "assignment.json").read_bytes())

    assert (read.device, read.seq, read.model, read.version, read.mode) == ("press-1", 4, "golden-pump", 7, "serve")
    assert (read.sha256, read.length) == (V1_DIGEST, len((V1 / "bundle.tar").read_bytes()))


def test_the_media_file_of_version_1_is_read_and_is_what_todays_writer_writes() -> None:
    packed = (V1 / "bundle.tar.zst").read_bytes()
    data = (V1 / "export.media").read_bytes()
    file = io.BytesIO(data)

    index = read_index(file)

    assert index.devices == ("press-1",)
    assert list(index.entries) == [
        "lightship-media", "metadata/1.root.json", "metadata/4.snapshot.json", "metadata/timestamp.json",
        "assignments/press-1.json", f"targets/{sha256_hex(packed)}",
    ]  # fmt: skip
    assert read_member(file, index, target_name(sha256_hex(packed)), len(packed)) == packed
    again = io.BytesIO()
    writer = MediaWriter(again)
    for name in list(index.entries)[1:]:
        writer.add(name, index.entries[name].length, read_chunks(file, index.entries[name]))
    writer.finish()
    assert again.getvalue() == data


def test_canonical_json_of_version_1_has_the_same_bytes_today() -> None:
    written = (V1 / "canonical.json").read_bytes()

    assert canonical_json({"a": {"ü": "–"}, "b": [1, 2.5, None]}) == written
    assert sha256_hex(written) == "4712c763042c45032f8ce50337b8ae155b2adde0b2e3c7510cc5eafe3f802694"
