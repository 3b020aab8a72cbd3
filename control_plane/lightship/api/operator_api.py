"""API: the face operators and their programs speak to.

Rules: every route declares what it does, and a guard stands before it (`guard.py`); every mutating call needs a bearer
token of a role that may, and is audited; errors are JSON with a stable code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lightship import __version__
from lightship.access.rules import Verb
from lightship.alerting import views as alerting
from lightship.fleet import comparison, experiments, rollouts
from lightship.home import Home
from lightship.registry.bundles import BundleCache
from lightship.storage import audit as audit_log
from lightship.storage.audit import now_ms
from lightship.storage.models import Device
from lightship_agent.contract.codes import FleetError, LightshipError, StorageError

from . import metrics, operator_acts, views
from .guard import Guard, Policy, does

_STATUS: Final = {
    "access.token": 401,
    "access.role": 403,
    "access.environment": 403,
    "access.unknown": 404,
    "alert.mute": 422,
    "alert.unknown": 404,
    "fleet.unknown-device": 404,
    "fleet.unknown-experiment": 404,
    "fleet.unknown-rollout": 404,
    "name.invalid": 422,
    "registry.unknown-model": 404,
    "storage.corrupt": 500,
    "registry.unknown-version": 404,
    "wire.too-large": 413,
}


def create_operator_app(home: Home, hosts: Sequence[str] = (), policy: Policy | None = None) -> FastAPI:
    """The operator API over `home`; `app.state.guard` stands before its routes, and before those added later.

    Args:
        home: what is shown and acted on.
        hosts: names under which we may be asked; others are refused, so that a foreign page whose name resolves to
            this machine can't read here. None given: no check.
        policy: which environment this is, and whether reading needs a token; by default as on a developer's machine.
    """
    # The schema is served by a route of ours, behind the guard; FastAPI's own would stand before it.
    app = FastAPI(title="Lightship", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_exception_handler(LightshipError, refuse)
    app.add_exception_handler(RequestValidationError, _malformed)
    guard = app.state.guard = Guard(home, policy or Policy())
    guard.protect(app)
    _add_fleet(app, home)
    _add_experiments(app, home)
    _add_alerts(app, home)
    _add_audit(app, home)
    _add_health(app, home)
    operator_acts.add_acts(app, home)
    return app


def _add_fleet(app: FastAPI, home: Home) -> None:
    @app.get("/api/v1/overview")
    @does(Verb.FLEET_READ)
    def overview() -> dict[str, Any]:
        """Fleet, rollouts, versions, alarms."""
        with home.database.read() as session:
            return views.overview(session)

    @app.get("/api/v1/devices")
    @does(Verb.FLEET_READ)
    def devices(group: str = "") -> list[dict[str, Any]]:
        """All devices, or those of a group: what they run, by their own reports."""
        with home.database.read() as session:
            return views.devices(session, group)

    @app.get("/api/v1/devices/{device}")
    @does(Verb.FLEET_READ)
    def device(device: str) -> dict[str, Any]:
        """One device in detail."""
        with home.database.read() as session:
            row = session.get(Device, device)
            if row is None:
                raise FleetError("fleet.unknown-device", f"No device {device!r}.")
            return views.device_detail(session, row)

    @app.get("/api/v1/models/{model}/versions/{version}/exposures")
    @does(Verb.FLEET_READ)
    def exposures(model: str, version: int) -> list[dict[str, Any]]:
        """Who was ever served by a version, and for how long."""
        with home.database.read() as session:
            return views.exposures(session, model, version)

    @app.get("/api/v1/models/{model}/windows")
    @does(Verb.FLEET_READ)
    def windows(model: str) -> dict[str, list[dict[str, Any]]]:
        """Drift and accuracy by device and window."""
        with home.database.read() as session:
            return views.window_series(session, model)

    @app.get("/api/v1/releases")
    @does(Verb.FLEET_READ)
    def releases() -> list[dict[str, Any]]:
        """What the signed repository lists."""
        return [{"path": r.path, "sha256": r.sha256, "length": r.length} for r in home.releases.released()]

    @app.get("/api/v1/rollouts")
    @does(Verb.FLEET_READ)
    def rollout_list(limit: Annotated[int, Query(ge=1, le=1_000)] = 100) -> list[dict[str, Any]]:
        """The newest rollouts."""
        with home.database.read() as session:
            return views.rollout_list(session, limit)

    @app.get("/api/v1/rollouts/{rollout}")
    @does(Verb.FLEET_READ)
    def rollout(rollout: str) -> dict[str, Any]:
        """One rollout."""
        with home.database.read() as session:
            return rollouts.view(session, rollouts.get(session, rollout))


def _add_experiments(app: FastAPI, home: Home) -> None:
    @app.get("/api/v1/experiments")
    @does(Verb.FLEET_READ)
    def experiment_list(limit: Annotated[int, Query(ge=1, le=1_000)] = 100) -> list[dict[str, Any]]:
        """The newest experiments."""
        with home.database.read() as session:
            return [comparison.summary(row) for row in experiments.newest(session, limit)]

    @app.get("/api/v1/experiments/{experiment}")
    @does(Verb.FLEET_READ)
    def experiment(experiment: str) -> dict[str, Any]:
        """What an experiment has shown so far."""
        with home.database.read() as session:
            return comparison.view(session, experiments.get(session, experiment), BundleCache(home.artifacts))


def _add_alerts(app: FastAPI, home: Home) -> None:
    @app.get("/api/v1/alerts")
    @does(Verb.FLEET_READ)
    def alerts(everything: bool = False) -> dict[str, Any]:
        """Open alerts, the mutes, and channels that take nothing; with `everything` also what is over."""
        with home.database.read() as session:
            return alerting.listing(session, now_ms(), everything=everything)

    @app.get("/api/v1/alerts/{alert}")
    @does(Verb.FLEET_READ)
    def alert(alert: str) -> dict[str, Any]:
        """One alert: what is in it, and what was sent of it, when and to whom."""
        with home.database.read() as session:
            return alerting.detail(session, alert, now_ms())


def _add_audit(app: FastAPI, home: Home) -> None:
    @app.get("/api/v1/audit")
    @does(Verb.AUDIT_READ)
    def audit(limit: Annotated[int, Query(ge=1, le=1_000)] = 200, subject: str = "") -> list[dict[str, Any]]:
        """The newest audit events."""
        with home.database.read() as session:
            return views.audit_events(session, limit, subject)

    @app.get("/api/v1/audit/verify")
    @does(Verb.AUDIT_READ)
    def verify(head: str = "") -> dict[str, Any]:
        """Check the audit log's chain, against a head noted earlier if one is given."""
        with home.database.read() as session:
            found = audit_log.verify(session, head)
        return {"events": found.events, "head": found.head, "since": found.since if head else None, "whole": True}


def _add_health(app: FastAPI, home: Home) -> None:
    exposition = metrics.Exposition(home)

    @app.get("/healthz")
    @does(Verb.OPEN)
    def healthz() -> PlainTextResponse:
        """Whether the database answers."""
        with home.database.read() as session:
            views.audit_events(session, 1)
        return PlainTextResponse("ok\n")

    @app.get("/metrics")
    @does(Verb.FLEET_READ)
    def prometheus() -> Response:
        """Prometheus exposition."""
        return Response(exposition.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json")
    @does(Verb.FLEET_READ)
    def schema() -> dict[str, Any]:
        """This API as an OpenAPI schema."""
        return app.openapi()


async def refuse(_request: Request, error: Exception) -> Response:
    """A refusal as JSON, with the status its code has here."""
    assert isinstance(error, LightshipError)
    status = _STATUS.get(error.code, 503 if isinstance(error, StorageError) else 409)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"error": str(error), "code": error.code}, status_code=status, headers=headers)


async def _malformed(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # What was sent is not repeated: it may have been a secret in the wrong field.
    said = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
    return JSONResponse({"error": said, "code": "wire.malformed"}, status_code=422)
