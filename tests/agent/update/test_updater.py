"""The updater before a real release repository over real TLS. Whatever goes wrong, the old model serves on."""

from __future__ import annotations

import errno
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner
from tests.agent.conftest import FEATURES, build, pack_bundle, training_rows
from tests.agent.link.field import Device, Field
from tests.agent.runtime.graphs import grinding
from tuf.api.metadata import Metadata, TargetFile, Targets

from lightship.release.repository import RELEASES
from lightship.storage.models import ModelVersion
from lightship_agent.contract.assignment import PAYLOAD_TYPE, assignment_bytes
from lightship_agent.contract.bundle import Golden, Rows
from lightship_agent.contract.manifest import Requires
from lightship_agent.contract.profile import ReferenceProfile, profile_features
from lightship_agent.contract.schema import Outputs
from lightship_agent.contract.transport import TRANSPORT_SUFFIX
from lightship_agent.update import download
from lightship_agent.update import machine as m
from lightship_agent.update.store import BundleStore, StateFile

#: What a refused assignment may leave: fresher metadata, and nothing else.
METADATA = "tuf/"
#: What a failed attempt may leave besides: the state that says so and its copy, the bundle, a part of a download.
ATTEMPT = ("tuf/", "update.json", "committed.json", "staging/", "bundles/")


def committed(field: Field, **timing: float) -> tuple[Device, ModelVersion]:
    """A device that was started with version 1 committed on its disk, and has had its assignment confirmed."""
    identity, first = field.enrolled(), field.release(1)
    seq = field.assign("press-1", first)
    folder = identity.folder.parent
    target = m.Target.of(field.assignment("press-1", first, seq=seq))
    BundleStore(folder).put(first.digest, build(1))
    StateFile(folder).save(m.UpdateState(floor=seq, current=target))
    device = field.boot(identity, **timing)
    assert device.look() == ""
    assert device.host.history == [first.digest]
    return device, first


def refused(field: Field, device: Device, old: ModelVersion, code: str) -> None:
    """Look: the assignment is refused with that code, the old model serves, nothing but metadata changed on disk."""
    before = device.on_disk(METADATA)

    assert device.look() == code

    assert device.host.serving == old.digest
    assert device.host.history == [old.digest]
    assert device.on_disk(METADATA) == before


def failed(field: Field, device: Device, old: ModelVersion, code: str) -> None:
    """Look: the attempt fails with that code; the old model serves, and is what a restart would serve."""
    before = device.on_disk(*ATTEMPT)

    device.look()

    assert device.host.steps[-1][1] == code
    assert device.host.serving == old.digest
    assert device.on_disk(*ATTEMPT) == before
    state = StateFile(device.folder).load()
    assert (state.phase, state.candidate, state.last_code) == ("idle", None, code)
    assert state.current is not None
    assert state.current.sha256 == old.digest
    assert field.boot(device.identity).host.serving == old.digest


# What goes well -------------------------------------------------------------------------------------------------------


def test_a_device_goes_from_nothing_to_the_first_bundle_and_on_to_the_second(field: Field) -> None:
    device, first = field.device(), field.release(1)
    field.assign("press-1", first)
    device.look()
    second = field.release(2, flip=True)
    field.assign("press-1", second)

    device.look()

    assert device.host.history == [None, first.digest, second.digest]
    assert [step for step, _ in device.host.steps] == 2 * ["fetching", "trying", "soaking", "committed"]
    state = device.updater.state
    assert (state.phase, state.floor) == ("idle", 2)
    assert (state.current and state.current.sha256, state.previous and state.previous.sha256) == (
        second.digest,
        first.digest,
    )
    assert sorted(p.stem for p in device.updater.store.bundles.iterdir()) == sorted([first.digest, second.digest])
    assert list(device.updater.store.staging.iterdir()) == []


def test_a_legitimate_way_back_is_a_new_assignment_and_needs_no_download(field: Field) -> None:
    device, first = committed(field)
    field.assign("press-1", field.release(2, flip=True))
    device.look()
    field.assign("press-1", first)
    downloads = len(field.server.asked("targets"))

    device.look()

    assert device.host.serving == first.digest
    assert device.updater.state.floor == 3
    assert len(field.server.asked("targets")) == downloads


