"""API: the guard before every route of the operator API and the dashboard.

Rules:
* every endpoint says with `@does(verb)` what it does; one that does not is never called (500), so that a forgotten
  declaration closes a route instead of opening it;
* who calls is settled before the body is read, and a body is bounded;
* a bearer token opens what its role may do; a session cookie opens reads only, and only its own pages can use it;
* the credential in `<home>/operator-token` is read anew each time: replace the file, and the old one is worth nothing;
* where a request came from is the other end of the connection: headers of proxies are not believed.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from lightship.access import tokens
from lightship.access.rules import ANY_ENVIRONMENT, RULES, Grant, Role, Verb, permit
from lightship.access.sessions import COOKIE, LIFE_SECONDS, Sessions
from lightship.home import Home
from lightship.storage import audit
from lightship_agent.contract.codes import AccessError, StorageError, WireError

log = logging.getLogger(__name__)
BOOTSTRAP: Final = "operator-token"
MAX_BODY: Final = 64 * 1024
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])
_VERB: Final = "lightship_verb"
_CALLER: ContextVar[Grant | None] = ContextVar("caller", default=None)


@dataclass(frozen=True)
class Policy:
    """What this server is, as far as access goes."""

    environment: str = "development"
    open_reads: bool = True
    secure_cookies: bool = False


def does(verb: Verb) -> Callable[[_Endpoint], _Endpoint]:
    """Declare what an endpoint does."""

    def declare(endpoint: _Endpoint) -> _Endpoint:
        setattr(endpoint, _VERB, verb)
        return endpoint

    return declare


def verb_of(endpoint: object) -> Verb | None:
    """What an endpoint declares."""
    found = getattr(endpoint, _VERB, None)
    return found if isinstance(found, Verb) else None


def caller() -> Grant | None:
    """Who the request under way comes from; None for a caller without a token."""
    return _CALLER.get()


def actor() -> str:
    """Who acts, for the audit log.

    Raises:
        AccessError: access.token, for a caller without a token: such a one can't act.
    """
    grant = caller()
    if grant is None:
        raise AccessError("access.token", "Acting needs an API token.")
    return f"api:{BOOTSTRAP}" if grant.environment == ANY_ENVIRONMENT else f"token:{grant.name}"


class Guard:
    """Settles who calls, and whether they may."""

    def __init__(self, home: Home, policy: Policy) -> None:
        """Guard the tokens of `home`."""
        self._home = home
        self.policy = policy
        self.sessions = Sessions()

    def protect(self, app: FastAPI) -> None:
        """Put every route that is added to `app` from now on behind this guard."""
        app.router.route_class = _guarded_routes(self)

    async def check(self, request: Request, endpoint: object) -> None:
        """Let a request pass, or not.

        Raises:
            AccessError: access.token, access.environment, access.role.
        """
        verb = verb_of(endpoint)
        if verb is None:
            bug = f"{request.url.path}: the endpoint declares no verb."
            raise AssertionError(bug)
        grant = None
        if RULES[verb].least is not None:
            grant = await run_in_threadpool(self._who, request, verb)
        try:
            permit(grant, verb, environment=self.policy.environment, open_reads=self.policy.open_reads)
        except AccessError as e:
            # Strangers knock all day; a token that tries what it may not is worth a look.
            level = logging.WARNING if grant else logging.INFO
            who = grant.name if grant else "nobody"
            log.log(level, "%s refused from %s: %s for %s", verb, origin_of(request), e.code, who)
            raise
        _CALLER.set(grant)

    def grant(self, shown: str, origin: str) -> Grant | None:
        """What a token grants; None unless it is one of ours and good. Its use is noted."""
        expected = self._bootstrap()
        if expected and hmac.compare_digest(_hash(shown), _hash(expected)):
            return Grant(BOOTSTRAP, Role.ADMIN, ANY_ENVIRONMENT)
        now = audit.now_ms()
        with self._home.database.read() as session:
            row = tokens.identify(session, shown, now)
        if row is None:
            return None
        if tokens.needs_touch(row, now):
            self._touch(row.name, now, origin)
        return tokens.grant_of(row)

    def session_for(self, grant: Grant) -> str:
        """The cookie of whoever has just signed in."""
        return self.sessions.seal(self._holder(grant), int(time.time()) + LIFE_SECONDS)

    def _who(self, request: Request, verb: Verb) -> Grant | None:
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        if scheme:
            # A token that is shown must be good, also where none is needed: a typo should not look like success.
            grant = self.grant(shown.strip(), origin_of(request)) if scheme.lower() == "bearer" else None
            if grant is None:
                message = "The token shown is unknown, expired or revoked."
                raise AccessError("access.token", message, remedy="`lightship token list` shows which are good.")
            return grant
        cookie = request.cookies.get(COOKIE, "")
        return self._of_session(cookie) if cookie and not RULES[verb].changes else None

    def _of_session(self, cookie: str) -> Grant | None:
        name = self.sessions.open(cookie, time.time())
        if name is None:
            return None
        if name == self._holder(Grant(BOOTSTRAP, Role.ADMIN, ANY_ENVIRONMENT)):
            return Grant(BOOTSTRAP, Role.ADMIN, ANY_ENVIRONMENT)
        with self._home.database.read() as session:
            row = tokens.by_name(session, name, audit.now_ms())
        return tokens.grant_of(row) if row else None

    def _holder(self, grant: Grant) -> str:
        """Who a session belongs to. For the bootstrap credential that is its content: a new one ends its sessions."""
        if grant.environment != ANY_ENVIRONMENT:
            return grant.name
        return f"{BOOTSTRAP}:{_hash(self._bootstrap()).hex()[:16]}"

    def _bootstrap(self) -> str:
        try:
            return self._home.token_path.read_text().strip()
        except OSError:
            return ""  # removed on purpose: tokens only

    def _touch(self, name: str, now: int, origin: str) -> None:
        try:
            with self._home.database.write() as session:
                tokens.touch(session, name, now=now, origin=origin)
        except StorageError as e:
            log.warning("last use of token %s not noted: %s", name, e)


def origin_of(request: Request) -> str:
    """The address at the other end of the connection."""
    return request.client.host if request.client else ""


def _guarded_routes(guard: Guard) -> type[APIRoute]:
    class GuardedRoute(APIRoute):
        """A route that asks the guard first."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            """The handler, behind the guard."""
            plain = super().get_route_handler()

            async def guarded(request: Request) -> Response:
                await guard.check(request, self.endpoint)
                with audit.coming_from(origin_of(request)):
                    if request.method == "GET":
                        return await plain(request)
                    bounded = _BoundedRequest(request.scope, request.receive)
                    await bounded.body()
                    return await plain(bounded)

            return guarded

    return GuardedRoute


class _BoundedRequest(Request):
    """A request whose body is read up to a bound."""

    async def body(self) -> bytes:
        """The body.

        Raises:
            WireError: wire.too-large.
        """
        if not hasattr(self, "_body"):
            data = bytearray()
            async for chunk in self.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    raise WireError("wire.too-large", f"Expected at most {MAX_BODY} bytes.")
            self._body = bytes(data)
        return self._body


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
