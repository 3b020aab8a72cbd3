"""The hot path answers to the byte what the long way answers, alone or together, or leaves the request to it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.agent.conftest import training_rows

from lightship_agent.contract.codes import ServingError
from lightship_agent.monitor.monitor import Monitor
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.serving.connections import Reply, Request
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.hot import HotModel
from lightship_agent.serving.http import create_app
from lightship_agent.serving.server import HttpServer

Models = Callable[..., LoadedModel]
KINDS = ("classifier", "three-classes", "regressor")
URL = b"/v2/models/pump/infer"
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def body(data: list[Any], **more: Any) -> bytes:
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, len(data)], "data": data, **more.pop("tensor", {})}
    return json.dumps({"inputs": [tensor], "id": "seven", **more}).encode()


def plane_of(model: LoadedModel, **watching: Any) -> DataPlane:
    plane = DataPlane(watching.pop("observe", lambda *_: None), **watching)
    plane.install(model)
    return plane


def hot_of(plane: DataPlane) -> HotModel:
    return plane.hot[b"pump"]


def long_way(plane: DataPlane, content: bytes) -> bytes:
    reply = create_app(plane, status=dict, metrics=str).respond(Request(b"POST", URL, {}, content, True))
    assert isinstance(reply, Reply)
    assert reply.status == 200, reply.body
    return reply.body


@pytest.fixture(scope="module", params=KINDS)
def plane(request: pytest.FixtureRequest, make_model: Models) -> DataPlane:
    return plane_of(make_model(kind=request.param))


@settings(deadline=None, max_examples=150)
@given(data=st.lists(FLOATS, min_size=4, max_size=4))
def test_one_row_is_answered_to_the_byte_as_the_long_way_answers_it(plane: DataPlane, data: list[float]) -> None:
    content, hot = body(data), hot_of(plane)

    asked = hot.parse(content)

    assert asked is not None
    assert hot.answer(asked) == long_way(plane, content)


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(st.lists(FLOATS, min_size=4, max_size=4), min_size=1, max_size=40))
def test_rows_that_wait_together_are_answered_to_the_byte_as_each_alone(
    plane: DataPlane, rows: list[list[float]]
) -> None:
    hot = hot_of(plane)
    asked = [found for row in rows if (found := hot.parse(body(row)))]

    together = hot.answer_all(asked)

    assert together == [hot.answer(one) for one in asked]
    assert len(together) == len(rows)


LONG_WAY: dict[str, bytes] = {
    "binary data": body([0.5] * 4, tensor={"parameters": {"binary_data_size": 16}}),
    "request parameters": body([0.5] * 4, parameters={"binary_data_output": True}),
    "chosen outputs": body([0.5] * 4, outputs=[{"name": "scores"}]),
    "another name": body([0.5] * 4, tensor={"name": "pixels"}),
    "another datatype": body([0.5] * 4, tensor={"datatype": "FP64"}),
    "two rows": body([0.5] * 8, tensor={"shape": [2, 4]}),
    "nested data": body([[0.5] * 4], tensor={"shape": [1, 4]}),
    "a missing value": body([0.5, None, 0.5, 0.5]),
    "a boolean": body([0.5, True, 0.5, 0.5]),
    "a word": body([0.5, "0.5", 0.5, 0.5]),
    "too few": body([0.5] * 3),
    "too many": body([0.5] * 5),
    "beyond float32": body([0.5, 1e39, 0.5, 0.5]),
    "beyond float32 below": body([0.5, -1e39, 0.5, 0.5]),
    "NaN": body([0.5, math.nan, 0.5, 0.5]),
    "a long id": body([0.5] * 4, id="x" * 129),
    "an id that is a number": body([0.5] * 4, id=7),
    "two inputs": json.dumps({"inputs": [json.loads(body([0.5] * 4))["inputs"][0]] * 2}).encode(),
    "no inputs": b'{"inputs": []}',
    "no JSON": b"{",
    "nothing": b"",
    "no text": b"\xff\xfe",
    "deep": b"[" * 50_000,
}


@pytest.mark.parametrize("content", LONG_WAY.values(), ids=LONG_WAY)
def test_whatever_is_unusual_goes_the_long_way(make_model: Models, content: bytes) -> None:
    watched: list[object] = []
    plane = plane_of(make_model(), observe=lambda *_: watched.append(1))

    assert hot_of(plane).parse(content) is None

    assert watched == []
    assert plane.stats()[0].requests == 0


@pytest.mark.parametrize(
    ("method", "url", "headers", "keep_alive"),
    [
        (b"GET", URL, {}, True),
        (b"POST", b"/v2/models/fan/infer", {}, True),
        (b"POST", b"/v2/models/pump/versions/2/infer", {}, True),
        (b"POST", b"/v2/models/pump/infer?x=1", {}, True),
        (b"POST", b"/v2/models/p%75mp/infer", {}, True),
        (b"POST", URL, {b"content-encoding": b"gzip"}, True),
        (b"POST", URL, {b"inference-header-content-length": b"90"}, True),
        (b"POST", URL, {}, False),
    ],
)
def test_a_request_that_is_not_plainly_for_it_goes_the_long_way(
    make_model: Models, method: bytes, url: bytes, headers: dict[bytes, bytes], keep_alive: bool
) -> None:
    app = create_app(plane_of(make_model()), status=dict, metrics=str)

    assert app.hot(Request(method, url, headers, body([0.5] * 4), keep_alive)) is None


def test_the_version_in_the_path_is_the_one_that_serves(make_model: Models) -> None:
    app = create_app(plane_of(make_model(version=3)), status=dict, metrics=str)

    for url in (URL, b"/v2/models/pump/versions/3/infer"):
        assert app.hot(Request(b"POST", url, {}, body([0.5] * 4), True)) is not None


def test_a_model_that_is_taken_away_is_off_the_hot_path(make_model: Models) -> None:
    plane = plane_of(make_model())

    plane.remove("pump")

    assert plane.hot == {}


def test_a_slow_model_is_not_on_the_hot_path(make_model: Models) -> None:
    assert plane_of(msgspec.structs.replace(make_model(), row_ms=5.0)).hot == {}


def test_what_it_answers_is_counted_and_watched_as_the_long_way_does(make_model: Models) -> None:
    monitors = []
    for way in ("hot", "together", "long"):
        monitor = Monitor(16)
        plane = plane_of(
            make_model(),
            observe=monitor.observe,
            observe_row=monitor.observe_row,
            observe_rows=monitor.observe_rows,
        )
        if way == "together":
            rows = [hot_of(plane).parse(body(row.tolist(), id="")) for row in training_rows(20)]
            hot_of(plane).answer_all([row for row in rows if row is not None])
        for row in training_rows(0 if way == "together" else 20):
            content = body(row.tolist(), id="")
            if way == "hot":
                asked = hot_of(plane).parse(content)
                assert asked is not None
                hot_of(plane).answer(asked)
            else:
                long_way(plane, content)
        assert (plane.stats()[0].requests, plane.stats()[0].rows) == (20, 20)
        monitors.append(monitor.flush(1_000))

    hot, together, long = monitors
    assert hot
    assert hot == together == long


def test_an_observer_that_fails_costs_no_answer(make_model: Models) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError

    plane = plane_of(make_model(), observe_row=fails)
    asked = hot_of(plane).parse(body([0.5] * 4))
    assert asked is not None

    assert hot_of(plane).answer(asked) == long_way(plane_of(make_model()), body([0.5] * 4))


def test_an_observer_that_fails_costs_none_of_the_answers_that_are_made_together(make_model: Models) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError

    plane = plane_of(make_model(), observe_row=fails, observe_rows=fails)
    asked = hot_of(plane).parse(body([0.5] * 4))
    assert asked is not None

    assert hot_of(plane).answer_all([asked] * 3) == [long_way(plane_of(make_model()), body([0.5] * 4))] * 3


def test_who_is_told_of_single_rows_only_is_told_of_each_that_is_answered_together(make_model: Models) -> None:
    told: list[tuple[float, int, str]] = []

    def observe_row(_model: LoadedModel, row: Any, label: int, _top: float, request_id: str) -> None:
        told.append((row[0].item(), label, request_id))

    plane = plane_of(make_model(), observe_row=observe_row)
    asked = [hot_of(plane).parse(body([number] * 4, id=f"r{number}")) for number in (0.25, 0.5)]

    hot_of(plane).answer_together([one for one in asked if one is not None])

    assert [(row, name) for row, _, name in told] == [(0.25, "r0.25"), (0.5, "r0.5")]


def test_what_rounds_to_the_largest_float32_is_answered_as_the_long_way_answers_it(make_model: Models) -> None:
    plane, content = plane_of(make_model()), body([3.4028235e38, -3.4028235e38, 0.5, 0.5])
    asked = hot_of(plane).parse(content)
    assert asked is not None

    assert hot_of(plane).answer(asked) == long_way(plane_of(make_model()), content)


def test_a_runtime_that_fails_is_one_error_and_counted_once(
    make_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = plane_of(make_model())
    hot = hot_of(plane)
    asked = hot.parse(body([0.5] * 4))
    assert asked is not None

    def broken() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(hot.model.bound), "run", lambda _self: broken())

    with pytest.raises(ServingError) as refused:
        hot.answer(asked)

    assert refused.value.code == "serving.runtime"
    assert plane.errors() == {"serving.runtime": 1}
    assert plane.stats()[0].failures == 1
    monkeypatch.undo()
    assert hot.answer(asked) == long_way(plane, body([0.5] * 4)), "the next one is answered"


def test_while_another_thread_has_the_row_the_answer_is_the_same(make_model: Models) -> None:
    hot = hot_of(plane_of(make_model()))
    asked = hot.parse(body([0.5] * 4))
    assert asked is not None
    alone = hot.answer(asked)
    assert hot.model.bound is not None

    with hot.model.bound.lock:
        assert hot.answer(asked) == alone


# Many clients at once -------------------------------------------------------------------------------------------------


@pytest.fixture
def served(make_model: Models) -> Iterator[tuple[HttpServer, DataPlane]]:
    plane = plane_of(make_model(kind="three-classes"))
    server = HttpServer(create_app(plane, status=dict, metrics=str), port=0)
    server.start()
    yield server, plane
    server.stop()


def test_twenty_clients_at_once_each_get_their_own_answer(served: tuple[HttpServer, DataPlane]) -> None:
    server, plane = served
    url = "http://{}:{}".format(*(server.address or ())) + URL.decode()
    wrong: list[str] = []

    def ask(number: int) -> None:
        rows = np.random.default_rng(number).normal(size=(40, 4)).astype(np.float32)
        with httpx.Client() as client:
            for i, row in enumerate(rows):
                content = body(row.tolist(), id=f"{number}-{i}")
                got = client.post(url, content=content).content
                if got != long_way(plane, content):
                    wrong.append(f"{number}-{i}")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
