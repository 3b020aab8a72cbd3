"""Every attack on signed metadata: a code that names it, and a device on which nothing changed."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.agent.update.ground import NEW, OLD, Ground, open_ground
from tests.conformance.simulator import Answer
from tuf.ngclient.fetcher import FetcherInterface

from lightship_agent.contract.codes import LightshipError
from lightship_agent.contract.transport import TRANSPORT_SUFFIX, delta_path
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.update.check import ServerSource, check_in_child
from lightship_agent.update.metadata_fetcher import MetadataFetcher, Patience
from lightship_agent.update.releases import Releases

DAY = 86_400.0
cut = pytest.mark.parametrize("cache", ["kept", "empty"])


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    """A device that has seen the repository as it was when bundle 1 was released, before bundle 2 is."""
    with open_ground(tmp_path) as opened:
        opened.accepted(opened.sign(opened.assignment(OLD, b"old")))
        yield opened


def empty_the_cache(ground: Ground) -> None:
    """What a power cut leaves of files that nobody synced."""
    for path in (ground.folder / "tuf").rglob("*.json"):
        if not path.is_symlink():
            path.write_bytes(b"")


def test_the_honest_repository_is_believed(ground: Ground) -> None:
    ground.publish_new()
    reply = ground.accepted()
    assert reply.bundle.path == NEW
    assert reply.bundle.sha256 == sha256_hex(b"new")
    assert reply.transport.path == NEW + TRANSPORT_SUFFIX
    assert reply.transport.url_path == f"bundles/pump/{sha256_hex(b'packed new')}.2.tar.zst"


# Signatures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "releases"])
def test_unsigned(ground: Ground, role: str) -> None:
    ground.release(NEW, b"new")
    ground.repository.signers[role] = []
    ground.repository.update("releases")
    assert ground.refused() == "trust.signature"


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "releases"])
def test_signed_with_the_wrong_key(ground: Ground, role: str) -> None:
    ground.release(NEW, b"new")
    ground.repository.signers[role] = [ground.repository.new_signer()]
    ground.repository.update("releases")
    assert ground.refused() == "trust.signature"


def test_under_the_threshold(ground: Ground) -> None:
    """Two must release; one has been talked into it."""
    repository = ground.repository
    delegations = repository.targets().delegations
    assert delegations is not None
    assert delegations.roles is not None
    second = repository.new_signer()
    repository.targets().add_key(second.public_key, "releases")
    delegations.roles["releases"].threshold = 2
    repository.signers["releases"].append(second)
    repository.update("releases")
    assert ground.accepted(ground.sign(ground.assignment(OLD, b"old"))).bundle.path == OLD
    repository.signers["releases"].pop()
    ground.publish_new()
    assert ground.refused() == "trust.signature"


def test_a_stolen_release_key_is_worth_nothing_once_it_is_revoked(ground: Ground) -> None:
    repository = ground.repository
    stolen = repository.signers["releases"]
    delegations = repository.targets().delegations
    assert delegations is not None
    assert delegations.roles is not None
    delegations.roles["releases"].keyids = []
    fresh = repository.new_signer()
    repository.targets().add_key(fresh.public_key, "releases")
    repository.signers["releases"] = [fresh]
    repository.update("releases")
    assert ground.accepted(ground.sign(ground.assignment(OLD, b"old"))).bundle.path == OLD
    repository.signers["releases"] = stolen
    ground.publish_new()
    assert ground.refused() == "trust.signature"


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_stolen_top_level_key_is_worth_nothing_once_it_is_revoked(ground: Ground, role: str) -> None:
    stolen = ground.repository.signers[role]
    ground.repository.rotate(role)
    ground.repository.update()
    assert ground.accepted(ground.sign(ground.assignment(OLD, b"old"))).bundle.path == OLD
    ground.repository.signers[role] = stolen
    ground.release(NEW, b"new")
    ground.repository.update("releases")
    assert ground.refused() == "trust.signature"


# Freshness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets", "releases"])
def test_expired(ground: Ground, role: str) -> None:
    ground.release(NEW, b"new")
    ground.repository.metadata[role].signed.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    ground.repository.update("releases")
    if role == "root":
        ground.repository.publish("root")
    assert ground.refused() == "trust.expired"


def test_frozen(ground: Ground) -> None:
    """Everything is genuine, and a month old: somebody withholds what is newer."""
    later = time.time() + 31 * DAY
    envelope = ground.sign(ground.assignment(OLD, b"old", expires=int(later + DAY)))
    assert ground.refused(envelope, now=later) == "trust.expired"


@cut
def test_rolled_back(ground: Ground, cache: str) -> None:
    ground.publish_new()
    ground.accepted()
    ground.repository.lie("timestamp", Answer(200, ground.repository.published["timestamp"][-2][1]))
    if cache == "empty":
        empty_the_cache(ground)
    assert ground.refused(ground.sign(ground.assignment(OLD, b"old"))) == "trust.rollback"
    ground.repository.lies.clear()
    assert ground.accepted().bundle.path == NEW


@cut
def test_fast_forwarded_and_recovered_from(ground: Ground, cache: str) -> None:
    """A thief of the online keys drives the versions to the sky; new keys bring the device back."""
    repository = ground.repository
    repository.publish("snapshot", "timestamp", version=2**31)
    ground.accepted(ground.sign(ground.assignment(OLD, b"old")))
    ground.release(NEW, b"new")
    repository.publish("releases", version=3)
    repository.publish("snapshot", "timestamp", version=4)
    if cache == "empty":
        empty_the_cache(ground)
    assert ground.refused() == "trust.rollback"

    repository.rotate("snapshot", "timestamp")
    repository.publish("snapshot", "timestamp", version=5)

    assert ground.accepted().bundle.path == NEW


@pytest.mark.parametrize("role", ["snapshot", "releases"])
def test_mix_and_match(ground: Ground, role: str) -> None:
    old = ground.repository.published[role][-1][1]
    ground.publish_new()
    version = ground.repository.version(role)
    ground.repository.lie(rf"{version}\.{role}\.json", Answer(200, old))
    assert ground.refused() == "trust.rollback"


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets", "releases"])
def test_endless_data(ground: Ground, role: str) -> None:
    ground.release(NEW, b"new")
    ground.repository.update("releases")
    chunk = b"{" + b" " * 65_535

    def stream(out: Any) -> None:
        for _ in range(1_000):
            out.write(chunk)

    ground.repository.lie(rf"(\d\.)?{role}\.json", Answer(stream=stream))
    assert ground.refused() == "trust.digest"


def test_slow_drip(ground: Ground) -> None:
    def stream(out: Any) -> None:
        for _ in range(600):
            out.write(b" ")
            out.flush()
            time.sleep(0.05)

    ground.repository.lie("timestamp", Answer(stream=stream))
    began = time.monotonic()
    with httpx.Client() as http:
        assert code_of(ground, MetadataFetcher(http, Patience(seconds=0.5))) == "link.slow"
        assert code_of(ground, MetadataFetcher(http, Patience(seconds=30, minimum_rate=500, grace=0.5))) == "link.slow"
    assert time.monotonic() - began < 10


def test_a_server_that_accepts_and_says_nothing(ground: Ground) -> None:
    ground.repository.lie("timestamp", Answer(stream=lambda _: time.sleep(2.0), headers={"Content-Length": "10"}))
    with httpx.Client(timeout=0.3) as http:
        assert code_of(ground, MetadataFetcher(http)) == "link.slow"


def code_of(ground: Ground, source: FetcherInterface) -> str:
    root = (ground.folder / "identity" / "tuf-root.json").read_bytes()
    before = ground.on_disk()
    with pytest.raises(LightshipError) as refusal:
        Releases(ground.folder / "tuf", source, ground.url, root)
    assert ground.on_disk() == before
    return refusal.value.code


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "releases"])
def test_truncation(ground: Ground, role: str) -> None:
    ground.publish_new()
    data = ground.repository.published[role][-1][1]

    def stream(out: Any) -> None:
        out.write(data[:100])

    ground.repository.lie(rf"{role}\.json", Answer(stream=stream, headers={"Content-Length": str(len(data))}))
    assert ground.refused() == "link.unreachable"


@pytest.mark.parametrize("role", ["snapshot", "releases"])
def test_wrong_bytes(ground: Ground, role: str) -> None:
    ground.repository.hashes = True
    ground.publish_new()
    data = ground.repository.published[role][-1][1]
    ground.repository.lie(rf"{role}\.json", Answer(200, data.replace(b'"_type"', b' "_type"')[: len(data)]))
    assert ground.refused() == "trust.digest"


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 7_000,
        b'{"a":' * 1_500,
        b'{"signed": {"_type": "timestamp", "version": ' + b"9" * 7_000 + b'}, "signatures": []}',
        b'{"signatures": [], "signed": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
        b"{" + b'"a": 1e999,' * 500 + b'"signed": NaN}',
        b"<html>Welcome to our hotel's network</html>",
        b"\x00" * 5_000,
    ],
)
def test_json_bomb(ground: Ground, bomb: bytes) -> None:
    ground.repository.lie("timestamp", Answer(200, bomb))
    assert ground.refused() == "trust.metadata"


def test_a_deeply_nested_field_that_is_properly_signed_is_no_bomb_either(ground: Ground) -> None:
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    ground.repository.timestamp.unrecognized_fields["later"] = deep
    ground.publish_new()
    assert ground.accepted().bundle.path == NEW


def test_compressed_metadata_is_not_inflated(ground: Ground) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    ground.repository.lie("timestamp", Answer(200, bomb, headers={"Content-Encoding": "gzip"}))
    assert ground.refused() == "link.unreachable"


@pytest.mark.parametrize("status", [204, 301, 307, 403, 404, 500, 503])
def test_a_status_that_is_no_answer(ground: Ground, status: int) -> None:
    ground.repository.lie("timestamp", Answer(status, headers={"Location": ground.url + "1.root.json"}))
    assert ground.refused() == "link.unreachable"


def test_nobody_there(ground: Ground) -> None:
    assert ground.refused(source=ServerSource(metadata_url="http://127.0.0.1:1/metadata/")) == "link.unreachable"


# Assignments ----------------------------------------------------------------------------------------------------------


def test_a_revoked_release_is_refused_though_the_director_assigns_it(ground: Ground) -> None:
    ground.publish_new()
    ground.accepted()
    del ground.repository.targets("releases").targets[NEW]
    ground.repository.publish("releases", "snapshot", "timestamp")
    assert ground.refused() == "trust.not-released"


def test_a_stolen_director_key_can_only_choose_among_the_released(ground: Ground) -> None:
    ground.publish_new()
    for stolen in (
        ground.assignment("bundles/pump/66.tar", b"malware"),  # not released
        ground.assignment(NEW, b"malware"),  # released, but with other bytes
        ground.assignment(NEW, b"new", length=4),
        ground.assignment("../../etc/passwd", b"new"),
        ground.assignment("targets.json", b"new"),
    ):
        assert ground.refused(ground.sign(stolen)) == "trust.not-released"
    assert ground.accepted().bundle.path == NEW


def test_an_assignment_by_anybody_else_is_refused(ground: Ground) -> None:
    ground.publish_new()
    others = [ground.repository.new_signer(), *(s[0] for r, s in ground.repository.signers.items() if r != "director")]
    for signer in others:
        assert ground.refused(ground.sign(ground.assignment(), signer)) == "trust.signature"


def test_a_revoked_director_is_refused(ground: Ground) -> None:
    ground.publish_new()
    stolen = ground.repository.signers["director"][0]
    delegations = ground.repository.targets().delegations
    assert delegations is not None
    assert delegations.roles is not None
    delegations.roles["director"].keyids = []
    fresh = ground.repository.new_signer()
    ground.repository.targets().add_key(fresh.public_key, "director")
    ground.repository.update()
    assert ground.refused(ground.sign(ground.assignment(), stolen)) == "trust.signature"
    assert ground.accepted(ground.sign(ground.assignment(), fresh)).bundle.path == NEW


def test_foreign_replayed_and_expired_assignments_are_refused(ground: Ground) -> None:
    ground.publish_new()
    assert ground.refused(ground.sign(ground.assignment(device="press-2"))) == "trust.foreign"
    assert ground.refused(ground.sign(ground.assignment(seq=4)), floor=5) == "trust.rollback"
    assert ground.refused(ground.sign(ground.assignment(expires=int(time.time()) - 5))) == "trust.expired"
    early = ground.sign(ground.assignment(expires=int(time.time() + DAY)))
    assert ground.refused(early, now=time.time() + 2 * DAY) == "trust.expired"


@pytest.mark.parametrize(
    "envelope",
    [
        b"",
        b"null",
        b"{}",
        b"[" * 10_000,
        b"\xff",
        b" " * 20_000,
        b'{"payload": 5, "payloadType": "x", "signatures": []}',
        b'{"payload": "", "payloadType": "application/vnd.lightship.assignment+json", "signatures": [{}]}',
    ],
)
def test_what_is_no_envelope_is_refused(ground: Ground, envelope: bytes) -> None:
    assert ground.refused(envelope) == "trust.metadata"


def test_a_payload_of_another_type_is_refused(ground: Ground) -> None:
    ground.publish_new()
    envelope = json.loads(ground.sign(ground.assignment()))
    envelope["payloadType"] = "application/vnd.in-toto+json"
    assert ground.refused(json.dumps(envelope).encode()) == "trust.metadata"


def test_a_release_without_its_transport_file_is_refused(ground: Ground) -> None:
    ground.release(NEW, b"new")
    del ground.repository.targets("releases").targets[NEW + TRANSPORT_SUFFIX]
    ground.repository.publish("releases", "snapshot", "timestamp")
    assert ground.refused() == "trust.not-released"


# Deltas, bins, the folder ---------------------------------------------------------------------------------------------


def test_a_released_patch_from_what_is_here_is_named(ground: Ground) -> None:
    old, new = sha256_hex(b"old"), sha256_hex(b"new")
    path = delta_path("pump", old, new)
    ground.repository.add(path, b"patch", "releases")
    ground.publish_new()
    delta = ground.accepted(current_sha256=old).delta
    assert delta is not None
    assert (delta.path, delta.sha256, delta.length) == (path, sha256_hex(b"patch"), 5)
    assert ground.accepted(current_sha256=new).delta is None
    assert ground.accepted(current_sha256="f" * 64).delta is None
    assert ground.accepted().delta is None


def test_releases_in_bins_are_found(ground: Ground) -> None:
    repository = ground.repository
    bins = repository.bins("releases", 6, "releases-")
    for path, data in ((NEW, b"new"), (NEW + TRANSPORT_SUFFIX, b"packed")):
        where = bins[int(sha256_hex(path.encode())[:8], 16) >> 26]
        repository.add(path, data, where)
    repository.update("releases", *bins)
    assert ground.accepted().transport.length == 6


def test_two_looks_at_one_folder_take_turns(ground: Ground) -> None:
    ground.publish_new()
    root = (ground.folder / "identity" / "tuf-root.json").read_bytes()
    with httpx.Client() as http:
        first = Releases(ground.folder / "tuf", http, ground.url, root)
        second = Releases(ground.folder / "tuf", http, ground.url, root)
        assert first.find(NEW) == second.find(NEW)
        with first._exclusive(), pytest.raises(LightshipError) as refusal:
            Releases(ground.folder / "tuf", http, ground.url, root, lock_seconds=0.1)
    assert refusal.value.code == "storage.busy"


def test_a_folder_that_cannot_be_made_is_an_error_with_a_code(ground: Ground) -> None:
    (ground.folder / "file").write_bytes(b"")
    with httpx.Client() as http, pytest.raises(LightshipError) as refusal:
        Releases(ground.folder / "file" / "tuf", http, ground.url, b"")
    assert refusal.value.code == "storage.unwritable"


@pytest.mark.parametrize("root", [b"", b"{}", b"[" * 60_000])
def test_a_pinned_root_that_is_none_is_an_error_with_a_code(ground: Ground, root: bytes) -> None:
    with httpx.Client() as http, pytest.raises(LightshipError) as refusal:
        Releases(ground.folder / "tuf", http, ground.url, root)
    assert refusal.value.code == "trust.metadata"


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_the_cache_is_durable_when_a_look_is_over(ground: Ground, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """Every file that the client renamed into place was synced, and the folder after it."""
    synced: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    ground.publish_new()
    cache = ground.folder / "tuf"
    if ends == "well":
        ground.accepted()
        assert {cache / f"{role}.json" for role in ("snapshot", "releases")} <= set(synced)
    else:
        ground.repository.lie("snapshot", Answer(404))
        assert ground.refused() == "link.unreachable"
    assert cache / "timestamp.json" in synced
    assert cache in synced


def test_an_attack_has_the_same_name_when_a_child_meets_it(ground: Ground) -> None:
    ground.publish_new()
    assert check_in_child(ground.request()).bundle.path == NEW
    ground.repository.lie("timestamp", Answer(200, ground.repository.published["timestamp"][0][1]))
    empty_the_cache(ground)
    assert ground.refused(by=check_in_child) == "trust.rollback"
    assert ground.refused(b"{}", by=check_in_child) == "trust.rollback"
    ground.repository.lies.clear()
    assert ground.refused(b"{}", by=check_in_child) == "trust.metadata"
    assert ground.refused(ground.sign(ground.assignment(device="press-2")), by=check_in_child) == "trust.foreign"
