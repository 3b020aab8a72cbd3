"""The agent's composition root: wires the rooms, owns threads and shutdown.

Rules: it only wires. The HTTP port is taken before anything else, so that a taken port is an error and not a half
agent; serving starts from what is on disk and needs no network; the threads are: HTTP, updater, MQTT, reporter.
"""

from __future__ import annotations

import gc
import logging
import math
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from . import __version__, lean
from .contract.assignment import Beside
from .contract.bundle import Bundle, read_bundle
from .contract.codes import LightshipError, StorageError
from .contract.messages import AnyRecord, Command, Fault, Reply, Update
from .contract.wire import pack
from .fail_points import fail_point
from .files import sweep, write_durably
from .link import identity
from .link.asked import Asked, LogLevel
from .link.client import ControlPlane
from .link.home_assistant import HomeAssistant
from .link.outbox import Outbox
from .link.renewal import CertificateKeeper
from .link.ring import LAST_SEQ
from .link.sender import RESEND_SECONDS, Parcel, Sender
from .link.way import Way
from .logs import RecentLines, speak_for
from .monitor.application import ApplicationNumbers
from .monitor.monitor import Monitor, StandingFault
from .monitor.redaction import parse_redaction
from .monitor.sharing import Sharing
from .runtime.compat import check_compatible
from .runtime.memory import trim_memory
from .runtime.model import load_model
from .runtime.ort import onnxruntime
from .runtime.session import Allowed
from .service import notify_systemd
from .serving.access import access_of
from .serving.company import Company
from .serving.dataplane import DataPlane
from .serving.frames import FrameFace
from .serving.http import create_app
from .serving.mirror import Mirror
from .serving.repository import Repository, Shelved
from .serving.residents import Residents
from .serving.server import HttpServer
from .settings import Settings
from .snapshot import snapshot_of
from .update import machine
from .update.gate import Gate, Rules
from .update.rate import bucket_for
from .update.steps import Timing
from .update.updater import Bounds, Updater
from .view import Parts, View, now_ms

if TYPE_CHECKING:
    from .link.mqtt import MqttLink
    from .serving.mqtt import MqttFace

log = logging.getLogger(__name__)

#: Reports that matter at once are sent without waiting for the next report interval.
TICK_SECONDS = 1.0
#: Without MQTT for so long, reports go over HTTPS.
HTTPS_FALLBACK_SECONDS = 60.0
#: Within a request Python's lock is given up, and taken back, some four times, and each may have to wait so long.
SWITCH_SECONDS = 0.0001
#: Whoever waited for us to serve is answered before we load what the network takes.
FIRST_SECONDS = 0.05
#: Of the outbox of events, beside that of reports: years of them.
EVENTS_MB = 4


