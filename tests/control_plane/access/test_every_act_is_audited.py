"""Every act that changes something leaves one word in the log: who, from where, what, why.

The lists here are complete: a new command, route or write to the database that is in none of them fails a test.
"""

from __future__ import annotations

import ast
import json
import os
import pwd
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from functools import cache
from pathlib import Path

import click
import pytest
from alembic import command
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi.routing import APIRoute
from sqlalchemy import select, text
from starlette.routing import Route
from tests.control_plane.access.callers import AWAY, CLOSED, Caller, application, token
from tests.control_plane.things import MODEL, Served, add_device, enrolled, register, token_for

import lightship
from lightship.access.rules import RULES, Role
from lightship.alerting.evaluate import Evaluator
from lightship.api.device_api import DeviceApi
from lightship.api.guard import verb_of
from lightship.cli import cli
from lightship.fleet import director, enrolment
from lightship.fleet.reconciler import Reconciler
from lightship.home import Home
from lightship.registry import release, versions
from lightship.settings import load_settings
from lightship.storage.audit import now_ms
from lightship.storage.models import AuditEvent, Device, RetrainProposal
from lightship_agent.contract.device_api import Paths
from lightship_agent.link.identity import certificate_request

CONTROL_PLANE = Path(lightship.__file__).parent

#: Commands that change nothing in the home.
READS = {
    "alarm list", "alert list", "audit", "audit export", "audit verify", "data example", "data list", "data show",
    "device asked", "device list", "device show", "drift explain", "drift simulate", "experiment list",
    "experiment show", "keys show",
    "model explain", "model exposure", "model list", "model show", "release list", "retrain list", "rollout plan",
    "rollout status", "rollout watch", "status", "telemetry dead list", "token list",
}  # fmt: skip

#: Commands that change no home, but a file or a key of whoever calls them.
OUTSIDE = {
    "drift compare", "keys add-uri", "keys ceremony sign", "keys ceremony status", "keys create", "release sign",
    "release status",
}  # fmt: skip

#: Acts that have their own tests of what they write, because they train, migrate or serve: where.
ELSEWHERE = {
    "alert show": "tests/control_plane/alerting/test_cli.py; it only reads",
    "alert test": "tests/control_plane/alerting/test_cli.py; it needs a receiver",
    "broker check": "tests/control_plane/fleet/test_broker_check.py; it changes no home, and cleans up at the broker",
    "db upgrade": "test_a_migration_is_an_act",
    "ingest": "no act itself; what it stores are devices' reports",
    "init": "test_making_a_home_and_its_credential_anew_are_acts",
    "model import": "tests/control_plane/registry/test_pipeline.py",
    "model import-tensors": "tests/control_plane/registry/test_tensors.py",
    "retrain run": "tests/control_plane/ingest/test_retrain.py",
    "dashboards export": "tests/control_plane/dashboards/test_files.py; it writes files of its own, and no home",
    "telemetry dead show": "tests/control_plane/ingest/test_history.py; it only reads",
    "telemetry tail": "tests/control_plane/ingest/test_tail.py; it only reads",
    "telemetry otlp": "tests/control_plane/integrations/test_otlp.py; it only reads",
    "telemetry export": "tests/control_plane/ingest/test_history.py; it only reads",
    "train": "tests/control_plane/registry/test_pipeline.py",
    "up": "no act itself; what it runs has rows of its own",
}

#: Functions that write to the database and audit nothing, and why that is right.
UNAUDITED = {
    "alerting/courier.py: _claim": "a message to somebody: it is kept with its attempts",
    "alerting/courier.py: _settle": "the same",
    "alerting/evaluate.py: _count": "what devices report, counted: what alerts follow from",
    "alerting/evaluate.py: _prune": "what is long over is forgotten",
    "alerting/evaluate.py: _write": "what people are told of follows from facts, and is kept as a row of its own",
    "api/guard.py: _touch": "the last use of a token, kept beside it",
    "fleet/broker_guard.py: _reissue": "certificates that ran out are forgotten; their revocation was audited",
    "fleet/reconciler.py: _ask_devices": "that it was sent; who asked was audited",
    "fleet/reconciler.py: stop": "the lease of the reconciler: housekeeping between replicas",
    "fleet/reconciler.py: _ours": "the same",
    "monitoring/mqtt_ingest.py: _flush": "a device's report: kept as evidence with its sequence number",
}


