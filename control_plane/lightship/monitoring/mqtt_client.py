"""Monitoring: the MQTT client of ingest: the library's, with a short way for what comes a thousand times a second.

Rules:
* a report (QoS 1) is taken out of its packet here: the library would make for each an object with locks of its own, and
  in MQTT 5 a table of all properties there are, which together cost more than to store it;
* acknowledgements of a batch are one write, in the order of the messages;
* everything else is the library's: it connects, subscribes, pings and says what went wrong. A release of it that calls
  the method below by another name would deliver through `on_message`, as it does for other kinds of messages.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

_QOS: Final = 0x06
_QOS_1: Final = 0x02
_PUBACK: Final = 0x40
_MALFORMED: Final = MQTTErrorCode.MQTT_ERR_PROTOCOL


class Message(NamedTuple):
    """A message of QoS 1, and the number by which it is acknowledged."""

    topic: str
    payload: bytes
    mid: int


class IngestClient(paho.Client):
    """A client whose messages of QoS 1 come as `Message`.

    Args:
        heard: is given each, on the thread of the loop.
        client_id: the name at the broker.
        v5: MQTT 5 instead of 3.1.1. The session is never a clean one.
    """

    def __init__(self, client_id: str, *, v5: bool, heard: Callable[[Message], None]) -> None:
        """Prepare; nothing is connected."""
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if v5 else False,
            protocol=MQTTProtocolVersion.MQTTv5 if v5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self._v5 = v5
        self._heard = heard
        self.on_message = lambda _client, _data, m: heard(Message(m.topic, bytes(m.payload), m.mid))

    def acknowledge(self, mids: Sequence[int]) -> None:
        """Say that these messages are stored; all of this connection."""
        if mids:
            said = b"".join(struct.pack("!BBH", _PUBACK, 2, mid) for mid in mids)
            self._packet_queue(_PUBACK, said, mids[-1], 1)

    def _handle_publish(self) -> MQTTErrorCode:
        if self._in_packet["command"] & _QOS != _QOS_1:
            return super()._handle_publish()
        message = parse(bytes(self._in_packet["packet"]), v5=self._v5)
        if message is None:
            return _MALFORMED
        self._heard(message)
        return MQTTErrorCode.MQTT_ERR_SUCCESS


def parse(body: bytes, *, v5: bool) -> Message | None:
    """What a PUBLISH of QoS 1 says after its fixed header; None if it is none."""
    at = 2 + int.from_bytes(body[:2], "big")
    mid, begins = int.from_bytes(body[at : at + 2], "big"), at + 2
    if v5:
        size, shift, more = 0, 0, True
        while more:
            if begins >= len(body) or shift > 21:
                return None
            size |= (body[begins] & 0x7F) << shift
            more, shift, begins = body[begins] > 0x7F, shift + 7, begins + 1
        begins += size
    if not mid or begins > len(body):
        return None
    try:
        return Message(body[2:at].decode(), body[begins:], mid)
    except UnicodeDecodeError:
        return None
