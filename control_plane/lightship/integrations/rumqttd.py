"""Integrations: the embedded broker, rumqttd inside the `iotcore` wheel, for machines where only pip exists.

Rules: TLS and a password, bound where told; it can't enforce client certificates or topic rules, keeps nothing over
a restart, and we say so wherever it is used. Correctness doesn't depend on it: reports stay on the device until the
control plane has stored them, and what a device runs is decided by signatures.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Final

from lightship_agent.contract.codes import LinkError
from lightship_agent.files import storage_error, write_durably

NOTICE: Final = (
    "Embedded broker: TLS and a shared password, but no client certificates and no per-device topic rules; "
    "a revoked device is not heard any more, but its session is not cut. Install mosquitto for mutual TLS over MQTT."
)
DEVICE_USER: Final = "device"
CONTROL_PLANE_USER: Final = "control-plane"

_CONFIG: Final = """\
id = 0

[router]
id = 0
max_connections = 2000
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10

[v5.1]
name = "lightship"
listen = "{host}:{port}"
next_connection_delay_ms = 1

[v5.1.tls]
certpath = "{folder}/server.pem"
keypath = "{folder}/server.key"

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 1048576
max_inflight_count = 200
dynamic_filters = true

[v5.1.connections.auth]
{device_user} = "{device_password}"
{control_user} = "{control_password}"
"""


def available() -> bool:
    """Whether the `broker` extra is installed."""
    import importlib.util

    return importlib.util.find_spec("iotcore") is not None


def configure(folder: Path, *, host: str, port: int, key: bytes, chain: bytes) -> tuple[Path, str, str]:
    """Write the configuration; its path, the device password and the control plane's.

    Raises:
        StorageError: storage.full, storage.unwritable.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise storage_error(e, folder) from e
    device_password = _password(folder / "device-password")
    control_password = _password(folder / "control-password")
    write_durably(folder / "server.key", key, mode=0o600)
    write_durably(folder / "server.pem", chain)
    text = _CONFIG.format(
        host=host,
        port=port,
        folder=folder,
        device_user=DEVICE_USER,
        control_user=CONTROL_PLANE_USER,
        device_password=device_password,
        control_password=control_password,
    )
    config = folder / "rumqttd.toml"
    write_durably(config, text.encode(), mode=0o600)
    return config, device_password, control_password


def start(config: Path) -> subprocess.Popen[bytes]:
    """Start the broker; it ends with us, because it watches its standard input.

    Raises:
        LinkError: link.broker.
    """
    # The broker's own child entry point reads its options from its arguments, and leaves when stdin closes.
    program = "import sys; from iotcore._serve import main; main()"
    options = f'{{"config_path": "{config}"}}'
    with (config.parent / "rumqttd.log").open("ab") as log:
        try:
            return subprocess.Popen(
                [sys.executable, "-c", program, options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ.get("PATH", "")},
            )
        except OSError as e:
            raise LinkError("link.broker", f"Can't start the embedded broker: {e}.") from e


def _password(path: Path) -> str:
    if not path.exists():
        write_durably(path, secrets.token_urlsafe(24).encode(), mode=0o600)
    return path.read_text()
