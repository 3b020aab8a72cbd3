"""The service manager: told when the agent is ready, alive and stopping, if it asked to be.

Source: sd_notify(3).
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify_systemd(message: str) -> None:
    """Tell systemd, if it started us with Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        try:
            s.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as e:
            log.debug("systemd can't be told: %s", e)
