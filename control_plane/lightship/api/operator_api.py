"""API: the face operators and their programs speak to, on loopback.

Rules: reading needs nothing on loopback; every mutating call needs the bearer token in `<home>/operator-token`
and is audited; errors are JSON with a stable code.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lightship import __version__
from lightship.fleet import rollouts
from lightship.home import Home
from lightship.storage.models import Device
from lightship_agent.contract.codes import AccessError, FleetError, LightshipError, StorageError

from . import metrics, views

ACTOR = "api:operator-token"
_STATUS = {
    "access.token": 401,
    "fleet.unknown-device": 404,
    "fleet.unknown-rollout": 404,
    "registry.unknown-model": 404,
    "registry.unknown-version": 404,
}


class Intervention(BaseModel):
    """Body of a rollout intervention."""

    reason: str = ""
    revert: bool = True


def create_operator_app(home: Home, hosts: Sequence[str] = ()) -> FastAPI:
    """The operator API over `home`.

    Args:
        home: what is shown and acted on.
        hosts: names under which we may be asked; others are refused, so that a foreign page whose name resolves to
            this machine can't read here. None given: no check.
    """
    app = FastAPI(title="Lightship", version=__version__, docs_url=None, redoc_url=None)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_exception_handler(LightshipError, _refuse)
    guard = Depends(_guard(home))
    _add_reads(app, home)

    @app.post("/api/v1/rollouts/{rollout}/{act}", dependencies=[guard])
    def intervene(rollout: str, act: str, body: Intervention) -> dict[str, Any]:
        """Pause, resume or abort a rollout."""
        if act not in ("pause", "resume", "abort"):
            raise FleetError("fleet.rollout-state", f"Expected pause, resume or abort; found {act!r}.")
        with home.database.write() as session:
            row = rollouts.intervene(session, rollout, act, actor=ACTOR, reason=body.reason, revert=body.revert)
            return rollouts.view(session, row)

    return app


def _add_reads(app: FastAPI, home: Home) -> None:
    @app.get("/api/v1/overview")
    def overview() -> dict[str, Any]:
        """Fleet, rollouts, versions, alarms."""
        with home.database.read() as session:
            return views.overview(session)

    @app.get("/api/v1/devices/{device}")
    def device(device: str) -> dict[str, Any]:
        """One device in detail."""
        with home.database.read() as session:
            row = session.get(Device, device)
            if row is None:
                raise FleetError("fleet.unknown-device", f"No device {device!r}.")
            return views.device_detail(session, row)

    @app.get("/api/v1/models/{model}/versions/{version}/exposures")
    def exposures(model: str, version: int) -> list[dict[str, Any]]:
        """Who was ever served by a version, and for how long."""
        with home.database.read() as session:
            return views.exposures(session, model, version)

    @app.get("/api/v1/models/{model}/windows")
    def windows(model: str) -> dict[str, list[dict[str, Any]]]:
        """Drift and accuracy by device and window."""
        with home.database.read() as session:
            return views.window_series(session, model)

    @app.get("/api/v1/rollouts/{rollout}")
    def rollout(rollout: str) -> dict[str, Any]:
        """One rollout."""
        with home.database.read() as session:
            return rollouts.view(session, rollouts.get(session, rollout))

    @app.get("/api/v1/audit")
    def audit(limit: Annotated[int, Query(ge=1, le=1_000)] = 200) -> list[dict[str, Any]]:
        """The newest audit events."""
        with home.database.read() as session:
            return views.audit_events(session, limit)

    @app.get("/healthz")
    def healthz() -> PlainTextResponse:
        """Whether the database answers."""
        with home.database.read() as session:
            views.audit_events(session, 1)
        return PlainTextResponse("ok\n")

    @app.get("/metrics")
    def prometheus() -> Response:
        """Prometheus exposition."""
        return Response(metrics.render(home), media_type="text/plain; version=0.0.4; charset=utf-8")


def _guard(home: Home) -> Any:
    expected = home.token_path.read_text().strip()

    def check(authorization: Annotated[str, Header()] = "") -> None:
        shown = authorization.removeprefix("Bearer ").strip()
        if not hmac.compare_digest(shown.encode(), expected.encode()):
            raise AccessError("access.token", "Expected the bearer token in <home>/operator-token.")

    return check


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, LightshipError)
    status = 503 if isinstance(error, StorageError) else _STATUS.get(error.code, 409)
    return JSONResponse({"error": str(error), "code": error.code}, status_code=status)
