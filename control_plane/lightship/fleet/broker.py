"""Fleet: the MQTT broker beside the control plane, whichever it is.

Rules: mosquitto if it is there, else the embedded one, else none (devices then report over HTTPS and poll); the
choice, and what it can't enforce, is stated once, plainly.
"""

from __future__ import annotations

import errno
import secrets
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lightship.settings import Settings
from lightship.storage import audit
from lightship.storage.database import Database
from lightship_agent.contract.codes import LinkError, SettingsError
from lightship_agent.contract.topics import check_discovery_prefix
from lightship_agent.files import write_durably

from .ca import CertificateAuthority, server_names
from .certificates import revocation_list

START_SECONDS = 30.0
#: Above most known services, and below what operating systems give to connections and to whoever binds port 0.
_ASIDE = range(20_000, 32_000)


@dataclass(frozen=True)
class BrokerInfo:
    """How devices, and we, reach the broker."""

    kind: str  # mosquitto | embedded
    host: str
    port: int
    auth: str  # mtls | password
    device_username: str = ""
    device_password: str = ""
    control_username: str = ""
    control_password: str = ""
    notice: str = ""


@dataclass
class RunningBroker:
    """A broker process that we own."""

    info: BrokerInfo
    process: subprocess.Popen[bytes]

    def reload(self) -> None:
        """Have it read its revocation list again, if it has one."""
        if self.info.kind == "mosquitto":
            from lightship.integrations import mosquitto

            mosquitto.reload(self.process)

    def stop(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.terminate()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_broker(
    settings: Settings, folder: Path, ca: CertificateAuthority, revoked: Iterable[tuple[str, int]] = ()
) -> RunningBroker | None:
    """Start the broker the settings ask for; None for `broker = "none"`.

    `revoked` are the certificates that no longer count, by serial and time in milliseconds.

    Raises:
        LinkError: link.broker.
        SettingsError: settings.port-taken.
    """
    from lightship.integrations import mosquitto, rumqttd

    check_discovery_prefix(settings.home_assistant)
    if settings.broker == "none":
        return None
    program = mosquitto.find()
    kind = settings.broker
    if kind == "auto":
        kind = "mosquitto" if program else "embedded"
    host, port = settings.mqtt_host, settings.mqtt_port or free_port(settings.mqtt_host)
    _require_free(host, port)
    key, chain = ca.issue_server(server_names([settings.reachable_host]))
    public = settings.public_host or host
    if kind == "mosquitto":
        if program is None:
            raise LinkError(
                "link.broker", "mosquitto is not installed.", remedy="Install it, or set broker = embedded."
            )
        crl = revocation_list(ca, revoked)
        config = mosquitto.configure(
            folder,
            host=host,
            port=port,
            ca=ca.certificate_pem(),
            key=key,
            chain=chain,
            crl=crl,
            home_assistant=settings.home_assistant,
        )
        process = mosquitto.start(program, config)
        info = BrokerInfo("mosquitto", public, port, "mtls")
    else:
        if not rumqttd.available():
            message = "No MQTT broker: mosquitto is not on PATH and the `broker` extra is not installed."
            raise LinkError("link.broker", message, remedy="Install mosquitto, or `pip install 'lightship[broker]'`.")
        config, device_password, control_password = rumqttd.configure(
            folder, host=host, port=port, key=key, chain=chain
        )
        process = rumqttd.start(config)
        info = BrokerInfo(
            "embedded",
            public,
            port,
            "password",
            rumqttd.DEVICE_USER,
            device_password,
            rumqttd.CONTROL_PLANE_USER,
            control_password,
            rumqttd.NOTICE,
        )
    running = RunningBroker(info, process)
    write_durably(folder / "broker.json", msgspec.json.encode(info), mode=0o600)
    try:
        _wait_until_listening(running, host, port, folder)
    except BaseException:
        running.stop()
        raise
    return running


def known_broker(folder: Path) -> BrokerInfo:
    """The broker that `lightship up` started.

    Raises:
        LinkError: link.broker where it has started none.
    """
    try:
        return msgspec.json.decode((folder / "broker.json").read_bytes(), type=BrokerInfo)
    except (OSError, msgspec.MsgspecError) as e:
        message = f"{folder} knows of no broker: {e}."
        raise LinkError("link.broker", message, remedy="Start one: `lightship up`.") from e


def worker_name(number: int) -> str:
    """As whom an ingest worker connects, where the broker knows certificates."""
    from lightship.integrations.mosquitto import WORKER_USER

    return f"{WORKER_USER}{number}"


def control_plane_context(folder: Path, ca: CertificateAuthority, name: str = "") -> ssl.SSLContext:
    """TLS for our own MQTT sessions: our CA, and a certificate in the control plane's name, or a worker's."""
    from lightship.integrations.mosquitto import CONTROL_PLANE_USER

    key, chain = ca.issue_client(name or CONTROL_PLANE_USER)
    stem = name.lstrip("_") or "control-plane"
    write_durably(folder / f"{stem}.key", key, mode=0o600)
    write_durably(folder / f"{stem}.pem", chain)
    context = ssl.create_default_context(cafile=str(ca.certificate_path))
    context.load_cert_chain(folder / f"{stem}.pem", folder / f"{stem}.key")
    return context


def admit_home_assistant(database: Database, ca: CertificateAuthority, *, actor: str) -> tuple[bytes, bytes]:
    """Key and certificate for Home Assistant at our mosquitto."""
    from lightship.integrations.mosquitto import HOME_ASSISTANT_USER

    issued = ca.issue_client(HOME_ASSISTANT_USER)
    with database.write() as session:
        audit.append(session, actor=actor, verb="broker.admit", subject="home-assistant")
    return issued


def free_port(host: str) -> int:
    """A TCP port nobody listens on right now, and that the system won't give away before it is taken."""
    for _ in range(100):
        try:
            return _bound(host, secrets.choice(_ASIDE))
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise
    return _bound(host, 0)


def _bound(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.bind((host, port))
        return int(s.getsockname()[1])


def _require_free(host: str, port: int) -> None:
    """Ask before starting: whoever listens there already would be taken for our broker."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
            s.listen()
        except OSError as e:
            message = f"The broker can't listen on {host}:{port}: {e.strerror}."
            raise SettingsError("settings.port-taken", message, remedy="Set mqtt_port to another port, or 0.") from e


def _stays(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        return True
    return False


def _wait_until_listening(running: RunningBroker, host: str, port: int, folder: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if running.process.poll() is not None:
            break
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
            s.settimeout(0.5)
            listens = s.connect_ex((host, port)) == 0
        # mosquitto listens before it looks at its certificates, and ends where it can't use them.
        if listens and _stays(running.process):
            return
        time.sleep(0.05)
    said = "".join(p.read_text(errors="replace")[-400:] for p in folder.glob("*.log"))
    message = f"The {running.info.kind} broker does not listen on {host}:{port}: {said.strip() or 'it said nothing'}"
    raise LinkError("link.broker", message, remedy="Is the port taken? Set mqtt_port.")
