"""Fleet: what a broker does, found out by doing it: the trials behind `lightship broker check`.

Rules:
* only below a prefix and under names that nobody else has; what was retained, and every session, is removed again;
* a trial writes down what it saw, and judges nothing;
* a trial that can't come to an end says why, and the others go on.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final

from lightship_agent.contract.codes import LightshipError, LinkError

from .broker_contract import KEEPALIVE, LOOK_SECONDS, PACKET_BYTES, WILL_DELAY, WINDOW, Facts, Share
from .broker_doors import plain_ports, speaks_old_tls
from .broker_seat import Credential, RefusedError, Seat, Will, pump

PAYLOAD: Final = b"lightship broker check"
SHARED: Final = 60
UNACKNOWLEDGED: Final = 10
SIZES: Final = (65_536, PACKET_BYTES, 1_000_000)
_SOON: Final = 3.0
_QUIET: Final = 0.6
_KEEP: Final = 60


class _SkippedError(LinkError):
    """A trial that can't be held here."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A broker, and as whom it may be tried.

    `second` is needed where the broker names sessions by who connects; `device` has no rights but a device's, under the
    name `device_name`; `bare` shows nothing at all; `prefix` is where the throw-away topics are.
    """

    host: str
    port: int
    main: Credential
    bare: Credential
    second: Credential | None = None
    device: Credential | None = None
    device_name: str = ""
    prefix: str = "lightship/v1/_check"
    offline: int = 2_000
    certificate: tuple[str, str] | None = None


class Bench:
    """Seats at that broker, and what has to be cleaned up behind them."""

    def __init__(self, target: Target) -> None:
        """Nothing is connected yet."""
        self.target = target
        self.run = secrets.token_hex(4)
        self.base = f"{target.prefix}-{self.run}"
        self.v5 = True
        self.named = False  # sessions, by who connects
        self._seats: list[Seat] = []
        self._sessions: list[tuple[Credential, str, bool]] = []
        self._retained: list[str] = []

    def topic(self, name: str) -> str:
        """A throw-away topic that no ingest worker listens to."""
        return f"{self.base}/_/{name}"

    def one(self, name: str = "one", **more: Any) -> Seat:
        """The first to sit down."""
        return self.seat(self.target.main, name, **more)

    def two(self, name: str = "two", **more: Any) -> Seat:
        """The second, who must not take the session of the first."""
        if self.named and self.target.second is None:
            raise _SkippedError("link.broker", "it names sessions by who connects: a second credential is needed")
        return self.seat(self.target.second if self.named and self.target.second else self.target.main, name, **more)

    def seat(
        self, who: Credential, name: str, *, keep: int = 0, back: bool = False, v5: bool | None = None, **more: Any
    ) -> Seat:
        """A connected seat.

        Args:
            who: as whom.
            name: of the session; it is made unique.
            keep: seconds for which the session is kept.
            back: go on with a session, and do not begin anew.
            v5: MQTT 5 or 3.1.1; None: the newest that the broker speaks.
            more: as for `Seat`.
        """
        v5 = self.v5 if v5 is None else v5
        client_id = f"check-{self.run}-{name}"
        if keep:
            self._sessions.append((who, client_id, v5))
        at = (self.target.host, self.target.port, who, client_id)
        if keep and not back and self.named:  # what an earlier trial left under that name
            Seat(*at, v5=v5, clean=True).open().close()
        # As devices and workers do: some brokers keep no session that began with a clean start.
        seat = Seat(*at, v5=v5, clean=not keep, expiry=keep, **more)
        self._seats.append(seat.open())
        return seat

    def retained(self, topic: str) -> str:
        """A topic that has to be cleaned up."""
        self._retained.append(topic)
        return topic

    def tidy(self) -> None:
        """Close what is open, end sessions, remove what is retained. Never raises."""
        seats, sessions, topics = self._seats, dict.fromkeys(self._sessions), self._retained
        self._seats, self._sessions, self._retained = [], [], []
        for seat in seats:
            seat.close()
        for who, client_id, v5 in sessions:
            try:
                Seat(self.target.host, self.target.port, who, client_id, v5=v5, clean=True).open().close()
            except LightshipError:
                continue
        if topics:
            try:
                seat = self.one("tidy")
            except LightshipError:
                return
            for topic in topics:
                seat.say(topic, b"", retain=True)
            seat.close()


def check(target: Target, *, only: Collection[str] = (), begin: Callable[[str], None] = lambda _: None) -> Facts:
    """Hold every trial, or only these; `begin` is told the name of each.

    Raises:
        LinkError: link.unreachable, link.broker where nobody is let in.
    """
    bench, facts = Bench(target), Facts()
    begin("versions")
    _versions(bench, facts)
    for name, trial in TRIALS.items():
        if only and name not in only:
            continue
        begin(name)
        try:
            trial(bench, facts)
        except LightshipError as e:
            facts.trouble[name] = e.args[0] if e.args else str(e)
        finally:
            bench.tidy()
        if name in facts.trouble and not _alive(bench):
            facts.died = name
            break
    return facts


def _alive(bench: Bench) -> bool:
    try:
        bench.one("hello")
    except LightshipError:
        return False
    bench.tidy()
    return True


def _versions(bench: Bench, facts: Facts) -> None:
    spoken: dict[bool, bool] = {}
    said = ""
    for v5 in (True, False):
        try:
            seat = bench.one("hello", v5=v5)
        except RefusedError as e:
            spoken[v5], said = False, said or str(e)
        else:
            spoken[v5], facts.granted = True, facts.granted or seat.granted
            bench.tidy()
    if not any(spoken.values()):
        remedy = "Are the credentials right? --username and --password-file, or --cert and --key, and --ca."
        raise LinkError("link.broker", said, remedy=remedy)
    facts.v5, facts.v311 = spoken[True], spoken[False]
    bench.v5 = facts.v5


def _naming(bench: Bench, facts: Facts) -> None:
    first = bench.one("first")
    second = bench.one("second")
    facts.named_by_credential = bench.named = pump([first, second], lambda: first.lost is not None, _QUIET)


def _delivery(bench: Bench, facts: Facts) -> None:
    one, two = bench.one(), bench.two()
    two.subscribe(bench.topic("delivery"))
    more: dict[str, Any] = {}
    if bench.v5:
        more = {
            "ContentType": "text/plain",
            "ResponseTopic": bench.topic("answer"),
            "CorrelationData": b"42",
            "UserProperty": ("a", "b"),
        }
    taken = one.say(bench.topic("delivery"), *(PAYLOAD + b" %d" % n for n in range(20)), **more)
    pump([one, two], lambda: len(two.heard) >= 20, _SOON)
    facts.delivered = Share(min(taken, len({h.payload for h in two.heard})), 20)
    if bench.v5 and two.heard:
        expected = {
            "content type": ("ContentType", "text/plain"),
            "response topic": ("ResponseTopic", bench.topic("answer")),
            "correlation data": ("CorrelationData", b"42"),
            "user property": ("UserProperty", [("a", "b")]),
        }
        came = two.heard[0].properties
        facts.carried = tuple(name for name, (p, value) in expected.items() if getattr(came, p, None) == value)


def _retained(bench: Bench, facts: Facts) -> None:
    topic = bench.retained(bench.topic("retained"))
    one = bench.one()
    one.say(topic, PAYLOAD, retain=True)
    two = bench.two()
    two.subscribe(topic)
    facts.retained = pump([one, two], lambda: any(h.retain and h.payload == PAYLOAD for h in two.heard), _SOON)
    two.close()
    one.say(topic, b"", retain=True)
    two = bench.two("two-again")
    two.subscribe(topic)
    facts.cleared = not pump([one, two], lambda: any(h.payload for h in two.heard), _QUIET)


def _time_of_will(bench: Bench, dies: Callable[[Seat], None], *, delay: int, keepalive: int = 30) -> float:
    topic = bench.retained(bench.topic(f"will-{delay}-{keepalive}"))
    two = bench.two()
    two.subscribe(topic)
    # Without a session that goes on, MQTT 5 says the will at once.
    will = Will(topic, PAYLOAD, delay, retain=True)
    one = bench.one(keep=_KEEP if delay else 0, keepalive=keepalive, will=will)
    died = time.monotonic()
    dies(one)
    patience = delay + 4.0 if one.lost is not None else 1.5 * keepalive + LOOK_SECONDS
    came = pump([two], lambda: bool(two.heard), patience)
    if one.lost is None:
        one.kill()
    return time.monotonic() - died if came else -1.0


def _will(bench: Bench, facts: Facts) -> None:
    facts.will_after = _time_of_will(bench, Seat.kill, delay=0)


def _will_delay(bench: Bench, facts: Facts) -> None:
    _need_5(bench)
    facts.will_delayed = _time_of_will(bench, Seat.kill, delay=WILL_DELAY)


def _keepalive(bench: Bench, facts: Facts) -> None:
    facts.silent_cut_after = _time_of_will(bench, lambda _: None, delay=0, keepalive=KEEPALIVE)


def _shared(bench: Bench, *, v5: bool) -> tuple[int, int, int]:
    name = "5" if v5 else "311"
    one, two = bench.one(v5=v5), bench.two(v5=v5)
    for seat in (one, two):
        seat.subscribe(f"$share/check-{bench.run}-{name}/{bench.topic(f'shared-{name}')}")
    for n in range(SHARED):
        one.publish(bench.topic(f"shared-{name}"), b"%d" % n)
        pump([one, two], lambda: True)
    pump([one, two], lambda: len(one.heard) + len(two.heard) >= SHARED, _SOON)
    pump([one, two], lambda: False, 0.2)
    return len(one.heard), len(two.heard), SHARED


def _shared_5(bench: Bench, facts: Facts) -> None:
    _need_5(bench)
    facts.shared_5 = _shared(bench, v5=True)


def _shared_311(bench: Bench, facts: Facts) -> None:
    if not facts.v311:
        raise _SkippedError("link.broker", "MQTT 3.1.1 is not spoken")
    facts.shared_311 = _shared(bench, v5=False)


def _come_again(bench: Bench, subscription: str, topic: str, name: str) -> tuple[Share, int]:
    """Of what a session left unacknowledged, how much it gets when it is back; and of what it had acknowledged."""
    one, two = bench.one(), bench.two(name, keep=_KEEP, manual=True)
    two.subscribe(subscription)
    one.say(topic, *(b"%d" % n for n in range(UNACKNOWLEDGED)))
    pump([one, two], lambda: len(two.heard) >= UNACKNOWLEDGED, _SOON)
    done = two.heard[: UNACKNOWLEDGED // 2]
    two.acknowledge(done)
    two.kill()
    pump([one], lambda: False, 0.3)
    two = bench.two(name, keep=_KEEP, back=True, manual=True)
    wanted = {b"%d" % n for n in range(UNACKNOWLEDGED)} - {h.payload for h in done}
    pump([one, two], lambda: {h.payload for h in two.heard} >= wanted, _SOON)
    came = {h.payload for h in two.heard}
    two.acknowledge(two.heard)
    return Share(len(came & wanted), len(wanted)), len(came - wanted)


def _redelivery(bench: Bench, facts: Facts) -> None:
    topic = bench.topic("again")
    facts.redelivered, facts.acknowledged_again = _come_again(bench, topic, topic, "again")


def _redelivery_shared(bench: Bench, facts: Facts) -> None:
    topic = bench.topic("again-shared")
    subscription = f"$share/check-{bench.run}-again/{topic}"
    facts.redelivered_shared, _ = _come_again(bench, subscription, topic, "again-shared")


def _session(bench: Bench, facts: Facts) -> None:
    one, two = bench.one(), bench.two("session", keep=_KEEP)
    two.subscribe(bench.topic("session"))
    two.kill()
    pump([one], lambda: False, 0.3)
    one.say(bench.topic("session"), PAYLOAD)
    two = bench.two("session", keep=_KEEP, back=True)
    facts.session_kept = pump([one, two], lambda: bool(two.heard), _SOON) and two.present


def _session_end(bench: Bench, facts: Facts) -> None:
    _need_5(bench)
    two = bench.two("short", keep=1)
    two.subscribe(bench.topic("short"))
    two.close()
    time.sleep(3.5)
    if facts.session_kept:  # else there is nothing to forget
        facts.session_forgotten = not bench.two("short", keep=1, back=True).present


def _expiry(bench: Bench, facts: Facts) -> None:
    _need_5(bench)
    topic = bench.topic("expiry")
    one, two = bench.one(), bench.two("expiry", keep=_KEEP)
    two.subscribe(topic)
    two.close()
    one.say(topic, b"old", MessageExpiryInterval=1)
    one.say(topic, b"fresh", MessageExpiryInterval=600)
    pump([one], lambda: False, 2.3)
    two = bench.two("expiry", keep=_KEEP, back=True)
    pump([one, two], lambda: any(h.payload == b"fresh" for h in two.heard), _SOON)
    pump([one, two], lambda: False, 0.3)
    came = {h.payload for h in two.heard}
    facts.expired_delivered, facts.fresh_delivered = b"old" in came, b"fresh" in came


def _packet(bench: Bench, facts: Facts) -> None:
    facts.largest = 0
    for size in SIZES:
        one, two = bench.one(f"large-{size}"), bench.two(f"large-to-{size}")
        two.subscribe(bench.topic("packet"))
        one.publish(bench.topic("packet"), bytes(size))
        if not pump([one, two], lambda two=two: bool(two.heard), _SOON):  # type: ignore[misc]
            return
        facts.largest = size
        one.close()
        two.close()


def _window(bench: Bench, facts: Facts) -> None:
    _need_5(bench)
    one, two = bench.one(), bench.two("window", manual=True, window=WINDOW)
    two.subscribe(bench.topic("window"))
    one.say(bench.topic("window"), *(b"%d" % n for n in range(4 * WINDOW)))
    pump([one, two], lambda: False, _QUIET)
    first = len(two.heard)
    two.acknowledge(two.heard[:1])
    pump([one, two], lambda: False, _QUIET)
    facts.window = (first, len(two.heard))
    two.acknowledge(two.heard[1:])


def _queue(bench: Bench, facts: Facts) -> None:
    topic, many = bench.topic("queue"), bench.target.offline
    one, two = bench.one(), bench.two("queue", keep=_KEEP)
    two.subscribe(topic)
    two.close()
    one.say(topic, *(b"%d" % n for n in range(many)))
    two = bench.two("queue", keep=_KEEP, back=True)
    known = -1
    while known < len(two.heard) < many:
        known = len(two.heard)
        pump([one, two], lambda: len(two.heard) >= many, _SOON)
    facts.queued = Share(len({h.payload for h in two.heard}), many)


def _nobody(bench: Bench, facts: Facts) -> None:
    _need_5(bench)
    one = bench.one()
    mid = one.publish(bench.topic("nobody"), PAYLOAD)
    if pump([one], lambda: mid in one.reasons or one.lost is not None, _SOON):
        facts.nobody = one.reasons.get(mid)


def _acl(bench: Bench, facts: Facts) -> None:
    target = bench.target
    if target.device is None:
        raise _SkippedError("link.broker", "not tried: a device's credential is needed (--device-cert, or -username)")
    other = f"other-{bench.run}"
    one = bench.one()
    one.subscribe(f"{bench.base}/+/tele")
    device = bench.seat(target.device, target.device_name)
    device.publish(f"{bench.base}/{target.device_name}/tele", PAYLOAD + b": own")
    pump([one, device], lambda: bool(one.heard), _SOON)
    facts.own_topic = any(h.payload.endswith(b"own") for h in one.heard)
    device.subscribe(f"{bench.base}/{other}/cmd/+")
    one.say(f"{bench.base}/{other}/cmd/check", PAYLOAD)
    facts.foreign_read = pump([one, device], lambda: bool(device.heard), _QUIET)
    if device.lost is not None:  # it was sent away for asking
        device = bench.seat(target.device, target.device_name)
    mid = device.publish(f"{bench.base}/{other}/tele", PAYLOAD + b": another's")
    pump([one, device], lambda: mid in device.reasons or device.lost is not None, _SOON)
    pump([one, device], lambda: False, _QUIET)
    facts.foreign_write = any(h.payload.endswith(b"another's") for h in one.heard)
    facts.foreign_write_reason = -1 if device.lost is not None else device.reasons.get(mid)


def _anonymous(bench: Bench, facts: Facts) -> None:
    target = bench.target
    if target.main.username == "" and target.certificate is None:
        facts.anonymous = True  # that is how we came
        return
    try:
        bench.seat(target.bare, "stranger")
    except RefusedError:
        facts.anonymous = False
    else:
        facts.anonymous = True


def _tls(bench: Bench, facts: Facts) -> None:
    target = bench.target
    facts.loopback = _is_loopback(target.host)
    if target.main.tls is None:
        facts.tls = ""
        return
    facts.old_tls = speaks_old_tls(target.host, target.port, target.certificate)
    facts.tls = bench.one().tls_version


def _plain(bench: Bench, facts: Facts) -> None:
    target = bench.target
    if target.main.tls is None:
        raise _SkippedError("link.broker", "the address itself is without TLS")
    facts.plain = plain_ports(target.host, (target.port, 1_883))


def _takeover(bench: Bench, facts: Facts) -> None:
    older = bench.one("same")
    newer = bench.one("same")
    gone = pump([older, newer], lambda: older.lost is not None, _SOON)
    facts.taken_over = max(0, older.lost or 0) if gone else -1


def _need_5(bench: Bench) -> None:
    if not bench.v5:
        raise _SkippedError("link.broker", "MQTT 5 is not spoken")


def _is_loopback(host: str) -> bool:
    try:
        found: Iterable[Any] = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(str(address[4][0]).startswith(("127.", "::1")) for address in found)


TRIALS: Final[dict[str, Callable[[Bench, Facts], None]]] = {
    "naming": _naming,
    "delivery": _delivery,
    "retained": _retained,
    "will": _will,
    "will-delay": _will_delay,
    "keepalive": _keepalive,
    "shared-5": _shared_5,
    "shared-311": _shared_311,
    "redelivery": _redelivery,
    "session": _session,
    "session-end": _session_end,
    "expiry": _expiry,
    "packet": _packet,
    "window": _window,
    "queue": _queue,
    "nobody": _nobody,
    "acl": _acl,
    "anonymous": _anonymous,
    "tls": _tls,
    "plain": _plain,
    "takeover": _takeover,
    # Last: rumqttd 0.20 does not survive it.
    "redelivery-shared": _redelivery_shared,
}
