"""The bindings file: what it may say, and what a message becomes by it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from lightship_agent.contract.codes import ServingError, SettingsError
from lightship_agent.contract.schema import Feature, FeatureSchema
from lightship_agent.serving.bindings import Sensor, matches, parse_bindings, read_message, record_of

SCHEMA = FeatureSchema(features=(Feature(name="temperature"), Feature(name="rpm", nullable=True)))
SENSOR = '[[sensors]]\ntopic = "s/1"\npublish = "p/1"\n'


def test_a_whole_file_is_read() -> None:
    found = parse_bindings(
        """
        [broker]
        host = "broker.local"
        ca_file = "/etc/ssl/broker.pem"
        [[sensors]]
        topic = "site/+/telemetry"
        publish = "predictions/{topic}"
        model = "pump"
        format = "msgpack"
        fields = { temperature = "temp.c" }
        [[requests]]
        model = "pump"
        """,
        "bindings.toml",
    )

    assert found.broker.port == 1883
    assert found.sensors[0].fields == {"temperature": "temp.c"}
    assert found.requests[0].asked_on == "lightship/v1/_local/pump/predict"
    assert found.requests[0].answered_on == "lightship/v1/_local/pump/prediction"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "at least one"),
        ("[broker]\nport = 1\n", "at least one"),
        ("nonsense", "bindings.toml"),
        ("[[sensors]]\ntopic = 's'\n", "publish"),
        ("[[sensors]]\ntopic = 's'\npublish = 'p'\ntopics = 1\n", "topics"),
        ("[[sensors]]\ntopic = 's'\npublish = 'p'\nformat = 'xml'\n", "xml"),
        ("[[sensors]]\ntopic = 's'\npublish = 'p/+'\n", "publish on"),
        ("[[sensors]]\ntopic = 's'\npublish = ''\n", "publish on"),
        ("[[sensors]]\ntopic = ''\npublish = 'p'\n", "filter"),
        ("[[sensors]]\ntopic = 's#'\npublish = 'p'\n", "filter"),
        ("[[sensors]]\ntopic = '#/s'\npublish = 'p'\n", "filter"),
        ("[[sensors]]\ntopic = '$SYS/#'\npublish = 'p'\n", "filter"),
        ("[[sensors]]\ntopic = 's/#'\npublish = 's/prediction'\n", "for ever"),
        ("[[sensors]]\ntopic = '#'\npublish = 'p'\n", "for ever"),
        ("[[sensors]]\ntopic = '+/a'\npublish = '{topic}'\n", "for ever"),
        (SENSOR + "[[requests]]\nmodel = 'm'\nanswer = 's'\n", "for ever"),
        ("[[requests]]\nmodel = 'm'\ntopic = 't'\nanswer = 't'\n", "for ever"),
        ("[[requests]]\nmodel = 'm'\ntopic = 'a/+/c/d'\nanswer = 'a/b'\n", "for ever"),
        ("[[requests]]\nmodel = 'm'\ntopic = 'a/#'\nanswer = 'a'\n", "for ever"),
        ("[broker]\nhost = '10.0.0.1'\n" + SENSOR, "ca_file"),
        ("[broker]\nhost = 'broker.local'\n" + SENSOR, "ca_file"),
        ("[broker]\nport = '1'\n" + SENSOR, "port"),
    ],
)
def test_what_can_not_work_is_refused_with_the_files_name(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match="bindings.toml") as found:
        parse_bindings(text, "bindings.toml")
    assert found.value.code == "settings.invalid"
    assert words in str(found.value)


def test_a_message_becomes_the_record_of_what_is_there() -> None:
    sensor = Sensor(topic="s", publish="p", fields={"temperature": "temp.c"})

    assert record_of({"temp": {"c": 21.3}, "rpm": 900, "at": "noon"}, sensor, SCHEMA) == {
        "temperature": 21.3,
        "rpm": 900,
    }
    assert record_of({"temp": 5, "rpm": None}, sensor, SCHEMA) == {}


@pytest.mark.parametrize("message", [5, None, [1], "text"])
def test_a_message_that_is_no_object_is_refused(message: Any) -> None:
    with pytest.raises(ServingError) as found:
        record_of(message, Sensor(topic="s", publish="p"), SCHEMA)
    assert found.value.code == "serving.input"


def test_a_field_of_a_feature_that_is_not_there_is_refused() -> None:
    with pytest.raises(ServingError, match="'speed'"):
        record_of({}, Sensor(topic="s", publish="p", fields={"speed": "v"}), SCHEMA)


@given(st.binary(max_size=60), st.sampled_from(["json", "msgpack"]))
def test_no_bytes_at_all_make_reading_fail_in_another_way(payload: bytes, how: str) -> None:
    try:
        read_message(payload, how)
    except ServingError as e:
        code = e.code
    else:
        code = "serving.malformed"
    assert code == "serving.malformed"


PART = st.sampled_from(["a", "b", "", "cc"])


@given(st.lists(PART | st.just("+"), min_size=1, max_size=4), st.booleans(), st.lists(PART, min_size=1, max_size=5))
def test_topics_match_as_the_mqtt_library_says(parts: list[str], rest: bool, topic: list[str]) -> None:
    wanted = "/".join([*parts, *(["#"] if rest else [])])
    assert matches(wanted, "/".join(topic)) == topic_matches_sub(wanted, "/".join(topic))


def test_messages_in_both_formats_say_the_same() -> None:
    said = {"temp": {"c": 21.3}}
    assert read_message(msgspec.json.encode(said), "json") == read_message(msgspec.msgpack.encode(said), "msgpack")
