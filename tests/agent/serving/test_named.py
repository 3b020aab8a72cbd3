"""One input per feature, words as categories: the same answers as the one tensor, on every face that takes them."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from tests.agent.conftest import FEATURES, build, training_rows
from tests.agent.worded import MATERIALS, worded_bundle

from lightship_agent.contract.bundle import (
    read_bundle,
)
from lightship_agent.runtime.model import LoadedModel, load_model
from lightship_agent.serving.connections import Reply, Request
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import HttpApp, create_app
from lightship_agent.serving.oip import DTYPES, model_metadata

ROWS = np.array([[0.5, 1, 2.0, 0], [-1.5, 2, 0.25, 1]], dtype=np.float32)


def model(**material: Any) -> LoadedModel:
    return load_model(read_bundle(worded_bundle(**material)))


def app_of(served: LoadedModel, seen: list[Any] | None = None) -> HttpApp:
    plane = DataPlane(lambda *told: None if seen is None else seen.append(told))
    plane.install(served)
    return create_app(plane, status=dict, metrics=str)


def column(name: str, datatype: str, data: list[Any], shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": data}


COLUMNS = [
    column("material", "BYTES", ["iron", "stål"]),
    column("gear", "BYTES", ["1", "2"], [2, 1]),
    column("temperature", "FP32", [0.5, -1.5]),
    column("current", "FP64", [2.0, 0.25], [2, 1]),
]


def post(app: HttpApp, body: Any, path: str = "infer", **headers: bytes) -> tuple[int, Any]:
    named = {k.replace("_", "-").encode(): v for k, v in headers.items()}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = app.respond(Request(b"POST", f"/v2/models/pump/{path}".encode(), named, content, True))
    assert isinstance(reply, Reply)
    return reply.status, json.loads(reply.body)


def scores(told: Any) -> list[float]:
    found: list[float] = next(o["data"] for o in told["outputs"] if o["name"] == "scores")
    return found


def matrix() -> dict[str, Any]:
    return {"inputs": [column("features", "FP32", ROWS.ravel().tolist(), [2, 4])]}


def test_columns_by_name_in_any_order_are_the_rows_of_the_one_tensor() -> None:
    seen: list[Any] = []
    app = app_of(model(), seen)

    by_name = post(app, {"inputs": COLUMNS})
    by_matrix = post(app, matrix())

    assert by_name[0] == by_matrix[0] == 200
    assert scores(by_name[1]) == scores(by_matrix[1])
    assert np.array_equal(seen[0][1], ROWS)
    assert np.array_equal(seen[1][1], ROWS)


def test_records_and_lines_of_csv_take_words() -> None:
    app = app_of(model())
    records = [
        {"temperature": 0.5, "material": " iron ", "current": 2.0, "gear": "1"},
        {"temperature": -1.5, "material": "sta\u030al", "current": 0.25, "gear": "2"},
    ]
    lines = "gear,material,current,temperature\n1, iron ,2.0,0.5\n2,stål,0.25,-1.5\n".encode()

    expected = scores(post(app, matrix())[1])

    for body, kind in ((records, b"application/json"), (lines, b"text/csv")):
        status, told = post(app, body, "predict", content_type=kind)
        assert status == 200, told
        assert [s for answer in told for s in answer["scores"].values()] == expected


def test_words_in_a_binary_tensor_are_words() -> None:
    app = app_of(model())
    blob = b"".join(struct.pack("<I", len(w)) + w for w in (b"iron", "stål".encode()))
    told = {**COLUMNS[0], "parameters": {"binary_data_size": len(blob)}}
    del told["data"]
    text = json.dumps({"inputs": [told, *COLUMNS[1:]]}).encode()

    status, answer = post(app, text + blob, inference_header_content_length=b"%d" % len(text))

    assert status == 200
    assert scores(answer) == scores(post(app, matrix())[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": ["iron", "wood"]}, "expected one of 'brass', 'iron', 'stål'; found 'wood'"),
        ({"data": ["iron", None]}, "'material' has no value"),
        ({"data": ["iron", "NA"]}, "'material' has no value"),
        ({"datatype": "FP32", "data": [1, 2]}, "expected words in BYTES, found FP32"),
        ({"data": ["iron"], "shape": [1]}, "expected shape"),
        ({"data": ["iron"] * 4, "shape": [2, 2]}, "expected shape"),
        ({"name": "metal"}, "No feature 'metal'"),
        ({"name": "gear"}, "each input once"),
    ],
)
def test_columns_that_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    app = app_of(model())

    status, told = post(app, {"inputs": [*COLUMNS[1:], {**COLUMNS[0], **change}]})

    assert (status, told["code"]) == (400, "serving.input")
    assert said in told["error"]


def test_a_model_with_words_is_not_on_the_hot_path_where_numbers_are_not_looked_up() -> None:
    app = app_of(model())

    assert model().bound is None
    assert app.plane.hot == {}


def test_a_column_that_is_left_out_is_missing_in_every_row() -> None:
    app = app_of(model())

    without = [c for c in COLUMNS if c["name"] != "temperature"]

    assert "'temperature' has no value" in post(app, {"inputs": without})[1]["error"]


def test_a_word_nobody_knows_has_a_number_of_its_own_where_the_schema_says_so() -> None:
    seen: list[Any] = []
    app = app_of(model(unknown="code"), seen)

    status, _ = post(app, {"temperature": 0.5, "material": "wood", "current": 2.0, "gear": "1"}, "predict")

    assert status == 200
    assert seen[0][1].tolist() == [[0.5, 3.0, 2.0, 0.0]]


@pytest.mark.parametrize("material", ["wood", 1, True, ["iron"], {"value": "iron", "unit": "K"}, None, ""])
def test_a_record_whose_word_is_none_is_refused(material: Any) -> None:
    app = app_of(model())

    status, told = post(app, {"temperature": 0.5, "material": material, "current": 2.0, "gear": "1"}, "predict")

    assert (status, told["code"]) == (400, "serving.input")
    assert "'material'" in told["error"]


def test_a_number_that_stands_for_no_word_is_refused_in_the_one_tensor() -> None:
    app = app_of(model())
    body = matrix()
    body["inputs"][0]["data"][1] = 1.5

    status, told = post(app, body)

    assert (status, told["code"]) == (400, "serving.input")
    assert "'material' is a category" in told["error"]


def test_a_model_with_words_describes_an_input_for_each_feature() -> None:
    told = model_metadata(model())

    assert told["inputs"] == [
        {"name": "temperature", "datatype": "FP32", "shape": [-1]},
        {"name": "material", "datatype": "BYTES", "shape": [-1]},
        {"name": "current", "datatype": "FP32", "shape": [-1]},
        {"name": "gear", "datatype": "BYTES", "shape": [-1]},
    ]
    assert told["parameters"]["categories"] == {"material": list(MATERIALS), "gear": ["1", "2"]}


@pytest.mark.parametrize("datatype", DTYPES)
def test_numbers_of_any_datatype_are_the_same_rows(datatype: str) -> None:
    seen: list[Any] = []
    app = app_of(load_model(read_bundle(build())), seen)
    rows = np.array([[0, 1, 1, 0], [1, 0, 1, 1]], DTYPES[datatype])
    blob = rows.tobytes()
    told = {"name": "features", "datatype": datatype, "shape": [2, 4], "parameters": {"binary_data_size": len(blob)}}
    text = json.dumps({"inputs": [told]}).encode()
    nested = {"inputs": [{"name": "features", "datatype": datatype, "shape": [2, 4], "data": rows.tolist()}]}

    assert post(app, text + blob, inference_header_content_length=b"%d" % len(text))[0] == 200
    status, answer = post(app, nested)

    assert status == (400 if datatype == "FP16" else 200), answer
    for _, found, *_ in seen:
        assert found.dtype == np.float32
        assert found.tolist() == rows.astype(np.float32).tolist()
    assert len(seen) == (1 if datatype == "FP16" else 2)


def test_a_model_without_words_takes_its_features_by_name_too() -> None:
    seen: list[Any] = []
    app = app_of(load_model(read_bundle(build(nullable=("vibration",)))), seen)
    rows = training_rows(3)
    columns = [column(n, "FP32", rows[:, j].tolist()) for j, n in enumerate(FEATURES)]

    assert post(app, {"inputs": columns})[0] == 200
    assert post(app, {"inputs": [columns[0], *columns[2:]]})[0] == 200

    assert np.array_equal(seen[0][1], rows)
    assert np.isnan(seen[1][1][:, 1]).all()
