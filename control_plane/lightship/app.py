"""The control plane's composition root: wires the rooms, owns threads, processes and shutdown.

Rules: it only wires. Ports are checked before anything starts; what was started is stopped in reverse order, whatever
happens in between.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from lightship_agent.contract.codes import SettingsError
from lightship_agent.files import sweep, write_durably

from .alerting.office import AlertOffice
from .api.device_api import DeviceApi
from .api.guard import Policy
from .api.listener import Listener, operator_listener
from .api.operator_api import create_operator_app
from .api.tls_protocol import PeerProtocol
from .fleet import certificates
from .fleet.broker import BrokerInfo, control_plane_context, start_broker
from .fleet.broker_guard import BrokerGuard
from .fleet.ca import server_names
from .fleet.reconciler import Reconciler
from .home import Home
from .monitoring.history import History, open_history
from .monitoring.mqtt_ingest import IngestWorker
from .monitoring.workers import HistoryKeeper, WorkerProcesses
from .settings import Settings
from .web.pages import add_pages

log = logging.getLogger(__name__)
WORKER_ID = "lightship-ingest-0"
STOP_SECONDS = 5  # for requests under way, when we are told to stop


@dataclass(frozen=True)
class Addresses:
    """Where things listen."""

    dashboard: str
    devices: str
    broker: BrokerInfo | None
    access: str  # who may read and act through the dashboard's address, in words


class ControlPlane:
    """Everything `lightship up` runs."""

    def __init__(self, home: Home, settings: Settings) -> None:
        """Nothing runs yet."""
        self._home = home
        self._settings = settings
        self._stack = ExitStack()
        self._servers: list[uvicorn.Server] = []
        self._sockets: list[socket.socket] = []
        self._stopping: Callable[[], object] = lambda: None
        self.addresses: Addresses | None = None

    def start(self) -> Addresses:
        """Bind the ports, start broker, ingest and reconciler. `serve` then answers.

        Raises:
            SettingsError: settings.port-taken.
            ReleaseError: release.not-begun, release.unknown.
            LinkError: link.broker.
            AlertError: alert.secret.
        """
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> Addresses:
        settings, home = self._settings, self._home
        home.releases.require()
        listener = operator_listener(settings)
        operator_socket = self._bind(settings.api_host, settings.api_port, "api_port")
        device_socket = self._bind(settings.device_host, settings.device_port, "device_port")
        with home.database.read() as session:
            revoked = certificates.revoked(session)
        broker = start_broker(settings, home.path / "broker", home.ca, revoked)
        poke = guard = ask = None
        if broker is not None:
            self._stack.callback(broker.stop)
            guard = BrokerGuard(home.database, home.ca, broker, home.path / "broker")
            tls = control_plane_context(home.path / "broker", home.ca)
            history = self._open_history()
            workers = settings.ingest_workers
            ingest = IngestWorker(
                home.database,
                broker.info,
                tls,
                WORKER_ID if not workers else "lightship-voice",
                history=history,
                protocol=settings.ingest_mqtt,
                listening=not workers,
            )
            ingest.start()
            self._stack.callback(ingest.stop)
            if workers:
                processes = WorkerProcesses(home.path, workers, settings.log_level, settings.log_format)
                processes.start()
                self._stack.callback(processes.stop)
            poke, ask = ingest.poke, ingest.ask
        tenant = settings.tenant

        def poke_devices(devices: tuple[str, ...]) -> None:
            if poke is not None and devices:
                poke(tenant, devices)

        office = AlertOffice(home, settings)
        office.start()
        self._stack.callback(office.stop)
        reconciler = Reconciler(home, settings, poke_devices, guard, ask, office.tick)
        reconciler.start()
        self._stack.callback(reconciler.stop)
        info = broker.info if broker else None
        names = server_names([n for n in (settings.api_host, settings.public_host) if n])
        policy = Policy(settings.environment, listener.open_reads, secure_cookies=listener.tls)
        operator_app = create_operator_app(home, [*names, "[::1]"], policy)
        add_pages(operator_app, home)
        # An open dashboard keeps an event stream open, which must not keep us from stopping.
        self._stopping = operator_app.state.live.stop
        operator_config = uvicorn.Config(
            operator_app,
            lifespan="off",
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=STOP_SECONDS,
            # Whoever is at the other end is written to the audit log: no header may say otherwise.
            proxy_headers=False,
            **self._operator_tls(listener, names),
        )
        self._servers = [
            _Server(operator_config),
            _Server(self._device_config(DeviceApi(home, tenant, info, recovery_days=settings.recovery_days))),
        ]
        self._sockets = [operator_socket, device_socket]
        self.addresses = Addresses(
            dashboard=f"{listener.scheme}://{settings.api_host}:{operator_socket.getsockname()[1]}",
            devices=f"https://{settings.reachable_host}:{device_socket.getsockname()[1]}",
            broker=info,
            access=listener.notice,
        )
        return self.addresses

    def _open_history(self) -> History | None:
        if self._settings.history == "off":
            return None
        history = open_history(self._home.path, self._settings.history)
        self._stack.callback(history.close)
        keeper = HistoryKeeper(history, self._settings)
        keeper.start()
        self._stack.callback(keeper.stop)
        return history

    def serve(self) -> None:
        """Answer until SIGINT or SIGTERM, then stop everything."""
        try:
            asyncio.run(self._serve())
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop what was started, in reverse order; twice is no harm."""
        self._stack.close()

    close = stop

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        pairs = zip(self._servers, self._sockets, strict=True)
        tasks = [asyncio.create_task(server.serve(sockets=[s])) for server, s in pairs]
        await stop.wait()
        self._stopping()
        for server in self._servers:
            server.should_exit = True
        await asyncio.gather(*tasks)

    def _bind(self, host: str, port: int, name: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        s = socket.socket(family)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
            # Only a listening socket keeps others off the port: without this, two programs may both think it theirs.
            s.listen(128)
        except OSError as e:
            s.close()
            message = f"Can't listen on {host}:{port}: {e.strerror}."
            raise SettingsError("settings.port-taken", message, remedy=f"Set {name} to another port, or 0.") from e
        self._stack.callback(s.close)
        return s

    def _operator_tls(self, listener: Listener, names: list[str]) -> dict[str, Any]:
        """What uvicorn needs for HTTPS: the certificate given, or one of our CA, made anew at every start."""
        if not listener.tls:
            return {}
        key, certificate = listener.key, listener.certificate
        if key is None or certificate is None:
            folder = self._home.path / "ca"
            key, certificate = folder / "api.key", folder / "api.pem"
            made_key, chain = self._home.ca.issue_server(names)
            write_durably(key, made_key, mode=0o600)
            write_durably(certificate, chain)
        _check_pair(certificate, key)
        return {"ssl_keyfile": str(key), "ssl_certfile": str(certificate)}

    def _device_config(self, api: DeviceApi) -> uvicorn.Config:
        folder = self._home.path / "ca"
        key, chain = self._home.ca.issue_server(server_names([self._settings.reachable_host]))
        sweep(folder)
        write_durably(folder / "server.key", key, mode=0o600)
        write_durably(folder / "server.pem", chain)
        return uvicorn.Config(
            api.app(),
            http=PeerProtocol,
            lifespan="off",
            access_log=False,
            log_level="warning",
            ssl_keyfile=str(folder / "server.key"),
            ssl_certfile=str(folder / "server.pem"),
            ssl_ca_certs=str(self._home.ca.certificate_path),
            # Enrolment comes without a certificate; every other path refuses those who show none.
            ssl_cert_reqs=ssl.CERT_OPTIONAL,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=STOP_SECONDS,
        )


def _check_pair(certificate: Path, key: Path) -> None:
    """Refuse a pair that can't serve now, rather than when the first browser comes."""
    try:
        # A sealed key would otherwise ask the terminal for its passphrase, where there is often none.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ValueError) as e:
        message = f"api_cert and api_key are no PEM certificate with its unsealed key: {e}."
        raise SettingsError("settings.invalid", message) from e


class _Server(uvicorn.Server):
    """A server that leaves the signals to us: both servers stop together."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
