"""Signing in to the dashboard: a token for a cookie that only reads, and no way around."""

from __future__ import annotations

from urllib.parse import urljoin, urlsplit

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from tests.control_plane.access.callers import CLOSED, OPEN, Caller, application, token

from lightship.access import tokens
from lightship.access.rules import Role
from lightship.api.guard import Policy
from lightship.home import Home
from lightship.web.sign_in import landing


@pytest.fixture
def app(fresh_home: Home) -> FastAPI:
    return application(fresh_home, CLOSED)


def sign_in(app: FastAPI, shown: str, back: str = "", **headers: str) -> object:
    return Caller(app).ask("POST", "/login", data={"token": shown, "next": back}, headers=headers)


def test_a_page_asks_for_a_token_and_leads_back_to_where_one_was(app: FastAPI, fresh_home: Home) -> None:
    asked = Caller(app).get("/audit?subject=press-1")
    assert (asked.status_code, asked.headers["location"]) == (303, "/login?next=%2Faudit%3Fsubject%3Dpress-1")
    form = Caller(app).get(asked.headers["location"])
    assert 'name="next" value="/audit?subject=press-1"' in form.text
    entered = sign_in(app, token(fresh_home, Role.VIEWER), "/audit?subject=press-1")
    assert (entered.status_code, entered.headers["location"]) == (303, "/audit?subject=press-1")
    page = Caller(app, cookie=entered.cookies["lightship_session"]).get("/audit?subject=press-1")
    assert page.status_code == 200
    assert "viewer <button>Sign out</button>" in page.text
    assert "production" in page.text


@pytest.mark.parametrize("secure", [True, False])
def test_the_cookie_is_for_our_pages_only_and_holds_nothing_of_the_token(fresh_home: Home, secure: bool) -> None:
    app = application(fresh_home, Policy("production", open_reads=False, secure_cookies=secure))
    shown = token(fresh_home, Role.VIEWER)
    set_cookie = sign_in(app, shown).headers["set-cookie"]
    attributes = {a.strip().lower() for a in set_cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/"} <= attributes
    assert ("secure" in attributes) == secure
    assert not any(shown[i : i + 12] in set_cookie for i in range(4, len(shown) - 12))
    assert shown[4:16] not in set_cookie


def test_a_wrong_token_gets_no_cookie_and_one_sentence(app: FastAPI, fresh_home: Home) -> None:
    shown = token(fresh_home, Role.VIEWER)
    for wrong in ("", "x", shown[:-1], fresh_home.token_path.read_text()[:-1]):
        answer = sign_in(app, wrong)
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers
        assert "unknown, expired or revoked" in answer.text
        assert shown not in answer.text


def test_a_token_for_another_environment_does_not_sign_in(app: FastAPI, fresh_home: Home) -> None:
    answer = sign_in(app, token(fresh_home, Role.ADMIN, environment="staging"))
    assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)
    assert "for staging; this server is production" in answer.text


def test_revoking_a_token_ends_the_sessions_it_began(app: FastAPI, fresh_home: Home) -> None:
    reader = Caller(app, cookie=sign_in(app, token(fresh_home, Role.VIEWER)).cookies["lightship_session"])
    assert reader.get("/").status_code == 200
    with fresh_home.database.write() as session:
        tokens.revoke(session, "viewer", actor="user:test", reason="x")
    assert reader.get("/").status_code == 303


def test_replacing_the_credential_in_the_home_ends_the_sessions_it_began(app: FastAPI, fresh_home: Home) -> None:
    reader = Caller(app, cookie=sign_in(app, fresh_home.token_path.read_text()).cookies["lightship_session"])
    assert reader.get("/").status_code == 200
    fresh_home.token_path.write_text("another-credential-of-enough-length")
    assert reader.get("/").status_code == 303


