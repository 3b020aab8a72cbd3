"""Fleet: what Lightship asks of an MQTT broker, and what is lost where a broker does not give it.

Rules:
* pure: facts in, findings out; whoever measured is in `broker_trials`;
* what was not tried is unknown, and says so: it is never taken for good;
* no row is about correctness: a device keeps what it reports until the server has stored it, whatever the broker does.
  What is lost is time, load, or who may hear and say what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, Final, NamedTuple

import msgspec

#: What the largest of our messages may need, with room.
PACKET_BYTES: Final = 262_144
#: For what should come at once.
LATE_SECONDS: Final = 3.0
#: Beyond one and a half keepalives: some look only every few seconds.
LOOK_SECONDS: Final = 8.0


class Level(StrEnum):
    """How a broker did."""

    OK = "ok"
    MISSING = "missing"  # it does not have it
    BROKEN = "broken"  # it claims to have it, and behaves otherwise; or it lets in, or through, what it should not
    UNKNOWN = "unknown"  # not tried, or the trial did not come to an end


class Share(NamedTuple):
    """So many of so many."""

    got: int
    of: int

    def __str__(self) -> str:
        """Like `997 of 1000`."""
        return f"{self.got} of {self.of}"


class Facts(msgspec.Struct, kw_only=True):
    """What was seen. None: not tried. Times are seconds; a time below 0 means never."""

    trouble: dict[str, str] = {}  # by trial: why it came to no end
    died: str = ""  # the trial that the broker did not survive
    v5: bool | None = None
    v311: bool | None = None
    granted: dict[str, int] = {}  # limits in the answer to CONNECT
    named_by_credential: bool | None = None  # the broker names sessions itself, by who connects
    delivered: Share | None = None
    carried: tuple[str, ...] | None = None  # which properties of a message came through
    retained: bool | None = None
    cleared: bool | None = None  # an empty retained message removes the one before
    will_after: float | None = None
    will_delayed: float | None = None  # when asked for `WILL_DELAY`
    silent_cut_after: float | None = None  # with a keepalive of `KEEPALIVE`
    shared_5: tuple[int, int, int] | None = None  # to one, to the other, of
    shared_311: tuple[int, int, int] | None = None
    redelivered: Share | None = None  # of what was not acknowledged, to the session that came back
    redelivered_shared: Share | None = None
    acknowledged_again: int | None = None  # of what had been acknowledged
    session_kept: bool | None = None
    session_forgotten: bool | None = None  # when its time was over
    expired_delivered: bool | None = None
    fresh_delivered: bool | None = None
    largest: int | None = None  # payload bytes that came through
    window: tuple[int, int] | None = None  # unacknowledged, and after one acknowledgement, with a window of `WINDOW`
    queued: Share | None = None  # kept for a session that was away
    nobody: int | None = None  # the reason code of a publish to no subscriber
    own_topic: bool | None = None  # a device may report in its own name
    foreign_write: bool | None = None  # a device was heard in another's name
    foreign_write_reason: int | None = None
    foreign_read: bool | None = None  # a device heard a command to another
    anonymous: bool | None = None  # was let in
    tls: str | None = None  # the version; "" for none
    old_tls: bool | None = None  # a version before 1.2 was agreed to
    plain: tuple[int, ...] | None = None  # ports that speak MQTT without TLS
    loopback: bool = False
    taken_over: int | None = (
        None  # the reason the older of two sessions of one name was given; 0: none, below: it lived
    )


WILL_DELAY: Final = 2
KEEPALIVE: Final = 2
WINDOW: Final = 5
CARRIED: Final = ("content type", "response topic", "correlation data", "user property")
_NOBODY: Final = 0x10
_TAKEN_OVER: Final = 0x8E
_DENIED: Final = 0x80

Verdict = tuple[Level, str]


class Expectation(NamedTuple):
    """One row: what is expected, what is lost without it, and what to set."""

    name: str
    loses: str
    remedy: str
    judge: Callable[[Facts], Verdict | None]
    trial: str  # which trial finds it out
    must: bool = False  # without it there is no use in this broker, or harm


class Finding(NamedTuple):
    """How a broker did in one row. `loses` and `remedy` are empty where nothing is lost."""

    name: str
    level: Level
    found: str
    loses: str
    remedy: str
    must: bool

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict()


def judge(facts: Facts) -> list[Finding]:
    """Every row of the contract, in its order."""
    return [_finding(expectation, facts) for expectation in EXPECTATIONS]


def exit_status(findings: Iterable[Finding]) -> int:
    """0: nothing is missing; 3: something is, and Lightship works without; 4: do not use it like this."""
    bad = [f for f in findings if f.level in (Level.MISSING, Level.BROKEN)]
    return 4 if any(f.must for f in bad) else 3 if bad else 0


def _finding(row: Expectation, facts: Facts) -> Finding:
    verdict = row.judge(facts)
    if facts.died and facts.died == row.trial:
        verdict = (Level.BROKEN, "the broker did not survive the trial: it answers nobody any more")
    if verdict is None:
        verdict = (Level.UNKNOWN, facts.trouble.get(row.trial, "not tried"))
    level, found = verdict
    if level == Level.OK:
        return Finding(row.name, level, found, "", "", row.must)
    return Finding(row.name, level, found, row.loses, row.remedy, row.must)


def _flag(good: bool | None, yes: str, no: str, level: Level = Level.MISSING) -> Verdict | None:
    if good is None:
        return None
    return (Level.OK, yes) if good else (level, no)


def _version_5(facts: Facts) -> Verdict | None:
    return _flag(facts.v5, "spoken", "not spoken")


def _version_311(facts: Facts) -> Verdict | None:
    return _flag(facts.v311, "spoken", "not spoken")


def _any_version(facts: Facts) -> Verdict | None:
    if facts.v5 is None and facts.v311 is None:
        return None
    spoken = [name for name, has in (("5", facts.v5), ("3.1.1", facts.v311)) if has]
    return _flag(bool(spoken), " and ".join(spoken), "neither 5 nor 3.1.1")


def _all_of(share: Share | None, what: str) -> Verdict | None:
    if share is None:
        return None
    return (Level.OK if share.got == share.of else Level.BROKEN, f"{share} {what}")


def _delivery(facts: Facts) -> Verdict | None:
    return _all_of(facts.delivered, "delivered, and acknowledged")


def _birth(facts: Facts) -> Verdict | None:
    if facts.retained and facts.cleared is False:
        return Level.BROKEN, "kept, and not removed by an empty message"
    return _flag(facts.retained, "kept for whoever comes later", "not kept")


def _after(seconds: float | None, earliest: float, latest: float, what: str) -> Verdict | None:
    if seconds is None:
        return None
    if seconds < 0:
        return Level.MISSING, f"no {what}"
    level = Level.OK if earliest <= seconds <= latest else Level.BROKEN
    return level, f"{what} after {seconds:.1f} s"


def _will(facts: Facts) -> Verdict | None:
    return _after(facts.will_after, 0, LATE_SECONDS, "last will")


def _will_delay(facts: Facts) -> Verdict | None:
    return _after(facts.will_delayed, WILL_DELAY - 0.3, WILL_DELAY + LATE_SECONDS, "last will")


def _keepalive(facts: Facts) -> Verdict | None:
    return _after(facts.silent_cut_after, 0, 1.5 * KEEPALIVE + LOOK_SECONDS, "cut")


def _split(split: tuple[int, int, int] | None) -> Verdict | None:
    if split is None:
        return None
    one, two, of = split
    found = f"{one} and {two} of {of}"
    if not one + two:
        return Level.MISSING, found
    return (Level.OK if one and two and one + two == of else Level.BROKEN), found


def _shared(facts: Facts) -> Verdict | None:
    found = [split for split in (facts.shared_5, facts.shared_311) if split is not None]
    if not found:
        return None
    return _flag(any(one + two for one, two, _ in found), "given", "nothing is delivered to them")


def _shared_5(facts: Facts) -> Verdict | None:
    return _split(facts.shared_5)


def _shared_311(facts: Facts) -> Verdict | None:
    return _split(facts.shared_311)


def _redelivery(facts: Facts) -> Verdict | None:
    verdict = _all_of(facts.redelivered, "delivered again")
    if verdict and facts.acknowledged_again:
        return Level.BROKEN, f"{verdict[1]}, and {facts.acknowledged_again} that were acknowledged"
    return verdict


def _redelivery_shared(facts: Facts) -> Verdict | None:
    return _all_of(facts.redelivered_shared, "delivered again")


def _kept(facts: Facts) -> Verdict | None:
    granted = facts.granted.get("SessionExpiryInterval")
    said = f"; it grants {granted} s at most" if granted is not None else ""
    return _flag(facts.session_kept, f"kept{said}", f"forgotten{said}")


def _forgotten(facts: Facts) -> Verdict | None:
    return _flag(facts.session_forgotten, "forgotten when its time is over", "kept for ever", Level.BROKEN)


def _expiry(facts: Facts) -> Verdict | None:
    if facts.expired_delivered is None:
        return None
    if not facts.fresh_delivered:
        return Level.BROKEN, "what had not expired was not delivered"
    return _flag(not facts.expired_delivered, "old messages go no further", "delivered after their time", Level.BROKEN)


def _properties(facts: Facts) -> Verdict | None:
    if facts.carried is None:
        return None
    lost = [name for name in CARRIED if name not in facts.carried]
    return _flag(not lost, ", ".join(CARRIED), f"lost: {', '.join(lost)}")


def _packet(facts: Facts) -> Verdict | None:
    limit = facts.granted.get("MaximumPacketSize")
    said = f"; it says {limit} at most" if limit else ""
    if facts.largest is None:
        return None
    return _flag(facts.largest >= PACKET_BYTES, f"{facts.largest} bytes{said}", f"{facts.largest} bytes{said}")


def _window(facts: Facts) -> Verdict | None:
    if facts.window is None:
        return None
    first, then = facts.window
    good = first <= WINDOW and then <= WINDOW + 1
    found = f"{first} on the way at once, {then} after one was acknowledged; asked for {WINDOW}"
    return _flag(good, found, found, Level.BROKEN)


def _queue(facts: Facts) -> Verdict | None:
    if facts.queued is None:
        return None
    return _flag(facts.queued.got == facts.queued.of, f"{facts.queued} kept", f"{facts.queued} kept")


def _nobody(facts: Facts) -> Verdict | None:
    if facts.nobody is None:
        return None
    return _flag(facts.nobody == _NOBODY, "said (0x10)", f"not said (0x{facts.nobody:02x})")


def _own(facts: Facts) -> Verdict | None:
    return _flag(facts.own_topic, "allowed", "not allowed", Level.BROKEN)


def _others(facts: Facts) -> Verdict | None:
    return _flag(_not(facts.foreign_write), "refused", "heard", Level.BROKEN)


def _commands(facts: Facts) -> Verdict | None:
    return _flag(_not(facts.foreign_read), "not heard", "heard", Level.BROKEN)


def _loud(facts: Facts) -> Verdict | None:
    if facts.foreign_write is not False or facts.foreign_write_reason is None:
        return None
    reason = facts.foreign_write_reason
    if reason < 0:
        return Level.OK, "the connection is closed"
    return _flag(reason >= _DENIED, f"said (0x{reason:02x})", f"silent: the device is told 0x{reason:02x}")


def _anonymous(facts: Facts) -> Verdict | None:
    return _flag(_not(facts.anonymous), "refused", "let in", Level.BROKEN)


def _tls(facts: Facts) -> Verdict | None:
    if facts.tls is None:
        return None
    if not facts.tls:
        return (Level.OK, "none, on this machine alone") if facts.loopback else (Level.MISSING, "none")
    if facts.old_tls:
        return Level.BROKEN, f"{facts.tls}, and older than 1.2 where a client asks for it"
    return Level.OK, facts.tls


def _plain(facts: Facts) -> Verdict | None:
    if facts.plain is None:
        return None
    ports = ", ".join(map(str, facts.plain))
    return _flag(not facts.plain, "none found", f"MQTT without TLS on port {ports}", Level.BROKEN)


def _takeover(facts: Facts) -> Verdict | None:
    if facts.taken_over is None:
        return None
    if facts.taken_over < 0:
        return Level.BROKEN, "two connections under one name lived side by side"
    if not facts.v5:
        return Level.OK, "the older one is ended"
    found = f"the older one is ended (0x{facts.taken_over:02x})"
    return _flag(facts.taken_over == _TAKEN_OVER, found, f"{found}, and not told why")


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


_SET_ACL: Final = "Let a user write only below lightship/v1/+/<own name>/: see docs/brokers.md, or use certificates."

EXPECTATIONS: Final[tuple[Expectation, ...]] = (
    Expectation(
        "a version of MQTT we speak",
        "everything: devices report over HTTPS instead, and are not poked",
        "Use a broker that speaks MQTT 5 or 3.1.1.",
        _any_version,
        "versions",
        must=True,
    ),
    Expectation(
        "MQTT 5",
        "reasons: devices speak 3.1.1, and are not told that the broker refused a report or that nobody listens",
        "Turn MQTT 5 on, or take a broker that has it.",
        _version_5,
        "versions",
    ),
    Expectation(
        "MQTT 3.1.1",
        "CPU: ingest speaks 5 instead, which costs half as much again a message; old clients stay outside",
        "Nothing, unless other clients need it. Set ingest_mqtt = 5.",
        _version_311,
        "versions",
    ),
    Expectation(
        "QoS 1",
        "latency: what is lost on the way is asked for again, and comes later",
        "Allow QoS 1.",
        _delivery,
        "delivery",
        must=True,
    ),
    Expectation(
        "retained birth",
        "sight: whoever comes later does not see who is there until the next heartbeat",
        "Allow retained messages (mosquitto: retain_available true).",
        _birth,
        "retained",
    ),
    Expectation(
        "last will on a dead connection",
        "latency: a device that dies is missed after three heartbeats, and not at once",
        "Allow wills; the control plane needs nothing else.",
        _will,
        "will",
    ),
    Expectation(
        "will delay",
        "quiet: a device that reconnects at once is shown as gone for a moment",
        "None: it is the broker's own.",
        _will_delay,
        "will-delay",
    ),
    Expectation(
        "keepalive",
        "latency: a device whose network died without a word is shown as online for longer",
        "Do not raise the keepalive of clients (mosquitto: max_keepalive).",
        _keepalive,
        "keepalive",
    ),
    Expectation(
        "shared subscriptions",
        "all reports over MQTT: ingest hears by shared subscriptions alone. Do not use it: devices would wait for an "
        "acknowledgement that nobody sends",
        "Allow shared subscriptions, or set broker = none: devices then report over HTTPS.",
        _shared,
        "shared-311",
        must=True,
    ),
    Expectation(
        "shared subscriptions, MQTT 5",
        "load: work is not spread over several ingest workers that speak 5",
        "Allow shared subscriptions, or run one worker.",
        _shared_5,
        "shared-5",
    ),
    Expectation(
        "shared subscriptions, MQTT 3.1.1",
        "CPU: ingest has to speak 5, which costs half as much again a message",
        "Set ingest_mqtt = 5.",
        _shared_311,
        "shared-311",
    ),
    Expectation(
        "what was not acknowledged comes again",
        "latency and load: what a worker held when it died is missed, and asked for again from the devices",
        "Keep sessions and their unacknowledged messages.",
        _redelivery,
        "redelivery",
    ),
    Expectation(
        "the same, of a shared subscription",
        "latency and load: what a worker held when it died is missed, and asked for again from the devices",
        "Keep sessions and their unacknowledged messages.",
        _redelivery_shared,
        "redelivery-shared",
    ),
    Expectation(
        "a session outlives its connection",
        "latency: pokes and reports that come while somebody reconnects are lost, and made good for later",
        "Allow a session expiry of a day (mosquitto: persistent_client_expiration 1d).",
        _kept,
        "session",
    ),
    Expectation(
        "a session ends when its time is over",
        "memory of the broker: what devices and workers that are gone left behind stays until you remove it",
        "Remove old sessions by the broker's own means, and watch its memory.",
        _forgotten,
        "session-end",
    ),
    Expectation(
        "message expiry",
        "load: a device that was away hears old pokes (it ignores them: they carry their own time)",
        "None: it is the broker's own.",
        _expiry,
        "expiry",
    ),
    Expectation(
        "properties of a message",
        "convenience: replies to commands and predictions over MQTT can't be matched by their properties",
        "None: it is the broker's own.",
        _properties,
        "delivery",
    ),
    Expectation(
        "messages of 256 KiB",
        "latency: a large batch goes over HTTPS, once MQTT is given up",
        "Raise the limit to 1 MiB (mosquitto: max_packet_size 1048576).",
        _packet,
        "packet",
    ),
    Expectation(
        "receive maximum",
        "memory of a worker: it is sent more than it asked for while the database is slow",
        "None: it is the broker's own (mosquitto 2.0.11 and before). A worker stops reading when it has enough.",
        _window,
        "window",
    ),
    Expectation(
        "a queue for who is away",
        "latency and load: what does not fit in the queue is asked for again from the devices",
        "Raise the queue (mosquitto: max_queued_messages 1000000, never 0).",
        _queue,
        "queue",
    ),
    Expectation(
        "a word when nobody listens",
        "latency: a device learns from the server's acknowledgement, some time later, that nothing was stored",
        "None: it is the broker's own.",
        _nobody,
        "nobody",
    ),
    Expectation(
        "a device may report",
        "all reports of such a device over MQTT; they go over HTTPS",
        "Let a user write below lightship/v1/+/<own name>/: see docs/brokers.md.",
        _own,
        "acl",
        must=True,
    ),
    Expectation(
        "no device speaks in another's name",
        "trust in what is reported: one stolen device can speak for all. Signatures still decide what devices run",
        _SET_ACL,
        _others,
        "acl",
        must=True,
    ),
    Expectation(
        "no device hears another's commands",
        "privacy: devices see which others are poked",
        _SET_ACL,
        _commands,
        "acl",
    ),
    Expectation(
        "a refusal is said",
        "sight: a device believes that its reports were taken, until the server's acknowledgement does not come",
        "Let devices speak MQTT 5; some brokers are silent even then.",
        _loud,
        "acl",
    ),
    Expectation(
        "no strangers",
        "privacy and trust: anybody who reaches the port can hear and say what devices may",
        "Ask for a certificate or a password (mosquitto: allow_anonymous false, require_certificate true).",
        _anonymous,
        "anonymous",
        must=True,
    ),
    Expectation(
        "TLS 1.2 or newer",
        "privacy: passwords and reports are read on the way",
        "Listen with TLS (mosquitto: cafile, certfile, keyfile, tls_version tlsv1.2).",
        _tls,
        "tls",
        must=True,
    ),
    Expectation(
        "no other door without TLS",
        "privacy: whoever is misconfigured reports in the clear, and nobody notices",
        "Remove the plain listener, or bind it to 127.0.0.1.",
        _plain,
        "plain",
    ),
    Expectation(
        "one connection for one name",
        "sight: a copied device is not noticed by the fight for its session",
        "None: it is the broker's own.",
        _takeover,
        "takeover",
    ),
)
