"""Update: the shell that looks for what is wanted, and carries out what the state machine decides.

Rules:
* one thread; state is made durable before its actions run; every error becomes an event with a code;
* a step forward that can't be made durable is not taken; a step back is, for the disk then still holds a state from
  which a restart leads back too;
* what is wanted comes from the control plane, or from a file that was carried here (update.media), and is verified in a
  process of its own (update.check), or from somebody at the device (update.orders);
* a carried file is kept while somebody on site objects, and while this program fails for reasons of its own; once it is
  applied, refused or failed it goes;
* what is settled is not asked for again, but once a day the whole of it is verified anew, so that signed metadata that
  nobody renews is noticed before it matters;
* fail points (`LIGHTSHIP_FAIL_POINT=<name>`) kill this process at a named instruction, for the crash tests;
* nothing here touches the model that serves, except the swap and the restore it is told to do (update.steps).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from lightship_agent.contract.codes import (
    EnrolError,
    LightshipError,
    LinkError,
    MediaError,
    StorageError,
    TrustError,
    UpdateError,
)
from lightship_agent.contract.device_api import Paths
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.fail_points import fail_point
from lightship_agent.files import storage_error
from lightship_agent.link.client import ControlPlane
from lightship_agent.link.identity import Identity
from lightship_agent.runtime.memory import trim_memory

from . import machine as m
from . import media, orders
from .check import CheckReply, CheckRequest, FileSource, ServerSource, check_in_child
from .clock import DeviceClock, date_of
from .companions import Companions
from .fetch import Ways
from .gate import DeferredError, Gate, Kind, Rules
from .rate import TokenBucket
from .sources import MediaFiles, ServerFiles
from .steps import Delivery, Host, Steps, Timing
from .store import BundleStore, StateFile

log = logging.getLogger(__name__)

#: What is settled is verified anew after so many seconds.
VERIFY_EVERY = 86_400.0
#: Shortest time between two looks in seconds, whoever pokes.
_LEAST_PAUSE = 0.5
#: While something is on its way, the server is asked at most so often, in seconds, whether it is still wanted.
_ASK_EVERY = 5.0

Check = Callable[[CheckRequest], CheckReply]


class Bounds(msgspec.Struct, frozen=True):
    """When, how fast, and into how much room."""

    gate: Gate = msgspec.field(default_factory=lambda: Gate(Rules()))
    rate: TokenBucket | None = None
    store_bytes: int = 0  # 0: no quota


class _Deferral(msgspec.Struct, frozen=True):
    """What may not be done now, and until when in Unix seconds, if that is known."""

    kind: Kind
    until: float | None


class Updater:
    """Looks for assignments, and brings this device to what they say."""

    def __init__(
        self,
        state_dir: Path,
        identity: Identity,
        plane: ControlPlane,
        host: Host,
        timing: Timing,
        bounds: Bounds | None = None,
        *,
        clock: DeviceClock | None = None,
        check: Check | None = None,
    ) -> None:
        """Read the durable state; `start` begins to act.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        self._dir = state_dir
        self._identity = identity
        self._plane = plane
        self._host = host
        self._timing = timing
        self._bounds = bounds or Bounds()
        self._check = check or self._check_in_child
        self.clock = clock or DeviceClock(state_dir)
        self._file = StateFile(state_dir)
        self.store = BundleStore(state_dir, self._bounds.store_bytes)
        self.state = self._file.load()
        self._etag = ""  # of the last envelope that is settled,
        self._etag_from = self._etag_until = 0.0  # and from when until when it is, in Unix seconds
        self._deferral: _Deferral | None = None
        self._held: frozenset[str] = frozenset()  # names of carried files that were looked at and wait for their moment
        self._beside_begun = False
        self._asked_at = 0.0  # monotonic seconds of the last question whether a transfer is still wanted
        self._stop = threading.Event()
        self._poke = threading.Event()
        self._thread = threading.Thread(target=self._run, name="updater", daemon=True)
        self._steps = Steps(host, self.store, plane, timing, self._bounds.gate, self._stop)
        self.companions = Companions(state_dir, self.store, host, self._bounds.gate, timing.soak, self.clock.now)
        self._steps.beside = lambda: self.companions.kept
        self.on_acknowledged: Callable[[str, int], None] = lambda _epoch, _seq: None
        self.trust_code = ""  # why updates stand still, if they do
        self.reached_at = 0.0  # Unix seconds of the last answer of the control plane
        self.metadata_expires: dict[str, int] = {}  # Unix seconds by role, as of the last check,
        self.revoked: frozenset[str] = frozenset()  # and digests that the store holds and nobody releases any more
        orders.prepare(state_dir)
        media.prepare(state_dir)

    # From outside ---------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Settle what a restart cut short, and serve what was committed. Call before `start`."""
        wanted = [t.sha256 for t in (self.state.current, self.state.previous) if t is not None]
        absent = tuple(digest for digest in wanted if not self.store.holds(digest))
        if absent:
            log.error("update: the store no longer holds %s", ", ".join(d[:12] for d in absent))
        self._apply(m.Started(absent))

    def start(self) -> None:
        """Begin to look for assignments."""
        self._thread.start()

    def stop(self) -> None:
        """Stop between two steps."""
        self._stop.set()
        self._poke.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self.companions.stop()

    def poke(self) -> None:
        """Look for an assignment now."""
        self._poke.set()

    @property
    def penalised(self) -> int:
        """How many bundles wait in the penalty box."""
        now = self.clock.now()
        return sum(p.until > now for p in self.state.penalties.values())

    def notice(self) -> None:
        """Look now if somebody at the device left something for us. Costs one look at each of two folders."""
        if orders.anything(self._dir) or any(p.name not in self._held for p in media.spooled(self._dir)):
            self._poke.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            for look in (self._look_at_orders, self._look_at_media, self._look_beside, self._look):
                try:
                    look()
                except LightshipError as e:
                    self._standstill(e)
                except Exception:  # the agent must go on serving and looking, whatever went wrong here
                    log.exception("updater: unexpected error")
            self._stop.wait(_LEAST_PAUSE)
            self._poke.wait(self._pause_seconds())
            self._poke.clear()

    def _pause_seconds(self) -> float:
        # Devices that were started in the same minute shall not come in the same second for ever.
        pause = self._timing.poll * random.uniform(0.9, 1.1)
        until = self._deferral.until if self._deferral is not None else None
        return pause if until is None else max(0.0, min(pause, until - time.time() + 1.0))

    def _standstill(self, e: LightshipError) -> None:
        if e.code != self.trust_code:
            log.warning("updater: %s: %s", e.code, e)
        self.trust_code = e.code

    # What is wanted -------------------------------------------------------------------------------------------------

    def _look_at_orders(self) -> None:
        for order in orders.waiting(self._dir):
            log.info("order: %s %s", order.verb, order.reason)
            if order.verb == "go-back":
                here = self.state.current.sha256 if self.state.current is not None else ""
                if orders.begun(order, here) == here:
                    self._apply(m.WentBack(order.reason or "No reason was given."))
            else:
                self._apply(m.PenaltyCleared())
            self._etag_until = 0.0
            orders.done(order)

    def _look_at_media(self) -> None:
        held = set()
        for path in media.spooled(self._dir):
            if self._stop.is_set() or not self._settles(path):
                held.add(path.name)
        self._held = frozenset(held)

    def _settles(self, path: Path) -> bool:
        """Bring this device to what a carried file says; whether that is settled, one way or the other."""
        try:
            source = FileSource(path=str(path.resolve()), opener=media.OPENER)
            reply = self._verified(media.envelope_for(path, self._identity.device), source)
            target = m.Target.of(reply.assignment, offline=True)
            self._take(reply, target, Delivery(MediaFiles(path), self._ways(reply), gated=False))
        except (TrustError, MediaError) as e:
            log.warning("media: %s is refused: %s: %s", path.name, e.code, e)
            media.settled(path)
            return True
        except LightshipError as e:  # of our own: no room, another check under way, a process that can't be started
            self._standstill(e)
            return False
        # Held by whoever objects, or by a stop that came between: then it is looked at again.
        if self._deferral is not None or self._stop.is_set():
            return False
        media.settled(path)
        return True

    def _look_beside(self) -> None:
        """What ran beside before a restart runs again; it is not waited for by the first prediction."""
        if not self._beside_begun:
            self._beside_begun = True
            self.companions.recover(self._serving)
        self.companions.settle()

    @property
    def _serving(self) -> str:
        """The digest of what is committed."""
        return self.state.current.sha256 if self.state.current is not None else ""

    def _look(self) -> None:
        # A clock that was set back says nothing of how long ago something was settled.
        settled = self._etag_from <= self.clock.now() < self._etag_until
        desired = self._plane.desired(self._etag if settled and not self._freed() else "")
        self.reached_at = time.time()
        self.clock.authenticated(date_of(desired.date))
        for epoch, seq in desired.acked:
            self.on_acknowledged(epoch, seq)
        if desired.envelope is None:
            # Nothing is wanted of us, or what is settled: whatever stood in the way before, nothing does now.
            self.trust_code = ""
            return
        etag = sha256_hex(desired.envelope)[:32]
        source = ServerSource(metadata_url=f"{self._plane.server}{Paths.METADATA}")
        reply = self._verified(desired.envelope, source)
        files = ServerFiles(self._plane, self._pause, self._bounds.rate, self._stopped(etag))
        self._take(reply, m.Target.of(reply.assignment), Delivery(files, self._ways(reply), gated=True))
        # Only what is settled need not be sent again: a failed try comes back with the next look.
        self._etag, self._etag_from = etag, self.clock.now()
        self._etag_until = self._settled_until(reply.assignment.sha256)

    def _verified(self, envelope: bytes, source: ServerSource | FileSource) -> CheckReply:
        current = self.state.current
        request = CheckRequest(
            state_dir=str(self._dir.resolve()),
            device=self._identity.device,
            envelope=envelope,
            floor=self.state.floor,
            director=self.state.director,
            now=self.clock.now(),
            source=source,
            current_sha256=current.sha256 if current else "",
            held=tuple((t.path, t.sha256) for t in (current, self.state.previous) if t is not None),
        )
        fail_point("checking")
        reply = self._check(request)
        self.clock.authenticated(reply.assignment.issued)
        self.metadata_expires = reply.metadata_expires
        if self.revoked != (revoked := frozenset(reply.revoked)):
            self.revoked = revoked
            self._host.settle(m.fit(self.state))
        self.trust_code = ""
        return reply

    def _check_in_child(self, request: CheckRequest) -> CheckReply:
        return check_in_child(request, cancelled=self._stop.is_set)

    def _ways(self, reply: CheckReply) -> Ways:
        current = self.state.current
        keep = (*m.kept(self.state), reply.assignment.sha256)
        return Ways(reply.transport, reply.delta, current.sha256 if current else "", keep)

    def _take(self, reply: CheckReply, target: m.Target, delivery: Delivery) -> None:
        self._deferral = None
        self._etag_until = 0.0  # of what is settled, nobody knows whether it still is
        self._steps.delivery = delivery
        try:
            self._apply(m.Assigned(target, reply.director))
        finally:
            self._steps.delivery = None
        if self.state.last_code == "update.superseded":
            self._poke.set()
        elif not self._stop.is_set():
            self._follow(reply, target, delivery)
        # What was transferred and unpacked was large.
        if reply.assignment.sha256 in m.kept(self.state):
            trim_memory()

    def _follow(self, reply: CheckReply, target: m.Target, delivery: Delivery) -> None:
        """Now that the machine is at rest: what shall run beside."""
        # What was carried here brings no companions: they come over the network, or from the store.
        source, before = delivery.source if delivery.gated else None, self.companions.kept
        self.companions.follow(reply.beside, target.seq, self._serving, source, gated=delivery.gated)
        if self.companions.deferred is not None and self._deferral is None and delivery.gated:
            self._deferral = _Deferral(*self.companions.deferred)
        if set(before) - set(self.companions.kept):
            self.store.collect_garbage((*m.kept(self.state), *self.companions.kept))

    def _freed(self) -> bool:
        """Whether what was not allowed the last time is allowed now."""
        if self._deferral is None:
            return False
        try:
            self._bounds.gate.check(self._deferral.kind)
        except DeferredError as e:
            self._deferral = _Deferral(self._deferral.kind, e.until)
            return False
        return True

    def _settled_until(self, digest: str) -> float:
        now = self.clock.now()
        if self._deferral is not None:
            return now + VERIFY_EVERY
        until = self.state.penalties.get(digest, m.Penalty()).until
        if self.state.current is not None and self.state.current.sha256 == digest:
            until = now + VERIFY_EVERY
        return min(until, self.companions.settled_until())

    def _stopped(self, etag: str) -> Callable[[], bool]:
        """Asked between two chunks: stops with the agent, with the window, and when another assignment is there."""

        def stopped() -> bool:
            if time.monotonic() - self._asked_at > _ASK_EVERY and self._poke.is_set():
                self._asked_at = time.monotonic()
                self._poke.clear()
                if self._is_superseded(etag):
                    raise UpdateError("update.superseded", "Another assignment came meanwhile.")
            return self._stop.is_set()

        return self._bounds.gate.watch(stopped)

    def _is_superseded(self, etag: str) -> bool:
        try:
            envelope = self._plane.desired(etag).envelope
        except (LinkError, EnrolError):  # then the transfer itself will tell
            return False
        return envelope is not None and sha256_hex(envelope)[:32] != etag

    # What follows ---------------------------------------------------------------------------------------------------

    def _apply(self, event: m.Event) -> None:
        """Run the machine until it rests: durable state first, then its actions, whose outcome is the next event."""
        pending: m.Event | None = event
        while pending is not None:
            before = self.state
            after, actions = m.step(before, pending, self.clock.now())
            try:
                self._save(before, after)
            except StorageError as e:
                if not isinstance(pending, m.Failed | m.Started):
                    if before.candidate is None:
                        raise
                    pending = m.Failed(e.code, str(e)[:1_000])
                    continue
                log.warning("update: %s: %s", e.code, e)
            self.state = after
            pending = None
            for action in actions:
                pending = self._perform(action) or pending

    def _save(self, before: m.UpdateState, after: m.UpdateState) -> None:
        if after != before:
            fail_point(f"before-save-{after.phase}")
            self._file.save(after)
            fail_point(f"after-save-{after.phase}")

    def _perform(self, action: m.Action) -> m.Event | None:
        """Carry out one action; what follows from it, if anything."""
        error: LightshipError
        try:
            return self._steps.carry_out(action, self.state)
        except DeferredError as e:
            self._deferral = _Deferral("download" if self.state.phase == "fetching" else "install", e.until)
            error = e
        except LightshipError as e:
            error = e
        except OSError as e:
            error = storage_error(e, self._dir)
        except Exception as e:  # whatever it was: an attempt that nobody ends would stop all updates for good
            log.exception("update: unexpected error")
            error = UpdateError("update.swap", f"Unexpected: {type(e).__name__}: {e}.")
        log.warning("update: %s: %s", error.code, error)
        return m.Failed(error.code, str(error)[:1_000])

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise LinkError("link.unreachable", "The agent is stopping.")
