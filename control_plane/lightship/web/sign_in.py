"""Web: signing in to the dashboard with an API token.

Rules: the token is sent once, in the body of a form of ours, and is never in an address; what the browser keeps is a
signed cookie (`access/sessions.py`) that scripts can't read, other sites can't send, and that only reads; a form that
another site sent is refused; after signing in one lands on a page of ours, whatever the form says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, quote, urlencode

from fastapi import Request, Response

from lightship.access.rules import Verb, permit
from lightship.access.sessions import COOKIE, LIFE_SECONDS
from lightship.api.guard import Guard, origin_of
from lightship_agent.contract.codes import AccessError

MAX_FIELDS: Final = 4


@dataclass(frozen=True)
class Asked:
    """A form of ours, filled in."""

    token: str
    landing: str
    origin: str


async def read(request: Request) -> Asked | None:
    """The form; None if it is not one of ours."""
    if not is_ours(request):
        return None
    try:
        fields = parse_qs((await request.body()).decode(), max_num_fields=MAX_FIELDS)
    except ValueError:
        return None
    shown, wanted = (fields.get(name, [""])[0] for name in ("token", "next"))
    return Asked(shown.strip(), landing(wanted), origin_of(request))


def is_ours(request: Request) -> bool:
    """Whether a form came from a page of ours: browsers say so, and other programs can't be tricked into it."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    return origin in (None, "null") or (origin or "").partition("://")[2] == request.headers.get("host", "")


def enter(guard: Guard, asked: Asked) -> tuple[str | None, str]:
    """The cookie of whoever may read here; else None, and why."""
    grant = guard.grant(asked.token, asked.origin)
    if grant is None:
        return None, "The token is unknown, expired or revoked."
    try:
        permit(grant, Verb.FLEET_READ, environment=guard.policy.environment, open_reads=False)
    except AccessError as e:
        return None, str(e)
    return guard.session_for(grant), ""


def set_cookie(answer: Response, cookie: str, *, secure: bool) -> None:
    """Give the cookie to the browser."""
    answer.set_cookie(COOKIE, cookie, max_age=LIFE_SECONDS, path="/", secure=secure, httponly=True, samesite="strict")


def drop_cookie(answer: Response, *, secure: bool) -> None:
    """Take it back."""
    answer.delete_cookie(COOKIE, path="/", secure=secure, httponly=True, samesite="strict")


def landing(wanted: str) -> str:
    """A path of ours, fit for a header: `wanted` if it is one, else the first page."""
    ours = re.fullmatch(r"/(?![/\\]).*|/", wanted) and wanted.isprintable() and "\\" not in wanted
    return quote(wanted, safe="/?=&%+,;:@!$'()*~.-_") if ours else "/"


def address(path: str, query: str) -> str:
    """The sign-in page that leads back to where one was."""
    back = f"{path}?{query}" if query else path
    return f"/login?{urlencode({'next': back})}"
