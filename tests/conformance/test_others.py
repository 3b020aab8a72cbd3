"""Repositories as other tools write them: what tuf-on-ci and large public ones do beyond the plain specification."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256, sha512

import pytest
from securesystemslib.signer import Signature
from tests.conformance.conftest import Client
from tests.conformance.simulator import Repository
from tuf.api.metadata import Metadata, TargetFile

Make = Callable[[Repository], Client]
PATHS = ["team/*", "team/*/*", "team/*/*/*"]


def as_tuf_on_ci_writes() -> Repository:
    """ECDSA keys with owners, periods in every role, no hashes of metadata, and room for those who did not sign."""
    repository = Repository(kind="ecdsa")
    for key in repository.root.keys.values():
        key.unrecognized_fields["x-tuf-on-ci-keyowner"] = "@somebody"
    for signed in (repository.root, repository.targets(), *repository.root.roles.values()):
        signed.unrecognized_fields |= {"x-tuf-on-ci-expiry-period": 365, "x-tuf-on-ci-signing-period": 60}
    repository.delegate("targets", "team", paths=PATHS, terminating=True)
    absent = repository.new_signer().public_key
    repository.targets().add_key(absent, "team")
    content = b"a model"
    hashes = {"sha512": sha512(content).hexdigest(), "sha256": sha256(content).hexdigest()}
    repository.targets("team").targets["team/a/model"] = TargetFile(len(content), hashes, "team/a/model")
    repository.files["team/a/model"] = content
    repository.publish("root", "team", "targets", "snapshot", "timestamp")
    # Whoever did not sign has an empty signature in the file.
    version, data = repository.published["team"][-1]
    metadata = Metadata.from_bytes(data)
    metadata.signatures[absent.keyid] = Signature(absent.keyid, "")
    repository.published["team"][-1] = (version, metadata.to_bytes())
    return repository


def test_a_repository_of_tuf_on_ci_is_read(client_of: Make) -> None:
    client = client_of(as_tuf_on_ci_writes())
    assert client.refresh() == 0
    assert client.download("team/a/model") == 0
    assert client.has == [b"a model"]
    assert client.trusted == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2, "team": 1}


@pytest.mark.parametrize("first", [2, 12, 300])
def test_trust_may_begin_with_any_root_and_the_chain_goes_on_from_there(client_of: Make, first: int) -> None:
    repository = Repository(kind="ecdsa")
    repository.publish("root", version=first)
    client = client_of(repository)
    assert client.init(repository.published["root"][-1][1]) == 0
    repository.rotate("timestamp")
    repository.publish("root")
    repository.update()

    assert client.refresh() == 0

    assert client.asked[:3] == [f"{first + n}.root.json" for n in (1, 2, 3)]
    assert client.trusted["root"] == first + 2


def test_what_the_client_keeps_for_itself_looks_like_no_metadata(client_of: Make) -> None:
    client = client_of(Repository())
    assert client.refresh() == 0
    own = {p.name for p in client.metadata.iterdir()} - {f"{role}.json" for role in client.trusted}
    assert own == {"floors", "pinned-root", ".lock", "root_history"}
    assert [p.name for p in client.downloads.iterdir()] == []