def test_the_version_before_may_stay_in_memory_unless_it_failed_or_is_revoked(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    device.look()
    assert device.host.kept == (second.digest, first.digest)

    device.updater._apply(m.WentBack("it misreads sevens"))
    assert device.host.kept == (first.digest,)

    device.updater._apply(m.PenaltyCleared())
    field.home.releases.revoke(second.path)
    device.host.kept = ()
    field.assign("press-1", first)
    device.look()

    assert device.updater.revoked == {second.digest}
    assert device.host.kept == (first.digest, second.digest)  # the agent leaves out what is revoked


def test_what_is_settled_is_not_sent_again(field: Field) -> None:
    device, _ = committed(field)
    seen = len(field.server.seen)

    device.look()

    assert field.server.seen[seen:] == [("GET", "/v1/assignment", "")]
    assert device.host.steps == []


def test_the_same_bundle_under_a_newer_assignment_is_committed_at_once(field: Field) -> None:
    device, first = committed(field)
    field.assign("press-1", first)

    device.look()

    assert device.host.history == [first.digest]
    assert device.host.steps == [("committed", "")]
    assert device.updater.state.current is not None
    assert device.updater.state.current.seq == 2


def test_three_versions_later_the_store_holds_two(field: Field) -> None:
    device, _ = committed(field)
    versions = [field.release(n, flip=n % 2 == 0) for n in (2, 3)]
    for version in versions:
        field.assign("press-1", version)
        device.look()

    assert sorted(p.stem for p in device.updater.store.bundles.iterdir()) == sorted(v.digest for v in versions)


def test_a_restart_serves_what_was_committed_without_a_network(field: Field) -> None:
    device, first = committed(field)
    field.fault(".", status=500)

    restarted = field.boot(device.identity)

    assert restarted.host.history == [first.digest]
    assert restarted.look() == "link.status"
    assert restarted.host.serving == first.digest


# Who may say what runs ------------------------------------------------------------------------------------------------


def unsigned(field: Field, version: ModelVersion, seq: int = 99) -> bytes:
    plain = Envelope(assignment_bytes(field.assignment("press-1", version, seq=seq)), PAYLOAD_TYPE, {})
    return json.dumps(plain.to_dict()).encode()


def signed_by(signer: CryptoSigner, payload: bytes, kind: str = PAYLOAD_TYPE) -> bytes:
    envelope = Envelope(payload, kind, {})
    envelope.sign(signer)
    return json.dumps(envelope.to_dict()).encode()


def altered(envelope: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(envelope), **changes}).encode()


Forgery = Callable[[Field, ModelVersion], bytes]
FORGERIES: dict[str, tuple[Forgery, str]] = {
    "unsigned": (unsigned, "trust.signature"),
    "a stranger's key": (
        lambda f, v: signed_by(CryptoSigner.generate_ed25519(), assignment_bytes(f.assignment("press-1", v))),
        "trust.signature",
    ),
    "the release key, which may not assign": (
        lambda f, v: signed_by(f.home.keys.signer("releases"), assignment_bytes(f.assignment("press-1", v))),
        "trust.signature",
    ),
    "the director, over another type of payload": (
        lambda f, v: signed_by(f.home.keys.signer("director"), assignment_bytes(f.assignment("press-1", v)), "text"),
        "trust.metadata",
    ),
    "a payload changed after signing": (
        lambda f, v: altered(
            f.sign(f.assignment("press-1", v)),
            payload=json.loads(f.sign(f.assignment("press-1", v, seq=100)))["payload"],
        ),
        "trust.signature",
    ),
    "the director, over nonsense": (lambda f, _: signed_by(f.home.keys.signer("director"), b"{}"), "trust.metadata"),
    "another device's": (lambda f, v: f.sign(f.assignment("press-2", v)), "trust.foreign"),
    "expired": (lambda f, v: f.sign(f.assignment("press-1", v, expires=1_000)), "trust.expired"),
    "below the floor": (lambda f, v: f.sign(f.assignment("press-1", v, seq=0)), "trust.rollback"),
    "of a path that was never released": (
        lambda f, v: f.sign(f.assignment("press-1", v, path="bundles/pump/9.tar")),
        "trust.not-released",
    ),
    "of a path outside the release role": (
        lambda f, v: f.sign(f.assignment("press-1", v, path="../../etc/passwd")),
        "trust.not-released",
    ),
    "of another digest than the released one": (
        lambda f, v: f.sign(f.assignment("press-1", v, sha256="f" * 64)),
        "trust.not-released",
    ),
    "of another length than the released one": (
        lambda f, v: f.sign(f.assignment("press-1", v, length=v.length + 1)),
        "trust.not-released",
    ),
    "no JSON": (lambda *_: b"\xff\xfe{", "trust.metadata"),
    "a list": (lambda *_: b"[]", "trust.metadata"),
    "deep": (lambda *_: b"[" * 16_000, "trust.metadata"),
    "a number for a type": (lambda f, v: altered(unsigned(f, v), payloadType=5), "trust.metadata"),
    "a number for a payload": (lambda f, v: altered(unsigned(f, v), payload=5), "trust.metadata"),
    "numbers for signatures": (lambda f, v: altered(unsigned(f, v), signatures=[5]), "trust.metadata"),
    "too long": (lambda *_: b" " * 20_000, "trust.metadata"),
}


