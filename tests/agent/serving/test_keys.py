"""A key that occurs twice is refused, on every way into the data plane; and so is all other bad input, with a count."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import ServingError
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.serving.bindings import read_message
from lightship_agent.serving.connections import Reply, Request
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import HttpApp, create_app
from lightship_agent.serving.keys import check_keys, check_value_keys

Models = Callable[..., LoadedModel]
ROW = b'{"name":"features","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}'
WHOLE = b'{"inputs":[%b]}' % ROW
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def plane(make_model: Models) -> DataPlane:
    made = DataPlane(lambda *_: None)
    made.install(make_model())
    return made


@pytest.fixture
def app(plane: DataPlane) -> HttpApp:
    return create_app(plane, status=dict, metrics=str)


def ask(app: HttpApp, body: bytes, path: str = "/v2/models/pump/infer", **headers: bytes) -> tuple[int, Any]:
    named = {k.replace("_", "-").encode(): v for k, v in headers.items()}
    outcome = app.respond(Request(b"POST", path.encode(), named, body, True))

    async def answered() -> Reply:
        return outcome if isinstance(outcome, Reply) else await outcome

    reply = asyncio.run(answered())
    return reply.status, json.loads(reply.body)


@given(value=plain, ascii_only=st.booleans())
def test_json_without_a_key_twice_is_let_through(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    if b"\xed" in text:
        return  # half of a pair is no UTF-8; the decoder before refuses it

    check_keys(text)
    check_value_keys(text, value)


@given(value=st.dictionaries(st.text("abc\\", max_size=4), plain, min_size=1, max_size=4), at=st.integers(0, 3))
def test_json_with_a_key_twice_is_refused_however_deep(value: dict[str, Any], at: int) -> None:
    name = list(value)[at % len(value)]
    twice = json.dumps(value)[:-1] + f", {json.dumps(name)}: 1}}"
    deep = f'[{{"a": [0, {twice}]}}]'.encode()

    for check in (check_keys, lambda text: check_value_keys(text, json.loads(text))):
        with pytest.raises(ServingError, match="occurs twice") as caught:
            check(deep)
        assert caught.value.code == "serving.malformed"


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":[%b],"inputs":[%b]}' % (ROW, ROW),
        b'{"id":"a","id":"b","inputs":[%b]}' % ROW,
        b'{"inputs":[{"shape":[1,4],%b]}' % ROW[1:],
        b'{"inputs":[{"name":"features",%b]}' % ROW[1:],
        b'{"inputs":[{"data":[9,9,9,9],%b]}' % ROW[1:],
        b'{"inputs":[{"d\\u0061ta":[9,9,9,9],%b]}' % ROW[1:],
        b'{"inputs":[{"parameters":{"a":1,"a":2},%b]}' % ROW[1:],
        b'{"inputs":[%b],"parameters":{"a":{"b":1,"b":1}}}' % ROW,
        b'{"inputs":[%b],"outputs":[{"name":"label","name":"class"}]}' % ROW,
        b'{"inputs":[%b],"unheard":[{"of":1,"of":2}]}' % ROW,
    ],
)
def test_a_request_that_says_something_twice_is_refused_on_the_hot_path_and_beside_it(
    plane: DataPlane, app: HttpApp, body: bytes
) -> None:
    before = plane.errors().get("serving.malformed", 0)
    assert plane.hot[b"pump"].parse(body) is None  # so that it is looked at

    status, told = ask(app, body)

    assert (status, told["code"]) == (400, "serving.malformed")
    assert "occurs twice" in told["error"]
    assert plane.errors()["serving.malformed"] == before + 1


@pytest.mark.parametrize("rest", [b"", b',"id":"x"', b',"id":""'])
def test_the_hot_path_still_takes_what_says_everything_once(plane: DataPlane, rest: bytes) -> None:
    assert plane.hot[b"pump"].parse(b'{"inputs":[%b]%b}' % (ROW, rest)) is not None


@pytest.mark.parametrize("path", ["/v2/models/pump/predict", "/v2/repository/index"])
def test_other_bodies_that_say_something_twice_are_refused_and_counted(
    plane: DataPlane, app: HttpApp, path: str
) -> None:
    before = plane.errors().get("serving.malformed", 0)
    record = b'{"temperature":1,"vibration":2,"current":3,"speed":4,"speed":5,"ready":true,"ready":false}'

    status, told = ask(app, record, path)

    assert (status, told["code"]) == (400, "serving.malformed")
    assert plane.errors()["serving.malformed"] == before + 1


def test_a_sensors_message_that_says_something_twice_is_refused() -> None:
    with pytest.raises(ServingError, match="'t' occurs twice"):
        read_message(b'{"t": 1, "t": 2}', "json")


def binary(blob: bytes, shape: list[int], datatype: str, size: int | None = None) -> tuple[bytes, bytes]:
    told = {"binary_data_size": len(blob) if size is None else size}
    tensor = {"name": "features", "shape": shape, "datatype": datatype, "parameters": told}
    text = json.dumps({"inputs": [tensor]}).encode()
    return text + blob, b"%d" % len(text)


FOUR = np.ones(4, "<f4").tobytes()
WORD = struct.pack("<I", 2) + b"ab"


@pytest.mark.parametrize(
    ("body", "length", "code"),
    [
        (b'{"inputs":[{"name":"f\xff"}]}', None, "serving.malformed"),
        (b'{"inputs":[%b],"unheard":"\xff"}' % ROW, None, "serving.malformed"),
        (b'{"inputs":[%b],"id":"\xc3"}' % ROW, None, "serving.malformed"),
        (WHOLE.replace(b"FP32", b"BYTES").replace(b"1,2,3,4", b'"\xff"'), None, "serving.malformed"),
        (WHOLE.replace(b"1,2,3", b"1,NaN,3"), None, "serving.malformed"),
        (WHOLE.replace(b"1,2,3", b"1,null,3"), None, "serving.input"),
        (WHOLE.replace(b"1,2,3", b"1,1e39,3"), None, "serving.input"),
        (*binary(np.array([1, np.nan, 3, 4], "<f4").tobytes(), [1, 4], "FP32"), "serving.input"),
        (*binary(np.array([1, np.inf, 3, 4], "<f4").tobytes(), [1, 4], "FP32"), "serving.input"),
        (*binary(FOUR[:-1], [1, 4], "FP32"), "serving.input"),
        (*binary(FOUR + b"\0", [1, 4], "FP32"), "serving.input"),
        (*binary(FOUR, [1, 4], "FP32", 17), "serving.malformed"),
        (*binary(FOUR, [1, 4], "FP32", 15), "serving.input"),
        (*binary(FOUR, [1, 4], "FP64"), "serving.input"),
        (*binary(WORD * 4, [1, 4], "BYTES"), "serving.input"),
        (*binary(WORD * 3, [1, 4], "BYTES"), "serving.input"),
        (*binary(WORD * 4 + b"\0", [1, 4], "BYTES"), "serving.input"),
        (*binary(WORD * 3 + struct.pack("<I", 2**32 - 1), [1, 4], "BYTES"), "serving.input"),
    ],
)  # fmt: skip
def test_bad_input_gets_the_protocols_error_a_code_and_a_count(
    plane: DataPlane, app: HttpApp, body: bytes, length: bytes | None, code: str
) -> None:
    before = plane.errors().get(code, 0)
    headers = {"inference_header_content_length": length} if length else {}

    status, told = ask(app, body, **headers)

    assert (status, told["code"], sorted(told)) == (400, code, ["code", "error"])
    assert plane.errors()[code] == before + 1
    assert ask(app, WHOLE)[0] == 200
