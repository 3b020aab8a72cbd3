"""API tokens: shown once, stored as a hash, found again, and worth nothing once they are over."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import select, update

from lightship.access import tokens
from lightship.access.rules import Role
from lightship.access.sessions import Sessions
from lightship.cli import cli
from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import ApiToken, AuditEvent
from lightship_agent.contract.codes import AccessError, InvalidNameError


def make(home: Home, name: str = "ci", *, ttl: int = 600, role: Role = Role.OPERATOR) -> str:
    with home.database.write() as session:
        return tokens.create(
            session, name=name, role=role, environment="development", ttl_seconds=ttl, actor="user:ann", reason="CI"
        )


def found(home: Home, shown: str, at: int | None = None) -> str | None:
    with home.database.read() as session:
        row = tokens.identify(session, shown, at or audit.now_ms())
        return row.name if row else None


def events(home: Home) -> list[AuditEvent]:
    with home.database.read() as session:
        return list(session.scalars(select(AuditEvent).order_by(AuditEvent.seq)))


def lightship(home: Home, *arguments: str) -> str:
    done = CliRunner().invoke(cli, ["--home", str(home.path), *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_token_has_a_form_that_secret_scanners_find(home: Home) -> None:
    assert tokens.FORM.fullmatch(make(home))


def test_of_a_token_only_its_hash_is_stored_and_the_log_holds_neither(home: Home) -> None:
    shown = make(home)
    secret = shown[len("lst_0123456789ab_") :]
    with home.database.read() as session:
        row = session.get(ApiToken, "ci")
        assert row is not None
        assert row.secret_hash == hashlib.sha256(shown.encode()).hexdigest()
    home.close()  # what is in the journal goes to the file
    for path in home.path.glob("lightship.db*"):
        assert secret.encode() not in path.read_bytes()
    event = events(home)[-1]
    assert (event.verb, event.subject, event.detail["role"], event.detail["reason"]) == (
        "access.grant", "ci", "operator", "CI",
    )  # fmt: skip
    assert row.secret_hash not in json.dumps(event.detail)


def test_a_token_is_known_by_every_character_of_it(home: Home) -> None:
    shown = make(home)
    assert found(home, shown) == "ci"
    for wrong in (shown[:-1], shown + "A", shown[:-1] + ("B" if shown[-1] != "B" else "C"), shown.upper(), "", "lst_"):
        assert found(home, wrong) is None
    other = make(home, "other")
    assert found(home, f"{shown[:16]}{other[16:]}") is None  # the id of one with the secret of another


def test_a_token_is_good_until_it_expires_and_not_a_moment_longer(home: Home) -> None:
    shown = make(home, ttl=600)
    with home.database.read() as session:
        row = session.get(ApiToken, "ci")
        assert row is not None
        end = row.expires_at
    assert found(home, shown, end - 1) == "ci"
    assert found(home, shown, end) is None


def test_a_revoked_token_is_unknown_and_its_revocation_is_one_event_however_often_it_is_told(home: Home) -> None:
    shown = make(home)
    for _ in range(2):
        with home.database.write() as session:
            tokens.revoke(session, "ci", actor="user:ann", reason="left the team")
    assert found(home, shown) is None
    assert [e.verb for e in events(home)].count("access.withdraw") == 1
    assert events(home)[-1].detail == {"reason": "left the team"}


def test_a_name_is_never_used_twice_also_when_its_token_is_revoked(home: Home) -> None:
    make(home)
    with home.database.write() as session:
        tokens.revoke(session, "ci", actor="user:ann", reason="x")
    before = len(events(home))
    with pytest.raises(AccessError, match="Choose another name") as e:
        make(home)
    assert e.value.code == "access.exists"
    assert len(events(home)) == before


@pytest.mark.parametrize("name", ["", "Upper", "a b", "../x", "a" * 64, "-a", "a\n"])
def test_a_name_outside_the_alphabet_is_refused_and_nothing_is_stored(home: Home, name: str) -> None:
    before = len(events(home))
    with pytest.raises(InvalidNameError):
        make(home, name)
    assert len(events(home)) == before


def test_an_unknown_token_cannot_be_revoked(home: Home) -> None:
    with pytest.raises(AccessError, match="token list") as e, home.database.write() as session:
        tokens.revoke(session, "nobody", actor="user:ann", reason="x")
    assert e.value.code == "access.unknown"


def test_the_last_use_is_noted_at_most_once_a_minute(home: Home) -> None:
    make(home)
    with home.database.write() as session:
        tokens.touch(session, "ci", now=1_000_000, origin="198.51.100.7")
        row = session.get(ApiToken, "ci", populate_existing=True)
        assert row is not None
        assert (row.last_used_at, row.last_used_from) == (1_000_000, "198.51.100.7")
        assert not tokens.needs_touch(row, 1_059_999)
        assert tokens.needs_touch(row, 1_060_000)


def test_the_commands_make_list_and_revoke_and_show_a_secret_once(home: Home, tmp_path: Path) -> None:
    shown = lightship(home, "token", "create", "ci", "--role", "operator", "--ttl", "2h", "--reason", "CI").strip()
    assert found(home, shown) == "ci"
    out = tmp_path / "pager.token"
    said = lightship(home, "token", "create", "pager", "--role", "viewer", "--out", str(out))
    assert found(home, out.read_text()) == "pager"
    assert out.read_text() not in said
    assert stat.S_IMODE(out.stat().st_mode) == 0o600

    rows = {r["name"]: r for r in json.loads(lightship(home, "token", "list", "--json"))}
    assert (rows["ci"]["role"], rows["ci"]["environment"], rows["ci"]["state"]) == ("operator", "development", "active")
    assert abs(rows["ci"]["expires_at"] - audit.now_ms() - 7_200_000) < 60_000
    listed = lightship(home, "token", "list")
    assert shown[17:] not in listed + json.dumps(rows)

    lightship(home, "token", "revoke", "ci", "--reason", "rotated")
    assert found(home, shown) is None
    assert json.loads(lightship(home, "token", "list", "--json"))[0]["state"] == "revoked"
    assert [e.actor[:5] for e in events(home)][-3:] == ["user:"] * 3


def test_a_token_that_could_not_be_written_to_its_file_was_never_made(home: Home, tmp_path: Path) -> None:
    arguments = ["--home", str(home.path), "token", "create", "ci", "--role", "viewer", "--out", str(tmp_path / "no/x")]
    assert CliRunner().invoke(cli, arguments).exit_code != 0
    with home.database.read() as session:
        assert session.get(ApiToken, "ci") is None
    assert [e.verb for e in events(home)] == ["home.create"]


@pytest.mark.parametrize("ttl", ["0s", "59s", "367d", "90", "90 d", "-1d", "1y", ""])
def test_a_span_that_is_none_is_refused(home: Home, ttl: str) -> None:
    arguments = ["--home", str(home.path), "token", "create", "ci", "--role", "viewer", "--ttl", ttl]
    assert CliRunner().invoke(cli, arguments).exit_code == 2


def test_a_session_is_sealed_with_a_key_of_its_process_and_ends_in_time() -> None:
    ours, theirs = Sessions(), Sessions()
    cookie = ours.seal("ci", 1_000)
    assert ours.open(cookie, 999.9) == "ci"
    assert ours.open(cookie, 1_000) is None
    assert theirs.open(cookie, 0) is None
    name, until, signature = cookie.split(".")
    for forged in (
        f"admin.{until}.{signature}", f"{name}.9{until}.{signature}", f"{name}.{until}.", f"{name}.{until}.é", "", ".",
        "..", "x", f"{name}.{until}",
    ):  # fmt: skip
        assert ours.open(forged, 0) is None


def test_a_stolen_database_lets_nobody_in(home: Home) -> None:
    make(home)
    with home.database.read() as session:
        row = session.get(ApiToken, "ci")
        assert row is not None
        stolen = row.secret_hash
    assert found(home, stolen) is None
    assert found(home, f"lst_{row.id}_{stolen[:43]}") is None
    with home.database.write() as session:
        session.execute(update(ApiToken).values(secret_hash=""))
    assert found(home, "") is None
