"""Access: the pure rules, may this caller do this here?

    viewer < operator < releaser < admin

Rules:
* a role may do what every role below it may;
* a token is for one environment, and is worth nothing in another, whatever its role;
* every verb names the least role that may do it, so a verb without a role can't be written down;
* what changes something always needs a token; reading needs none where the server says that its reads are open;
* the environment is judged before the role: a stranger to this environment learns nothing about its rights.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from lightship_agent.contract.codes import AccessError

#: The environment of the bootstrap credential, which is a file in the home itself: wherever the home is.
ANY_ENVIRONMENT: Final = ""


class Role(StrEnum):
    """What a token may do, from little to all."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    RELEASER = "releaser"
    ADMIN = "admin"


class Verb(StrEnum):
    """What a route of the operator API does; every route declares one."""

    OPEN = "open"
    FLEET_READ = "fleet.read"
    AUDIT_READ = "audit.read"
    ROLLOUT_PLAN = "rollout.plan"
    ROLLOUT_START = "rollout.start"
    ROLLOUT_PAUSE = "rollout.pause"
    ROLLOUT_RESUME = "rollout.resume"
    ROLLOUT_ABORT = "rollout.abort"
    EXPERIMENT_START = "experiment.start"
    EXPERIMENT_STOP = "experiment.stop"
    DEVICE_TOKEN = "device.token"  # noqa: S105 - the name of an act, not a secret
    DEVICE_APPROVE = "device.approve"
    DEVICE_RETRY = "device.retry"
    DEVICE_REVOKE = "device.revoke"
    DEVICE_CLEAR = "device.clear-clone"
    ALERT_ACKNOWLEDGE = "alert.acknowledge"
    ALERT_MUTE = "alert.mute"
    ALERT_UNMUTE = "alert.unmute"
    RELEASE_PUBLISH = "release.publish"
    RELEASE_REVOKE = "release.revoke"
    TOKEN_LIST = "token.list"  # noqa: S105 - as above
    TOKEN_CREATE = "token.create"  # noqa: S105 - as above
    TOKEN_REVOKE = "token.revoke"  # noqa: S105 - as above


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    least: Role | None  # None: nobody is asked who they are
    changes: bool
    words: str


RULES: Final[dict[Verb, Rule]] = {
    Verb.OPEN: Rule(None, False, "health check, sign-in page, stylesheet"),
    Verb.FLEET_READ: Rule(Role.VIEWER, False, "see devices, rollouts, versions, releases, alarms, alerts, metrics"),
    Verb.AUDIT_READ: Rule(Role.VIEWER, False, "read the audit log and check its chain"),
    Verb.ROLLOUT_PLAN: Rule(Role.VIEWER, False, "see which device would be in which wave"),
    Verb.ROLLOUT_START: Rule(Role.OPERATOR, True, "start a rollout of a released version"),
    Verb.ROLLOUT_PAUSE: Rule(Role.OPERATOR, True, "pause a rollout"),
    Verb.ROLLOUT_RESUME: Rule(Role.OPERATOR, True, "resume a rollout"),
    Verb.ROLLOUT_ABORT: Rule(Role.OPERATOR, True, "abort a rollout, and take devices back"),
    Verb.EXPERIMENT_START: Rule(Role.OPERATOR, True, "run a released version beside the champion"),
    Verb.EXPERIMENT_STOP: Rule(Role.OPERATOR, True, "end an experiment"),
    Verb.DEVICE_TOKEN: Rule(Role.OPERATOR, True, "make a join token"),
    Verb.DEVICE_APPROVE: Rule(Role.OPERATOR, True, "let a device in that waits for it"),
    Verb.DEVICE_RETRY: Rule(Role.OPERATOR, True, "let a device try a bundle again that failed there"),
    Verb.DEVICE_REVOKE: Rule(Role.OPERATOR, True, "revoke a device"),
    Verb.DEVICE_CLEAR: Rule(Role.OPERATOR, True, "take away the mark that an identity is in use twice"),
    Verb.ALERT_ACKNOWLEDGE: Rule(Role.OPERATOR, True, "say that you look after an alert"),
    Verb.ALERT_MUTE: Rule(Role.OPERATOR, True, "hold back what people would be told of, for a while"),
    Verb.ALERT_UNMUTE: Rule(Role.OPERATOR, True, "end a mute"),
    Verb.RELEASE_PUBLISH: Rule(Role.RELEASER, True, "sign and publish a version"),
    Verb.RELEASE_REVOKE: Rule(Role.RELEASER, True, "de-list a version"),
    Verb.TOKEN_LIST: Rule(Role.ADMIN, False, "see who holds API tokens"),
    Verb.TOKEN_CREATE: Rule(Role.ADMIN, True, "make an API token"),
    Verb.TOKEN_REVOKE: Rule(Role.ADMIN, True, "revoke an API token"),
}

_RANK: Final = {role: rank for rank, role in enumerate(Role)}


@dataclass(frozen=True)
class Grant:
    """What a valid token says of its holder."""

    name: str
    role: Role
    environment: str


def covers(held: Role, least: Role) -> bool:
    """Whether `held` may do what needs `least`."""
    return _RANK[held] >= _RANK[least]


def permit(grant: Grant | None, verb: Verb, *, environment: str, open_reads: bool) -> None:
    """Pass if the holder of `grant` may do `verb` on a server of `environment`.

    Args:
        grant: what the caller's valid token says; None for a caller without one.
        verb: what the route declares.
        environment: the server's.
        open_reads: whether this server answers what changes nothing to callers without a token. What is for
            more than viewers is never open.

    Raises:
        AccessError: access.token, access.environment, access.role.
    """
    rule = RULES[verb]
    if rule.least is None:
        return
    if grant is None:
        if open_reads and not rule.changes and rule.least is Role.VIEWER:
            return
        remedy = "Make one with `lightship token create`, and send it as `Authorization: Bearer …`."
        raise AccessError("access.token", f"{verb} needs an API token of a {rule.least} or more.", remedy=remedy)
    if grant.environment not in (environment, ANY_ENVIRONMENT):
        message = f"The token {grant.name} is for {grant.environment}; this server is {environment}."
        raise AccessError("access.environment", message, remedy="Use a token that was made here.")
    if not covers(grant.role, rule.least):
        message = f"{verb} needs a {rule.least} or more; the token {grant.name} is a {grant.role}."
        raise AccessError("access.role", message)
