"""Serving: the MQTT face: what comes on a local broker's topics is predicted, and published there.

Rules:
* what is not answered at once waits in a bounded queue; beyond it a message is dropped, and counted serving.overloaded;
* a sensor's message that can't be predicted is counted by its code and logged once per code, a request's is answered
  with it;
* a request whose content type says so is a frame's body, and answered with one (serving.frames), by that topic's model;
* an answer goes to the topic of answers, or to one below it that the request names: nobody has us publish elsewhere;
* retained messages are from before, and not predicted again with every connection;
* it reconnects for ever, and its absence costs the other faces nothing.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from lightship_agent.contract.codes import ServingError, SettingsError
from lightship_agent.contract.experiment import MAX_KEY
from lightship_agent.contract.topics import FRAME_TYPE
from lightship_agent.runtime.model import LoadedModel

from .bindings import Bindings, Requests, Sensor, matches, parse_bindings, read_message, record_of
from .connections import Reply
from .dataplane import DataPlane
from .frames import LENGTH, FrameFace
from .records import answers, request_of

_MAX_MESSAGE: Final = 256 * 1024  # bytes
_WAITING: Final = 256  # messages
_LOG: Final = logging.getLogger("lightship.serving")


class MqttFace:
    """A connection to a local broker, and one thread that predicts what comes.

    Args:
        plane: what answers.
        bindings: which topics ask which model.
        client_id: how the broker knows us.
    """

    def __init__(self, plane: DataPlane, bindings: Bindings, *, client_id: str) -> None:
        """Prepare; `start` connects.

        Raises:
            SettingsError: settings.invalid when a file that the bindings name can't be read.
        """
        self._plane, self._bindings = plane, bindings
        self._frames = FrameFace(plane)
        self._runner = asyncio.Runner()  # of the thread, for frames that another one answers
        self._waiting: queue.Queue[paho.MQTTMessage | None] = queue.Queue(_WAITING)
        self._logged: set[str] = set()
        self.listening = threading.Event()  # whether the broker has taken our subscriptions, once
        self._client = _make_client(bindings, client_id)
        self._client.on_connect = self._connected
        self._client.on_message = self._received
        self._client.on_subscribe = lambda *_: self.listening.set()
        self._thread = threading.Thread(target=self._work, name="mqtt-face", daemon=True)

    def start(self) -> None:
        """Connect in the background, for as long as it takes."""
        self._thread.start()
        self._client.connect_async(self._bindings.broker.host, self._bindings.broker.port, keepalive=30)
        self._client.loop_start()

    def stop(self) -> None:
        """Finish what waits, and disconnect."""
        self._client.unsubscribe(self._filters())
        self._waiting.put(None)
        self._thread.join(5)
        self._client.disconnect()
        self._client.loop_stop()

    def _filters(self) -> list[str]:
        return [s.topic for s in self._bindings.sensors] + [r.asked_on for r in self._bindings.requests]

    def _connected(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            _LOG.warning("mqtt face: the broker refused: %s", reason)
            return
        client.subscribe([(topic, 1) for topic in self._filters()])

    def _received(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        if message.retain:
            return
        try:
            self._waiting.put_nowait(message)
        except queue.Full:
            self._plane.count_error("serving.overloaded")
            self._log(ServingError("serving.overloaded", f"{_WAITING} messages wait already."))

    def _work(self) -> None:
        with self._runner:
            self._take_all()

    def _take_all(self) -> None:
        while (message := self._waiting.get()) is not None:
            try:
                self._take(message)
            except Exception as e:  # noqa: BLE001 - one message must not end the face
                _LOG.error("mqtt face: a message failed in a way nobody foresaw", exc_info=e)
                self._plane.count_error("serving.runtime")

    def _take(self, message: paho.MQTTMessage) -> None:
        is_frame = getattr(message.properties, "ContentType", "") == FRAME_TYPE
        for request in self._bindings.requests:
            if not matches(request.asked_on, message.topic):
                continue
            if is_frame:
                self._answer_frame(request, message)
            else:
                self._answer(request, message)
        for sensor in self._bindings.sensors:
            if matches(sensor.topic, message.topic):
                self._predict(sensor, message)

    def _predict(self, sensor: Sensor, message: paho.MQTTMessage) -> None:
        def row(model: LoadedModel) -> list[Any]:
            return [record_of(_read(message, sensor.format), sensor, model.schema)]

        try:
            # A sensor is known by its topic: one and the same version answers it.
            told = self._ask(sensor.model, row, message.topic[:MAX_KEY])[0]
        except ServingError as e:
            self._log(e)
            return
        self._publish(sensor.publish.replace("{topic}", message.topic), told, sensor.format)

    def _answer(self, bound: Requests, message: paho.MQTTMessage) -> None:
        topic, is_list = bound.answered_on, False
        properties = message.properties

        def rows(_model: LoadedModel) -> list[Any]:
            nonlocal topic, is_list
            topic = _answer_topic(properties, topic)
            asked = _read(message, bound.format)
            is_list = isinstance(asked, list)
            return asked if is_list else [asked]

        said: Any
        try:
            told = self._ask(bound.model, rows, _key(properties))
            said = told if is_list else told[0]
        except ServingError as e:
            said = {"code": e.code, "error": str(e)}
        self._publish(topic, said, bound.format, getattr(properties, "CorrelationData", None))

    def _answer_frame(self, bound: Requests, message: paho.MQTTMessage) -> None:
        topic, properties = bound.answered_on, message.properties
        try:
            topic = _answer_topic(properties, topic)
            outcome = self._frames.respond(_body(message), only=bound.model)
            reply = outcome if isinstance(outcome, Reply) else self._runner.run(_awaited(outcome))
        except ServingError as e:
            reply = self._frames.refuse(e)
        self._send(topic, reply.body[LENGTH.size :], getattr(properties, "CorrelationData", None))

    def _ask(self, name: str | None, rows: Callable[[LoadedModel], list[Any]], key: str) -> list[dict[str, Any]]:
        try:
            found = self._plane.find(name, None, key)
            request = request_of(rows(found.model), found.model)
        except ServingError as e:
            self._plane.count_error(e.code)
            raise
        with self._plane.admission:
            response = self._plane.answer(request, by=found)
        return answers(response, found.model.outputs.labels)

    def _publish(self, topic: str, said: Any, how: str, correlation: bytes | None = None) -> None:
        body = msgspec.json.encode(said) if how == "json" else msgspec.msgpack.encode(said)
        self._send(topic, body, correlation)

    def _send(self, topic: str, body: bytes, correlation: bytes | None) -> None:
        properties = None
        if correlation is not None:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.CorrelationData = correlation
        self._client.publish(topic, body, qos=0, properties=properties)

    def _log(self, e: ServingError) -> None:
        if e.code not in self._logged:
            self._logged.add(e.code)
            _LOG.warning("mqtt face: %s: %s (said once; metrics count the others)", e.code, e)


def load_bindings(path: Path) -> Bindings:
    """The bindings in a file.

    Raises:
        SettingsError: settings.invalid.
    """
    return parse_bindings(_text(path), str(path))


async def _awaited(outcome: Awaitable[Reply]) -> Reply:
    return await outcome


def _body(message: paho.MQTTMessage) -> bytes:
    if len(message.payload) > _MAX_MESSAGE:
        text = f"Expected messages of at most {_MAX_MESSAGE} bytes, found {len(message.payload)}."
        raise ServingError("serving.too-large", text)
    return bytes(message.payload)


def _read(message: paho.MQTTMessage, how: str) -> Any:
    return read_message(_body(message), how)


def _key(properties: Properties | None) -> str:
    """The user property `key` of a request: on whose behalf it asks."""
    told = dict(getattr(properties, "UserProperty", ()))
    return str(told.get("key", ""))


def _answer_topic(properties: Properties | None, topic: str) -> str:
    """Where the answer goes: where the request says, within bounds."""
    named = str(getattr(properties, "ResponseTopic", topic))
    if named != topic and (not named.startswith(f"{topic}/") or set(named) & set("+#\0")):
        text = f"Expected the response topic {topic} or one below it, found {named[:80]!r}."
        raise ServingError("serving.input", text)
    return named


def _make_client(bindings: Bindings, client_id: str) -> paho.Client:
    broker = bindings.broker
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5)
    if broker.username:
        password = _text(Path(broker.password_file)).strip() if broker.password_file else None
        client.username_pw_set(broker.username, password)
    if broker.ca_file:
        _text(Path(broker.ca_file))
        client.tls_set(ca_certs=broker.ca_file)
    client.max_queued_messages_set(_WAITING)
    client.reconnect_delay_set(1, 60)
    return client


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError("settings.invalid", f"{path} can't be read: {e}.") from e
