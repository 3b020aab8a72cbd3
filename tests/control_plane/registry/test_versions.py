"""Versions, aliases, release and revocation, in a real home."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select
from tests.control_plane.things import ACTOR, MODEL, make_champion, register

from lightship.fleet import director
from lightship.home import Home
from lightship.registry import release, versions
from lightship.release.repository import ReleaseRepository
from lightship.storage import audit
from lightship.storage.models import AuditEvent, ModelVersion
from lightship_agent.contract.codes import InvalidNameError, RegistryError, StorageError


def verbs(home: Home) -> list[str]:
    with home.database.read() as session:
        audit.verify(session)
        return list(session.scalars(select(AuditEvent.verb).order_by(AuditEvent.seq)))


def state_of(home: Home, version: int) -> str:
    with home.database.read() as session:
        return versions.get(session, MODEL, version).state


def resolve(home: Home, reference: str) -> ModelVersion:
    with home.database.read() as session:
        return versions.resolve(session, reference)


def test_a_reference_finds_a_number_an_alias_or_the_newest(home: Home) -> None:
    register(home, 1)
    register(home, 2)
    make_champion(home, 1)
    assert [resolve(home, f"{MODEL}{which}").version for which in ("@1", "@2", "@champion", "")] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("reference", "code", "says"),
    [
        ("pumps", "registry.unknown-model", "pump"),
        ("pumps@3", "registry.unknown-model", "pump"),
        ("pump@3", "registry.unknown-version", r"\[1\]"),
        ("pump@latest", "registry.unknown-version", r"\[1\]"),
        ("", "registry.unknown-model", "pump"),
    ],
)
def test_a_reference_to_nothing_says_what_there_is(home: Home, reference: str, code: str, says: str) -> None:
    register(home, 1)
    with pytest.raises(RegistryError, match=says) as e:
        resolve(home, reference)
    assert e.value.code == code


def test_releasing_publishes_once_and_again_is_no_change(home: Home) -> None:
    row = register(home, 1, released=False)
    first = release.release(home, f"{MODEL}@1", actor=ACTOR)
    metadata = sorted(p.name for p in home.releases.metadata.iterdir())
    again = release.release(home, f"{MODEL}@1", actor=ACTOR)
    assert (first.state, again.released_at) == ("released", first.released_at)
    assert [r.sha256 for r in home.releases.released()] == [row.digest]
    assert sorted(p.name for p in home.releases.metadata.iterdir()) == metadata
    assert verbs(home).count("model.release") == 1


def test_a_revoked_version_is_de_listed_and_never_released_again(home: Home) -> None:
    register(home, 1)
    release.revoke(home, f"{MODEL}@1", actor=ACTOR, reason="it lies")
    assert home.releases.released() == []
    with pytest.raises(RegistryError, match="revoked can't be released"):
        release.release(home, f"{MODEL}@1", actor=ACTOR)
    assert home.releases.released() == []
    with pytest.raises(RegistryError):
        release.revoke(home, f"{MODEL}@1", actor=ACTOR, reason="again")
    assert verbs(home).count("model.revoke") == 1


def test_a_release_that_was_cut_before_the_database_is_finished_by_repeating_it(home: Home) -> None:
    row = register(home, 1, released=False)
    home.releases.publish(row.path, home.artifacts.get(row.digest))
    assert state_of(home, 1) == "registered"
    assert release.release(home, f"{MODEL}@1", actor=ACTOR).state == "released"


def test_a_revocation_that_was_cut_before_the_database_is_finished_by_repeating_it(home: Home) -> None:
    row = register(home, 1)
    home.releases.revoke(row.path)
    assert state_of(home, 1) == "released"
    assert release.revoke(home, f"{MODEL}@1", actor=ACTOR, reason="it lies").state == "revoked"


def test_who_revokes_while_another_releases_has_the_last_word(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    register(home, 1)
    publish = ReleaseRepository.publish

    def revoked_meanwhile(self: ReleaseRepository, path: str, bundle: bytes, **how: Any) -> object:
        monkeypatch.setattr(ReleaseRepository, "publish", publish)
        release.revoke(home, f"{MODEL}@1", actor="user:other", reason="it lies")
        return publish(self, path, bundle, **how)

    monkeypatch.setattr(ReleaseRepository, "publish", revoked_meanwhile)
    with pytest.raises(RegistryError, match="revoked"):
        release.release(home, f"{MODEL}@1", actor=ACTOR)
    assert state_of(home, 1) == "revoked"
    assert home.releases.released() == []


def test_a_damaged_bundle_is_not_released(home: Home) -> None:
    row = register(home, 1, released=False)
    (home.path / "artifacts" / row.digest[:2] / row.digest).write_bytes(b"something else")
    with pytest.raises(StorageError) as e:
        release.release(home, f"{MODEL}@1", actor=ACTOR)
    assert e.value.code == "storage.corrupt"
    assert (state_of(home, 1), home.releases.released()) == ("registered", [])


def test_an_alias_moves_and_the_log_knows_from_where(home: Home) -> None:
    register(home, 1)
    register(home, 2)
    make_champion(home, 1)
    make_champion(home, 2)
    assert resolve(home, "pump@champion").version == 2
    with home.database.read() as session:
        details = session.scalars(select(AuditEvent.detail).where(AuditEvent.verb == "model.alias")).all()
        assert versions.aliases(session, MODEL) == {2: ["champion"]}
    assert [(d["before"], d["version"]) for d in details] == [(None, 1), (1, 2)]


@pytest.mark.parametrize("alias", ["Champion", "my alias", "3", "", "x" * 33, "a/b"])
def test_an_alias_outside_its_alphabet_is_refused(home: Home, alias: str) -> None:
    register(home, 1)
    with home.database.write() as session, pytest.raises(InvalidNameError):
        versions.set_alias(session, MODEL, alias, 1, actor=ACTOR)
    with home.database.read() as session:
        assert versions.aliases(session, MODEL) == {}


def test_an_unreleased_version_can_be_challenger_but_not_champion_nor_be_assigned(home: Home) -> None:
    row = register(home, 1, released=False)
    with home.database.write() as session:
        versions.set_alias(session, MODEL, "challenger", 1, actor=ACTOR)
        with pytest.raises(RegistryError, match="lightship release"):
            versions.set_alias(session, MODEL, "champion", 1, actor=ACTOR)
        with pytest.raises(RegistryError, match="lightship release"):
            director.assign(session, home.keys, device="pump-1", version=row, rollout="r", actor=ACTOR)
    with home.database.read() as session:
        assert versions.aliases(session, MODEL) == {1: ["challenger"]}
