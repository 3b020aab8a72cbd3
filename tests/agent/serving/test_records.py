"""Records by feature name and CSV: what they become, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.agent.conftest import FEATURES, build, training_rows

from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.schema import Feature, FeatureSchema
from lightship_agent.runtime.model import LoadedModel, load_model
from lightship_agent.serving.connections import Reply, Request
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import HttpApp, create_app
from lightship_agent.serving.records import UNITS, decode_records, request_of

Models = Callable[..., LoadedModel]
PUMP = load_model(read_bundle(build(nullable=("vibration",))))
ROW = {"temperature": 21.3, "vibration": 0.4, "current": 1.1, "speed": 0.9}


def measured(**units: str) -> LoadedModel:
    """A model whose schema has units."""
    features = tuple(Feature(name=n, unit=units.get(n, "")) for n in FEATURES)
    return msgspec.structs.replace(PUMP, schema=FeatureSchema(features=features))


def rows_of(body: Any, content_type: str = "application/json", model: LoadedModel = PUMP) -> Any:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return decode_records(data, content_type, model).request.inputs[0].data


def refusal(body: Any, content_type: str = "application/json", model: LoadedModel = PUMP) -> ServingError:
    with pytest.raises(ServingError) as found:
        rows_of(body, content_type, model)
    return found.value


def served(*models: LoadedModel) -> HttpApp:
    plane = DataPlane(lambda *_: None)
    for model in models:
        plane.install(model)
    return create_app(plane, status=dict, metrics=str)


def post(app: HttpApp, body: bytes, path: str = "/v2/models/pump/predict", **headers: str) -> tuple[int, Any]:
    named = {k.replace("_", "-").encode(): v.encode() for k, v in headers.items()}
    reply = app.respond(Request(b"POST", path.encode(), named, body, True))
    assert isinstance(reply, Reply)
    return reply.status, msgspec.json.decode(reply.body)


def test_a_record_in_any_order_is_the_row_in_the_schemas_order() -> None:
    assert rows_of(dict(reversed(ROW.items()))).tolist() == [[21.3, 0.4, 1.1, 0.9]]
    assert rows_of([ROW, ROW]).shape == (2, 4)


def test_an_answer_is_what_the_tensor_route_answers_in_words() -> None:
    app = served(PUMP)
    rows = training_rows(3)
    records = [dict(zip(FEATURES, map(float, row), strict=True)) for row in rows]
    expected = PUMP.predict(rows)
    assert expected.labels is not None
    assert expected.scores is not None

    status, answers = post(app, msgspec.json.encode(records), x_request_id="seven")

    assert status == 200
    for i, answer in enumerate(answers):
        assert answer["label"] == ("healthy", "worn")[expected.labels[i]]
        assert list(answer["scores"]) == ["healthy", "worn"]
        assert np.array_equal(np.array(list(answer["scores"].values()), np.float32), expected.scores[i])
        assert (answer["id"], answer["model"], answer["version"]) == (f"seven:{i}", "pump", 1)
        assert answer["digest"] == PUMP.digest


def test_one_record_is_answered_by_one_record_and_one_line_of_csv_by_a_list() -> None:
    app = served(PUMP)
    text = b"speed,temperature,current,vibration\n0.9,21.3,1.1,0.4\n"

    status, one = post(app, msgspec.json.encode(ROW), x_request_id="r")
    csv_status, several = post(app, text, content_type="text/csv; charset=utf-8", x_request_id="r")

    assert (status, csv_status) == (200, 200)
    assert one["id"] == "r"
    assert several == [one]


def test_a_regressor_answers_with_a_value(make_model: Models) -> None:
    model = make_model(kind="regressor")
    status, answer = post(served(model), msgspec.json.encode(ROW))

    assert status == 200
    assert set(answer) == {"value", "id", "model", "version", "digest"}


def test_missing_values_are_welcome_only_where_the_schema_allows_them() -> None:
    app = served(PUMP)
    without = {k: v for k, v in ROW.items() if k != "vibration"}
    assert math.isnan(rows_of(without)[0][1])
    assert math.isnan(rows_of({**ROW, "vibration": None})[0][1])
    assert math.isnan(rows_of(b"temperature,vibration,current,speed\n1,,1,1", "text/csv")[0][1])
    assert post(app, msgspec.json.encode(without))[0] == 200

    for body in ({"vibration": 1}, {**ROW, "speed": None}, {}):
        status, answer = post(app, msgspec.json.encode(body))
        assert (status, answer["code"]) == (400, "serving.input")
        assert "has no value" in answer["error"]


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({**ROW, "rpm": 900}, "serving.input", "rpm"),
        ({**ROW, "Speed": 1}, "serving.input", "Speed"),
        ({**ROW, "speed": "0.9"}, "serving.input", "number"),
        ({**ROW, "speed": True}, "serving.input", "number"),
        ({**ROW, "speed": [1]}, "serving.input", "number"),
        ({**ROW, "speed": {"value": 1}}, "serving.input", "unit"),
        ({**ROW, "speed": {"value": 1, "unit": "m/s"}}, "serving.input", "no unit"),
        ({**ROW, "speed": {"value": 1, "unit": None}}, "serving.input", "no unit"),
        ({**ROW, "speed": {"value": 1, "unit": ""}}, "serving.input", "no unit"),
        ([], "serving.input", "records"),
        ([ROW, 5], "serving.input", "Record 1"),
        ([ROW, None], "serving.input", "Record 1"),
        ([[1, 2, 3, 4]], "serving.input", "Record 0"),
        ("text", "serving.input", "Record 0"),
        (b"", "serving.malformed", "JSON"),
        (b"{", "serving.malformed", "JSON"),
        (b'{"speed": NaN}', "serving.malformed", "JSON"),
        (b'{"speed": 1e999}', "serving.malformed", "JSON"),
        (b"\xff\xfe", "serving.malformed", "JSON"),
        (b"[" * 100_000, "serving.malformed", "JSON"),
        (b'{"speed": 1' + b"0" * 400 + b"}", "serving.input", "finite"),
    ],
    ids=lambda v: f"{v!r:.40}",
)
def test_what_a_record_gets_wrong_is_named(body: Any, code: str, words: str) -> None:
    error = refusal(body)
    assert error.code == code
    assert words in str(error)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", "serving.input", "header"),
        ("temperature,vibration,current,speed", "serving.input", "header"),
        ("temperature,vibration,current,speed\n1,2,3", "serving.input", "4 cells"),
        ("temperature,vibration,current,speed\n1,2,3,4,5", "serving.input", "4 cells"),
        ("temperature,temperature,current,speed\n1,2,3,4", "serving.malformed", "once"),
        ("temperature,vibration,current,rpm\n1,2,3,4", "serving.input", "rpm"),
        ("temperature,vibration,current,speed\n1,2,3,nan", "serving.input", "decimal"),
        ("temperature,vibration,current,speed\n1,2,3,inf", "serving.input", "decimal"),
        ("temperature,vibration,current,speed\n1,2,3,1_000", "serving.input", "decimal"),
        ("temperature,vibration,current,speed\n1,2,3,٣", "serving.input", "decimal"),
        ("temperature,vibration,current,speed\n1,2,3,0x1f", "serving.input", "decimal"),
        ('temperature,vibration,current,speed\n1,2,3,"4', "serving.malformed", "CSV"),
        ("temperature;vibration;current;speed\n1;2;3;4", "serving.input", "decimal"),
    ],
)
def test_what_csv_gets_wrong_is_named(text: str, code: str, words: str) -> None:
    error = refusal(text.encode(), "text/csv")
    assert (error.code, words in str(error)) == (code, True), str(error)


def test_a_number_with_its_unit_is_converted_where_both_units_are_known() -> None:
    model = measured(temperature="C", current="A", speed="rpm")
    fahrenheit = {"value": 70, "unit": "F"}
    row = {
        **ROW,
        "temperature": fahrenheit,
        "current": {"value": 1100, "unit": "mA"},
        "speed": {"value": 2, "unit": "Hz"},
    }

    assert rows_of(row, model=model)[0] == pytest.approx([21.1111111, 0.4, 1.1, 120])
    assert rows_of({**ROW, "temperature": {"value": 5, "unit": "C"}}, model=model)[0][0] == 5


@pytest.mark.parametrize("unit", ["bar", "celsius", "", None, 5, ["C"], {"C": 1}])
def test_a_unit_that_measures_something_else_or_is_unknown_is_refused_with_what_was_expected(unit: Any) -> None:
    error = refusal({**ROW, "temperature": {"value": 5, "unit": unit}}, model=measured(temperature="C"))

    assert error.code == "serving.input"
    assert "'C'" in str(error)
    assert "temperature (K, C, " in str(error)


def test_a_unit_nobody_knows_is_taken_as_it_is_and_no_other_in_its_place() -> None:
    model = measured(temperature="furlongs")
    assert rows_of({**ROW, "temperature": {"value": 5, "unit": "furlongs"}}, model=model)[0][0] == 5
    assert refusal({**ROW, "temperature": {"value": 5, "unit": "m"}}, model=model).code == "serving.input"


@given(st.sampled_from(sorted(UNITS)), st.sampled_from(sorted(UNITS)), st.floats(-1e6, 1e6))
def test_a_conversion_there_and_back_is_the_number_again(one: str, other: str, number: float) -> None:
    if UNITS[one][0] != UNITS[other][0]:
        return
    there = rows_of({**ROW, "speed": {"value": number, "unit": one}}, model=measured(speed=other))[0][3]
    back = rows_of({**ROW, "speed": {"value": float(there), "unit": other}}, model=measured(speed=one))[0][3]
    assert back == pytest.approx(number, rel=1e-9, abs=1e-6)


def test_too_many_records_are_too_many() -> None:
    with pytest.raises(ServingError) as found:
        request_of([ROW] * 65_537, PUMP)
    assert found.value.code == "serving.too-large"


def test_wrong_models_methods_and_versions_get_the_protocols_error_and_are_counted_once() -> None:
    app = served(PUMP)
    body = msgspec.json.encode(ROW)
    assert post(app, body, "/v2/models/fan/predict")[1]["code"] == "serving.unknown-model"
    assert post(app, body, "/v2/models/pump/versions/2/predict")[1]["code"] == "serving.unknown-model"
    assert post(app, body, "/v2/models/pump/versions/1/predict")[0] == 200
    assert post(app, b"{", "/v2/models/pump/predict")[0] == 400
    assert app.plane.errors() == {"serving.unknown-model": 2, "serving.malformed": 1}


@given(st.binary(max_size=100), st.sampled_from(["application/json", "text/csv", ""]))
def test_no_bytes_at_all_make_it_fail_in_another_way(body: bytes, content_type: str) -> None:
    with suppress(ServingError):  # and nothing else
        assert decode_records(body, content_type, PUMP).request.inputs[0].data.shape[1] == 4
