"""HTTP: the routes of the three faces.

Rules: routes come from the applications themselves; where a handler has no words of its own they stand here, and a
route without words, or words without a route, is an error.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Route

from lightship.access.rules import RULES
from lightship.api.device_api import DeviceApi
from lightship.api.guard import verb_of
from lightship.api.operator_api import create_operator_app
from lightship.home import Home
from lightship.web.pages import add_pages
from lightship_agent.contract.device_api import Paths
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import create_app

Row = tuple[str, str, str]

DEVICE_WORDS = {
    Paths.CA: "The CA certificate, PEM. Needs no client certificate; a join token's pin says whether to believe it.",
    Paths.ENROL: "Redeem a join token: an `EnrolRequest` in, an `EnrolReply` out. Needs no client certificate.",
    Paths.RECOVERY_NONCE: "A nonce for a device whose certificate ran out: a `NonceRequest` in, a `NonceReply` out. "
    "Needs no client certificate, and stores nothing.",
    Paths.RECOVER: "A fresh certificate for the proof of the registered key, a `SignedProof` (DSSE); a `RenewReply` "
    "out. Needs no client certificate.",
    Paths.PING: "Whether this device may still speak to us.",
    Paths.RENEW: "A fresh certificate for a fresh key: a `RenewRequest` in, a `RenewReply` out.",
    Paths.ASSIGNMENT: "The signed assignment of this device (a DSSE envelope); 204 while there is none, 304 when the "
    "`If-None-Match` still fits. The header `lightship-acked` says how far its reports are stored.",
    Paths.TELEMETRY: "A packed `Envelope`, for devices that can't reach the broker.",
    Paths.REPLY: "A packed `Reply`, likewise.",
    Paths.METADATA + "{name}": "A file of the release repository's metadata.",
    Paths.TARGETS + "{folder}/{model}/{name}": "A bundle as it travels (`.zst`), by its digest; ranges are served.",
}
AGENT_WORDS = {
    "/v2": "Name, version and protocol extensions of the server.",
    "/v2/health": "How the agent is: `state`, what runs, degraded modes, update phase, link, health.",
    "/v2/health/live": "Whether the process answers.",
    "/v2/health/ready": "Whether a model serves.",
    "/v2/models/{model}[/versions/{version}]": "Inputs, outputs, digest, feature names, labels.",
    "/v2/models/{model}[/versions/{version}]/ready": "Whether that model serves.",
    "/v2/models/{model}[/versions/{version}]/infer": "Predict: JSON or binary tensors. The answer's `id` names the "
    "prediction for feedback; row i of several is `id:i`.",
    "/v2/models/{model}[/versions/{version}]/explain": "Takes what `infer` takes, says what moved the answers.",
    "/v2/models/{model}[/versions/{version}]/predict": "The same by feature name: a JSON record, a list of them, or "
    "`text/csv` with a header; see [docs/serving.md](../serving.md#records). `X-Request-Id` becomes the `id`.",
    "/v2/models/stats": "The same of every resident model.",
    "/v2/models/{model}[/versions/{version}]/stats": "Requests, rows, latency, errors by code.",
    "/v2/models/{model}/feedback": "What was true: one `{id, label}` or a list of them.",
    "/v2/lightship/metrics": "The application's own numbers, one or a list: "
    '`{"name": "parts", "kind": "counter", "value": 1}`; see [docs/device-reports.md](../device-reports.md).',
    "/v2/repository/index": "Every version that is here: in memory (READY) or not, and why. "
    '`{"ready": true}` lists the first.',
    "/v2/repository/models/{model}/load": "Have a version of the store in memory, "
    '`{"parameters": {"version": "3"}}`; needs `LIGHTSHIP_AGENT_MODEL_CONTROL=explicit`.',
    "/v2/repository/models/{model}/unload": "Let go of a version that does not serve; the same body and setting.",
    "/metrics": "Prometheus exposition.",
}


def device_routes() -> list[Row]:
    """Method, path and words of the device API."""
    with _home() as home:
        routes = DeviceApi(home, "default", None).app().routes
    return _worded(((_method(r), r.path) for r in routes if isinstance(r, Route)), DEVICE_WORDS)


def agent_routes() -> list[Row]:
    """Method, path and words of the agent's HTTP."""
    app = create_app(DataPlane(lambda *_: None), status=dict, metrics=str)
    routes = app._routes  # noqa: SLF001 - the table is the agent's own business; showing it is ours
    return _worded(((method, _template(pattern)) for pattern, method, _ in routes), AGENT_WORDS)


def operator_routes() -> list[tuple[str, str, str, str, str]]:
    """Method, path, least role, verb and words of the operator API and the dashboard, by path."""
    with _home() as home:
        app = create_operator_app(home)
        add_pages(app, home)
        return sorted((_method(r), r.path, *_rights(r), _words(r)) for r in _api_routes(app))


def _rights(route: APIRoute) -> tuple[str, str]:
    verb = verb_of(route.endpoint)
    assert verb is not None, route.path
    return str(RULES[verb].least or "–"), str(verb)


class _home:  # noqa: N801 - reads as a function
    """A home that lives as long as the block: the applications want one to exist."""

    def __enter__(self) -> Home:
        self._folder = tempfile.TemporaryDirectory(prefix="lightship-docs-")
        self._home = Home.create(Path(self._folder.name) / "home")
        return self._home

    def __exit__(self, *_: object) -> None:
        self._home.close()
        self._folder.cleanup()


def _api_routes(app: FastAPI) -> list[APIRoute]:
    return [r for r in app.routes if isinstance(r, APIRoute)]


def _method(route: Route) -> str:
    return next(m for m in sorted(route.methods or {"GET"}) if m != "HEAD")


def _words(route: APIRoute) -> str:
    words = (route.endpoint.__doc__ or "").split("\n\n")[0]
    if not words:
        message = f"{route.path} has no docstring."
        raise ValueError(message)
    return " ".join(words.split())


def _template(pattern: str) -> str:
    """`/v2/models/{model}` of a pattern with named groups; optional parts in brackets."""
    text = re.sub(r"\(\?P<(\w+)>\[\^/\]\+\)", r"{\1}", pattern)
    text = re.sub(r"\(\?:(.*?)\)\?", r"[\1]", text)
    return text.removesuffix("/?")


def _worded(routes: Iterable[tuple[str, str]], words: dict[str, str]) -> list[Row]:
    rows = list(routes)
    differ = {path for _, path in rows} ^ set(words)
    if differ:
        message = f"Routes and their words differ in: {', '.join(sorted(differ))}."
        raise ValueError(message)
    return [(method, path, words[path]) for method, path in rows]
