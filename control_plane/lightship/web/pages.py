"""Web: the dashboard, pages that a server renders and a browser may keep fresh.

Rules:
* the pages only read; each says which command acts; where reading is not open, one signs in with an API token;
* everything works without JavaScript, and without any other host: styles, the one script and the plots are ours;
* a strict content policy goes with every page: no inline script or style, nothing from elsewhere;
* what is shown is escaped by the template engine; only the plots and `words` hand over markup, and they escape.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import jinja2
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from lightship import __version__
from lightship.access.rules import Verb
from lightship.alerting import views as alerting
from lightship.api import views
from lightship.api.guard import Guard, caller, does
from lightship.api.operator_api import refuse
from lightship.fleet import rollouts
from lightship.home import Home
from lightship.storage.audit import now_ms
from lightship.storage.models import Device
from lightship_agent.contract.codes import AccessError, FleetError

from . import facts, figures, plots, scales, sign_in, words
from .live import Live, fingerprint

HERE: Final = Path(__file__).parent
POLICY: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
GUARDS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_MEDIA: Final = {"lightship.css": "text/css; charset=utf-8", "live.js": "text/javascript; charset=utf-8"}
#: Paths that programs ask: their errors stay JSON.
_PROGRAMS: Final = ("/api/", "/events", "/healthz", "/metrics", "/openapi.json")


def add_pages(app: FastAPI, home: Home) -> None:
    """Add the dashboard over `home` to the operator app.

    `app.state.live.stop()` ends the event streams, which would otherwise hold a stopping server.
    """
    pages = _Pages(home, app.state.guard)
    app.state.live = pages.live
    for path, endpoint in (
        ("/", pages.overview),
        ("/devices/{device}", pages.device),
        ("/rollouts/{rollout}", pages.rollout),
        ("/models/{model}", pages.model),
        ("/alarms", pages.alarms),
        ("/audit", pages.audit),
        ("/events", pages.events),
        ("/static/{name}", pages.static),
        ("/login", pages.login),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], include_in_schema=False, response_model=None)
    for path, answer in (("/login", pages.enter), ("/logout", pages.leave)):
        app.add_api_route(path, answer, methods=["POST"], include_in_schema=False, response_model=None)
    app.add_exception_handler(404, pages.not_found)
    app.add_exception_handler(AccessError, pages.refused)


def environment() -> jinja2.Environment:
    """The template engine: autoescape on, a name that is not there is an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals.update(
        status=words.status,
        tone=words.tone,
        shapes=words.SHAPES,
        command=words.command,
        when=words.when,
        day=lambda at: scales.moment(at, "%-d %B %Y"),
        ago=words.ago,
        primary=facts.primary,
        figures=figures,
        version_css=plots.version_css,
        release_tag=__version__,
    )
    env.filters.update(
        short=words.short,
        percent=words.percent,
        plain=words.plain,
        size=words.size,
        health=words.health,
        duration=scales.duration,
        number=scales.number,
    )
    return env


