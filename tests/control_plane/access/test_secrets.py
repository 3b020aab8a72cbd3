"""Secrets lie in their own files with mode 0600, and are nowhere else: not in a log at level debug, not in the
arguments or the environment of any process, not in the database, not in an answer.

A real control plane with its broker, and a real device that enrols, updates and reports, are searched for every secret
that there is.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from tests.control_plane.access.callers import application
from tests.control_plane.access.whole_system import SECRET_IN_OUR_ENVIRONMENT, WholeSystem, key_material, wait_for
from tests.control_plane.things import MODEL, make_champion, register

from lightship.home import Home
from lightship.integrations import mosquitto

#: Where a secret may lie, and nowhere else. All of these files are for their owner only.
KEPT = (
    "home/keys/*",
    "home/ca/*.key",
    "home/broker/*.key",
    "home/broker/*-password",
    "home/broker/rumqttd.toml",
    "home/broker/broker.json",  # how workers of their own reach it
    "home/operator-token",
    "press-1/identity/key.pem",
    "press-1/identity/broker-password",
    "*.token",
    "alice.pem",
    "alice.passphrase",
)
PASSPHRASE = "correct horse battery staple, sealed"


@dataclass
class Searched:
    """A system that has lived for a while, and every secret that came to be."""

    folder: Path
    secrets: dict[str, str] = field(default_factory=dict)  # the secret -> what it is
    answers: dict[str, bytes] = field(default_factory=dict)
    processes: dict[str, str] = field(default_factory=dict)

    def found_in(self, data: bytes) -> list[str]:
        """Which secrets some bytes hold."""
        return [what for secret, what in self.secrets.items() if secret.encode() in data]


@pytest.fixture(scope="module", params=["embedded", "mosquitto"])
def searched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    if request.param == "mosquitto" and mosquitto.find() is None:
        pytest.skip("mosquitto is not installed")
    folder = tmp_path_factory.mktemp(f"whole-{request.param}")
    with WholeSystem(folder, request.param) as system:
        yield live(system)


def live(system: WholeSystem) -> Searched:
    """Everything that handles a secret happens once: enrolment, update, reports, signing in, refusals."""
    out = Searched(system.folder, processes=system.seen)
    system.lightship("init")
    with_home(system.home)
    for name, role in (("admin", "admin"), ("shift", "operator")):
        system.lightship("token", "create", name, "--role", role, "--out", str(system.folder / f"{name}.token"))
    shift, admin = ((system.folder / f"{n}.token").read_text() for n in ("shift", "admin"))
    printed = system.lightship("token", "create", "printed", "--role", "viewer")
    system.up()
    joined = system.folder / "press-1.token"
    system.lightship("device", "token", "--group", "pumps", "--device", "press-1", "--out", str(joined))
    system.agent(
        "enrol", "--server", system.addresses["devices"], "--device", "press-1", "--token-file", str(joined),
        device="press-1",
    )  # fmt: skip
    system.start_device("press-1")
    with system.client(shift) as client:
        started = client.post("/api/v1/rollouts", json={"reference": f"{MODEL}@1", "require_labels": False})
        assert started.status_code == 201, started.text
        wait_for(lambda: client.get("/api/v1/devices/press-1").json()["version"] == 1)
        remote = client.post("/api/v1/join-tokens", json={}).json()["token"]
        client.post(
            "/api/v1/tokens", json={"name": "x", "role": "admin", "token": shift}
        )  # a secret where none belongs
    with system.client() as browser:
        cookie = browser.post("/login", data={"token": admin}).cookies["lightship_session"]
        browser.post("/login", data={"token": shift[:-1] + "!"})
        browser.get("/", headers={"Authorization": f"Bearer {remote}"})
    ceremony(system)
    search(out, system, admin)
    secrets = {
        joined.read_text().split(".")[1]: "the join token", remote.split(".")[1]: "a join token from the API",
        admin: "the admin's token", shift: "the operator's token", printed: "the printed token",
        (system.home / "operator-token").read_text(): "the operator-token", cookie: "a session",
        SECRET_IN_OUR_ENVIRONMENT: "a secret of the shell",
        PASSPHRASE: "a passphrase",
    }  # fmt: skip
    for path in (p for p in system.folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if b"PRIVATE KEY" in data:
            secrets |= dict.fromkeys(key_material(data.decode(errors="replace")), f"the key {path.name}")
        if path.name.endswith("-password"):
            secrets[data.decode()] = f"the password {path.name}"
    out.secrets = secrets
    return out


def with_home(path: Path) -> None:
    """A released version to roll out."""
    home = Home.open(path)
    register(home, 1)
    make_champion(home, 1)
    home.close()


def ceremony(system: WholeSystem) -> None:
    """A key under a passphrase takes the release list over."""
    alice, paper, sealed = (system.folder / n for n in ("alice", "a.json", "alice.passphrase"))
    sealed.write_text(PASSPHRASE)
    sealed.chmod(0o600)
    system.lightship("keys", "create", str(alice), "--passphrase-file", str(sealed))
    system.lightship("keys", "ceremony", "begin", "--releases", f"{alice}.pub.json", "--out", str(paper))
    key = ("--key", f"{alice}.pem", "--passphrase-file", str(sealed))
    system.lightship("keys", "ceremony", "sign", str(paper), *key)
    system.lightship("keys", "ceremony", "finish", str(paper))


def search(out: Searched, system: WholeSystem, admin: str) -> None:
    """Every page and every answer, as somebody who may see all of them."""
    home = Home.open(system.home)
    paths = [r.path for r in application(home).routes if isinstance(r, APIRoute) and "GET" in r.methods]
    home.close()
    named = {
        "device": "press-1",
        "model": MODEL,
        "version": "1",
        "rollout": "none",
        "name": "live.js",
        "experiment": "none",
        "alert": "none",
    }
    with system.client(admin) as client:
        for path in paths:
            if path != "/events":
                answer = client.get(path.format(**named))
                headers = "".join(f"{k}: {v}\n" for k, v in answer.headers.items())
                out.answers[path] = headers.encode() + answer.content


def files(searched: Searched) -> Iterator[tuple[str, Path]]:
    for path in sorted(searched.folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(searched.folder)), path


def is_kept(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in KEPT)


@pytest.mark.slow
def test_there_are_secrets_of_every_kind_to_search_for_and_the_search_finds_them_where_they_are(
    searched: Searched,
) -> None:
    held = {what for name, path in files(searched) if is_kept(name) for what in searched.found_in(path.read_bytes())}
    for kind in (
        "the join token",
        "the admin's token",
        "the operator-token",
        "ca.key",
        "key.pem",
        "alice.pem",
        "passphrase",
    ):
        assert any(kind in what for what in held), (kind, held)
    assert len(searched.secrets) > 15


@pytest.mark.slow
def test_no_log_no_database_and_no_other_file_holds_a_secret(searched: Searched) -> None:
    logs = [p for n, p in files(searched) if n.endswith(".log")]
    said = "".join(p.read_text(errors="replace") for p in logs)
    for word in ("DEBUG", "committed", "access.role"):
        assert word in said
    leaks = {n: found for n, p in files(searched) if not is_kept(n) and (found := searched.found_in(p.read_bytes()))}
    assert leaks == {}


@pytest.mark.slow
def test_no_process_shows_a_secret_in_its_arguments(searched: Searched) -> None:
    leaks = {said: found for said in list(searched.processes) if (found := searched.found_in(said.encode()))}
    assert leaks == {}


@pytest.mark.slow
def test_no_child_of_ours_has_a_secret_in_its_environment_not_even_one_that_we_were_given(searched: Searched) -> None:
    """The two programs themselves have what the shell gave them; what they start has not."""
    seen = list(searched.processes.items())
    started = {said: env for said, env in seen if not re.search(r" -m lightship(_agent)? ", said)}
    kinds = ("check_child", "probe", "iotcore", "mosquitto")
    assert sum(any(kind in said for said in started) for kind in kinds) >= 2, list(started)
    leaks = {said: found for said, env in started.items() if (found := searched.found_in(env.encode()))}
    assert leaks == {}
    ours = [env.replace(SECRET_IN_OUR_ENVIRONMENT, "") for _, env in seen]
    assert [found for env in ours for found in searched.found_in(env.encode())] == []


@pytest.mark.slow
def test_no_answer_of_the_api_and_no_page_holds_a_secret(searched: Searched) -> None:
    assert len(searched.answers) > 20
    assert {path: found for path, data in searched.answers.items() if (found := searched.found_in(data))} == {}


@pytest.mark.slow
def test_what_is_secret_is_for_its_owner_only_file_and_folder(searched: Searched) -> None:
    wrong = {}
    for name, path in files(searched):
        if searched.found_in(path.read_bytes()) and stat.S_IMODE(path.stat().st_mode) != 0o600:
            wrong[name] = oct(path.stat().st_mode)
    for name in ("home", "press-1", "press-1/identity"):
        mode = stat.S_IMODE((searched.folder / name).stat().st_mode)
        if mode & 0o077:
            wrong[name] = oct(mode)
    assert wrong == {}
