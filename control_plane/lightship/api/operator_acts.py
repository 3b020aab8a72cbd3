"""API: what operators do from afar. Each act is the same function that the command line calls.

Rules: every act names its verb, is done in the name of the token that asked, and is audited by what it calls; a reason
is required where the command line requires one; an answer that holds a secret is not to be kept by anybody between.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from lightship.access import tokens
from lightship.access.rules import Role, Verb
from lightship.alerting import store
from lightship.fleet import clones, comparison, director, enrolment, experiments, planning, rollouts
from lightship.fleet.rollout import Rules
from lightship.home import Home
from lightship.registry import release
from lightship.registry.bundles import BundleCache
from lightship.storage.audit import now_ms
from lightship_agent.contract.codes import FleetError

from . import views
from .guard import actor, does

Reason = Annotated[str, Field(min_length=1, max_length=500)]
_DAY: Final = 86_400


class Body(BaseModel):
    """A request's body; what it does not know, it refuses."""

    model_config = ConfigDict(extra="forbid")


class Why(Body):
    """Body of what may be done without a reason, and better is not."""

    reason: str = Field("", max_length=500)


class Because(Body):
    """Body of what needs a reason."""

    reason: Reason


class Abort(Why):
    """Body of an abort: with the way back, or without."""

    revert: bool = True


class RolloutBody(Why):
    """A rollout: which version to which devices, in which waves, by which rules."""

    reference: str
    group: str = ""
    labels: dict[str, str] = {}
    canary: int = Field(1, ge=1)
    waves: list[Annotated[float, Field(gt=0, le=1)]] = []
    require_labels: bool = True
    gate_timeout: float = 86_400.0
    device_timeout: float = 1_800.0
    offline_after: float = 900.0
    halt_share: float = 0.2

    def wish(self) -> planning.Wish:
        """What is asked for."""
        names = ("require_labels", "gate_timeout", "device_timeout", "offline_after", "halt_share")
        return planning.Wish(
            reference=self.reference,
            group=self.group,
            labels=self.labels,
            canary=self.canary,
            waves=tuple(self.waves),
            rules=Rules(**{name: getattr(self, name) for name in names}),
        )


class ExperimentBody(Why):
    """An experiment: which version beside the champion of which group, in its shadow or for which share."""

    group: str
    reference: str
    shadow: bool = False
    share: float | None = None
    per_request: bool = False
    name: str = ""

    def wish(self) -> experiments.Wish:
        """What is asked for.

        Raises:
            FleetError: fleet.experiment-spec.
        """
        if not self.shadow and self.share is None:
            raise FleetError("fleet.experiment-spec", "Expected shadow, or the share of the keys that it answers.")
        return experiments.Wish(
            group=self.group,
            reference=self.reference,
            mode="shadow" if self.shadow else "ab",
            share=1.0 if self.share is None else self.share,
            per_request=self.per_request,
            name=self.name,
            reason=self.reason,
        )


