"""The guard before the operator API: every route, every role, every wrong token; and that nothing changed."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from sqlalchemy import delete, func, select, update
from tests.control_plane.access.callers import AWAY, CLOSED, OPEN, Caller, Unread, application, contents, token
from tests.control_plane.things import add_device, register

from lightship.access import tokens
from lightship.access.rules import RULES, Role, Verb, covers
from lightship.api.guard import MAX_BODY, Policy, verb_of
from lightship.api.operator_api import create_operator_app
from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import ApiToken, AuditEvent, JoinToken


@pytest.fixture
def app(home: Home) -> FastAPI:
    return application(home)


def routes(app: FastAPI) -> list[tuple[str, str, Verb]]:
    """Method, a path that leads there, verb."""
    out = []
    for route in app.routes:
        assert isinstance(route, APIRoute), f"{route} does not stand behind the guard"
        verb = verb_of(route.endpoint)
        assert verb is not None, f"{route.path} declares no verb"
        path = route.path
        for name in ("device", "rollout", "model", "name", "version"):
            path = path.replace(f"{{{name}}}", "1" if name == "version" else "none")
        out += [(method, path, verb) for method in route.methods - {"HEAD"}]
    return out


def events(home: Home) -> int:
    with home.database.read() as session:
        return session.scalar(select(func.count()).select_from(AuditEvent)) or 0


def code(answer: object) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]  # type: ignore[attr-defined]


def test_every_route_declares_what_it_does_and_every_verb_has_a_route(app: FastAPI) -> None:
    found = routes(app)
    assert len(found) > 30
    assert {verb for _, _, verb in found} == set(Verb)
    for method, path, verb in found:
        sign_in = path in ("/login", "/logout")
        assert (method == "GET") != RULES[verb].changes or verb is Verb.ROLLOUT_PLAN or sign_in, path


def test_a_route_that_declares_nothing_is_closed_even_to_the_admin(home: Home, app: FastAPI) -> None:
    called = []

    @app.get("/api/v1/forgotten")
    def forgotten() -> str:
        called.append(1)
        return "secret"

    answer = Caller(app, token(home, Role.ADMIN)).get("/api/v1/forgotten")
    assert (answer.status_code, called) == (500, [])


@pytest.mark.parametrize("role", list(Role))
def test_each_role_passes_exactly_the_routes_its_rule_allows(home: Home, app: FastAPI, role: Role) -> None:
    somebody = Caller(app, token(home, role))
    before = events(home)
    for method, path, verb in routes(app):
        if path == "/events":
            continue  # never ends; its guard is the same
        answer = somebody.ask(method, path, json={"no such field": 1} if method == "POST" else None)
        least = RULES[verb].least
        if least is None or covers(role, least):
            assert answer.status_code not in (401, 403, 500) or path == "/login", (path, answer.text)
        else:
            assert code(answer) == (403, "access.role"), path
    assert events(home) == before


def test_nobody_gets_nothing_where_reads_are_closed_but_the_health_check_and_the_way_in(app: FastAPI) -> None:
    nobody = Caller(app)
    for method, path, verb in routes(app):
        answer = nobody.ask(method, path, json={} if method == "POST" else None)
        if verb is Verb.OPEN:
            assert answer.status_code in (200, 303, 401, 404), path
        elif path.startswith(("/api/", "/events", "/metrics", "/openapi")):
            assert code(answer) == (401, "access.token"), path
            assert answer.headers["www-authenticate"] == "Bearer"
        else:
            assert (answer.status_code, answer.headers["location"][:12]) == (303, "/login?next="), path


def test_nobody_may_read_and_not_act_where_reads_are_open(home: Home) -> None:
    app = application(home, OPEN)
    before = events(home)
    for method, path, verb in routes(app):
        if path == "/events":
            continue
        answer = Caller(app).ask(method, path, json={} if method == "POST" else None)
        if RULES[verb].changes or verb is Verb.TOKEN_LIST:
            assert code(answer) == (401, "access.token"), path
        else:
            assert answer.status_code not in (403, 500), path
    assert events(home) == before


def test_a_token_for_another_environment_opens_nothing_not_even_for_an_admin(home: Home, app: FastAPI) -> None:
    stranger = Caller(app, token(home, Role.ADMIN, environment="staging"))
    for method, path, verb in routes(app):
        if verb is not Verb.OPEN:
            answer = stranger.ask(method, path, json={} if method == "POST" else None)
            assert answer.status_code == 403, path
            assert "for staging; this server is production" in answer.text.replace("&#39;", "'"), path


@pytest.mark.parametrize(
    "header",
    [
        "Bearer ", "Bearer x", "Bearer lst_", "Basic {token}", "{token}", "Bearer {token}x", "Bearer x {token}",
        "Bearer lst_000000000000_" + "A" * 43, "Digest username=x",
    ],
)  # fmt: skip
def test_what_is_not_a_good_token_is_401_also_where_reads_are_open(home: Home, header: str) -> None:
    shown = token(home, Role.ADMIN, environment="development")
    app = application(home, OPEN)
    answer = Caller(app).get("/api/v1/overview", Authorization=header.format(token=shown))
    assert code(answer) == (401, "access.token")


def test_a_revoked_and_an_expired_token_are_401_from_the_next_request_on(home: Home, app: FastAPI) -> None:
    leaver, late = Caller(app, token(home, Role.OPERATOR)), Caller(app, token(home, Role.VIEWER))
    assert leaver.get("/api/v1/overview").status_code == late.get("/api/v1/overview").status_code == 200
    with home.database.write() as session:
        tokens.revoke(session, "operator", actor="user:test", reason="left")
        row = session.get(ApiToken, "viewer")
        assert row is not None
        row.expires_at = audit.now_ms() - 1
    assert code(leaver.get("/api/v1/overview")) == code(late.get("/api/v1/overview")) == (401, "access.token")


def test_the_answer_to_a_wrong_token_does_not_tell_which_part_was_wrong(home: Home, app: FastAPI) -> None:
    shown = token(home, Role.VIEWER)
    wrong = [shown[:-1] + ("A" if shown[-1] != "A" else "B"), "lst_" + "0" * 12 + shown[16:], "x"]
    said = {Caller(app, w).get("/api/v1/overview").text for w in wrong}
    assert len(said) == 1
    assert shown[20:] not in said.pop()


def test_the_credential_in_the_home_is_an_admin_everywhere_until_its_file_is_replaced_or_removed(home: Home) -> None:
    app = application(home)
    first = home.token_path.read_text()
    assert Caller(app, first).get("/api/v1/tokens").status_code == 200
    home.token_path.write_text("another-credential-of-enough-length")
    assert code(Caller(app, first).get("/api/v1/tokens")) == (401, "access.token")
    assert Caller(app, "another-credential-of-enough-length").get("/api/v1/tokens").status_code == 200
    for emptied in ("", "\n"):
        home.token_path.write_text(emptied)
        assert Caller(app).get("/api/v1/tokens", Authorization="Bearer ").status_code == 401
    home.token_path.unlink()
    assert code(Caller(app, "another-credential-of-enough-length").get("/api/v1/tokens")) == (401, "access.token")
    assert Caller(app).get("/api/v1/tokens", Authorization="Bearer ").status_code == 401


def test_a_session_cookie_reads_and_never_acts(home: Home, app: FastAPI) -> None:
    shown = token(home, Role.ADMIN)
    signed_in = Caller(app).ask("POST", "/login", data={"token": shown})
    cookie = signed_in.cookies["lightship_session"]
    reader = Caller(app, cookie=cookie)
    assert reader.get("/api/v1/overview").status_code == reader.get("/").status_code == 200
    before = events(home)
    for method, path, verb in routes(app):
        if RULES[verb].changes:
            assert code(reader.ask(method, path, json={})) == (401, "access.token"), path
    assert events(home) == before


def test_who_calls_is_settled_before_the_body_is_read(home: Home, app: FastAPI) -> None:
    body = Unread()
    answer = Caller(app).ask("POST", "/api/v1/rollouts", content=body)
    assert (code(answer), body.read) == ((401, "access.token"), 0)


def test_a_body_without_end_is_refused_at_its_bound(home: Home, app: FastAPI) -> None:
    body = Unread(chunks=10_000, size=8_192)
    answer = Caller(app, token(home, Role.ADMIN)).ask("POST", "/api/v1/rollouts", content=body)
    assert code(answer) == (413, "wire.too-large")
    assert body.read <= MAX_BODY // 8_192 + 2


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"reference": 1}', b'{"reference": "pump", "canery": 2}', b"\xff"])
def test_a_malformed_body_is_422_with_a_code_and_is_not_repeated(home: Home, app: FastAPI, body: bytes) -> None:
    before = events(home)
    answer = Caller(app, token(home, Role.OPERATOR)).ask(
        "POST", "/api/v1/rollouts", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert 'canery": 2' not in answer.text
    assert events(home) == before + 1  # the token


def test_the_last_use_is_shown_with_the_address_it_came_from(home: Home, app: FastAPI) -> None:
    Caller(app, token(home, Role.VIEWER)).get("/api/v1/overview", **{"X-Forwarded-For": "198.51.100.77"})
    with home.database.read() as session:
        row = session.get(ApiToken, "viewer")
        assert row is not None
        assert row.last_used_from == AWAY
        assert audit.now_ms() - row.last_used_at < 60_000


def test_a_foreign_host_name_is_refused_before_anything_is_looked_at(home: Home) -> None:
    app = create_operator_app(home, ["dashboard"], CLOSED)
    shown = token(home, Role.ADMIN)
    assert Caller(app, shown).get("/api/v1/overview").status_code == 200
    assert Caller(app, shown).get("/api/v1/overview", Host="evil.example").status_code == 400


def test_a_viewer_and_an_operator_do_not_reach_the_release_keys_and_acting_needs_none_of_them(home: Home) -> None:
    """The three offline roles' keys are away, as the guide advises: all but releases goes on."""
    register(home, 1)
    version = register(home, 2, released=False)
    add_device(home, "press-1")
    add_device(home, "press-2")
    app = application(home)
    for role in ("root", "targets", "releases"):
        for path in (home.path / "keys").glob(f"{role}*"):
            path.unlink()
    kept = contents(home.path / "tuf" / "metadata")
    said = {"reference": f"{version.model}@{version.version}", "reason": "because"}
    for role in (Role.VIEWER, Role.OPERATOR):
        somebody = Caller(app, token(home, role))
        assert code(somebody.post("/api/v1/releases", {"reference": said["reference"]})) == (403, "access.role")
        assert code(somebody.post("/api/v1/releases/revoke", said)) == (403, "access.role")
    operator = Caller(app, token(home, Role.OPERATOR, name="shift"))
    started = operator.post("/api/v1/rollouts", {"reference": f"{version.model}@1", "require_labels": False})
    assert started.status_code == 201, started.text
    for act in ("pause", "resume", "abort"):
        assert operator.post(f"/api/v1/rollouts/{started.json()['id']}/{act}", {"reason": "x"}).status_code == 200
    assert operator.post("/api/v1/join-tokens", {"device": "press-3"}).status_code == 201
    assert operator.post("/api/v1/devices/press-1/revoke", {"reason": "stolen"}).status_code == 200
    releaser = Caller(app, token(home, Role.RELEASER))
    assert code(releaser.post("/api/v1/releases", {"reference": said["reference"]})) == (409, "release.keys")
    assert contents(home.path / "tuf" / "metadata") == kept


