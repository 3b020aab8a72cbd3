"""The short way for reports: it says what the library would have said, of every packet, and of none that is broken."""

from __future__ import annotations

import struct

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from lightship.monitoring.mqtt_client import IngestClient, Message, parse

MIDS = st.integers(1, 65_535)
TOPICS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60)


def packet(topic: str, payload: bytes, mid: int, properties: bytes = b"") -> bytes:
    name = topic.encode()
    return struct.pack("!H", len(name)) + name + struct.pack("!H", mid) + properties + payload


def properties(**of: object) -> bytes:
    made = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    for name, value in of.items():
        setattr(made, name, value)
    return bytes(made.pack())  # type: ignore[no-untyped-call]


@given(TOPICS, st.binary(max_size=400), MIDS)
def test_a_report_of_3_1_1_is_taken_apart(topic: str, payload: bytes, mid: int) -> None:
    assert parse(packet(topic, payload, mid), v5=False) == Message(topic, payload, mid)


@given(TOPICS, st.binary(max_size=400), MIDS, st.integers(0, 400))
def test_a_report_of_5_is_taken_apart_whatever_its_properties(topic: str, payload: bytes, mid: int, size: int) -> None:
    said = properties(ContentType="c" * size, MessageExpiryInterval=7)
    assert parse(packet(topic, payload, mid, said), v5=True) == Message(topic, payload, mid)


@given(st.binary(max_size=40), st.booleans())
def test_what_is_no_report_is_nothing_and_never_an_error(noise: bytes, v5: bool) -> None:
    found = parse(noise, v5=v5)
    assert found is None or found.mid > 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00",
        b"\x00\x05pump",
        b"\x00\x01p\x00\x00x",
        b"\x00\x01\xff\x00\x01",
        b"\x00\x01p\x00\x01\xff\xff\xff\xff",
    ],
    ids=["nothing", "half a length", "a topic cut off", "number 0", "no UTF-8", "properties without end"],
)
def test_a_broken_packet_is_malformed(body: bytes) -> None:
    assert parse(body, v5=True) is None


def test_the_library_delivers_the_short_way_and_acknowledges_as_one_write() -> None:
    heard: list[Message] = []
    client = IngestClient("x", v5=False, heard=heard.append)
    for n, topic in enumerate(("a", "b"), start=1):
        client._in_packet = {**client._in_packet, "command": 0x32, "packet": bytearray(packet(topic, b"said", n))}
        assert client._packet_handle() == paho.MQTT_ERR_SUCCESS
    client._in_packet = {**client._in_packet, "command": 0x32, "packet": bytearray(b"\x00")}
    assert client._packet_handle() == paho.MQTT_ERR_PROTOCOL

    client.acknowledge([m.mid for m in heard])

    assert heard == [Message("a", b"said", 1), Message("b", b"said", 2)]
    assert [bytes(p["packet"]) for p in client._out_packet] == [b"\x40\x02\x00\x01\x40\x02\x00\x02"]