class MuteBody(Because):
    """What is held back and for how long: a kind, device:…, group:… or alert:…, several with commas."""

    what: str = Field(min_length=1, max_length=500)
    seconds: int = Field(ge=60, le=store.MAX_MUTE // 1_000)


class JoinTokenBody(Body):
    """A join token."""

    group: str = "default"
    device: str | None = None
    labels: dict[str, str] = {}
    uses: int = Field(1, ge=1, le=10_000)
    ttl: int = Field(3_600, ge=60, le=30 * _DAY)


class PublishBody(Body):
    """Which version to publish: name@3 or name@alias."""

    reference: str


class RevokeReleaseBody(Because):
    """Which version to de-list, and why."""

    reference: str


class ApiTokenBody(Why):
    """An API token."""

    name: str
    role: Role
    environment: str = ""
    ttl: int = Field(90 * _DAY, ge=60, le=366 * _DAY)


def add_acts(app: FastAPI, home: Home) -> None:
    """Add everything that changes something, and the plan that does not."""
    _add_rollouts(app, home)
    _add_experiments(app, home)
    _add_devices(app, home)
    _add_alerts(app, home)
    _add_releases(app, home)
    _add_tokens(app, home)


def _add_rollouts(app: FastAPI, home: Home) -> None:
    def intervene(rollout: str, what: str, reason: str, *, revert: bool = True) -> dict[str, Any]:
        with home.database.write() as session:
            row = rollouts.intervene(session, rollout, what, actor=actor(), reason=reason, revert=revert)
            return rollouts.view(session, row)

    @app.post("/api/v1/plans")
    @does(Verb.ROLLOUT_PLAN)
    def plan(body: RolloutBody) -> Any:
        """Which device would be in which wave. Changes nothing."""
        with home.database.read() as session:
            return msgspec.to_builtins(planning.plan(session, body.wish()))

    @app.post("/api/v1/rollouts", status_code=201)
    @does(Verb.ROLLOUT_START)
    def start(body: RolloutBody) -> dict[str, Any]:
        """Start a rollout."""
        with home.database.write() as session:
            row = planning.start(session, body.wish(), actor=actor(), reason=body.reason)
            return rollouts.view(session, row)

    @app.post("/api/v1/rollouts/{rollout}/pause")
    @does(Verb.ROLLOUT_PAUSE)
    def pause(rollout: str, body: Why) -> dict[str, Any]:
        """Hold a rollout; devices under way finish."""
        return intervene(rollout, "pause", body.reason)

    @app.post("/api/v1/rollouts/{rollout}/resume")
    @does(Verb.ROLLOUT_RESUME)
    def resume(rollout: str, body: Why) -> dict[str, Any]:
        """Go on; acknowledges the failures seen so far."""
        return intervene(rollout, "resume", body.reason)

    @app.post("/api/v1/rollouts/{rollout}/abort")
    @does(Verb.ROLLOUT_ABORT)
    def abort(rollout: str, body: Abort) -> dict[str, Any]:
        """End a rollout; `revert` takes assigned devices back."""
        return intervene(rollout, "abort", body.reason, revert=body.revert)


def _add_experiments(app: FastAPI, home: Home) -> None:
    @app.post("/api/v1/experiments", status_code=201)
    @does(Verb.EXPERIMENT_START)
    def start(body: ExperimentBody) -> dict[str, Any]:
        """Run a released version beside the champion on the devices of a group."""
        with home.database.write() as session:
            row = experiments.start(session, body.wish(), BundleCache(home.artifacts), actor=actor())
            return comparison.summary(row)

    @app.post("/api/v1/experiments/{experiment}/stop")
    @does(Verb.EXPERIMENT_STOP)
    def stop(experiment: str, body: Why) -> dict[str, Any]:
        """End an experiment."""
        with home.database.write() as session:
            row = experiments.get(session, experiment)
            return comparison.summary(experiments.stop(session, row.id, actor=actor(), reason=body.reason))


def _add_devices(app: FastAPI, home: Home) -> None:
    @app.post("/api/v1/join-tokens", status_code=201)
    @does(Verb.DEVICE_TOKEN)
    def join_token(body: JoinTokenBody) -> Response:
        """Make a join token. It is shown once."""
        with home.database.write() as session:
            made = enrolment.create_token(
                session,
                home.ca,
                group=body.group,
                labels=dict(body.labels),
                device=body.device,
                uses=body.uses,
                ttl_seconds=body.ttl,
                actor=actor(),
            )
        return _secret({"token": made, "uses": body.uses, "ttl": body.ttl})

    @app.post("/api/v1/devices/{device}/approve")
    @does(Verb.DEVICE_APPROVE)
    def approve(device: str) -> dict[str, Any]:
        """Let a device in that waits for it."""
        with home.database.write() as session:
            enrolment.approve(session, device, actor=actor())
        return {"device": device, "state": "active"}

    @app.post("/api/v1/devices/{device}/clear-clone")
    @does(Verb.DEVICE_CLEAR)
    def clear_clone(device: str, body: Because) -> dict[str, Any]:
        """Take away the mark that an identity is in use twice."""
        with home.database.write() as session:
            row = enrolment.known_device(session, device)
            clones.clear(session, row, actor=actor(), reason=body.reason)
        return {"device": device, "state": row.state}

    @app.post("/api/v1/devices/{device}/retry")
    @does(Verb.DEVICE_RETRY)
    def retry(device: str) -> dict[str, Any]:
        """Let a device try its assigned bundle again, though it failed there before."""
        with home.database.write() as session:
            return {"device": device, "seq": director.retry(session, home.keys, device=device, actor=actor())}

    @app.post("/api/v1/devices/{device}/revoke")
    @does(Verb.DEVICE_REVOKE)
    def revoke(device: str, body: Because) -> dict[str, Any]:
        """Refuse a device from its next request on."""
        with home.database.write() as session:
            enrolment.revoke(session, device, actor=actor(), reason=body.reason)
        return {"device": device, "state": "revoked"}


def _add_alerts(app: FastAPI, home: Home) -> None:
    @app.post("/api/v1/alerts/{alert}/acknowledge")
    @does(Verb.ALERT_ACKNOWLEDGE)
    def acknowledge(alert: str, body: Why) -> dict[str, Any]:
        """Say that you look after it: no reminders, unless it gets worse."""
        with home.database.write() as session:
            found = store.acknowledge(session, alert, actor=actor(), reason=body.reason, now=now_ms())
        return {"id": found.id, "acknowledged_by": found.acked_by}

    @app.post("/api/v1/mutes", status_code=201)
    @does(Verb.ALERT_MUTE)
    def mute(body: MuteBody) -> dict[str, Any]:
        """Hold back what fits. What is still open at the end is told then."""
        now = now_ms()
        until = now + body.seconds * 1_000
        with home.database.write() as session:
            row = store.mute(session, body.what, until=until, actor=actor(), reason=body.reason, now=now)
            return {"id": row.id, "what": row.what, "until": row.until, "reason": row.reason}

    @app.post("/api/v1/mutes/{mute}/end")
    @does(Verb.ALERT_UNMUTE)
    def unmute(mute: str, body: Because) -> dict[str, Any]:
        """End a mute now."""
        with home.database.write() as session:
            row = store.unmute(session, mute, actor=actor(), reason=body.reason, now=now_ms())
            return {"id": row.id, "until": row.until}


def _add_releases(app: FastAPI, home: Home) -> None:
    @app.post("/api/v1/releases", status_code=201)
    @does(Verb.RELEASE_PUBLISH)
    def publish(body: PublishBody) -> dict[str, Any]:
        """Sign a version's bundle and publish it, where this server has the key of `releases`."""
        row = release.release(home, body.reference, actor=actor())
        with home.database.read() as session:
            return views.model_version(session, row)

    @app.post("/api/v1/releases/revoke")
    @does(Verb.RELEASE_REVOKE)
    def revoke(body: RevokeReleaseBody) -> dict[str, Any]:
        """De-list a version, where this server has the key of `releases`."""
        row = release.revoke(home, body.reference, actor=actor(), reason=body.reason)
        with home.database.read() as session:
            return views.model_version(session, row)


def _add_tokens(app: FastAPI, home: Home) -> None:
    @app.get("/api/v1/tokens")
    @does(Verb.TOKEN_LIST)
    def listed() -> list[dict[str, Any]]:
        """All API tokens, without their secrets."""
        with home.database.read() as session:
            return views.api_tokens(session)

    @app.post("/api/v1/tokens", status_code=201)
    @does(Verb.TOKEN_CREATE)
    def create(body: ApiTokenBody) -> Response:
        """Make an API token, by default for this environment. It is shown once."""
        environment = body.environment or app.state.guard.policy.environment
        with home.database.write() as session:
            made = tokens.create(
                session,
                name=body.name,
                role=body.role,
                environment=environment,
                ttl_seconds=body.ttl,
                actor=actor(),
                reason=body.reason,
            )
        return _secret({"name": body.name, "role": body.role.value, "environment": environment, "token": made})

    @app.post("/api/v1/tokens/{name}/revoke")
    @does(Verb.TOKEN_REVOKE)
    def revoke(name: str, body: Because) -> dict[str, Any]:
        """Refuse an API token from its next request on."""
        with home.database.write() as session:
            tokens.revoke(session, name, actor=actor(), reason=body.reason)
        return {"name": name, "state": "revoked"}


def _secret(answer: dict[str, Any]) -> Response:
    return JSONResponse(answer, status_code=201, headers={"Cache-Control": "no-store"})