def test_a_cookie_of_another_process_or_a_forged_one_is_nothing(app: FastAPI, fresh_home: Home) -> None:
    cookie = sign_in(app, token(fresh_home, Role.VIEWER)).cookies["lightship_session"]
    after_restart = application(fresh_home, CLOSED)
    assert Caller(after_restart, cookie=cookie).get("/").status_code == 303
    name, until, seal = cookie.split(".")
    for forged in (f"admin.{until}.{seal}", f"{name}.{int(until) + 1}.{seal}", f"{name}.{until}.", "..", "x"):
        assert Caller(app, cookie=forged).get("/").status_code == 303


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://dashboard:8601"},
        {"Origin": "http://dashboard.evil.example"},
    ],
    ids=lambda h: " ".join(h.values()),
)
def test_a_form_that_another_site_sent_neither_signs_in_nor_out(
    app: FastAPI, fresh_home: Home, headers: dict[str, str]
) -> None:
    answer = sign_in(app, token(fresh_home, Role.VIEWER), **headers)
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    left = Caller(app).ask("POST", "/logout", headers=headers)
    assert (left.status_code, "set-cookie" in left.headers) == (403, False)


def test_a_browser_that_hides_its_origin_signs_in(app: FastAPI, fresh_home: Home) -> None:
    """Our pages send no referrer, so browsers send `Origin: null` with our own form."""
    answer = sign_in(app, token(fresh_home, Role.VIEWER), Origin="null", **{"Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 303
    assert sign_in(app, fresh_home.token_path.read_text(), Origin="http://dashboard").status_code == 303


def test_signing_out_takes_the_cookie_back(app: FastAPI) -> None:
    left = Caller(app).ask("POST", "/logout")
    assert (left.status_code, left.headers["location"]) == (303, "/login")
    assert 'lightship_session=""' in left.headers["set-cookie"]
    assert "Max-Age=0" in left.headers["set-cookie"]


@pytest.mark.parametrize(
    "wanted",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "",
        "evil",
        "/\r\nX: y",
        "/\t/",
    ],
)
def test_signing_in_never_leads_to_another_site(wanted: str) -> None:
    assert landing(wanted) == "/"


@given(wanted=st.text(max_size=30) | st.text("/\\\\:@?#.a\t\r\n%[]é日", max_size=12))
def test_whatever_the_form_says_one_lands_on_a_page_of_ours(wanted: str) -> None:
    found = landing(wanted)
    found.encode("latin-1")
    there = urlsplit(urljoin("http://dashboard/login", found))
    assert (there.scheme, there.netloc) == ("http", "dashboard")
    assert found.isprintable()


@pytest.mark.parametrize("origin", ["http://[", "[", "://"])
def test_an_origin_that_is_none_is_not_ours(app: FastAPI, fresh_home: Home, origin: str) -> None:
    assert sign_in(app, token(fresh_home, Role.VIEWER), Origin=origin).status_code == 403


def test_a_page_with_any_name_leads_to_the_sign_in_page(app: FastAPI) -> None:
    for path in ("/devices/%E6%97%A5", "/devices/%0D%0AX:y", "/audit?subject=%5B%2F%2F"):
        answer = Caller(app).get(path)
        assert (answer.status_code, answer.headers["location"][:12]) == (303, "/login?next=")
        assert Caller(app).get(answer.headers["location"]).status_code == 200


def test_a_form_of_too_many_fields_or_bytes_is_refused(app: FastAPI, fresh_home: Home) -> None:
    many = Caller(app).ask("POST", "/login", data={f"f{i}": "x" for i in range(9)})
    assert many.status_code == 403
    large = Caller(app).ask("POST", "/login", data={"token": "x" * 100_000})
    assert large.status_code == 413
    assert Caller(app).ask("POST", "/login", content=b"\xff\xfe").status_code in (401, 403)


def test_the_sign_in_page_tells_a_stranger_nothing_of_the_fleet(app: FastAPI, fresh_home: Home) -> None:
    from tests.control_plane.web import believable

    believable.fill(fresh_home)
    page = Caller(app).get("/login")
    assert page.status_code == 200
    assert "digits" not in page.text
    assert "meter-" not in page.text
    assert "<script" not in page.text  # nothing to keep fresh, and no token to wipe away
    for path in ("/devices/meter-1", "/devices/none", "/rollouts/none", "/models/none", "/no/such/page"):
        said = Caller(app).get(path)
        assert "digits" not in said.text, path


def test_where_reads_are_open_the_pages_need_no_signing_in(fresh_home: Home) -> None:
    page = Caller(application(fresh_home, OPEN)).get("/")
    assert page.status_code == 200
    assert "Sign out" not in page.text
