"""`lightship keys` and releases of several signers, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.control_plane.release.people import RELEASERS, ROOT, People
from tests.control_plane.things import add_device, make_champion, register, reports_running

from lightship.cli import cli
from lightship.home import Home
from lightship.registry import versions
from lightship.release.keys import ROLES
from lightship_agent.contract.codes import LightshipError

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    return People(tmp_path_factory.mktemp("people"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder of its own with --json; what it printed, or the code of its error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTSHIP_HOME", str(tmp_path / "home"))

    def command(*words: str | Path) -> Any:
        done: Result = CliRunner().invoke(cli, [*map(str, words), "--json"])
        if isinstance(done.exception, LightshipError):
            return done.exception.code
        assert done.exception is None, done.output
        return json.loads(done.stdout)

    return command


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def keys_of(run: Run) -> dict[str, list[str]]:
    return {r["role"]: [k["keyid"] for k in r["keys"]] for r in run("keys", "show")["roles"]}


def test_in_development_every_role_is_rotated_at_once_and_its_old_key_is_gone(run: Run, tmp_path: Path) -> None:
    assert run("init")["notice"].startswith("Development keys")
    with closing(Home.open(tmp_path / "home")) as home:
        register(home, 1)
    for role in ROLES:
        before = keys_of(run)
        assert run("keys", "rotate", role, "--reason", "practice")["changed"]
        after = keys_of(run)
        assert set(before[role]).isdisjoint(after[role])
        assert {r: k for r, k in after.items() if r != role} == {r: k for r, k in before.items() if r != role}
    with closing(Home.open(tmp_path / "home")) as home:
        assert len(home.keys.held()) == len(ROLES)
        assert [r.path for r in home.releases.released()] == ["bundles/pump/1.tar"]
        register(home, 2)
        assert len(home.releases.released()) == 2


def test_after_a_break_in_all_online_keys_are_rotated_in_one_go(run: Run) -> None:
    run("init")
    before = keys_of(run)
    assert run("keys", "rotate", "snapshot", "timestamp", "director", "--reason", "break-in")["changed"]
    after = keys_of(run)
    changed = {role for role in ROLES if before[role] != after[role]}
    assert changed == {"snapshot", "timestamp", "director"}


def test_a_revoked_online_key_gets_a_successor_that_is_made_here(run: Run) -> None:
    run("init")
    (old,) = keys_of(run)["timestamp"]
    assert "root" in run("keys", "revoke", old[:8], "--reason", "it leaked")["changed"]
    assert old not in keys_of(run)["timestamp"]


@pytest.mark.parametrize("keyid", ["", "abc", "ffffffff", "zz zz zz"])
def test_a_key_that_is_not_in_force_is_not_revoked(run: Run, tmp_path: Path, keyid: str) -> None:
    run("init")
    before = files_in(tmp_path / "home" / "tuf")
    assert run("keys", "revoke", keyid, "--reason", "x") == "release.keys"
    assert files_in(tmp_path / "home" / "tuf") == before


def test_the_only_key_of_a_role_is_not_revoked_without_another(run: Run, tmp_path: Path, people: People) -> None:
    run("init")
    (root,) = keys_of(run)["root"]
    before = files_in(tmp_path / "home" / "tuf")
    assert run("keys", "revoke", root[:8], "--reason", "x") == "release.ceremony"
    assert files_in(tmp_path / "home" / "tuf") == before
    replacement = people.folder / "dave.pub.json"
    left = run("keys", "revoke", root[:8], "--reason", "x", "--replace-with", replacement)
    assert (left["complete"], left["needs"][1]["waiting"]) == (False, [people.public("dave").keyid])
    assert files_in(tmp_path / "home" / "tuf") == before


def hold(run: Run, people: People) -> None:
    """A production server and its first ceremony."""
    run("init", "--production")
    words: list[str | Path] = []
    for role, names in (("root", ROOT), ("targets", ROOT), ("releases", RELEASERS)):
        for name in names:
            words += [f"--{role}", people.folder / f"{name}.pub.json"]
    begun = run("keys", "ceremony", "begin", *words, "--out", "first.json")
    assert [(n["document"], n["threshold"]) for n in begun["needs"]] == [("root", 2), ("targets", 2), ("releases", 2)]
    for name in ("alice", "carol", *RELEASERS):
        run("keys", "ceremony", "sign", "first.json", "--key", people.key(name))
    assert run("keys", "ceremony", "status", "first.json")["complete"]
    assert run("keys", "ceremony", "finish", "first.json") == {"changed": ["root", "targets", "releases"]}


def test_what_is_shown_says_what_is_here_and_what_is_missing(run: Run, people: People) -> None:
    hold(run, people)
    shown = run("keys", "show", "--check")
    missing = {r["role"]: r["missing"] for r in shown["roles"]}
    assert missing == {"root": 2, "targets": 2, "releases": 2, "snapshot": 0, "timestamp": 0, "director": 0}
    here = {r["role"]: [k["here"] for k in r["keys"]] for r in shown["roles"]}
    assert here["root"] == [False] * 3
    assert here["snapshot"] == [True]
    assert shown["trouble"] == []


def test_a_release_of_two_signers_and_its_revocation(run: Run, people: People, tmp_path: Path) -> None:
    hold(run, people)
    with closing(Home.open(tmp_path / "home")) as home:
        row = register(home, 1, released=False)
        add_device(home, "pump-1")
    left = run("release", "pump@1", "--key", people.key("builder"))
    assert (left["complete"], left["file"]) == (False, "release-pump@1.ceremony.json")
    assert run("release", "finish", left["file"]) == "release.threshold"
    assert run("release", "list") == []
    assert run("release", "pump@1") == "release.exists"  # the file of that name is not overwritten
    run("release", "sign", left["file"], "--key", people.key("approver"))
    assert run("release", "finish", left["file"]) == {"changed": ["releases"]}
    assert [r["path"] for r in run("release", "list")] == ["bundles/pump/1.tar"]
    with closing(Home.open(tmp_path / "home")) as home:
        make_champion(home, 1)
        reports_running(home, "pump-1", row)

    both = [w for n in RELEASERS for w in ("--key", people.key(n))]
    assert run("release", "revoke", "pump@1", "--reason", "it lies", *both)["state"] == "revoked"

    assert run("release", "list") == []
    with closing(Home.open(tmp_path / "home")) as home, home.database.read() as session:
        assert versions.aliases(session, "pump") == {}
    verbs = [e["verb"] for e in run("audit")]
    assert [v for v in reversed(verbs) if v.startswith(("keys.", "model.re"))] == [
        "keys.propose", "keys.finish", "keys.finish", "model.release", "model.revoke",
    ]  # fmt: skip


def test_signing_needs_no_home_and_makes_none(run: Run, people: People, tmp_path: Path) -> None:
    hold(run, people)
    with closing(Home.open(tmp_path / "home")) as home:
        register(home, 1, released=False)
    run("release", "pump@1", "--out", "r.json")
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    assert run("release", "sign", "r.json", "--key", people.key("builder"))["signed_now"] == ["releases"]
    assert run("keys", "ceremony", "status", "r.json")["needs"][0]["missing"] == 1
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("name", "code"), [("mallory", "release.ceremony"), ("nobody", "release.keys"), ("alice", "release.ceremony")]
)
def test_a_file_that_a_key_may_not_sign_stays_as_it_was(
    run: Run, people: People, tmp_path: Path, name: str, code: str
) -> None:
    hold(run, people)
    with closing(Home.open(tmp_path / "home")) as home:
        register(home, 1, released=False)
    run("release", "pump@1", "--out", "r.json")
    before = (tmp_path / "r.json").read_bytes()
    assert run("release", "sign", "r.json", "--key", people.key(name)) == code
    assert (tmp_path / "r.json").read_bytes() == before


def test_a_broken_releases_key_is_an_error_and_no_reason_to_look_elsewhere(run: Run, tmp_path: Path) -> None:
    run("init")
    with closing(Home.open(tmp_path / "home")) as home:
        register(home, 1, released=False)
    (tmp_path / "home" / "keys" / "releases.pem").write_bytes(b"rubbish")
    assert run("release", "pump@1") == "release.keys"
    assert not list(tmp_path.glob("*.ceremony.json"))


def test_no_secret_is_an_argument_and_none_is_printed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pass").write_text("correct horse\n")
    made = run("keys", "create", "zoe", "--passphrase-file", "pass")
    assert made["sealed"]
    assert "horse" not in json.dumps(made)
    assert run("keys", "create", "zoe") == "release.exists"
    assert b"ENCRYPTED" in (tmp_path / "zoe.pem").read_bytes()
