"""Fleet: what the database knows about certificates, brought to the broker, which can't ask it.

A broker looks at a certificate when a session begins, and never again. So a revocation goes four steps, and any of
them may be taken twice: the database (the device's next HTTPS request is refused) → the revocation list → the broker
reads it (nobody comes in with that certificate any more) → we connect once under the device's name, which ends its
session.

Rules:
* what was asked for is done when it was done: a cut that failed is tried again at every tick;
* the list is made anew every day and before the broker starts, and is good for a month;
* a broker that does not know certificates is told apart, and what it can't do is not claimed.
"""

from __future__ import annotations

import logging
import secrets
import ssl
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from sqlalchemy import delete, select

from lightship.integrations import mosquitto
from lightship.storage import audit
from lightship.storage.database import Database
from lightship.storage.models import Cut
from lightship_agent.contract.codes import LinkError
from lightship_agent.files import write_durably

from . import certificates
from .broker import RunningBroker
from .ca import CertificateAuthority

log = logging.getLogger(__name__)

REISSUE_SECONDS: Final = 86_400.0
#: The certificate under a device's name that ends its session is of no use to anybody after that.
CUT_LIFE: Final = timedelta(minutes=2)
_CUT_SECONDS: Final = 10.0
ACTOR: Final = "lightship:broker-guard"


class BrokerGuard:
    """Keeps one broker's idea of who may connect up to date."""

    def __init__(self, database: Database, ca: CertificateAuthority, broker: RunningBroker, folder: Path) -> None:
        """The broker has just been started with a fresh list."""
        self._database = database
        self._ca = ca
        self._broker = broker
        self._folder = folder
        self._issued = time.monotonic()

    def tick(self) -> None:
        """Cut what is to be cut; once a day, make the list anew.

        Raises:
            LinkError: link.broker; what was not cut is tried again.
            StorageError: storage.full, storage.unwritable; the list before stays in use.
        """
        with self._database.read() as session:
            waiting = list(session.scalars(select(Cut.device).order_by(Cut.asked_at)))
        by_certificate = self._broker.info.auth == "mtls"
        if by_certificate and (waiting or time.monotonic() - self._issued >= REISSUE_SECONDS):
            self._reissue()
        for device in waiting:
            if by_certificate:
                self._end_session(device)
            with self._database.write() as session:
                session.execute(delete(Cut).where(Cut.device == device))
                detail = {"broker": self._broker.info.kind, "cut": by_certificate}
                audit.append(session, actor=ACTOR, verb="device.cut", subject=device, detail=detail)
            log.info("broker: %s is revoked: %s", device, "session ended" if by_certificate else mosquitto.UNCUT)

    def _reissue(self) -> None:
        with self._database.write() as session:
            certificates.forget_expired(session)
            entries = certificates.revoked(session)
        before = mosquitto.read_crl(self._folder)
        mosquitto.write_crl(self._folder, certificates.revocation_list(self._ca, entries, before))
        self._broker.reload()
        self._issued = time.monotonic()

    def _end_session(self, device: str) -> None:
        """Connect once as the device: the broker lets go of whoever is connected under that name, and its queue."""
        context = self._short_lived(device)
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=device,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
        )
        client.tls_set_context(context)
        said: list[Any] = []
        client.on_connect = lambda _c, _d, _f, reason, _p: said.append(reason)
        info, end = self._broker.info, time.monotonic() + _CUT_SECONDS
        try:
            client.connect(info.host, info.port, keepalive=10, clean_start=True)
            while not said and time.monotonic() < end and client.loop(timeout=0.2) == paho.MQTT_ERR_SUCCESS:
                pass
            client.disconnect()
            client.loop(timeout=0.2)
        except OSError as e:
            raise LinkError("link.broker", f"The MQTT session of {device} can't be cut yet: {e}.") from e
        if not said or said[0].is_failure:
            found = said[0] if said else "no answer"
            raise LinkError("link.broker", f"The MQTT session of {device} can't be cut yet: {found}.")

    def _short_lived(self, device: str) -> ssl.SSLContext:
        key, chain = self._ca.issue_client(device, CUT_LIFE)
        context = ssl.create_default_context(cafile=str(self._ca.certificate_path))
        path = self._folder / f"cut-{secrets.token_hex(4)}.pem"
        try:
            write_durably(path, key + chain, mode=0o600)
            context.load_cert_chain(path)
        finally:
            path.unlink(missing_ok=True)
        return context
