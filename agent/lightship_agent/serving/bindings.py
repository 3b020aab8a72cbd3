"""Serving: which topics of a local broker ask which model, as a TOML file says.

    [broker]
    host = "127.0.0.1"
    port = 1883

    [[sensors]]                        # every message of a sensor becomes a prediction
    topic = "site/pump-7/telemetry"
    publish = "site/pump-7/prediction"
    fields = { temperature = "temp.c", vibration = "vib" }

    [[requests]]                       # whoever asks gets an answer
    model = "pump"

Rules:
* pure: text in, bindings out; a message in, records out;
* nothing is published where it would be heard as a question;
* off loopback only with TLS: a reading that anybody on the way can change is no reading;
* data for predictions comes this way, and never what to run.
"""

from __future__ import annotations

import ipaddress
import tomllib
from typing import Any, Literal

import msgspec

from lightship_agent.contract import topics
from lightship_agent.contract.codes import ServingError, SettingsError
from lightship_agent.contract.schema import FeatureSchema

from .keys import check_value_keys


class Broker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A broker on this device, or beside it."""

    host: str = "127.0.0.1"
    port: int = 1883
    username: str = ""
    password_file: str = ""
    ca_file: str = ""  # verifies the broker; needed off loopback


class Sensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A topic whose messages are rows."""

    topic: str
    publish: str  # `{topic}` stands for the topic a message came on
    model: str | None = None
    format: Literal["json", "msgpack"] = "json"
    fields: dict[str, str] = {}  # feature → where it is in a message, `outer.inner`; its own name when not listed


class Requests(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A topic on which programs ask, and the one on which they are answered."""

    model: str
    topic: str = ""
    answer: str = ""
    format: Literal["json", "msgpack"] = "json"

    @property
    def asked_on(self) -> str:
        """The topic to ask on."""
        return self.topic or topics.local_request(self.model)

    @property
    def answered_on(self) -> str:
        """The topic of answers, and the beginning of those that a request may name instead."""
        return self.answer or topics.local_answer(self.model)


class Bindings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    broker: Broker = Broker()
    sensors: tuple[Sensor, ...] = ()
    requests: tuple[Requests, ...] = ()


def parse_bindings(text: str, where: str) -> Bindings:
    """What the file says.

    Args:
        text: TOML.
        where: the file's name, for messages.

    Raises:
        SettingsError: settings.invalid.
    """
    try:
        found = msgspec.convert(tomllib.loads(text), Bindings)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as e:
        raise SettingsError("settings.invalid", f"{where}: {e}.") from e
    problem = _problem(found)
    if problem:
        raise SettingsError("settings.invalid", f"{where}: {problem}")
    return found


def _problem(found: Bindings) -> str:
    if not found.sensors and not found.requests:
        return "Expected at least one [[sensors]] or [[requests]]."
    if not found.broker.ca_file and not _is_loopback(found.broker.host):
        return f"Expected a ca_file to verify {found.broker.host!r} with, since it is not on this device."
    heard = [s.topic for s in found.sensors] + [r.asked_on for r in found.requests]
    said = [s.publish.replace("{topic}", _one_of(s.topic)) for s in found.sensors]
    answered = [r.answered_on for r in found.requests]
    for topic in heard:
        if not _is_filter(topic):
            return f"Expected a topic filter, found {topic[:80]!r}."
    for topic in said + answered:
        if not topic or set(topic) & set("+#\0"):
            return f"Expected a topic to publish on, found {topic[:80]!r}."
        echoing = [f for f in heard if matches(f, topic) or (topic in answered and _reaches(f, topic))]
        if echoing:
            return f"What is published on {topic[:80]!r} would be heard on {echoing[0][:80]!r}, and answered for ever."
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_filter(topic: str) -> bool:
    parts = topic.split("/")
    whole = all(p in {"+", "#"} or not set(p) & set("+#\0") for p in parts)
    return bool(topic) and whole and "#" not in parts[:-1] and not topic.startswith("$")


def _one_of(topic_filter: str) -> str:
    """A topic that the filter matches."""
    return topic_filter.replace("+", "x").replace("#", "x")


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a subscription to that filter brings that topic."""
    wanted, parts = topic_filter.split("/"), topic.split("/")
    for i, part in enumerate(wanted):
        if part == "#":
            return True
        if i >= len(parts) or part not in ("+", parts[i]):
            return False
    return len(wanted) == len(parts)


def _reaches(topic_filter: str, topic: str) -> bool:
    """Whether a subscription to that filter may bring that topic, or one below it."""
    wanted, parts = topic_filter.split("/"), topic.split("/")
    if "#" not in wanted and len(wanted) < len(parts):
        return False
    for want, part in zip(wanted, parts, strict=False):
        if want == "#":
            return True
        if want not in ("+", part):
            return False
    return True


def read_message(payload: bytes, how: str) -> Any:
    """What a message says.

    Raises:
        ServingError: serving.malformed.
    """
    decode = msgspec.json.decode if how == "json" else msgspec.msgpack.decode
    try:
        found = decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise ServingError("serving.malformed", f"Expected a message in {how}: {e}.") from e
    if how == "json":
        check_value_keys(payload, found)
    return found


def record_of(message: Any, sensor: Sensor, schema: FeatureSchema) -> dict[str, Any]:
    """The record in a sensor's message: the features that are there, and nothing else.

    Raises:
        ServingError: serving.input when it is no object, or a field is bound to a feature that the model has not.
    """
    if not isinstance(message, dict):
        raise ServingError("serving.input", f"Expected an object with the sensor's fields, found {message!r:.60}.")
    unknown = [name for name in sensor.fields if name not in schema.names]
    if unknown:
        raise ServingError("serving.input", f"The binding names a feature {unknown[0]!r} that the model has not.")
    found = {name: _at(message, sensor.fields.get(name, name)) for name in schema.names}
    return {name: value for name, value in found.items() if value is not None}


def _at(message: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(message, dict):
            return None
        message = message.get(part)
    return message
