"""The protocol's codec, bytes to requests and back."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import ServingError
from lightship_agent.serving.oip import DTYPES, MAX_BODY, Encoding, decode_infer, encode_infer
from lightship_agent.serving.tensors import InferResponse, Tensor

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def request(data: Any, shape: list[int], datatype: str = "FP32", **more: Any) -> bytes:
    tensor = {"name": "features", "shape": shape, "datatype": datatype, "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


def refusal(body: bytes, header_length: int | None = None) -> ServingError:
    with pytest.raises(ServingError) as refused:
        decode_infer(body, header_length=header_length)
    return refused.value


def binary(blob: bytes, shape: list[int], datatype: str = "FP32", size: Any = None, **more: Any) -> tuple[bytes, int]:
    size = len(blob) if size is None else size
    tensor = {"name": "features", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [{**tensor, **more}]}).encode()
    return text + blob, len(text)


@given(rows=st.lists(st.lists(floats, min_size=3, max_size=3), min_size=1, max_size=20))
def test_flat_nested_and_binary_say_the_same(rows: list[list[float]]) -> None:
    shape = [len(rows), 3]
    flat, _ = decode_infer(request([x for row in rows for x in row], shape))
    nested, _ = decode_infer(request(rows, shape))
    body, length = binary(np.array(rows, "<f4").tobytes(), shape)
    blob, _ = decode_infer(body, header_length=length)
    expected = np.array(rows, np.float32).ravel()
    for found in (flat, nested, blob):
        assert found.inputs[0].shape == (len(rows), 3)
        assert np.array_equal(np.asarray(found.inputs[0].data, np.float32), expected)


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("BOOL", [True, False]),
        ("UINT8", [0, 255]),
        ("INT8", [-128, 127]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("FP64", [1e300, -0.1]),
    ],
)
def test_every_datatype_keeps_its_extremes_in_json_and_binary(datatype: str, values: list[Any]) -> None:
    text, _ = decode_infer(request(values, [2], datatype))
    body, length = binary(np.array(values, DTYPES[datatype]).tobytes(), [2], datatype)
    blob, _ = decode_infer(body, header_length=length)
    assert text.inputs[0].data.tolist() == values
    assert blob.inputs[0].data.tolist() == values


def test_null_among_floats_is_not_a_number() -> None:
    found, _ = decode_infer(request([1, None, 2.5], [3]))
    assert math.isnan(found.inputs[0].data[1])


def test_half_floats_travel_as_binary_only() -> None:
    body, length = binary(np.array([1.5], "<f2").tobytes(), [1], "FP16")
    assert decode_infer(body, header_length=length)[0].inputs[0].data.tolist() == [1.5]
    assert refusal(request([1.5], [1], "FP16")).code == "serving.input"


def test_id_and_wanted_outputs_are_read() -> None:
    body = request(
        [1], [1], id="x7", outputs=[{"name": "scores", "parameters": {"binary_data": True}}, {"name": "label"}]
    )
    found, encoding = decode_infer(body, model="pump", version="3")
    assert (found.id, found.outputs, found.model, found.version) == ("x7", ("scores", "label"), "pump", "3")
    assert encoding.is_binary("scores")
    assert not encoding.is_binary("label")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"inputs":[{"name":"features","shape":[1],"datatype":"FP32","data":[1.0',
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"{}",
        b'{"inputs":[]}',
        b'{"inputs":{}}',
        b'{"inputs":[{"name":"features"}]}',
        b'{"inputs":[{"name":1,"shape":[1],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"name":"f","shape":[1.5],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"name":"f","shape":"1","datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"name":"f","shape":[1],"datatype":"FP32"}]}',
        b'{"inputs":[{"name":"f","shape":[1],"datatype":"FP32","data":[NaN]}]}',
        b'{"inputs":[{"name":"f","shape":[1],"datatype":"FP32","data":[Infinity]}]}',
        b'{"id":7,"inputs":[{"name":"f","shape":[1],"datatype":"FP32","data":[1]}]}',
        b"[" * 200_000,
        b'{"inputs":' + b"[" * 200_000,
    ],
)
def test_what_is_not_the_protocol_is_malformed(body: bytes) -> None:
    assert refusal(body).code == "serving.malformed"


@pytest.mark.parametrize(
    ("data", "shape", "datatype"),
    [
        (["1.0"], [1], "FP32"),
        ([True], [1], "FP32"),
        ("1.0", [1], "FP32"),
        (1.0, [1], "FP32"),
        (None, [1], "FP32"),
        ({"0": 1}, [1], "FP32"),
        ([1.5], [1], "INT32"),
        ([1], [1], "BOOL"),
        ([None], [1], "INT32"),
        ([300], [1], "UINT8"),
        ([-1], [1], "UINT8"),
        ([2**64], [1], "UINT64"),
        ([1, 2], [3], "FP32"),
        ([1, 2, 3, 4], [3], "FP32"),
        ([[1, 2], [3]], [2, 2], "FP32"),
        ([1], [-1], "FP32"),
        ([1], [], "FP32"),
        ([1], [1] * 9, "FP32"),
        ([[[[[[[[[[1]]]]]]]]]], [1], "FP32"),
        ([1], [1], "FP31"),
        ([1], [1], "BYTES"),
        (["a"], [2], "BYTES"),
        (["a", "b,c", 'd"'], [2], "BYTES"),
    ],
)
def test_numbers_that_are_not_of_the_datatype_or_shape_are_refused(data: Any, shape: list[int], datatype: str) -> None:
    assert refusal(request(data, shape, datatype)).code == "serving.input"


def test_a_shape_of_too_many_rows_is_refused_before_its_numbers_are_read() -> None:
    assert refusal(request([], [65_537, 4])).code == "serving.too-large"
    assert refusal(request([], [2**62])).code == "serving.too-large"


def test_a_body_beyond_the_bound_is_refused_unread() -> None:
    assert refusal(b"x" * (MAX_BODY + 1)).code == "serving.too-large"


BLOB = np.zeros(4, "<f4").tobytes()


@pytest.mark.parametrize("header", [0, -1, 10**9])
def test_a_header_length_outside_the_body_is_malformed(header: int) -> None:
    assert refusal(binary(BLOB, [4])[0], header).code == "serving.malformed"


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_header_length_that_is_off_by_one_is_malformed(shift: int) -> None:
    body, length = binary(BLOB, [4])
    assert refusal(body, length + shift).code == "serving.malformed"


@pytest.mark.parametrize("size", [-1, 17, 2**40, "16", 1.5, True])
def test_a_blob_size_that_is_not_there_is_malformed(size: Any) -> None:
    assert refusal(*binary(BLOB, [4], size=size)).code == "serving.malformed"


def test_bytes_nobody_claims_and_data_given_twice_are_malformed() -> None:
    body, length = binary(BLOB, [4])
    assert refusal(body + b"\0", length).code == "serving.malformed"
    assert refusal(*binary(BLOB, [4], data=[1, 2, 3, 4])).code == "serving.malformed"
    assert refusal(request([1], [1]) + BLOB).code == "serving.malformed"


def test_a_blob_of_another_size_than_its_shape_is_refused() -> None:
    assert refusal(*binary(BLOB, [5])).code == "serving.input"
    assert refusal(*binary(b"\0\1\2", [3], "BOOL")).code == "serving.input"


@given(body=st.binary(max_size=300), header=st.none() | st.integers(-2, 400))
def test_no_bytes_at_all_make_it_fail_in_another_way(body: bytes, header: int | None) -> None:
    try:
        decode_infer(body, header_length=header)
    except ServingError as e:
        assert e.code in {"serving.malformed", "serving.input", "serving.too-large"}  # noqa: PT017 - any of three is right


def response() -> InferResponse:
    return InferResponse(
        model_name="pump",
        model_version="1",
        id="x",
        parameters={"digest": "d"},
        outputs=(
            Tensor("label", "BYTES", (2,), ["ok", "größer"]),
            Tensor("class", "INT64", (2,), np.array([0, 1])),
            Tensor("scores", "FP32", (2, 2), np.array([[1, 0], [0.25, 0.75]], np.float32)),
        ),
    )


def test_an_answer_in_json_is_flat_and_row_major() -> None:
    text, length = encode_infer(response())
    assert length is None
    assert [o["data"] for o in json.loads(text)["outputs"]] == [["ok", "größer"], [0, 1], [1.0, 0.0, 0.25, 0.75]]


def test_an_answer_in_binary_can_be_taken_apart_again() -> None:
    body, length = encode_infer(response(), Encoding(default=True, chosen={"class": False}))
    assert length is not None
    label, classes, scores = json.loads(body[:length])["outputs"]
    assert classes["data"] == [0, 1]
    at = length
    words = []
    while at < length + label["parameters"]["binary_data_size"]:
        (size,) = struct.unpack_from("<I", body, at)
        words.append(body[at + 4 : at + 4 + size].decode())
        at += 4 + size
    assert words == ["ok", "größer"]
    assert np.frombuffer(body[at:], "<f4").tolist() == [1.0, 0.0, 0.25, 0.75]
    assert scores["parameters"]["binary_data_size"] == len(body) - at