@dataclass
class Stage:
    """A home with something to act on."""

    home: Home
    folder: Path
    rollout: str = ""
    entry: str = ""
    experiment: str = ""
    alert: str = ""
    mute: str = ""

    def run(self, *arguments: str) -> str:
        runner = CliRunner(env={"SSH_CONNECTION": "192.0.2.9 1 192.0.2.1 22", "SUDO_USER": "ann", "USER": "mallory"})
        done = runner.invoke(cli, ["--home", str(self.home.path), *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    def events(self) -> list[AuditEvent]:
        with self.home.database.read() as session:
            return list(session.scalars(select(AuditEvent).order_by(AuditEvent.seq)))

    def start(self) -> None:
        said = self.run("rollout", "start", f"{MODEL}@1", "--no-labels", "--json")
        self.rollout = json.loads(said)["id"]

    def pause(self) -> None:
        self.start()
        self.run("rollout", "pause", self.rollout)

    def grant(self) -> None:
        self.run("token", "create", "old", "--role", "viewer")

    def prepare_experiment(self) -> None:
        self.assign()
        release.release(self.home, f"{MODEL}@2", actor="user:test")

    def experiment_runs(self) -> None:
        self.prepare_experiment()
        said = self.run("experiment", "start", "pumps", f"{MODEL}@2", "--share", "0.3", "--json")
        self.experiment = json.loads(said)["id"]

    def alarmed(self) -> None:
        with self.home.database.write() as session:
            session.get_one(Device, "press-1").cloned_at = 1
        settings = load_settings({}, {"home": str(self.home.path), "alert_group_seconds": 0})
        Evaluator(self.home, settings, [], 0).look(now_ms())
        (found,) = (a for a in json.loads(self.run("alert", "list", "--json"))["alerts"] if a["kind"] == "clone")
        self.alert = found["id"]

    def muted(self) -> None:
        self.mute = json.loads(self.run("alert", "mute", "silent", "--for", "2h", "--reason", "r", "--json"))["id"]

    def begin(self) -> None:
        self.run("keys", "ceremony", "begin", "--renew", "root", "--out", str(self.folder / "a.json"))

    def propose(self) -> None:
        self.run("release", "publish", f"{MODEL}@2", "--out", str(self.folder / "a.json"))

    def expect(self) -> None:
        said = self.run("device", "preauthorise", "--serial", "12", "--json")
        (self.entry,) = json.loads(said)["entries"]

    def wait(self, device: str) -> None:
        with self.home.database.write() as session:
            session.get_one(Device, device).state = "pending"

    def assign(self) -> None:
        with self.home.database.write() as session:
            version = versions.get(session, MODEL, 1)
            director.assign(session, self.home.keys, device="press-1", version=version, rollout="r", actor="user:test")


@pytest.fixture
def stage(home: Home, tmp_path: Path) -> Stage:
    register(home, 1)
    register(home, 2, released=False)
    add_device(home, "press-1")
    add_device(home, "press-2")
    add_device(home, "press-3", state="pending")
    proposal = RetrainProposal(
        id="p1", model=MODEL, status="proposed", reason="r", excluded=[], since=0, created_at=1, updated_at=1
    )
    with home.database.write() as session:
        session.add(proposal)
    rows = "".join(f"{i},{i % 7},{'no' if i % 2 else 'yes'}\n" for i in range(40))
    (tmp_path / "rows.csv").write_text(f"a,b,y\n{rows}")
    (tmp_path / "readings.csv").write_text("speed,temperature,current,vibration\n1,2,3,4\n")
    return Stage(home, tmp_path)


@dataclass(frozen=True)
class Act:
    """How an act is done, what has to be there before, and the verb it leaves."""

    verb: str
    arguments: str
    before: Callable[[Stage], object] = lambda _: None
    says_why: bool = True


COMMANDS = {
    "broker home-assistant": Act("broker.admit", "--out {folder}/home-assistant", says_why=False),
    "alert ack": Act("alert.acknowledge", "{alert}", lambda s: s.alarmed()),
    "alert mute": Act("alert.mute", "silent --for 2h"),
    "alert unmute": Act("alert.unmute", "{mute}", lambda s: s.muted()),
    "data add": Act("data.add", "{folder}/rows.csv --name rows --target y", says_why=False),
    "device ask": Act("device.ask", "press-1 rebirth --wait 0", says_why=False),
    "device approve": Act("device.approve", "press-3", says_why=False),
    "device clear-clone": Act("device.clear-clone", "press-1"),
    "device preauthorise": Act("device.preauthorise", "--serial 12", says_why=False),
    "device preauthorised": Act("device.withdraw", "--withdraw {entry}", lambda s: s.expect(), says_why=False),
    "device retry": Act("device.assign", "press-1", Stage.assign, says_why=False),
    "device revoke": Act("device.revoke", "press-1"),
    "device token": Act("token.create", "", says_why=False),
    "experiment start": Act("experiment.start", "pumps pump@2 --shadow", Stage.prepare_experiment),
    "experiment stop": Act("experiment.stop", "{experiment}", Stage.experiment_runs),
    "keys ceremony begin": Act("keys.propose", "--renew root --out {folder}/a.json"),
    "keys ceremony finish": Act("keys.finish", "{folder}/a.json", lambda s: s.begin(), says_why=False),
    "keys revoke": Act("keys.finish", "{keyid}"),
    "keys rotate": Act("keys.finish", "timestamp"),
    "model alias": Act("model.alias", "pump@1 champion", says_why=False),
    "release export": Act("release.export", "--device press-1 -o {folder}/press.media", Stage.assign, says_why=False),
    "release finish": Act("model.release", "{folder}/a.json", lambda s: s.propose(), says_why=False),
    "release publish": Act("model.release", "pump@2", says_why=False),
    "release revoke": Act("model.revoke", "pump@1"),
    "retrain dismiss": Act("retrain.dismiss", "p1"),
    "rollout abort": Act("rollout.abort", "{rollout}", Stage.start),
    "rollout pause": Act("rollout.pause", "{rollout}", Stage.start),
    "rollout resume": Act("rollout.resume", "{rollout}", Stage.pause),
    "rollout start": Act("rollout.start", "pump@1 --no-labels"),
    "token create": Act("access.grant", "ci --role viewer"),
    "token revoke": Act("access.withdraw", "old", Stage.grant),
}
ROUTES = {
    "/api/v1/alerts/{alert}/acknowledge": Act("alert.acknowledge", "{}", lambda s: s.alarmed()),
    "/api/v1/devices/{device}/approve": Act("device.approve", "{}", lambda s: s.wait("press-1"), says_why=False),
    "/api/v1/devices/{device}/clear-clone": Act("device.clear-clone", "{}"),
    "/api/v1/devices/{device}/retry": Act("device.assign", "{}", Stage.assign, says_why=False),
    "/api/v1/devices/{device}/revoke": Act("device.revoke", "{}"),
    "/api/v1/experiments": Act(
        "experiment.start", '{"group": "pumps", "reference": "pump@2", "shadow": true}', Stage.prepare_experiment
    ),
    "/api/v1/experiments/{experiment}/stop": Act("experiment.stop", "{}", Stage.experiment_runs),
    "/api/v1/join-tokens": Act("token.create", "{}", says_why=False),
    "/api/v1/mutes": Act("alert.mute", '{"what": "silent", "seconds": 7200}'),
    "/api/v1/mutes/{mute}/end": Act("alert.unmute", "{}", lambda s: s.muted()),
    "/api/v1/releases": Act("model.release", '{"reference": "pump@2"}', says_why=False),
    "/api/v1/releases/revoke": Act("model.revoke", '{"reference": "pump@1"}'),
    "/api/v1/rollouts": Act("rollout.start", '{"reference": "pump@1", "require_labels": false}'),
    "/api/v1/rollouts/{rollout}/abort": Act("rollout.abort", "{}", Stage.start),
    "/api/v1/rollouts/{rollout}/pause": Act("rollout.pause", "{}", Stage.start),
    "/api/v1/rollouts/{rollout}/resume": Act("rollout.resume", "{}", Stage.pause),
    "/api/v1/tokens": Act("access.grant", '{"name": "ci", "role": "viewer"}'),
    "/api/v1/tokens/{name}/revoke": Act("access.withdraw", "{}", Stage.grant),
}
WHY = "because it was time"


def leaves(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(command, click.Group):
        if command.invoke_without_command:
            yield " ".join(words)
        for name, below in command.commands.items():
            yield from leaves(below, (*words, name))
    else:
        yield " ".join(words)


def test_every_command_is_known_to_read_or_to_act() -> None:
    known = [*READS, *OUTSIDE, *ELSEWHERE, *COMMANDS]
    assert sorted(leaves(cli)) == sorted(known)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_that_acts_says_who_from_where_what_and_why(stage: Stage, words: str) -> None:
    act = COMMANDS[words]
    act.before(stage)
    before = len(stage.events())
    keyid = next(iter(stage.home.releases.in_force().role_keys("timestamp").keyids))
    known = {"folder": stage.folder, "rollout": stage.rollout, "entry": stage.entry, "keyid": keyid}
    known |= {"experiment": stage.experiment, "alert": stage.alert, "mute": stage.mute}
    arguments = act.arguments.format(**known).split()
    stage.run(*words.split(), *arguments, *(["--reason", WHY] if act.says_why else []))
    found = stage.events()[before:]
    (event,) = (e for e in found if e.verb == act.verb)
    assert not act.says_why or event.detail["reason"] == WHY
    assert {e.actor for e in found} == {f"user:{pwd.getpwuid(os.getuid()).pw_name}"}  # whatever USER says
    assert {e.origin for e in found} == {"ssh 192.0.2.9, sudo by ann"}


@pytest.mark.parametrize("words", sorted(READS - {"rollout watch", "drift explain"}))
def test_a_command_that_reads_leaves_nothing(stage: Stage, words: str) -> None:
    if words == "experiment show":
        stage.experiment_runs()
    reference = {
        "data example": ["iris", "--out", str(stage.folder / "iris.csv")], "data show": ["rows"],
        "device asked": ["press-1"],
        "device show": ["press-1"], "drift simulate": ["--runs", "4"], "experiment show": [stage.experiment],
        "model exposure": ["pump@1"], "model show": ["pump@1", "--json"],
        "model explain": ["pump@1", str(stage.folder / "readings.csv"), "--permutations", "3"],
        "rollout plan": ["pump@1", "--no-labels"],
    }  # fmt: skip
    if words == "data show":
        stage.run("data", "add", str(stage.folder / "rows.csv"), "--name", "rows", "--target", "y")
    before = len(stage.events())
    stage.run(*words.split(), *reference.get(words, []))
    assert len(stage.events()) == before


def test_every_route_that_changes_something_is_known(home: Home) -> None:
    changing = {
        r.path
        for r in application(home).routes
        if isinstance(r, APIRoute) and (verb := verb_of(r.endpoint)) is not None and RULES[verb].changes
    }
    assert changing == set(ROUTES)


@pytest.mark.parametrize("path", ROUTES)
def test_a_route_that_acts_says_who_from_where_what_and_why(stage: Stage, path: str) -> None:
    act = ROUTES[path]
    act.before(stage)
    shown = token(stage.home, Role.ADMIN, name="night-shift")
    before = len(stage.events())
    body = json.loads(act.arguments) | ({"reason": WHY} if act.says_why else {})
    things = {"rollout": stage.rollout, "experiment": stage.experiment, "alert": stage.alert, "mute": stage.mute}
    where = path.format(device="press-1", name="old", **things)
    answer = Caller(application(stage.home, CLOSED), shown).post(where, body)
    assert answer.status_code in (200, 201), answer.text
    (event,) = stage.events()[before:]
    assert (event.verb, event.actor, event.origin) == (act.verb, "token:night-shift", AWAY)
    assert not act.says_why or event.detail["reason"] == WHY


def test_a_migration_is_an_act(home: Home) -> None:
    with home.database.write() as session:
        session.execute(text("delete from audit_events"))
    home.close()
    config = home.database._alembic()
    command.downgrade(config, "-1")
    stage = Stage(home, home.path)
    stage.run("db", "upgrade")
    (event,) = stage.events()
    assert (event.verb, event.actor[:5], event.origin[:3]) == ("home.upgrade", "user:", "ssh")
    assert event.detail["from"] < event.detail["to"]
    stage.run("db", "upgrade")
    assert len(stage.events()) == 1


def test_making_a_home_and_its_credential_anew_are_acts(tmp_path: Path) -> None:
    stage = Stage(Home.at(tmp_path / "home"), tmp_path)
    stage.run("init")
    assert [(e.verb, e.origin) for e in stage.events()] == [("home.create", "ssh 192.0.2.9, sudo by ann")]
    stage.home.token_path.unlink()
    stage.run("init")
    assert [(e.verb, e.subject) for e in stage.events()][1:] == [("access.grant", "operator-token")]
    stage.run("init")
    assert len(stage.events()) == 2
    stage.home.close()


def test_what_the_reconciler_signs_anew_is_an_act_of_its_own(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(home, home.path)
    reconciler = Reconciler(home, load_settings({}, {"home": str(home.path)}), lambda _: None)
    monkeypatch.setattr("lightship.fleet.reconciler.datetime", InFiveDays)
    before = len(stage.events())
    reconciler.tick()
    found = [(e.verb, e.subject, e.actor) for e in stage.events()[before:]]
    for role in ("snapshot", "timestamp"):
        assert ("release.renew", role, "lightship:reconciler") in found


class InFiveDays(datetime):
    """The clock of a server that was off for a while."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> InFiveDays:
        return super().now(tz) + timedelta(days=5)


def test_every_write_to_the_database_audits_or_is_known_not_to_be_an_act() -> None:
    functions = dict(written_functions())
    silent = {where for where, function in functions.items() if not audits(where, function, set())}
    assert len(functions) > 25
    assert silent == set(UNAUDITED)


Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def package() -> dict[str, list[tuple[str, Function]]]:
    """Every function by its name, with where it is."""
    found: dict[str, list[tuple[str, Function]]] = {}
    for path in sorted(CONTROL_PLANE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Function):
                where = f"{path.relative_to(CONTROL_PLANE)}: {node.name}"
                found.setdefault(node.name, []).append((where, node))
    return found


def written_functions() -> Iterator[tuple[str, Function]]:
    """Functions that open a transaction which may write."""
    for defined in package().values():
        for where, function in defined:
            if any(ast.unparse(call.func).endswith("database.write") for call in calls(function)):
                yield where, function


def calls(function: Function) -> list[ast.Call]:
    """The calls of a function, without those of functions inside it."""
    inside = [n for n in ast.walk(function) if isinstance(n, Function) and n is not function]
    theirs = {id(n) for inner in inside for n in ast.walk(inner)}
    return [n for n in ast.walk(function) if isinstance(n, ast.Call) and id(n) not in theirs]


def audits(where: str, function: Function, seen: set[str]) -> bool:
    """Whether a function, or one of ours that it calls, appends to the log."""
    seen.add(where)
    named = {a.asname: a.name for n in ast.walk(function) if isinstance(n, ast.ImportFrom) for a in n.names if a.asname}
    for call in calls(function):
        owner, _, name = ast.unparse(call.func).rpartition(".")
        owner, name = named.get(owner, owner), named.get(name, name)
        if (owner, name) == ("audit", "append"):
            return True
        for there, below in package().get(name, []):
            mine = there.partition(":")[0] == where.partition(":")[0]
            reached = owner == Path(there.partition(":")[0]).stem or (owner in ("", "self") and (mine or not owner))
            if reached and there not in seen and audits(there, below, seen):
                return True
    return False


#: What devices may change about themselves, and the word it leaves.
DEVICE_ACTS = {
    Paths.ENROL: "device.enrol",
    Paths.RENEW: "device.renew",
    Paths.RECOVER: "device.recover",
    Paths.RECOVERY_NONCE: "",  # a number to be signed; it is kept for a minute
    Paths.REPLY: "device.answer",
    Paths.TELEMETRY: "",  # reports
}


def test_every_route_by_which_a_device_changes_something_is_known(home: Home) -> None:
    app = DeviceApi(home, "default", None).app()
    changing = {r.path for r in app.routes if isinstance(r, Route) and "POST" in (r.methods or ())}
    assert changing == set(DEVICE_ACTS)


def test_what_a_device_does_says_from_where(home: Home, served: Served, tmp_path: Path) -> None:
    stage = Stage(home, tmp_path)
    enrolled(home, served.url, tmp_path, "press-9")
    event = stage.events()[-1]
    assert (event.verb, event.actor, event.origin) == ("device.enrol", "device:press-9", "127.0.0.1")


def test_a_certificate_that_is_issued_again_for_a_lost_answer_is_written_down(home: Home) -> None:
    stage = Stage(home, home.path)
    key = ec.generate_private_key(ec.SECP256R1())
    csr, shown = certificate_request(key, "press-9").decode(), token_for(home, "press-9")
    for _ in range(2):
        with home.database.write() as session:
            enrolment.enrol(session, home.ca, token=shown, device="press-9", csr=csr, tenant="default")
    assert [e.verb for e in stage.events()][-2:] == ["device.enrol", "device.certify-again"]


def test_what_somebody_says_of_himself_moves_nobodys_cursor(home: Home) -> None:
    reason = "\x1b[2J\x1b]0;owned\x07 \u202eelpmis\x9b31m"
    runner = CliRunner(env={"SUDO_USER": "\x1b[8mann"})
    arguments = ["token", "create", "ci", "--role", "viewer", "--reason", reason]
    assert runner.invoke(cli, ["--home", str(home.path), *arguments]).exit_code == 0
    said = runner.invoke(cli, ["--home", str(home.path), "audit"]).output
    assert "owned" in said or "sudo by" in said
    assert not set(said) & set("\x1b\x07\x9b\u202e")


def test_whoever_acts_by_himself_is_called_by_one_pattern() -> None:
    """A person, a program with a token, a device, or a part of Lightship: the log can be searched by it."""
    said = set()
    for path in CONTROL_PLANE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.keyword)
                and node.arg == "actor"
                and isinstance(node.value, ast.Constant | ast.JoinedStr)
            ):
                said.add(ast.unparse(node.value).strip("f'\""))
            if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Constant):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                if any(ast.unparse(t) == "ACTOR" for t in targets):
                    said.add(str(node.value.value))
    assert len(said) >= 4
    assert [actor for actor in said if not actor.startswith(("lightship:", "device:{"))] == []
