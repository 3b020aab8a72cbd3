"""Who may list a target, where a search goes, and what is downloaded (specification 5.6.7, 5.7)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest
from tests.conformance.conftest import Client
from tests.conformance.simulator import Answer, Repository
from tuf.api.metadata import TargetFile

Make = Callable[[Repository], Client]


# Delegations ----------------------------------------------------------------------------------------------------------

#: Edges of a graph (from, to, how) and the order in which a search for a missing target visits it.
GRAPHS: dict[str, tuple[list[tuple[str, str, dict[str, Any]]], list[str]]] = {
    "one": ([("targets", "A", {})], ["A"]),
    "two": ([("targets", "A", {}), ("targets", "B", {})], ["A", "B"]),
    "below the second": ([("targets", "A", {}), ("targets", "B", {}), ("B", "C", {})], ["A", "B", "C"]),
    "depth first": (
        [("targets", "A", {}), ("targets", "B", {}), ("A", "C", {}), ("A", "D", {})],
        ["A", "C", "D", "B"],
    ),
    "deeper first": (
        [("targets", "A", {}), ("targets", "B", {}), ("A", "C", {}), ("C", "D", {})],
        ["A", "C", "D", "B"],
    ),
    "terminating": (
        [("targets", "A", {}), ("targets", "B", {}), ("A", "C", {"terminating": True}), ("A", "D", {})],
        ["A", "C"],
    ),
    "terminating, with a child": (
        [("targets", "A", {}), ("targets", "B", {}), ("A", "C", {"terminating": True}), ("C", "D", {})],
        ["A", "C", "D"],
    ),
    "terminating at once": ([("targets", "A", {"terminating": True}), ("targets", "B", {})], ["A"]),
    "terminating, but elsewhere": (
        [("targets", "A", {"terminating": True, "paths": ["x/*"]}), ("targets", "B", {})],
        ["B"],
    ),
    "not of that path": ([("targets", "A", {"paths": ["*.py"]}), ("targets", "B", {}), ("A", "C", {})], ["B"]),
    "not of that path, deeper": (
        [("targets", "A", {}), ("targets", "B", {}), ("A", "C", {"paths": ["*.py"]}), ("C", "D", {})],
        ["A", "B"],
    ),
    "no path at all": ([("targets", "A", {"paths": []}), ("targets", "B", {})], ["B"]),
    "a circle": (
        [("targets", "A", {}), ("targets", "B", {}), ("B", "C", {}), ("C", "D", {}), ("D", "B", {})],
        ["A", "B", "C", "D"],
    ),
    "itself": ([("targets", "A", {}), ("A", "A", {})], ["A"]),
    "met twice": ([("targets", "A", {}), ("targets", "B", {}), ("B", "C", {}), ("A", "C", {})], ["A", "C", "B"]),
    "met by one path only": (
        [("targets", "A", {}), ("targets", "B", {}), ("B", "C", {}), ("A", "C", {"paths": ["*.py"]})],
        ["A", "B", "C"],
    ),
    "of that hash": (
        [
            ("targets", "A", {"paths": None, "path_hash_prefixes": [hashlib.sha256(b"missing").hexdigest()[:3]]}),
            ("targets", "B", {"paths": None, "path_hash_prefixes": ["0000000"]}),
        ],
        ["A"],
    ),
}


def build(repository: Repository, edges: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    """Delegate, without publishing; the delegated roles."""
    for parent, role, how in edges:
        repository.delegate(parent, role, **how)
    return sorted({role for _, role, _ in edges})


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_search_visits_the_roles_that_may_know_in_their_order_and_each_once(client_of: Make, graph: str) -> None:
    edges, order = GRAPHS[graph]
    repository = Repository()
    repository.update(*build(repository, edges))
    client = client_of(repository)

    assert client.download("missing") == 1

    assert client.asked[4:] == [f"1.{role}.json" for role in order]
    assert client.trusted.keys() - {"root", "timestamp", "snapshot", "targets"} == set(order)


TREE: list[tuple[str, str, dict[str, Any]]] = [
    ("targets", "A", {"paths": ["*.doc", "*.md"]}),
    ("targets", "B", {"paths": ["releases/*/*"]}),
    ("B", "C", {"paths": ["releases/x/*"]}),
    ("B", "D", {"paths": ["releases/y/*.zip"]}),
]


@pytest.mark.parametrize(
    ("path", "by", "visited"),
    [
        ("file", "targets", []),
        ("README.md", "A", ["A"]),
        ("releases/x/v1", "C", ["B", "C"]),
        ("releases/y/v1.zip", "D", ["B", "D"]),
        ("releases/z/v1.zip", "", ["B"]),  # listed by D, to whom nobody delegates it
        ("deep/README.md", "", []),  # a star does not cross a slash
        ("releases/x/deep/v1", "", []),
    ],
)
def test_a_target_is_believed_only_of_whom_it_was_delegated_to(
    client_of: Make, path: str, by: str, visited: list[str]
) -> None:
    repository = Repository()
    roles = build(repository, TREE)
    for role in ("targets", *roles):
        if role == (by or "D"):
            repository.add(path, f"{path} by {role}".encode(), role)
    repository.update(*roles)
    client = client_of(repository)

    assert client.download(path) == (0 if by else 1)

    assert client.has == ([f"{path} by {by}".encode()] if by else [])
    assert [name for name in client.asked[4:] if name.endswith(".json")] == [f"1.{role}.json" for role in visited]


def test_of_two_roles_that_list_a_target_the_first_is_believed(client_of: Make) -> None:
    repository = Repository()
    roles = build(repository, [("targets", "A", {}), ("targets", "B", {})])
    repository.add("file", b"by B", "B")
    repository.add("file", b"by A", "A")
    repository.update(*roles)
    client = client_of(repository)
    assert client.download("file") == 0
    assert client.has == [b"by A"]


@pytest.mark.parametrize("role", ["?", "#", "/role", "../role", "..", "a b", "ü", "%2e", "role.json"])
def test_a_role_may_have_any_name_and_stays_in_its_place(client_of: Make, role: str) -> None:
    repository = Repository()
    repository.delegate("targets", role)
    repository.update(role)
    client = client_of(repository)
    around = sorted(client.metadata.parent.parent.rglob("*"))

    assert client.download("missing") == 1

    assert client.asked[-1] == f"1.{quote(role, safe='')}.json"
    assert len(client.trusted) == 5
    new = set(client.metadata.parent.parent.rglob("*")) - set(around)
    assert all(client.metadata in path.parents for path in new)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_hash_bins_are_searched_in_one_place(client_of: Make, bits: int) -> None:
    repository = Repository()
    bins = repository.bins("targets", bits, "bin")
    where = bins[int(hashlib.sha256(b"file").hexdigest()[:8], 16) >> (32 - bits)]
    repository.add("file", b"in a bin", where)
    repository.update(*bins)
    client = client_of(repository)
    assert client.download("file") == 0
    assert client.has == [b"in a bin"]
    assert client.asked[4] == f"1.{where}.json"
    assert len(client.asked) == 6
    assert client.download("missing") == 1
    assert len([name for name in client.asked if "bin" in name]) <= 1


def test_a_target_in_the_wrong_bin_is_not_found(client_of: Make) -> None:
    repository = Repository()
    bins = repository.bins("targets", 4, "bin")
    where = int(hashlib.sha256(b"file").hexdigest()[0], 16)
    repository.add("file", b"elsewhere", bins[(where + 1) % 16])
    repository.update(*bins)
    client = client_of(repository)
    assert client.download("file") == 1
    assert client.has == []


def test_bins_below_a_terminating_role_are_found(client_of: Make) -> None:
    repository = Repository()
    repository.delegate("targets", "releases", terminating=True, paths=["bundles/*/*"])
    bins = repository.bins("releases", 6, "releases")
    path = "bundles/pump/1.tar"
    where = bins[int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) >> 26]
    repository.add(path, b"bundle", where)
    repository.update("releases", *bins)
    client = client_of(repository)
    assert client.download(path) == 0
    assert client.has == [b"bundle"]


@pytest.mark.parametrize("fault", ["unsigned", "foreign", "below-threshold", "expired", "unlisted", "absent"])
def test_a_delegated_role_that_does_not_hold_ends_the_search(client_of: Make, fault: str) -> None:
    repository = Repository()
    repository.delegate("targets", "A")
    repository.delegate("targets", "B")
    repository.add("file", b"by A", "A")
    repository.add("file", b"by B", "B")
    delegations = repository.targets().delegations
    assert delegations is not None
    assert delegations.roles is not None
    if fault == "unsigned":
        repository.signers["A"] = []
    elif fault == "foreign":
        repository.signers["A"] = repository.signers["B"]
    elif fault == "below-threshold":
        delegations.roles["A"].threshold = 2
    elif fault == "expired":
        repository.targets("A").expires = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    repository.update("A", "B")
    if fault == "unlisted":
        del repository.snapshot.meta["A.json"]
        repository.publish("snapshot", "timestamp")
    elif fault == "absent":
        repository.lie(r"1\.A\.json", Answer(404))
    client = client_of(repository)

    assert client.refresh() == 0
    assert client.download("file") == 1

    assert client.has == []
    assert "A" not in client.trusted


def test_a_kept_delegated_role_that_has_expired_is_exchanged_for_a_fresh_one(client_of: Make) -> None:
    repository = Repository()
    repository.delegate("targets", "role")
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
    repository.targets("role").expires = expires
    repository.add("first", b"1", "role")
    repository.add("second", b"2", "role")
    repository.update("role")
    client = client_of(repository)
    assert client.download("first") == 0
    time.sleep(max(0.0, (expires - datetime.now(UTC)).total_seconds()) + 0.1)

    assert client.download("second") == 1
    repository.targets("role").expires = repository.expiry()
    repository.publish("role", "snapshot", "timestamp")
    assert client.download("second") == 0

    assert client.has == [b"1", b"2"]


def test_a_role_is_judged_by_the_one_that_delegates_and_not_by_another_before_it(client_of: Make) -> None:
    repository = Repository()
    build(
        repository,
        [("targets", "A", {"paths": ["a"]}), ("targets", "B", {"paths": ["b"]}), ("A", "C", {}), ("B", "C", {})],
    )
    delegations = repository.targets("B").delegations
    assert delegations is not None
    assert delegations.roles is not None
    delegations.roles["C"].threshold = 2
    repository.add("a", b"by A's word", "C")
    repository.add("b", b"by B's word", "C")
    repository.update("A", "B", "C")
    client = client_of(repository)
    assert client.download("a", "b") == 1
    assert client.has == [b"by A's word"]


def test_a_revoked_delegated_key_opens_nothing_any_more(client_of: Make) -> None:
    repository = Repository()
    repository.delegate("targets", "role")
    repository.add("old", b"good", "role")
    repository.update("role")
    client = client_of(repository)
    assert client.download("old") == 0
    delegations = repository.targets().delegations
    assert delegations is not None
    assert delegations.roles is not None
    delegations.roles["role"].keyids = []
    repository.targets().add_key(repository.new_signer().public_key, "role")
    repository.add("new", b"bad", "role")
    repository.update("role")
    assert client.download("new") == 1
    assert client.has == [b"good"]


# Downloads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("path", ["file", "path/to/a/file.txt", "with space", "ümlaut", ".hidden", "x" * 220])
def test_a_target_is_downloaded_from_its_place(client_of: Make, path: str, consistent: bool) -> None:
    repository = Repository(consistent=consistent)
    repository.add(path, b"content")
    repository.update()
    client = client_of(repository)
    assert client.refresh() == 0
    assert client.has == []
    assert client.download(path) == 0
    assert client.has == [b"content"]


def test_several_targets_come_in_order_from_one_refresh_and_each_once(client_of: Make) -> None:
    repository = Repository()
    for name in ("one", "two", "three"):
        repository.add(name, name.encode())
    repository.update()
    client = client_of(repository)
    assert client.download("two", "one", "two", "three", "one") == 0
    assert client.has == [b"two", b"one", b"three"]
    assert [name.partition(".")[2] for name in client.asked[4:]] == ["two", "one", "three"]


def test_what_is_here_already_is_not_downloaded_again(client_of: Make) -> None:
    repository = Repository()
    repository.add("file", b"content")
    repository.update()
    client = client_of(repository)
    client.download("file")
    assert client.download("file") == 0
    assert client.asked == ["2.root.json", "timestamp.json"]


def test_what_was_altered_here_is_downloaded_again(client_of: Make) -> None:
    repository = Repository()
    repository.add("file", b"content")
    repository.update()
    client = client_of(repository)
    client.download("file")
    (path,) = client.downloads.iterdir()
    path.write_bytes(b"altered")
    assert client.download("file") == 0
    assert client.has == [b"content"]


def test_a_target_that_changes_takes_the_place_of_the_old_one(client_of: Make) -> None:
    repository = Repository()
    client = client_of(repository)
    for number in range(5):
        repository.add("file", b"%d" % number)
        repository.update()
        assert client.download("file") == 0
        assert client.has == [b"%d" % number]


@pytest.mark.parametrize("bad", [b"malicious", b"malicious and longer", b"short", b""])
def test_bytes_that_are_not_the_listed_ones_are_not_kept(client_of: Make, bad: bytes) -> None:
    repository = Repository()
    repository.add("one", b"good data")
    repository.add("two", b"good data")
    repository.update()
    client = client_of(repository)
    assert client.download("one") == 0
    repository.files = dict.fromkeys(repository.files, bad)
    client.download("one")
    assert client.download("two") == 1
    assert client.has == [b"good data"]


def test_a_target_that_is_no_longer_listed_is_not_downloaded(client_of: Make) -> None:
    repository = Repository()
    repository.add("file", b"content")
    repository.update()
    client = client_of(repository)
    del repository.targets().targets["file"]
    repository.update()
    assert client.download("file") == 1
    assert client.has == []


def test_the_first_missing_target_ends_a_download_of_several(client_of: Make) -> None:
    repository = Repository()
    repository.add("one", b"1")
    repository.add("two", b"2")
    repository.update()
    client = client_of(repository)
    assert client.download("one", "missing", "two") == 1
    assert client.has == [b"1"]


@pytest.mark.parametrize("kinds", [["sha256"], ["sha512"], ["sha256", "sha512"], ["sha512", "sha256"], ["sha384"]])
def test_any_known_hash_will_do(client_of: Make, kinds: list[str]) -> None:
    repository = Repository()
    repository.add("file", b"content")
    repository.targets().targets["file"] = TargetFile.from_data("file", b"content", kinds)
    repository.update()
    client = client_of(repository)
    assert client.download("file") == 0
    assert client.has == [b"content"]
    assert [name.partition(".")[0] for name in client.asked[4:]] in [
        [hashlib.new(kind, b"content").hexdigest()] for kind in kinds
    ]
    assert client.download("file") == 0
    assert client.asked == ["2.root.json", "timestamp.json"]


@pytest.mark.parametrize("known", [[], ["sha256"]])
def test_a_hash_that_nobody_knows_is_one_that_does_not_match(client_of: Make, known: list[str]) -> None:
    repository = Repository()
    repository.add("file", b"content")
    target = TargetFile.from_data("file", b"content", ["sha512", *known])
    target.hashes["unknown-hash"] = target.hashes.pop("sha512")
    repository.targets().targets["file"] = target
    repository.update()
    client = client_of(repository)
    assert client.download("file") == 1
    assert client.has == []


@pytest.mark.parametrize("wrong", ["hash", "length", "one of two hashes"])
def test_a_target_that_is_listed_wrongly_is_refused(client_of: Make, wrong: str) -> None:
    repository = Repository()
    repository.add("file", b"content")
    target = TargetFile.from_data("file", b"content", ["sha256", "sha512"])
    if wrong == "length":
        target.length += 1
    else:
        target.hashes["sha512"] = "0" * 128
        if wrong == "hash":
            del target.hashes["sha256"]
    repository.targets().targets["file"] = target
    repository.update()
    client = client_of(repository)
    assert client.download("file") == 1
    assert client.has == []


@pytest.mark.parametrize("path", ["../file", "..", "/etc/file", "a/../../file"])
def test_a_target_path_leads_nowhere_else(client_of: Make, path: str) -> None:
    repository = Repository(consistent=False)
    repository.add(path, b"content")
    repository.update()
    client = client_of(repository)
    client.download(path)
    found = [p for p in client.downloads.parent.parent.rglob("*") if p.is_file() and p.read_bytes() == b"content"]
    assert all(p.parent == client.downloads for p in found)
