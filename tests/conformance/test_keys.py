"""Thresholds, and every way to change the root's keys (specification 5.3.4, 5.3.5)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from securesystemslib.signer import CryptoSigner
from tests.conformance.conftest import Client
from tests.conformance.simulator import Answer, Repository
from tuf.api.metadata import Metadata, MetaFile

Make = Callable[[Repository], Client]
OTHERS = ("timestamp", "snapshot", "targets")


@dataclass(frozen=True)
class Keys:
    """Keys of a role by number, how many must sign, and who does."""

    keys: str
    threshold: int
    signers: str

    def bind(self, repository: Repository, role: str, pool: list[CryptoSigner]) -> None:
        chosen = [pool[int(n)] for n in self.keys]
        repository.bind(role, chosen, self.threshold, [pool[int(n)] for n in self.signers])


#: Roots in a row, and how many of them a client must accept.
CHAINS: dict[str, tuple[list[Keys], int]] = {
    "one key for another": ([Keys("1", 1, "1"), Keys("2", 1, "12"), Keys("2", 1, "2")], 3),
    "signatures nobody needs": ([Keys("1", 1, "13"), Keys("2", 1, "3214"), Keys("2", 1, "23")], 3),
    "any three of five": ([Keys("01234", 3, s) for s in ("024", "123", "234", "01234")], 4),
    "one of five exchanged": ([Keys("01234", 3, "024"), Keys("01345", 3, "014")], 2),
    "one of five exchanged, step by step": (
        [Keys("01234", 3, "024"), Keys("01345", 3, "0245"), Keys("01345", 3, "345")],
        3,
    ),
    "all of five exchanged": ([Keys("01234", 3, "024"), Keys("56789", 3, "024567"), Keys("56789", 3, "789")], 3),
    "threshold raised": ([Keys("123", 1, "1"), Keys("123", 2, "12"), Keys("123", 3, "123")], 3),
    "threshold lowered": ([Keys("123", 2, "12"), Keys("123", 1, "23"), Keys("123", 1, "3")], 3),
    "a key more and a threshold more": ([Keys("1", 1, "1"), Keys("12", 2, "12")], 2),
    "there and back again": ([Keys("1", 1, "1"), Keys("2", 1, "12"), Keys("1", 1, "12"), Keys("1", 1, "1")], 4),
    "without the old key": ([Keys("1", 1, "1"), Keys("2", 1, "234")], 1),
    "without the new key": ([Keys("1", 1, "1"), Keys("2", 1, "134")], 1),
    "too few of the new keys": ([Keys("01234", 3, "024"), Keys("01345", 3, "024")], 1),
    "too few of the old keys": ([Keys("01234", 3, "024"), Keys("01345", 3, "045")], 1),
    "below the raised threshold": ([Keys("123", 1, "1"), Keys("123", 2, "2")], 1),
    "below the threshold that is to be lowered": ([Keys("123", 2, "12"), Keys("123", 1, "1")], 1),
    "with a key that is gone": ([Keys("1", 1, "1"), Keys("2", 1, "12"), Keys("2", 1, "1")], 2),
    "a good root behind a bad one": ([Keys("1", 1, "1"), Keys("2", 1, "2"), Keys("2", 1, "12")], 1),
    "nobody signed": ([Keys("1", 1, "1"), Keys("1", 1, "")], 1),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_of_roots_is_followed_as_far_as_it_holds(client_of: Make, chain: str) -> None:
    roots, accepted = CHAINS[chain]
    repository = Repository()
    repository.published["root"].clear()
    pool = [repository.new_signer() for _ in range(10)]
    for number, keys in enumerate(roots, start=1):
        keys.bind(repository, "root", pool)
        repository.publish("root", version=number)
    repository.update()
    client = client_of(repository)

    assert client.refresh() == (0 if accepted == len(roots) else 1)

    assert client.trusted["root"] == accepted
    assert (client.metadata / "root.json").read_bytes() == repository.published["root"][accepted - 1][1]


#: The keys of another role, and whether its metadata is good enough.
BINDINGS: dict[str, tuple[Keys, bool]] = {
    "a new key": (Keys("2", 1, "2"), True),
    "signatures nobody needs": (Keys("1", 1, "314"), True),
    "three of five": (Keys("01234", 3, "024"), True),
    "three others of five": (Keys("01234", 3, "134"), True),
    "all of five": (Keys("01234", 5, "01234"), True),
    "only strangers": (Keys("2", 1, "134"), False),
    "two and a stranger": (Keys("01345", 3, "024"), False),
    "two of three": (Keys("01345", 3, "04"), False),
    "nobody": (Keys("1", 1, ""), False),
    "more than there are keys": (Keys("012", 4, "012"), False),
}


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize("role", OTHERS)
def test_a_role_is_as_good_as_the_keys_that_the_root_gives_it(client_of: Make, role: str, binding: str) -> None:
    keys, good = BINDINGS[binding]
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    pool = [repository.new_signer() for _ in range(6)]
    keys.bind(repository, role, pool)
    repository.publish("root")
    repository.update()

    assert client.refresh() == (0 if good else 1)

    assert client.trusted["root"] == 2
    # A key that is gone takes the old metadata with it where it is met again, but not what was kept.
    assert client.trusted[role] == (2 if good else 1)


@pytest.mark.parametrize("role", OTHERS)
def test_one_key_under_many_names_signs_once(client_of: Make, role: str) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    signer = repository.new_signer()
    repository.bind(role, [signer], 3, [signer])
    for number in range(4):
        repository.root.keys[f"{number:064x}"] = signer.public_key
        repository.root.roles[role].keyids.append(f"{number:064x}")
    repository.publish("root")
    repository.update()
    assert client.refresh() == 1
    assert client.trusted[role] == 1


@pytest.mark.parametrize("role", OTHERS)
def test_a_revoked_key_opens_nothing_any_more(client_of: Make, role: str) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    stolen = repository.signers[role]
    repository.rotate(role)
    repository.update()
    assert client.refresh() == 0
    repository.signers[role] = stolen
    repository.update()
    assert client.refresh() == 1
    assert client.trusted[role] == 2


@pytest.mark.parametrize("role", OTHERS)
def test_one_role_cannot_be_signed_with_the_key_of_another(client_of: Make, role: str) -> None:
    repository = Repository()
    client = client_of(repository)
    client.refresh()
    repository.signers[role] = repository.signers["root"]
    repository.update()
    assert client.refresh() == 1
    assert client.trusted[role] == 1


# Signatures in odd company --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa", "rsa-pkcs1v15"])
def test_a_key_of_any_kind_counts_with_a_good_signature_and_only_then(client_of: Make, kind: str) -> None:
    repository = Repository()
    client = client_of(repository)
    second = repository.new_signer(kind)
    repository.grant("root", second)
    repository.root.roles["root"].threshold = 2
    repository.publish("root")
    assert client.refresh() == 0
    repository.publish("root")
    version, data = repository.published["root"][-1]
    metadata = Metadata.from_bytes(data)
    signature = metadata.signatures[second.public_key.keyid]
    # One of the same kind and length, over something else.
    signature.signature = second.sign(b"something else").signature
    repository.published["root"][-1] = (version, metadata.to_bytes())
    assert client.refresh() == 1
    assert client.trusted["root"] == 2


@pytest.mark.parametrize("bad", ["", "00", "zz", "00" * 64])
@pytest.mark.parametrize("role", OTHERS)
def test_a_bad_signature_beside_a_good_one_does_no_harm(client_of: Make, role: str, bad: str) -> None:
    repository = Repository()
    client = client_of(repository)
    second = repository.new_signer()
    repository.grant(role, second)
    repository.publish("root")
    for name in ("targets", "snapshot", "timestamp"):
        repository.publish(name)
        if name == role:
            version, data = repository.published[role][-1]
            metadata = Metadata.from_bytes(data)
            metadata.signatures[second.public_key.keyid].signature = bad
            repository.published[role][-1] = (version, metadata.to_bytes())
    assert client.refresh() == 0
    assert client.trusted[role] == 2


@pytest.mark.parametrize("role", OTHERS)
def test_the_same_signature_twice_is_refused(client_of: Make, role: str) -> None:
    repository = Repository()
    client = client_of(repository)
    version, data = repository.published[role][-1]
    doubled = json.loads(data)
    doubled["signatures"] *= 2
    repository.published[role][-1] = (version, json.dumps(doubled).encode())
    assert client.refresh() == 1
    assert role not in client.trusted


def test_a_snapshot_that_the_timestamp_key_signed_is_no_timestamp(client_of: Make) -> None:
    """Signed by the right key, of the right shape, and yet of another type."""
    repository = Repository()
    client = client_of(repository)
    repository.grant("snapshot", repository.signers["timestamp"][0])
    repository.snapshot.meta = {"snapshot.json": MetaFile(1)}
    repository.publish("root", "snapshot")
    repository.lie(r"timestamp\.json", Answer(200, repository.published["snapshot"][-1][1]))
    assert client.refresh() == 1
    assert client.trusted == {"root": 2}