def test_a_join_token_and_an_api_token_are_answers_that_nobody_keeps(home: Home, app: FastAPI) -> None:
    admin = Caller(app, token(home, Role.ADMIN))
    made = admin.post("/api/v1/tokens", {"name": "pager", "role": "viewer", "reason": "on call"})
    joined = admin.post("/api/v1/join-tokens", {})
    assert made.headers["cache-control"] == joined.headers["cache-control"] == "no-store"
    assert made.json()["environment"] == "production"
    assert Caller(app, made.json()["token"]).get("/api/v1/overview").status_code == 200
    with home.database.read() as session:
        assert session.scalar(select(func.count()).select_from(JoinToken)) == 1
    assert "secret" not in admin.get("/api/v1/tokens").text
    admin.post("/api/v1/tokens/pager/revoke", {"reason": "over"})
    assert Caller(app, made.json()["token"]).get("/api/v1/overview").status_code == 401


def test_what_needs_a_reason_is_refused_without_one(home: Home, app: FastAPI) -> None:
    admin = Caller(app, token(home, Role.ADMIN))
    before = events(home)
    for path in ("/api/v1/devices/press-1/revoke", "/api/v1/releases/revoke", "/api/v1/tokens/admin/revoke"):
        for body in ({}, {"reason": ""}, {"reference": "pump@1", "reason": ""}):
            assert code(admin.post(path, body)) == (422, "wire.malformed")
    assert events(home) == before


def test_the_environment_of_a_policy_is_what_its_tokens_are_checked_against(home: Home) -> None:
    shown = token(home, Role.VIEWER, environment="staging")
    for environment, status in (("staging", 200), ("production", 403), ("development", 403)):
        app = application(home, Policy(environment=environment, open_reads=False))
        assert Caller(app, shown).get("/api/v1/overview").status_code == status


def test_the_api_checks_the_chain_against_a_head_and_says_when_it_is_broken(home: Home, app: FastAPI) -> None:
    viewer = Caller(app, token(home, Role.VIEWER))
    whole = viewer.get("/api/v1/audit/verify").json()
    assert whole["whole"]
    with home.database.write() as session:
        audit.append(session, actor="user:test", verb="x", subject="y")
    assert viewer.get(f"/api/v1/audit/verify?head={whole['head']}").json()["since"] == 1
    with home.database.write() as session:
        session.execute(delete(AuditEvent).where(AuditEvent.verb == "x"))
        session.execute(update(AuditEvent).where(AuditEvent.seq == 1).values(actor="user:eve"))
    assert code(viewer.get("/api/v1/audit/verify")) == (500, "storage.corrupt")
