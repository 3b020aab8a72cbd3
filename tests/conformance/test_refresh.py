"""Refreshing the top-level roles: order, persistence, signatures, expiry, formats (specification 5.3 to 5.6)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.conformance.conftest import Client
from tests.conformance.simulator import TOP, Answer, Repository

Make = Callable[[Repository], Client]
ALL_AT_1 = {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}
#: The order in which roles are verified, and so what is kept when the named one fails.
KEPT_BEFORE = {"timestamp": {"root"}, "snapshot": {"root", "timestamp"}, "targets": {"root", "timestamp", "snapshot"}}


def test_init_trusts_the_root_and_asks_for_nothing(client_of: Make) -> None:
    client = client_of(Repository())
    assert client.trusted == {"root": 1}
    assert client.asked == []


def test_the_first_refresh_asks_for_each_role_once_and_in_order(client_of: Make) -> None:
    client = client_of(Repository())
    assert client.refresh() == 0
    assert client.asked == ["2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"]
    assert client.trusted == ALL_AT_1


def test_a_refresh_with_nothing_new_asks_for_a_root_and_the_timestamp_only(client_of: Make) -> None:
    client = client_of(Repository())
    client.refresh()
    assert client.refresh() == 0
    assert client.asked == ["2.root.json", "timestamp.json"]


def test_without_consistent_snapshots_only_roots_are_asked_for_by_version(client_of: Make) -> None:
    client = client_of(Repository(consistent=False))
    assert client.refresh() == 0
    assert client.asked == ["2.root.json", "timestamp.json", "snapshot.json", "targets.json"]
    assert client.trusted == ALL_AT_1


def test_consistent_snapshots_may_be_switched_on_by_a_root(client_of: Make) -> None:
    repository = Repository(consistent=False)
    client = client_of(repository)
    client.refresh()
    repository.root.consistent_snapshot = True
    repository.publish("root")
    repository.update()
    assert client.refresh() == 0
    assert client.asked == ["2.root.json", "3.root.json", "timestamp.json", "2.snapshot.json", "2.targets.json"]


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa", "rsa-pkcs1v15"])
def test_every_kind_of_key_is_understood(client_of: Make, kind: str) -> None:
    repository = Repository(kind=kind)
    client = client_of(repository)
    assert client.refresh() == 0
    repository.rotate(*TOP)
    repository.update()
    assert client.trusted == ALL_AT_1
    # The new root needs the old keys' word as well.
    assert client.refresh() == 1


@pytest.mark.parametrize("old", ["ed25519", "ecdsa", "rsa"])
@pytest.mark.parametrize("new", ["ed25519", "ecdsa", "rsa"])
def test_a_role_may_change_its_kind_of_key(client_of: Make, old: str, new: str) -> None:
    repository = Repository(kind=old)
    client = client_of(repository)
    client.refresh()
    repository.kind = new
    repository.rotate("targets", "snapshot", "timestamp")
    repository.update()
    assert client.refresh() == 0
    assert client.trusted == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2}


@pytest.mark.parametrize("damage", ["version", "roles", "keys", "expires", "_type"])
def test_an_initial_root_without_a_field_is_refused_before_anything_is_asked_for(client_of: Make, damage: str) -> None:
    repository = Repository()
    client = client_of(repository)
    root = json.loads(repository.published["root"][0][1])
    del root["signed"][damage]
    client.init(json.dumps(root).encode())
    assert client.refresh() == 1
    assert client.asked == []


def test_an_initial_root_with_a_wrong_signature_is_refused_before_anything_is_asked_for(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    root = json.loads(repository.published["root"][0][1])
    root["signatures"][0]["sig"] = "00" * 64
    client.init(json.dumps(root).encode())
    assert client.refresh() == 1
    assert client.asked == []


def test_fields_that_nobody_knows_are_kept_and_signed_for(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    repository.root.unrecognized_fields["later"] = {"a": [1, 2]}
    repository.root.roles["root"].unrecognized_fields["later"] = "yes"
    key = repository.root.keys[repository.root.roles["root"].keyids[0]]
    key.unrecognized_fields["keyid_hash_algorithms"] = ["md5"]
    repository.publish("root")
    for role in ("targets", "snapshot", "timestamp"):
        repository.metadata[role].signed.unrecognized_fields["later"] = 1
    repository.update()
    assert client.refresh() == 0
    assert client.trusted == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2}


def test_metadata_is_kept_byte_for_byte(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    for role in TOP:
        assert (client.metadata / f"{role}.json").read_bytes() == repository.published[role][-1][1]


# Signatures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_role_without_a_signature_ends_the_first_refresh_there(client_of: Make, role: str) -> None:
    repository = Repository()
    repository.signers[role] = []
    repository.update()
    client = client_of(repository)
    assert client.refresh() == 1
    assert client.trusted.keys() == KEPT_BEFORE[role]


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_role_signed_by_a_foreign_key_ends_the_refresh_there(client_of: Make, role: str) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    repository.signers[role] = [repository.new_signer()]
    repository.update()
    assert client.refresh() == 1
    assert client.trusted[role] == 1


def test_an_unsigned_root_is_not_taken(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    repository.signers["root"] = []
    repository.publish("root")
    assert client.refresh() == 1
    assert client.trusted == {"root": 1}


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_content_that_changed_after_signing_is_refused(client_of: Make, role: str) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    repository.update()
    version, data = repository.published[role][-1]
    changed = json.loads(data)
    changed["signed"]["x-later"] = "slipped in"
    repository.published[role][-1] = (version, json.dumps(changed).encode())
    assert client.refresh() == 1
    assert client.trusted[role] == 1


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_one_role_served_as_another_is_refused(client_of: Make, role: str) -> None:
    repository = Repository()
    client = client_of(repository)
    repository.lie(rf"metadata/(1\.)?{role}\.json$", Answer(200, repository.published["root"][0][1]))
    assert client.refresh() == 1
    assert client.trusted.keys() == KEPT_BEFORE[role]


# Expiry ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_an_expired_role_is_not_taken(client_of: Make, role: str) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    repository.metadata[role].signed.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(days=5)
    repository.update()
    assert client.refresh() == 1
    assert client.trusted[role] == 1


def test_an_expired_root_is_kept_and_ends_the_refresh(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    repository.root.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    repository.publish("root")
    repository.update()
    assert client.refresh() == 1
    assert client.trusted == {**ALL_AT_1, "root": 2}


def test_an_expired_root_on_the_way_to_a_fresh_one_does_not_matter(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    repository.root.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    repository.publish("root")
    repository.root.expires = repository.expiry()
    repository.publish("root")
    assert client.refresh() == 0
    assert client.trusted["root"] == 3


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_kept_role_that_has_expired_since_is_no_longer_enough(client_of: Make, role: str) -> None:
    repository = Repository()
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
    repository.metadata[role].signed.expires = expires
    repository.update()
    client = client_of(repository)
    assert client.refresh() == 0
    time.sleep(max(0.0, (expires - datetime.now(UTC)).total_seconds()) + 0.1)
    assert client.refresh() == 1


def test_kept_roles_that_have_expired_are_a_start_for_fresh_ones(client_of: Make) -> None:
    repository = Repository()
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
    for role in ("timestamp", "snapshot", "targets"):
        repository.metadata[role].signed.expires = expires
    repository.update()
    client = client_of(repository)
    assert client.refresh() == 0
    for role in ("timestamp", "snapshot", "targets"):
        repository.metadata[role].signed.expires = repository.expiry()
    repository.update()
    time.sleep(max(0.0, (expires - datetime.now(UTC)).total_seconds()) + 0.1)
    assert client.refresh() == 0
    assert client.trusted == {"root": 1, "timestamp": 3, "snapshot": 3, "targets": 3}


# Lengths and hashes ---------------------------------------------------------------------------------------------------


def test_lengths_and_hashes_of_metadata_are_optional_and_may_be_given(client_of: Make) -> None:
    repository = Repository(hashes=True)
    client = client_of(repository)
    assert client.refresh() == 0
    repository.update()
    assert client.refresh() == 0
    assert client.trusted["targets"] == 2


@pytest.mark.parametrize("wrong", ["hash", "length"])
def test_targets_that_are_not_what_snapshot_says_are_refused(client_of: Make, wrong: str) -> None:
    repository = Repository(hashes=True)
    client = client_of(repository)
    client.refresh()
    repository.publish("targets")
    spoil(repository.snapshot.meta["targets.json"], wrong)
    repository.publish("snapshot", "timestamp")
    assert client.refresh() == 1
    assert (client.trusted["snapshot"], client.trusted["targets"]) == (2, 1)


@pytest.mark.parametrize("wrong", ["hash", "length"])
def test_a_snapshot_that_is_not_what_timestamp_says_is_refused(client_of: Make, wrong: str) -> None:
    repository = Repository(hashes=True)
    client = client_of(repository)
    client.refresh()
    repository.publish("targets", "snapshot")
    spoil(repository.timestamp.snapshot_meta, wrong)
    repository.publish("timestamp")
    assert client.refresh() == 1
    assert (client.trusted["timestamp"], client.trusted["snapshot"]) == (2, 1)


def spoil(meta: Any, wrong: str) -> None:
    if wrong == "hash":
        meta.hashes["sha256"] = "0" * 64
    else:
        meta.length -= 1


# Versions that do not fit ---------------------------------------------------------------------------------------------


def test_a_new_targets_version_that_no_snapshot_lists_is_not_asked_for(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    repository.publish("targets")
    assert client.refresh() == 0
    assert client.asked == ["2.root.json", "timestamp.json"]
    assert client.trusted["targets"] == 1


def test_a_timestamp_of_the_same_version_with_other_content_is_not_taken(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    repository.timestamp.snapshot_meta.version = 100
    repository.publish("timestamp", version=1)
    assert client.refresh() == 0
    assert client.asked[-1] == "timestamp.json"
    assert (
        json.loads((client.metadata / "timestamp.json").read_bytes())["signed"]["meta"]["snapshot.json"]["version"] == 1
    )


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_a_role_that_has_another_version_than_is_listed_is_refused(client_of: Make, role: str) -> None:
    repository = Repository()
    repository.update()
    other = repository.published[role][0][1]
    repository.lie(rf"metadata/2\.{role}\.json$", Answer(200, other))
    client = client_of(repository)
    assert client.refresh() == 1
    assert client.trusted.keys() == KEPT_BEFORE[role]


def test_a_root_that_skips_a_version_is_refused(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    repository.publish("root", version=3)
    repository.lie(r"metadata/2\.root\.json$", Answer(200, repository.published["root"][-1][1]))
    assert client.refresh() == 1
    assert client.trusted == {"root": 1}


def test_the_same_root_again_as_the_next_is_refused(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    repository.lie(r"metadata/2\.root\.json$", Answer(200, repository.published["root"][0][1]))
    assert client.refresh() == 1
    assert client.trusted == {"root": 1}


def test_many_roots_are_walked_through_and_not_asked_for_again(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    for _ in range(40):
        repository.publish("root")
    assert client.refresh() == 0
    assert client.trusted["root"] == 41
    assert client.refresh() == 0
    assert client.asked == ["42.root.json", "timestamp.json"]


# Answers that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 404])
def test_no_next_root_means_that_this_is_the_newest(client_of: Make, status: int) -> None:
    repository = Repository()
    repository.lie(r"metadata/2\.root\.json$", Answer(status))
    assert client_of(repository).refresh() == 0


@pytest.mark.parametrize("status", [204, 301, 302, 400, 410, 429, 500, 503])
def test_any_other_answer_to_the_next_root_ends_the_refresh(client_of: Make, status: int) -> None:
    repository = Repository()
    repository.lie(r"metadata/2\.root\.json$", Answer(status, headers={"Location": "/0/metadata/1.root.json"}))
    client = client_of(repository)
    assert client.refresh() == 1
    assert client.asked == ["2.root.json"]


@pytest.mark.parametrize("status", [301, 403, 404, 500])
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_role_that_does_not_come_ends_the_refresh(client_of: Make, role: str, status: int) -> None:
    repository = Repository()
    repository.lie(rf"metadata/(1\.)?{role}\.json$", Answer(status, headers={"Location": "/"}))
    client = client_of(repository)
    assert client.refresh() == 1
    assert client.trusted.keys() == KEPT_BEFORE[role]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"{}", b'{"signed": {}, "signatures": []}', b"\xff\xfe", b"[" * 9_000]
)
@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_what_is_not_metadata_is_refused(client_of: Make, role: str, body: bytes) -> None:
    repository = Repository()
    repository.lie(rf"metadata/(\d\.)?{role}\.json$", Answer(200, body))
    client = client_of(repository)
    assert client.refresh() == 1
    assert client.trusted.keys() == KEPT_BEFORE.get(role, {"root"})


def test_a_refresh_without_init_fails(client_of: Make, tmp_path: Path) -> None:
    client = client_of(Repository())
    client.metadata = tmp_path / "another"
    assert client.refresh() == 1
    assert client.asked == []
