"""Old metadata for new, versions driven to the sky, and the way back (specification 5.3.11, 5.4.3, 5.5.5)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.conformance.conftest import Client
from tests.conformance.simulator import Answer, Repository

Make = Callable[[Repository], Client]
CACHE = ("timestamp.json", "snapshot.json", "targets.json")
hashes = pytest.mark.parametrize("hashes", [False, True], ids=["plain", "hashes"])
#: What becomes of the client's cache before it looks again: nothing, a power cut before anything was synced, or worse.
lost = pytest.mark.parametrize("lost", ["kept", "empty", "gone"])


def at_three(make: Make, *, hashed: bool = False) -> tuple[Repository, Client]:
    """A repository whose roles are at version 3, and a client that has seen that."""
    repository = Repository(hashes=hashed)
    repository.update()
    repository.update()
    client = make(repository)
    assert client.refresh() == 0
    assert client.trusted == {"root": 1, "timestamp": 3, "snapshot": 3, "targets": 3}
    return repository, client


def cut(client: Client, lost: str, *names: str) -> None:
    for name in names or CACHE:
        if lost == "empty":
            (client.metadata / name).write_bytes(b"")
        elif lost == "gone":
            (client.metadata / name).unlink()


@hashes
def test_an_older_timestamp_is_refused(client_of: Make, hashes: bool) -> None:
    repository, client = at_three(client_of, hashed=hashes)
    repository.lie("timestamp", Answer(200, repository.published["timestamp"][1][1]))
    assert client.refresh() == 1
    assert client.trusted["timestamp"] == 3
    assert client.asked[-1] == "timestamp.json"


@lost
def test_the_whole_of_an_older_repository_is_refused_whatever_became_of_the_cache(client_of: Make, lost: str) -> None:
    repository, client = at_three(client_of)
    repository.lie("timestamp", Answer(200, repository.published["timestamp"][1][1]))
    cut(client, lost)
    assert client.refresh() == 1


def test_a_client_that_refused_an_old_repository_goes_on_with_the_true_one(client_of: Make) -> None:
    repository, client = at_three(client_of)
    repository.lie("timestamp", Answer(200, repository.published["timestamp"][1][1]))
    cut(client, "empty")
    assert client.refresh() == 1
    repository.lies.clear()
    assert client.refresh() == 0
    repository.update()
    assert client.refresh() == 0
    assert client.trusted == {"root": 1, "timestamp": 4, "snapshot": 4, "targets": 4}


@hashes
@lost
def test_a_new_timestamp_that_names_an_older_snapshot_is_refused(client_of: Make, hashes: bool, lost: str) -> None:
    repository, client = at_three(client_of, hashed=hashes)
    repository.publish("snapshot", version=2)
    repository.publish("timestamp")
    cut(client, lost)
    assert client.refresh() == 1
    if lost == "kept":
        assert (client.trusted["timestamp"], client.trusted["snapshot"]) == (3, 3)
        assert client.asked[-1] == "timestamp.json"


@hashes
@lost
def test_a_new_snapshot_that_names_older_targets_is_refused(client_of: Make, hashes: bool, lost: str) -> None:
    repository, client = at_three(client_of, hashed=hashes)
    repository.publish("targets", version=2)
    repository.publish("snapshot", "timestamp")
    cut(client, lost)
    assert client.refresh() == 1
    if lost == "kept":
        assert client.trusted == {"root": 1, "timestamp": 4, "snapshot": 3, "targets": 3}


@lost
def test_a_new_snapshot_that_no_longer_names_a_role_is_refused(client_of: Make, lost: str) -> None:
    repository = Repository()
    repository.delegate("targets", "role")
    repository.update("role")
    client = client_of(repository)
    assert client.refresh() == 0
    del repository.snapshot.meta["role.json"]
    repository.publish("snapshot", "timestamp")
    cut(client, lost)
    assert client.refresh() == 1


@lost
def test_an_older_delegated_role_is_refused(client_of: Make, lost: str) -> None:
    repository = Repository()
    repository.delegate("targets", "role")
    repository.add("one", b"1", "role")
    repository.update("role")
    repository.update("role")
    client = client_of(repository)
    assert client.download("one") == 0
    repository.publish("role", version=1)
    repository.publish("snapshot", "timestamp")
    cut(client, lost, *CACHE, "role.json")
    assert client.download("one") == 1


@lost
def test_an_older_root_is_refused(client_of: Make, lost: str) -> None:
    repository = Repository()
    repository.publish("root")
    client = client_of(repository)
    assert client.refresh() == 0
    repository.lie(r"metadata/2\.root\.json", Answer(404))
    cut(client, lost, *CACHE, "root_history/2.root.json")
    assert client.refresh() == (0 if lost == "kept" else 1)


def test_a_snapshot_that_goes_back_behind_an_unchanged_timestamp_is_not_even_looked_at(client_of: Make) -> None:
    repository, client = at_three(client_of)
    timestamp = repository.published["timestamp"][-1]
    repository.publish("snapshot", version=1)
    repository.published["timestamp"].append(timestamp)
    assert client.refresh() == 0
    assert client.trusted["snapshot"] == 3


# Mix and match --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_an_old_role_below_a_new_timestamp_is_refused(client_of: Make, role: str) -> None:
    repository, client = at_three(client_of)
    repository.update()
    repository.lie(rf"metadata/4\.{role}\.json", Answer(200, repository.published[role][1][1]))
    assert client.refresh() == 1
    assert client.trusted[role] == 3


def test_an_old_delegated_role_below_a_new_snapshot_is_refused(client_of: Make) -> None:
    repository = Repository()
    repository.delegate("targets", "role")
    repository.add("one", b"1", "role")
    repository.update("role")
    repository.update("role")
    repository.lie(r"metadata/2\.role\.json", Answer(200, repository.published["role"][0][1]))
    client = client_of(repository)
    assert client.download("one") == 1
    assert "role" not in client.trusted


# Fast forward, and recovery -------------------------------------------------------------------------------------------


@lost
def test_a_timestamp_driven_to_the_sky_is_recovered_from_by_a_new_timestamp_key(client_of: Make, lost: str) -> None:
    repository, client = at_three(client_of)
    repository.publish("timestamp", version=2**31)
    assert client.refresh() == 0
    repository.publish("timestamp", version=5)
    assert client.refresh() == 1

    repository.rotate("timestamp")
    repository.publish("timestamp", version=1)

    cut(client, lost)
    assert client.refresh() == 0
    assert client.trusted["timestamp"] == 1


@lost
def test_a_snapshot_driven_to_the_sky_is_recovered_from_by_new_keys(client_of: Make, lost: str) -> None:
    repository, client = at_three(client_of)
    repository.publish("snapshot", version=2**31)
    repository.publish("timestamp")
    assert client.refresh() == 0
    repository.publish("snapshot", version=5)
    repository.publish("timestamp")
    cut(client, lost)
    assert client.refresh() == 1

    repository.rotate("snapshot", "timestamp")
    repository.publish("snapshot", version=1)
    repository.publish("timestamp")

    assert client.refresh() == 0
    assert client.trusted["snapshot"] == 1


@lost
def test_targets_driven_to_the_sky_are_recovered_from_by_a_new_snapshot_key(client_of: Make, lost: str) -> None:
    repository, client = at_three(client_of)
    repository.publish("targets", version=2**31)
    repository.publish("snapshot", "timestamp")
    assert client.refresh() == 0
    repository.publish("targets", version=5)
    repository.publish("snapshot", "timestamp")
    cut(client, lost)
    assert client.refresh() == 1

    repository.rotate("snapshot")
    repository.publish("targets", version=2)
    repository.publish("snapshot", "timestamp")

    assert client.refresh() == 0
    assert client.trusted["targets"] == 2


@lost
def test_after_a_recovery_the_new_keys_have_floors_of_their_own(client_of: Make, lost: str) -> None:
    repository, client = at_three(client_of)
    repository.rotate("snapshot", "timestamp")
    for version in (1, 2):
        repository.publish("targets", "snapshot", version=version)
        repository.publish("timestamp", version=version)
    assert client.refresh() == 0
    repository.lie("timestamp", Answer(200, repository.published["timestamp"][-2][1]))
    cut(client, lost)
    assert client.refresh() == 1