class Agent:
    """One device."""

    def __init__(self, settings: Settings, *, root: Path = Path("/")) -> None:
        """Open identity, outbox and update state; nothing runs yet.

        Args:
            settings: as they were given.
            root: where proc and sys are mounted.

        Raises:
            EnrolError: enrol.not-enrolled.
            SettingsError: settings.port-taken, settings.exposed, settings.missing, settings.invalid.
            StorageError: storage.unwritable, storage.corrupt.
        """
        self._settings = settings
        self._dir = settings.state_dir
        sweep(self._dir)
        identity.recover_identity(self._dir)
        self._identity = identity.load_identity(self._dir)
        speak_for(self._identity.device)
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._urgent = threading.Event()
        self._faults: tuple[StandingFault, ...] = ()
        self._monitor = Monitor(
            settings.window_rows,
            settings.share_labelled_rows,
            min_age_ms=int(settings.window_min_seconds * 1_000),
            max_age_ms=int(settings.window_max_seconds * 1_000),
            resume=self._load_positions(),
        )
        self._plane = DataPlane(
            self._monitor.observe,
            observe_row=self._monitor.observe_row,
            observe_rows=self._monitor.observe_rows,
            feedback=self._monitor.feedback,
            refused=self._monitor.refused,
            newest=self._monitor.newest,
        )
        self.allowed = Allowed.parse(settings.model_providers, settings.model_threads)
        self._residents = Residents(
            self._plane,
            budget=settings.models_mb * 1_000_000,
            spare=settings.spare_models,
            load=partial(load_model, allowed=self.allowed),
        )
        self._mirror = Mirror()
        self._application = ApplicationNumbers(now_ms())
        self._sharing = Sharing(
            self._dir,
            parse_redaction(settings.share_redact),
            rows=settings.share_rows_a_day,
            size=settings.share_kb_a_day * 1_000,
            names=self._columns,
        )
        self._company = Company(self._plane, self._residents, self._mirror, self._monitor.watch_beside)
        socket = Path(settings.socket) if settings.socket else None
        repository = Repository(
            self._plane,
            self._residents,
            shelf=self._shelf,
            read=self._read_bundle,
            is_open=settings.model_control == "explicit",
        )
        app = create_app(
            self._plane,
            status=self.status,
            metrics=self.metrics,
            repository=repository,
            seconds=settings.http_request_seconds or math.inf,
            told=self._application.take,
        )
        self._http = HttpServer(
            app,
            host=settings.http_host,
            port=settings.http_port,
            access=access_of(
                certificate=settings.http_certificate_file,
                key=settings.http_key_file,
                client_ca=settings.http_client_ca_file,
                tokens=settings.http_token_file,
                hosts=settings.http_allowed_hosts,
            ),
            unix_socket=socket,
            frames=FrameFace(self._plane),
            frames_socket=Path(settings.frames_socket) if settings.frames_socket else None,
        )
        self._topics: MqttFace | None = None
        if settings.bindings:
            from .serving.mqtt import MqttFace, load_bindings

            bindings = load_bindings(Path(settings.bindings))
            self._topics = MqttFace(self._plane, bindings, client_id=f"lightship-{self._identity.device}")
        self._http.bind()
        self._boot = self._next_boot()
        # Events are few, and worth a sync each; reports are many, and share one.
        worth = self._clock_quality
        reports = Outbox(self._dir / "outbox", limit_bytes=settings.outbox_mb * 1_000_000, quality=worth)
        events = Outbox(self._dir / "outbox" / "events", limit_bytes=EVENTS_MB * 1_000_000, at_once=True, quality=worth)
        self._reports, self._events = reports, events
        patience = settings.poll_seconds + RESEND_SECONDS
        self._sender = Sender(
            (("event", events), ("tele", reports)),
            self._boot,
            self._started,
            patience=patience,
            rate=settings.drain_rate,
        )
        self._way = Way(patience)
        # Every run has a name of its own: that is how the control plane notices a copy of this device.
        self._control = ControlPlane(self._identity, f"{secrets.token_hex(8)}:{self._boot}")
        self._certificate = CertificateKeeper(self._identity, self._control)
        timing = Timing(poll=settings.poll_seconds, soak=settings.soak_seconds, reach=settings.reach_seconds)
        bounds = Bounds(
            gate=Gate(Rules.of(settings)),
            rate=bucket_for(settings.bandwidth_kbps),
            store_bytes=settings.store_mb * 1_000_000,
        )
        self._updater = Updater(self._dir, self._identity, self._control, self, timing, bounds)
        parts = Parts(
            settings, self._identity, self._plane, self._residents, self._monitor, self._mirror, self._application,
            self._sharing, self._updater, events, reports, self._way,
        )  # fmt: skip
        self._view = View(parts, mqtt=lambda: self._mqtt, started=self._started, root=root)
        self._updater.on_acknowledged = self._acknowledged
        self._control.on_asked = self._command
        self._recent, self._log_level = RecentLines(), LogLevel()
        acts = {"rebirth": self._rebirth, "loglevel": self._log_level.change, "snapshot": self._snapshot}
        self._asked = Asked(self._dir, acts, self._reply, self._updater.clock.now)
        self._mqtt_seen = self._started  # monotonic seconds of the last publish that the broker took
        self._mqtt: MqttLink | None = None
        self._home = HomeAssistant(
            settings.home_assistant,
            self._dir,
            tenant=self._identity.info.tenant,
            device=self._identity.device,
            agent=__version__,
            report_seconds=settings.report_seconds,
        )

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        # A handler may put into it whatever the thread it interrupts is doing; an event's lock it might find taken.
        told: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: told.put(number))
        # What counts rows or applies an update lets a request in soon, and not after Python's five milliseconds.
        sys.setswitchinterval(SWITCH_SECONDS)
        self.start()
        gc.freeze()  # what was loaded stays; to look through it for garbage would hold up requests for 20 ms
        gc.enable()  # see the module `start`
        trim_memory()
        try:
            told.get()
        finally:
            self.close()

    def start(self) -> None:
        """Serve what is committed, then connect."""
        logging.getLogger().addHandler(self._recent)
        self._updater.recover()
        self._http.start()
        log.info("serving on %s", self._http.address)
        notify_systemd("READY=1")
        self._stop.wait(FIRST_SECONDS)
        lean.load("httpx")  # the first look of the updater wants it, when others import too
        if self._topics is not None:
            self._topics.start()
        if self._identity.info.broker is not None:
            from .link.mqtt import MqttLink

            self._mqtt = MqttLink(
                self._identity, boot=self._boot, agent=__version__, on_command=self._command, home=self._home
            )
            self._mqtt.start()
        self._updater.start()
        self._reporter = threading.Thread(target=self._report_loop, name="reporter", daemon=True)
        self._reporter.start()

    def close(self) -> None:
        """Drain and stop; what was counted is kept in the outbox."""
        notify_systemd("STOPPING=1")
        self._stop.set()
        self._urgent.set()
        self._http.stop()
        if self._topics is not None:
            self._topics.stop()
        self._updater.stop()
        self._reporter.join(timeout=10)
        self._mirror.drain(1.0)
        now = now_ms()
        rows = self._sharing.through(self._monitor.flush(now), now)
        self._keep([*rows, *self._mirror.collect(now), *self._application.collect(now)])
        try:
            self._send()
        except LightshipError as e:  # what can't be delivered now waits in the outbox for the next start
            log.info("close: %s: %s", e.code, e)
        for outbox in (self._events, self._reports):
            outbox.close()
        if self._mqtt is not None:
            self._mqtt.stop()
        self._control.close()
        logging.getLogger().removeHandler(self._recent)

    @property
    def address(self) -> tuple[str, int] | None:
        """Where HTTP is served."""
        return self._http.address

    def status(self) -> dict[str, Any]:
        """How the agent is, in words that machines can use too."""
        return self._view.status()

    def metrics(self) -> str:
        """The same in the text format of Prometheus."""
        return self._view.metrics()

    # What the updater asks of us ------------------------------------------------------------------------------------

    def check_compatible(self, bundle: Bundle) -> None:
        """Raise BundleError (bundle.incompatible) if this device can't run it."""
        check_compatible(
            bundle.manifest,
            agent_version=__version__,
            onnxruntime_version=onnxruntime.__version__,
            device_class=self._settings.device_class,
        )

    def serve(self, bundle: Bundle) -> None:
        """Load it and serve it, and nothing else, from now on; an already resident model is served again at once.

        Raises:
            LightshipError: update.swap, serving.memory, and those of loading.
        """
        with self._company.changing(bundle):
            model = self._residents.serve(bundle)
        for note in model.notes:
            log.warning("%s@%d is computed by %s; %s", model.name, model.version, model.provider, note)
        log.info("serving %s version %d (%s)", model.name, model.version, model.digest[:12])
        self._urgent.set()

    def serve_nothing(self) -> None:
        """Stop serving: there is no model to go back to."""
        self._residents.serve_nothing()
        self._company.arrange()

    def stand_beside(self, beside: Beside, bundle: Callable[[], Bundle]) -> None:
        """Have a bundle run beside what serves, or change how it does.

        Raises:
            LightshipError: update.beside, update.swap, serving.memory, and those of loading; then nothing has changed.
        """
        self._company.stand(beside, bundle)
        log.info("beside what serves: %s version %d, %s", beside.model, beside.version, beside.mode)
        self._urgent.set()

    def step_aside(self, experiment: str) -> None:
        """Have it run no longer."""
        self._company.leave(experiment)
        self._urgent.set()

    def settle(self, keep: Collection[str]) -> None:
        """An update came to its end: of what it brought only these may stay in memory."""
        self._residents.settle([d for d in keep if d not in self._updater.revoked])

    def _shelf(self) -> list[Shelved]:
        """The bundles that the store holds, and why some may not be loaded by whoever asks."""
        state = self._updater.state
        fit, candidate = machine.fit(state), state.candidate
        found = []
        for target in (state.current, state.previous, candidate):
            if target is None or not self._updater.store.path(target.sha256).exists():
                continue
            barred = "it failed on this device" if target.sha256 not in fit else ""
            if target.sha256 in self._updater.revoked:
                barred = "it was revoked"
            elif candidate is not None and target.sha256 == candidate.sha256:
                barred = "it is being tried"
            found.append(Shelved(target.model, target.version, target.sha256, barred))
        return found

    def _read_bundle(self, digest: str) -> Bundle:
        data = self._updater.store.read(digest)
        if data is None:
            message = f"Bundle {digest[:12]} is not in the store, or was altered there."
            raise StorageError("storage.corrupt", message, remedy="Assign it again: it is fetched anew.")
        return read_bundle(data)

    def failures(self, digest: str) -> int:
        """Server errors while serving that digest."""
        return sum(s.failures for s in self._plane.stats() if s.model.digest == digest)

    def report(self, action: machine.Report) -> None:
        """Queue an update step for the control plane, and send it soon."""
        target = action.target
        record = Update(
            s=1,
            t=now_ms(),
            rollout=target.rollout,
            seq=target.seq,
            digest=target.sha256,
            state=action.step,
            code=action.code,
            detail=action.detail,
        )
        log.info("update to %s@%d: %s %s", target.model, target.version, action.step, action.code)
        fail_point("reporting", action.step)
        self._events.append([record])
        fail_point("reported", action.step)
        self._urgent.set()

    # Reporting ------------------------------------------------------------------------------------------------------

    def _report_loop(self) -> None:
        due = 0.0
        while not self._stop.is_set():
            urgent = self._urgent.wait(TICK_SECONDS)
            self._urgent.clear()
            _whatever_happens(self._asked.work)
            self._log_level.tick()
            if urgent or time.monotonic() >= due:
                due = time.monotonic() + self._settings.report_seconds
                _whatever_happens(self._count_all)
                _whatever_happens(self._certificate.tick)
            else:
                _whatever_happens(self._count_rows)
            _whatever_happens(self._send)
            self._residents.tidy()
            self._updater.notice()
            notify_systemd("WATCHDOG=1")

    def _count_rows(self) -> None:
        """Before the rings overflow. A fault of data that begins or ends is reported with the next tick."""
        self._monitor.count(now_ms())
        faults = self._monitor.faults()
        if faults != self._faults:
            self._faults = faults
            self._urgent.set()

    def _count_all(self) -> None:
        counted, beat = self._counted(), self._view.heartbeat()
        self._keep([*counted, beat])
        if self._mqtt is not None:
            faults = [f"{fault.feature} of {fault.model}: {fault.kind}" for fault in self._monitor.faults()]
            self._mqtt.tell_home(self._home.values(beat, faults, time.monotonic()))

    def _counted(self) -> list[AnyRecord]:
        now = now_ms()
        rows = self._sharing.through(self._monitor.collect(now), now)
        return [*rows, *self._mirror.collect(now), *self._application.collect(now)]

    def _keep(self, records: Sequence[AnyRecord]) -> None:
        # Positions first: a cut in between skips a window number, and never uses one twice.
        try:
            write_durably(self._dir / "windows.json", msgspec.json.encode(self._monitor.positions()))
        except StorageError as e:  # a full disk must not silence the device: the outbox goes on in memory
            log.warning("report: %s: %s", e.code, e)
        faults = [r for r in records if isinstance(r, Fault)]
        for fault in faults:
            said = "data fault" if fault.raised else "data fault is over"
            log.warning("%s: %s of %s is %s", said, fault.feature, fault.model, fault.kind)
        self._events.append(faults)
        self._reports.append([r for r in records if not isinstance(r, Fault)])

    def _columns(self, digest: str) -> tuple[str, ...] | None:
        """What the columns of a model in memory are called."""
        return next((m.schema.names for m in self._plane.resident() if m.digest == digest), None)

    def _send(self) -> None:
        self._reports.tick()
        for handle in self._mqtt.refusals() if self._mqtt is not None else ():
            self._sender.refused(handle)
        parcel = self._sender.next_batch()
        if self._way.look(self._sender.stalls, time.time() - self._updater.reached_at, time.monotonic()):
            log.warning(
                "report: link.unacknowledged: the broker took %d reports, and the control plane has acknowledged none; "
                "they go over HTTPS now. Run `lightship broker check`.",
                self._sender.stalled,
            )
        while parcel is not None and self._deliver(parcel):
            parcel = self._sender.next_batch()

    def _deliver(self, parcel: Parcel) -> bool:
        fail_point("sending")
        mqtt = None if self._way.unheard(time.monotonic()) else self._mqtt
        if mqtt is not None and (handle := mqtt.publish(*parcel)):
            self._mqtt_seen = time.monotonic()
            fail_point("sent")
            self._sender.sent(handle)
            return True
        if mqtt is not None and time.monotonic() - self._mqtt_seen < HTTPS_FALLBACK_SECONDS:
            return False
        stored = self._control.post_telemetry(parcel.packed)
        fail_point("sent")
        self._sender.sent()
        for epoch, seq in stored.acked:
            self._acknowledged(epoch, seq)
        # What was not stored is to go again; an answer without reasons says so by what it acknowledges.
        if stored.acked and (stored.missing or stored.code):
            epoch, seq = stored.acked[0]
            self._sender.missing(epoch, stored.missing or ((seq + 1, LAST_SEQ),))
        return True

    def _acknowledged(self, epoch: str, seq: int) -> None:
        for outbox in (self._events, self._reports):
            outbox.acknowledge(epoch, seq)

    def _command(self, verb: str, command: Command) -> None:
        if verb == "check":
            self._updater.poke()
        elif verb == "resend":
            self._sender.missing(command.e, command.ranges or ((command.first, LAST_SEQ),))
        elif self._asked.hear(verb, command):
            self._urgent.set()

    def _rebirth(self, _command: Command) -> dict[str, Any]:
        """Say again who we are; the heartbeat goes with it, because what was asked is urgent."""
        if self._mqtt is not None:
            self._mqtt.announce()
        return {"device": self._identity.device, "agent": __version__, "boot": self._boot}

    def _snapshot(self, _command: Command) -> dict[str, Any]:
        return snapshot_of(self.status(), self._settings, self._recent.lines())

    def _reply(self, reply: Reply) -> bool:
        packed = pack(reply)
        if self._mqtt is not None:
            if self._mqtt.reply(reply.verb, packed):
                return True
            if time.monotonic() - self._mqtt_seen < HTTPS_FALLBACK_SECONDS:
                return False
        self._control.post_reply(packed)
        return True

    # Small state ----------------------------------------------------------------------------------------------------

    def _clock_quality(self) -> Literal[0, 1, 2]:
        return self._updater.clock.quality

    def _next_boot(self) -> int:
        path = self._dir / "boot"
        said = path.read_text(errors="replace") if path.exists() else ""
        # A longer number is damage: nobody starts that often, and no report could carry it.
        boot = 1 + (int(said) if said.isdecimal() and len(said) < 16 else 0)
        try:
            write_durably(path, str(boot).encode())
        except StorageError as e:  # a full disk must not keep the device from serving
            log.warning("boot: %s: %s", e.code, e)
        return boot

    def _load_positions(self) -> dict[str, int]:
        try:
            return msgspec.json.decode((self._dir / "windows.json").read_bytes(), type=dict[str, int])
        except (FileNotFoundError, msgspec.MsgspecError):
            return {}


def _whatever_happens(step: Callable[[], None]) -> None:
    """Take a step of reporting: none may keep the others from being taken, now or later."""
    try:
        step()
    except LightshipError as e:
        log.warning("report: %s: %s", e.code, e)
    except Exception:  # whatever it met, the device must not fall silent
        log.exception("report: unexpected error")