class _Pages:
    """The endpoints. The plain ones run in threads, as the database waits."""

    def __init__(self, home: Home, guard: Guard) -> None:
        self._home = home
        self._guard = guard
        self._files = {name: (HERE / "static" / name).read_bytes() for name in _MEDIA}
        self._digests = {name: hashlib.sha256(data).hexdigest()[:12] for name, data in self._files.items()}
        self._env = environment()
        self._env.globals["asset"] = lambda name: f"/static/{name}?v={self._digests[name]}"
        self.live = Live(self._fingerprint)

    @does(Verb.FLEET_READ)
    def overview(self) -> Response:
        """The fleet on one page."""
        now = now_ms()
        with self._home.database.read() as session:
            return self._page("overview.html", now, facts.overview(session, now), facts.model_names(session))

    @does(Verb.FLEET_READ)
    def device(self, device: str) -> Response:
        """One device."""
        now = now_ms()
        with self._home.database.read() as session:
            row = session.get(Device, device)
            if row is None:
                return self._missing(f"No device is called {device!r}.", "devices")
            return self._page("device.html", now, facts.device(session, row), facts.model_names(session))

    @does(Verb.FLEET_READ)
    def rollout(self, rollout: str) -> Response:
        """One rollout."""
        now = now_ms()
        with self._home.database.read() as session:
            try:
                row = rollouts.get(session, rollout)
            except FleetError:
                return self._missing(f"No rollout is called {rollout!r}.", "rollout")
            return self._page("rollout.html", now, facts.rollout_page(session, row, now), facts.model_names(session))

    @does(Verb.FLEET_READ)
    def model(self, model: str) -> Response:
        """One model with its versions."""
        now = now_ms()
        with self._home.database.read() as session:
            found = facts.model(session, model)
            if not found["versions"] and not found["unfinished"]:
                return self._missing(f"No model is called {model!r}.", "")
            return self._page("model.html", now, found, facts.model_names(session))

    @does(Verb.FLEET_READ)
    def alarms(self) -> Response:
        """Open alarms, then closed ones."""
        with self._home.database.read() as session:
            found = {
                "alerts": alerting.listing(session, now_ms()),
                "open_alarms": views.alarms(session, only_open=True),
                "closed": [a for a in views.alarms(session, limit=200) if a["closed_at"] is not None],
            }
            return self._page("alarms.html", now_ms(), found, facts.model_names(session))

    @does(Verb.AUDIT_READ)
    def audit(self, subject: str = "") -> Response:
        """The newest audit events, of one subject or of all."""
        with self._home.database.read() as session:
            found = {"events": views.audit_events(session, 200, subject), "subject": subject}
            return self._page("audit.html", now_ms(), found, facts.model_names(session))

    @does(Verb.FLEET_READ)
    async def events(self) -> Response:
        """Server-sent events: `changed`."""
        if self.live.full:
            return Response("Too many open pages.\n", 503, {**GUARDS, "Retry-After": "30"}, "text/plain")
        headers = {**GUARDS, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        stream: AsyncIterator[str] = self.live.stream()
        return StreamingResponse(stream, headers=headers, media_type="text/event-stream")

    @does(Verb.OPEN)
    def static(self, name: str, request: Request, v: str = "") -> Response:
        """The stylesheet and the script. An address with their digest may be kept for ever."""
        if name not in _MEDIA:
            return self._missing("There is no such file.", "")
        tag = f'"{self._digests[name]}"'
        lasting = v == self._digests[name]
        headers = {
            **GUARDS,
            "ETag": tag,
            "Cache-Control": "public, max-age=31536000, immutable" if lasting else "no-cache",
        }
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(self._files[name], headers=headers, media_type=_MEDIA[name])

    @does(Verb.OPEN)
    def login(self, request: Request) -> Response:
        """Where a person signs in with an API token."""
        return self._sign_in(sign_in.landing(request.query_params.get("next", "")), "")

    @does(Verb.OPEN)
    async def enter(self, request: Request) -> Response:
        """Sign in: a token for a cookie that reads."""
        asked = await sign_in.read(request)
        if asked is None:
            return self._sign_in("/", "That form was not ours.", 403)
        cookie, why = await run_in_threadpool(sign_in.enter, self._guard, asked)
        if cookie is None:
            return self._sign_in(asked.landing, why, 401)
        answer = Response(status_code=303, headers={**GUARDS, "Location": asked.landing, "Cache-Control": "no-store"})
        sign_in.set_cookie(answer, cookie, secure=self._guard.policy.secure_cookies)
        return answer

    @does(Verb.OPEN)
    async def leave(self, request: Request) -> Response:
        """Sign out."""
        if not sign_in.is_ours(request):
            return self._sign_in("/", "That form was not ours.", 403)
        answer = Response(status_code=303, headers={**GUARDS, "Location": "/login", "Cache-Control": "no-store"})
        sign_in.drop_cookie(answer, secure=self._guard.policy.secure_cookies)
        return answer

    async def refused(self, request: Request, error: Exception) -> Response:
        """Who may not read a page is asked to sign in; programs are told the code."""
        assert isinstance(error, AccessError)
        if request.url.path.startswith(_PROGRAMS):
            return await refuse(request, error)
        if error.code == "access.token":
            where = sign_in.address(request.url.path, request.url.query)
            return Response(status_code=303, headers={**GUARDS, "Location": where, "Cache-Control": "no-store"})
        return self._sign_in("/", str(error), 403)

    def not_found(self, request: Request, _error: Exception) -> Response:
        """The page for paths that lead nowhere; JSON where programs ask."""
        if request.url.path.startswith(_PROGRAMS):
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        return self._missing("There is no such page.", "")

    def _sign_in(self, landing: str, why: str, code: int = 200) -> Response:
        return self._page("login.html", now_ms(), {"landing": landing, "why": why}, [], code=code)

    def _missing(self, sentence: str, command: str) -> Response:
        # Also asked for by callers that the guard has not let in: a path that leads nowhere has no guard before it.
        names: list[str] = []
        if caller() is not None or self._guard.policy.open_reads:
            with self._home.database.read() as session:
                names = facts.model_names(session)
        return self._page("missing.html", now_ms(), {"sentence": sentence, "hint": command}, names, code=404)

    def _page(self, template: str, now: int, found: Mapping[str, Any], models: list[str], code: int = 200) -> Response:
        grant = caller()
        holder = grant.name if grant else ""
        where = self._guard.policy.environment
        body = self._env.get_template(template).render(
            now=now, nav_models=models, environment=where, holder=holder, **found
        )
        headers = {**GUARDS, "Cache-Control": "no-store"}
        return Response(body.encode(errors="replace"), code, headers, "text/html; charset=utf-8")

    def _fingerprint(self) -> str:
        with self._home.database.read() as session:
            return fingerprint(session, now_ms())