def test_no_forged_foreign_or_stale_assignment_changes_anything(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    genuine = field.envelope("press-1")

    for name, (forge, code) in FORGERIES.items():
        field.deliver("press-1", forge(field, second))
        before = device.on_disk(METADATA)
        assert device.look() == code, name
        assert device.on_disk(METADATA) == before, name
        assert device.host.history == [first.digest], name

    # And the device is as well as before.
    field.deliver("press-1", genuine)
    assert device.look() == ""
    field.assign("press-1", second)
    device.look()
    assert device.host.serving == second.digest


def test_an_older_assignment_played_again_is_refused(field: Field) -> None:
    device, _ = committed(field)
    old_envelope = field.envelope("press-1")
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    device.look()
    field.deliver("press-1", old_envelope)
    before = device.on_disk(METADATA)

    assert device.look() == "trust.rollback"

    assert device.host.serving == second.digest
    assert device.on_disk(METADATA) == before


def test_a_version_revoked_after_it_was_assigned_is_not_taken(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    field.home.releases.revoke(second.path)

    refused(field, device, first, "trust.not-released")


def test_an_old_release_list_brought_back_is_refused(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    with_second = {p.name: p.read_bytes() for p in field.home.releases.metadata.glob("*.json")}
    field.home.releases.revoke(second.path)
    field.assign("press-1", second)
    device.look()
    for name, data in with_second.items():
        (field.home.releases.metadata / name).write_bytes(data)

    refused(field, device, first, "trust.rollback")


def test_release_metadata_that_nobody_signed_is_refused(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    timestamp = field.home.releases.metadata / "timestamp.json"
    forged = json.loads(timestamp.read_bytes())
    forged["signed"]["version"] += 1
    timestamp.write_text(json.dumps(forged))

    refused(field, device, first, "trust.signature")


def test_expired_release_metadata_stops_updates_and_not_the_model(field: Field) -> None:
    device, first = committed(field)
    field.assign("press-1", field.release(2, flip=True))
    path = field.home.releases.metadata / "timestamp.json"
    timestamp: Metadata[Any] = Metadata.from_file(str(path))
    timestamp.signed.version += 1
    timestamp.signed.expires = timestamp.signed.expires.replace(year=2020)
    timestamp.sign(field.home.keys.signer("timestamp"))
    timestamp.to_file(str(path))

    refused(field, device, first, "trust.expired")


def test_noise_in_the_metadata_cache_does_not_stop_updates(field: Field) -> None:
    device, _ = committed(field)
    for path in (device.folder / "tuf").rglob("*.json"):
        path.write_bytes(b"noise")
    second = field.release(2, flip=True)
    field.assign("press-1", second)

    device.look()

    assert device.host.serving == second.digest


def test_a_revoked_device_says_so_and_serves_on(field: Field) -> None:
    from lightship.fleet import enrolment

    device, first = committed(field)
    with field.home.database.write() as session:
        enrolment.revoke(session, "press-1", actor="test", reason="stolen")

    refused(field, device, first, "enrol.revoked")


# The way of the bytes -------------------------------------------------------------------------------------------------


def test_a_bundle_tampered_with_on_the_server_is_refused(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    published = field.published(second)
    data = bytearray(published.read_bytes())
    data[len(data) // 2] ^= 1
    published.write_bytes(bytes(data))
    field.assign("press-1", second)

    failed(field, device, first, "trust.digest")

    assert list(device.updater.store.staging.iterdir()) == []
    assert not device.updater.store.holds(second.digest)


def test_a_download_cut_again_and_again_goes_on_where_it_stopped(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda *_: 0.0)
    device, _ = committed(field)
    second = field.release(2, flip=True)
    size = field.published(second).stat().st_size
    field.assign("press-1", second)
    asked = len(field.server.asked("targets"))
    for _ in range(3):
        field.fault("targets", times=1, cut_after=size // 5)

    device.look()

    ranges = [r for _, _, r in field.server.asked("targets")[asked:]]
    assert ranges == ["", *(f"bytes={n * (size // 5)}-" for n in (1, 2, 3))]
    assert device.host.serving == second.digest


def test_a_download_that_broke_off_for_good_is_taken_up_by_the_next_look(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda *_: 0.0)
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    field.fault("targets", cut_after=100)

    failed(field, device, first, "link.unreachable")

    assert device.host.steps[-1][0] == "retry"
    assert device.updater.state.penalties == {}
    (part,) = device.updater.store.staging.iterdir()
    assert part.stat().st_size == 100 * download.ATTEMPTS
    field.well_again()
    device.look()
    assert device.host.serving == second.digest


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (302, 1), (500, download.ATTEMPTS), (429, download.ATTEMPTS)])
def test_a_server_that_refuses_is_asked_again_only_where_that_may_help(
    field: Field, monkeypatch: pytest.MonkeyPatch, status: int, asked: int
) -> None:
    monkeypatch.setattr(random, "uniform", lambda *_: 0.0)
    device, first = committed(field)
    field.assign("press-1", field.release(2, flip=True))
    before = len(field.server.asked("targets"))
    field.fault("targets", status=status)

    failed(field, device, first, "link.status")

    assert len(field.server.asked("targets")) - before == asked
    assert device.updater.state.penalties == {}


def test_a_server_that_stumbles_once_costs_nothing(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda *_: 0.0)
    device, _ = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    field.fault("targets", times=1, status=503)

    device.look()

    assert device.host.serving == second.digest


@pytest.mark.parametrize("status", [301, 500, 503])
def test_metadata_that_does_not_come_is_a_link_error(field: Field, status: int) -> None:
    device, first = committed(field)
    field.assign("press-1", field.release(2, flip=True))
    field.fault("metadata", status=status)

    refused(field, device, first, "link.unreachable")


def test_endless_metadata_is_cut_off(field: Field) -> None:
    device, first = committed(field)
    field.assign("press-1", field.release(2, flip=True))
    field.fault("timestamp", status=200, body=b"{" + b" " * 1_000_000)

    refused(field, device, first, "trust.digest")


def test_an_endless_assignment_is_cut_off(field: Field) -> None:
    device, first = committed(field)
    field.fault("assignment", status=200, body=b" " * 3_000_000)

    refused(field, device, first, "link.status")


def sign_anyway(field: Field, version: ModelVersion, packed: bytes) -> None:
    """Publish other transport bytes for a version with the genuine release key: what a mistaken signer could do."""
    repository = field.home.releases
    name = version.path + TRANSPORT_SUFFIX
    with repository._lock():
        releases = repository._load(RELEASES, Targets)
        repository._store_target(name, packed)
        releases.signed.targets[name] = TargetFile.from_data(name, packed, ["sha256"])
        repository._commit(releases)


def test_a_zstd_bomb_signed_by_the_release_key_is_stopped_at_the_signed_length(field: Field) -> None:
    from backports import zstd

    device, first = committed(field)
    second = field.release(2, flip=True)
    sign_anyway(field, second, zstd.compress(bytes(100_000_000), level=19))
    field.assign("press-1", second)

    failed(field, device, first, "bundle.too-large")

    assert list(device.updater.store.staging.iterdir()) == []


def test_transport_bytes_of_another_bundle_are_refused(field: Field) -> None:
    device, first = committed(field)
    second, third = field.release(2, flip=True), field.release(3)
    sign_anyway(field, second, field.published(third).read_bytes())
    field.assign("press-1", second)

    failed(field, device, first, "trust.digest")


def test_released_bytes_that_are_no_bundle_are_refused(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, b"not a bundle at all")
    field.assign("press-1", second)

    failed(field, device, first, "bundle.malformed")

    assert not device.updater.store.holds(second.digest)


# Trying it ------------------------------------------------------------------------------------------------------------


def test_golden_rows_that_do_not_agree_here_keep_the_old_model(field: Field) -> None:
    device, first = committed(field)
    field.assign("press-1", field.release(2, golden_shift=0.01))

    failed(field, device, first, "update.golden")

    assert device.host.history == [first.digest]


def test_a_model_that_computes_for_ever_is_stopped(field: Field) -> None:
    rows = training_rows(8)
    hanging = pack_bundle(
        grinding(),
        Outputs(task="regression", value_output="value"),
        Golden(inputs=Rows.of(rows), values=Rows.of(rows[:, :1])),
        ReferenceProfile(rows=8, features=profile_features(rows, FEATURES)),
        version=2,
        requires=Requires(probe_seconds=2),
    )
    device, first = committed(field)
    field.assign("press-1", field.release(2, hanging))

    failed(field, device, first, "update.probe-timeout")


def test_a_manifest_that_names_another_version_than_its_release_is_refused(field: Field) -> None:
    device, first = committed(field)
    field.assign("press-1", field.release(2, build(7)))

    failed(field, device, first, "update.swap")


@pytest.mark.parametrize(
    "requires",
    [Requires(min_agent="99.0"), Requires(min_onnxruntime="99.0"), Requires(device_classes=("gateway",))],
    ids=["agent", "onnxruntime", "device-class"],
)
def test_a_bundle_for_other_devices_is_not_tried(field: Field, requires: Requires) -> None:
    device, first = committed(field)
    field.assign("press-1", field.release(2, requires=requires))

    failed(field, device, first, "bundle.incompatible")


def test_a_model_that_is_too_slow_here_keeps_the_old_one(field: Field) -> None:
    device, first = committed(field)
    field.assign("press-1", field.release(2, requires=Requires(latency_ms=0.000001)))

    failed(field, device, first, "update.budget")


# Swapping it ----------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_loaded_after_all_is_taken_back(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    device.host.unloadable = {second.digest}
    field.assign("press-1", second)

    failed(field, device, first, "update.swap")

    assert device.host.history == [first.digest, first.digest]


def test_a_model_that_fails_requests_while_soaking_is_taken_back(field: Field) -> None:
    device, first = committed(field, soak=5.0)
    second = field.release(2, flip=True)
    device.host.failing = {second.digest}
    field.assign("press-1", second)

    failed(field, device, first, "update.soak")

    assert device.host.history == [first.digest, second.digest, first.digest]


def test_a_control_plane_that_is_gone_after_the_swap_brings_the_old_model_back(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    field.fault("/v1/ping", status=503)

    failed(field, device, first, "update.server-unreachable")

    assert device.host.history == [first.digest, second.digest, first.digest]


@pytest.mark.parametrize("phase", ["soaking", "reaching"])
def test_a_graceful_stop_takes_the_new_model_back_and_blames_nobody(
    field: Field, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    device, first = committed(field, soak=30.0 if phase == "soaking" else 0.0, reach=30.0)
    second = field.release(2, flip=True)
    field.assign("press-1", second)

    def stopped_meanwhile(*_: str) -> int:
        device.updater._stop.set()
        return 0

    monkeypatch.setattr(device.host, "failures", stopped_meanwhile)
    if phase == "reaching":
        monkeypatch.setattr(device.control, "reachable", stopped_meanwhile)

    failed(field, device, first, "update.interrupted")

    assert device.host.steps[-1][0] == "retry"
    assert device.updater.state.penalties == {}


def test_a_first_bundle_that_fails_leaves_a_device_that_serves_nothing(field: Field) -> None:
    device = field.device()
    first = field.release(1)
    device.host.failing = {first.digest}
    field.assign("press-1", first)

    device.look()

    assert device.host.history == [None, first.digest, None]
    assert device.updater.state.current is None
    assert field.boot(device.identity).host.history == [None]


def test_an_error_nobody_thought_of_ends_the_attempt_and_not_all_updates(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    with monkeypatch.context() as patched:
        patched.setattr(device.host, "check_compatible", lambda _: 1 / 0)
        failed(field, device, first, "update.swap")

    device.look()

    assert device.host.serving == second.digest


# The penalty box ------------------------------------------------------------------------------------------------------


def test_a_bundle_that_failed_three_times_waits_a_day_and_is_tried_again_after_it(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, first = committed(field)
    bad = field.release(2, golden_shift=0.01)
    field.assign("press-1", bad)
    for _ in range(5):
        device.look()

    assert [s for s in device.host.steps if s[0] == "failed"] == [("failed", "update.golden")] * 3
    assert len(field.server.asked(r"2\.tar\.zst")) == 1  # what was verified once is kept
    assert device.host.serving == first.digest

    # While it waits, the server is not asked for the same envelope again and again; when its time is over, it is.
    seen = len(field.server.asked("metadata"))
    device.look()
    assert len(field.server.asked("metadata")) == seen
    tomorrow = time.time() + m.PENALTY_SECONDS + 60
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    device.look()
    assert [s for s in device.host.steps if s[0] == "failed"] == [("failed", "update.golden")] * 4


def test_another_bundle_is_not_held_up_by_the_one_in_the_box(field: Field) -> None:
    device, _ = committed(field)
    field.assign("press-1", field.release(2, golden_shift=0.01))
    for _ in range(3):
        device.look()
    third = field.release(3, flip=True)
    field.assign("press-1", third)

    device.look()

    assert device.host.serving == third.digest


# The disk -------------------------------------------------------------------------------------------------------------


def full_from(monkeypatch: pytest.MonkeyPatch, part: str, number: int = errno.ENOSPC) -> None:
    """No byte goes into files below a folder, or of a name, that contains `part`."""
    really = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if part in str(path) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(number, os.strerror(number), str(path))
        return really(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_bundle_keeps_the_old_model_and_no_debris(
    field: Field, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    with monkeypatch.context() as patched:
        full_from(patched, "/bundles/", number)
        failed(field, device, first, "storage.full" if number == errno.ENOSPC else "storage.unwritable")
    assert list(device.updater.store.staging.iterdir()) == []

    device.look()

    assert device.host.serving == second.digest


def test_a_disk_that_takes_no_state_starts_no_update_and_says_why(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    with monkeypatch.context() as patched:
        full_from(patched, "update.json")
        refused(field, device, first, "storage.full")

    assert device.look() == ""
    assert device.host.serving == second.digest


@pytest.mark.parametrize("phase", ["trying", "swapped", "reaching", "idle"])
def test_a_disk_that_fills_up_before_any_step_takes_the_attempt_back(
    field: Field, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    really = device.updater._file.save

    def save(state: m.UpdateState) -> None:
        if state.phase == phase:
            with monkeypatch.context() as patched:
                full_from(patched, "update.json")
                really(state)
        really(state)

    with monkeypatch.context() as patched:
        patched.setattr(device.updater._file, "save", save)
        device.look()

    assert device.host.serving == first.digest
    assert device.updater.state.phase == "idle"
    assert device.updater.state.current is not None
    assert device.updater.state.current.sha256 == first.digest
    assert device.host.steps[-1] == ("failed", "storage.full")
    assert field.boot(device.identity).host.serving == first.digest
    # With space again, the next look succeeds.
    device.look()
    assert device.host.serving == second.digest


def test_a_full_disk_at_start_still_serves(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    device, first = committed(field)
    state = StateFile(device.folder).load()
    assert state.current is not None
    cut = msgspec.structs.replace(state, phase="swapped", candidate=state.current)
    StateFile(device.folder).save(cut)
    full_from(monkeypatch, "update.json")

    assert field.boot(device.identity).host.serving == first.digest


def test_a_bundle_altered_on_disk_is_not_served_and_is_brought_anew(field: Field) -> None:
    device, first = committed(field)
    device.updater.store.path(first.digest).write_bytes(b"altered")

    restarted = field.boot(device.identity)

    assert restarted.host.history == [None]
    assert restarted.look() == ""
    assert restarted.host.serving == first.digest
    assert restarted.updater.state.floor == 1


def test_an_altered_bundle_falls_back_to_the_one_before_it_until_it_is_here_again(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    device.look()
    device.updater.store.path(second.digest).unlink()

    restarted = field.boot(device.identity)

    assert restarted.host.serving == first.digest
    restarted.look()
    assert restarted.host.serving == second.digest


@pytest.mark.parametrize("content", [b"", b"{", b'{"phase": "dancing"}', b"\xff"])
def test_a_state_file_of_nonsense_is_set_aside_and_what_was_committed_serves_on(field: Field, content: bytes) -> None:
    device, first = committed(field)
    before = device.updater.state
    path: Path = device.folder / "update.json"
    path.write_bytes(content)

    restarted = field.boot(device.identity)

    assert restarted.updater.state == before
    assert restarted.host.serving == first.digest
    assert path.with_name("update.json.broken").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"[]"])
def test_with_the_copy_lost_as_well_the_device_begins_anew(field: Field, content: bytes) -> None:
    device, first = committed(field)
    for name in ("update.json", "committed.json"):
        (device.folder / name).write_bytes(content)

    restarted = field.boot(device.identity)

    assert restarted.host.serving is None
    restarted.look()
    assert restarted.host.serving == first.digest
