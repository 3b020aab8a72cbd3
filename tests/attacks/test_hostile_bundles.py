"""Correctly signed, and meant to harm: the release key's holder is malicious, or was fooled.

Every row is a release that the genuine keys signed and the director assigned. Whatever is in it, afterwards the same
model answers, the state says what it said, the store holds what it held, and nothing lies about.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd
from tests.agent.conftest import build, training_rows
from tests.agent.link import field as fields
from tests.agent.link.field import Device, Field, RecordingHost, open_field
from tests.attacks import hostile
from tuf.api.metadata import Metadata, TargetFile, Targets

from lightship.home import Home
from lightship.release.repository import RELEASES
from lightship.storage.models import ModelVersion
from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.transport import TRANSPORT_SUFFIX, pack_transport
from lightship_agent.runtime.model import LoadedModel, load_model
from lightship_agent.update import machine as m
from lightship_agent.update.store import BundleStore, StateFile

#: What any look at the server may renew, and what an attempt may write about itself.
LIVING = ("tuf/", "update.json", "committed.json")
ROWS = training_rows(5)


class AnsweringHost(RecordingHost):
    """An agent that keeps the model it was told to serve, and answers with it."""

    def __init__(self) -> None:
        super().__init__()
        self.model: LoadedModel | None = None
        self.words = ""  # of the last report

    def serve(self, bundle: Bundle) -> None:
        super().serve(bundle)
        self.model = load_model(bundle)

    def report(self, action: m.Report) -> None:
        super().report(action)
        self.words = f"{action.code}: {action.detail}"

    def serve_nothing(self) -> None:
        super().serve_nothing()
        self.model = None


@dataclass
class Victim:
    """A device that serves version 1, and what it was like before anybody did anything."""

    field: Field
    device: Device
    first: ModelVersion
    scores: Any
    temporary: Path
    released: int = 1

    def release(self, bundle: bytes) -> ModelVersion:
        """Signed by the release key, at a path of its own."""
        self.released += 1
        return self.field.release(2, bundle, name=f"pump-{self.released}")

    def assign(self, version: ModelVersion) -> None:
        """Signed by the director, as what the manifests within say: version 2 of the pump."""
        told = self.field.assignment("press-1", version, model="pump", seq=self.released)
        self.field.deliver("press-1", self.field.sign(told))

    def on_disk(self) -> dict[str, str]:
        return self.device.on_disk(*LIVING)

    def assert_nothing_changed(self, before: dict[str, str], *, but: str = "") -> None:
        """The same model, the same answers, the same files: but for a refused bundle kept to be tried again."""
        host = self.device.host
        assert isinstance(host, AnsweringHost)
        assert host.serving == self.first.digest
        assert host.model is not None
        scores = host.model.predict(ROWS).scores
        assert scores is not None
        assert np.array_equal(scores, self.scores)
        after = self.on_disk()
        after.pop(f"bundles/{but}.tar", None)
        assert after == before
        assert list(self.device.updater.store.staging.iterdir()) == []
        assert list(self.temporary.iterdir()) == []
        state = StateFile(self.device.folder).load()
        assert (state.phase, state.candidate, state.previous) == ("idle", None, None)
        assert state.current is not None
        assert state.current.sha256 == self.first.digest


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "home"
    Home.create(path).close()
    return path


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Victim]:
    folder, temporary = tmp_path_factory.mktemp("field"), tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patched, open_field(folder, home) as field:
        patched.setattr(fields, "RecordingHost", AnsweringHost)
        patched.setattr(tempfile, "tempdir", str(temporary))
        patched.setenv("TMPDIR", str(temporary))
        identity, first = field.enrolled(), field.release(1)
        seq = field.assign("press-1", first)
        target = m.Target.of(field.assignment("press-1", first, seq=seq))
        BundleStore(identity.folder.parent).put(first.digest, build(1))
        StateFile(identity.folder.parent).save(m.UpdateState(floor=seq, current=target))
        device = field.boot(identity)
        assert device.look() == ""
        host = device.host
        assert isinstance(host, AnsweringHost)
        assert host.model is not None
        yield Victim(field, device, first, host.model.predict(ROWS).scores, temporary)


def said(device: Device) -> tuple[str, str]:
    """The last step that was reported: its name and its code."""
    return device.host.steps[-1]


def attack(victim: Victim, version: ModelVersion, code: str, *, but: str = "") -> None:
    """Assign it, look, and see that nothing came of it but a report."""
    before = victim.on_disk()
    victim.assign(version)

    victim.device.look()

    assert said(victim.device) == ("failed", code)
    victim.assert_nothing_changed(before, but=but)


# The bytes of a bundle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", hostile.UNPACKED)
def test_a_signed_bundle_that_is_no_bundle_gets_nowhere(victim: Victim, what: str) -> None:
    make, code = hostile.UNPACKED[what]
    attack(victim, victim.release(make()), code)


@pytest.mark.parametrize("what", hostile.LOOKED_THROUGH)
def test_a_signed_model_that_no_device_loads_gets_nowhere(victim: Victim, what: str) -> None:
    version = victim.release(hostile.LOOKED_THROUGH[what]())
    before = victim.on_disk()
    victim.assign(version)

    victim.device.look()

    assert said(victim.device)[1] in ("bundle.graph", "update.probe-failed")
    assert isinstance(victim.device.host, AnsweringHost)
    assert "bundle.graph" in victim.device.host.words  # the trial's process reports it within its own code
    victim.assert_nothing_changed(before, but=version.digest)


@pytest.mark.parametrize("what", hostile.TRIED)
def test_a_signed_model_that_harms_is_found_out_in_its_trial(victim: Victim, what: str) -> None:
    make, code = hostile.TRIED[what]
    version = victim.release(make())
    attack(victim, version, code, but=version.digest)


# The bytes that travel ------------------------------------------------------------------------------------------------


def sign_anyway(field: Field, version: ModelVersion, packed: bytes) -> None:
    """Publish other transport bytes for a version, with the genuine release key."""
    repository = field.home.releases
    name = version.path + TRANSPORT_SUFFIX
    with repository._lock():
        releases = repository._load(RELEASES, Targets)
        repository._store_target(name, packed)
        releases.signed.targets[name] = TargetFile.from_data(name, packed, ["sha256"])
        repository._commit(releases)


def wide_frame(data: bytes) -> bytes:
    """A frame that asks its reader for a window of 128 MiB."""
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    writer = zstd.ZstdCompressor(options=options)
    return writer.compress(data) + writer.flush()


TRANSPORTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a bomb": (lambda _: zstd.compress(bytes(200_000_000), level=19), "bundle.too-large"),
    "a bomb in a hundred frames": (lambda b: zstd.compress(b) * 100, "bundle.malformed"),
    "a window larger than a device has": (wide_frame, "bundle.malformed"),
    "half a frame": (lambda b: pack_transport(b)[: len(pack_transport(b)) // 2], "bundle.malformed"),
    "a frame and a script": (lambda b: pack_transport(b) + b"#!/bin/sh\n", "bundle.malformed"),
    "a frame that only skips": (lambda _: b"\x50\x2a\x4d\x18\xff\xff\xff\x00" + bytes(100), "bundle.malformed"),
    "another bundle": (lambda _: pack_transport(build(1)), "trust.digest"),
    "the bundle uncompressed": (lambda b: b, "bundle.malformed"),
    "the bundle, one byte off": (lambda b: zstd.compress(b[:-1] + b"\x01"), "trust.digest"),
    "less than the bundle": (lambda b: zstd.compress(b[:-512]), "trust.digest"),
    "nothing": (lambda _: b"", "bundle.malformed"),
}


@pytest.mark.parametrize("what", TRANSPORTS)
def test_signed_bytes_that_do_not_hold_the_bundle_get_nowhere(victim: Victim, what: str) -> None:
    make, code = TRANSPORTS[what]
    bundle = build(100 + victim.released)  # a digest that is in no penalty box
    version = victim.release(bundle)
    sign_anyway(victim.field, version, make(bundle))
    attack(victim, version, code)


def test_wrong_bytes_on_the_server_get_nowhere(victim: Victim) -> None:
    version = victim.release(build(99))
    published = victim.field.published(version)
    published.write_bytes(published.read_bytes()[:-1] + b"\0")
    attack(victim, version, "trust.digest")


# Stolen keys of the servers -------------------------------------------------------------------------------------------


def refused(victim: Victim, code: str) -> None:
    """Look: the assignment itself is refused, and not even an attempt begins."""
    before, steps = victim.on_disk(), list(victim.device.host.steps)

    assert victim.device.look() == code

    assert victim.device.host.steps == steps
    victim.assert_nothing_changed(before)


STOLEN_DIRECTOR: dict[str, tuple[Callable[[Field, ModelVersion], bytes], str]] = {
    "names a digest that was never released": (
        lambda f, v: f.sign(f.assignment("press-1", v, seq=9_999, sha256="a" * 64)),
        "trust.not-released",
    ),
    "names a length that was never released": (
        lambda f, v: f.sign(f.assignment("press-1", v, seq=9_999, length=1)),
        "trust.not-released",
    ),
    "names a path that was never released": (
        lambda f, v: f.sign(f.assignment("press-1", v, seq=9_999, path="bundles/backdoor/1.tar")),
        "trust.not-released",
    ),
    "names another release's path for these bytes": (
        lambda f, v: f.sign(f.assignment("press-1", v, seq=9_999, path="bundles/pump/1.tar")),
        "trust.not-released",
    ),
    "names the transport file for the bundle": (
        lambda f, v: f.sign(f.assignment("press-1", v, seq=9_999, path=v.path + TRANSPORT_SUFFIX)),
        "trust.not-released",
    ),
    "names a file of the device": (
        lambda f, v: f.sign(f.assignment("press-1", v, seq=9_999, path="../../../etc/passwd")),
        "trust.not-released",
    ),
    "plays another device's assignment": (
        lambda f, v: f.sign(f.assignment("press-2", v, seq=9_999)),
        "trust.foreign",
    ),
    "plays an old assignment": (lambda f, v: f.sign(f.assignment("press-1", v, seq=0)), "trust.rollback"),
    "plays an assignment past its time": (
        lambda f, v: f.sign(f.assignment("press-1", v, seq=9_999, expires=1_000)),
        "trust.expired",
    ),
}


@pytest.mark.parametrize("what", STOLEN_DIRECTOR)
def test_whoever_stole_the_online_key_can_only_choose_among_releases(victim: Victim, what: str) -> None:
    forge, code = STOLEN_DIRECTOR[what]
    genuine = victim.field.envelope("press-1")
    version = victim.release(build(2, flip=True))
    victim.field.deliver("press-1", forge(victim.field, version))
    try:
        refused(victim, code)
    finally:
        victim.field.deliver("press-1", genuine)


def test_with_all_online_keys_stolen_a_release_list_still_needs_its_own_key(victim: Victim) -> None:
    """Timestamp, snapshot and director keys sign whatever the thief likes; the release list he forged is refused."""
    field = victim.field
    folder = field.home.releases.metadata
    kept = {path: path.read_bytes() for path in folder.glob("*.json")}
    backdoor = build(2, flip=True)
    version = victim.release(build(3))
    try:
        repository = field.home.releases
        with repository._lock():
            releases: Metadata[Targets] = repository._load(RELEASES, Targets)
            name = "bundles/backdoor/1.tar"
            releases.signed.targets[name] = TargetFile.from_data(name, backdoor, ["sha256"])
            releases.signed.version += 1
            field.home.keys.signer("snapshot")  # what the thief has; the release key is not his
            releases.sign(field.home.keys.signer("timestamp"))
            releases.to_file(str(folder / f"{releases.signed.version}.{RELEASES}.json"))
            repository._commit_snapshot(releases.signed.version)
        forged = field.assignment("press-1", version, seq=9_999, path=name)
        field.deliver("press-1", field.sign(forged))
        refused(victim, "trust.signature")
    finally:
        for path in set(folder.glob("*.json")) - set(kept):
            path.unlink()
        for path, data in kept.items():
            path.write_bytes(data)


# And afterwards -------------------------------------------------------------------------------------------------------


def test_after_all_that_the_device_serves_the_same_after_a_restart_and_takes_a_genuine_update(victim: Victim) -> None:
    field = victim.field
    restarted = field.boot(victim.device.identity)
    assert restarted.host.serving == victim.first.digest
    genuine = build(77, flip=True)
    # The thief's snapshot was newer than the honest one: the server has to go beyond it before it is believed again.
    field.release(75)
    field.release(76)
    second = field.release(77, genuine)
    field.deliver("press-1", field.sign(field.assignment("press-1", second, seq=10_000)))

    assert restarted.look() == ""

    assert restarted.host.serving == second.digest
    held = {p.name for p in restarted.updater.store.bundles.iterdir()}
    assert held == {f"{victim.first.digest}.tar", f"{second.digest}.tar"}
    written = json.loads((restarted.folder / "update.json").read_bytes())
    assert written["current"]["sha256"] == hashlib.sha256(genuine).hexdigest()
