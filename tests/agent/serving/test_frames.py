"""Frames over real Unix sockets: what is answered, what is refused, and who else goes on being served."""

from __future__ import annotations

import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.agent.conftest import FEATURES, build, training_rows

from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import CODES, SettingsError
from lightship_agent.monitor.monitor import Monitor
from lightship_agent.runtime.model import LoadedModel, load_model
from lightship_agent.serving import server as serving
from lightship_agent.serving.connections import Limits, Reply
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.frames import FrameFace
from lightship_agent.serving.http import create_app
from lightship_agent.serving.server import HttpServer

Models = Callable[..., LoadedModel]


class Caller:
    """A program that speaks frames."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self._file = self.socket.makefile("rb")

    def send(self, *requests: Any) -> None:
        self.socket.sendall(b"".join(frame(msgspec.msgpack.encode(r)) for r in requests))

    def read(self) -> Any:
        head = self._file.read(4)
        return msgspec.msgpack.decode(self._file.read(struct.unpack("<I", head)[0])) if head else None

    def ask(self, **request: Any) -> Any:
        self.send(request)
        return self.read()

    def is_open(self) -> bool:
        return bool(self.ask(do="ready")["ready"])

    def close(self) -> None:
        self._file.close()
        self.socket.close()


class Served:
    """A data plane behind frames."""

    def __init__(self, path: Path, plane: DataPlane, server: HttpServer) -> None:
        self.path, self.plane, self.server = path, plane, server
        self.callers: list[Caller] = []

    def caller(self) -> Caller:
        self.callers.append(Caller(self.path))
        return self.callers[-1]

    def close(self) -> None:
        for caller in self.callers:
            caller.close()
        self.server.stop()


def serve(folder: Path, *models: LoadedModel, in_flight: int = 64) -> Served:
    monitor = Monitor(64)
    plane = DataPlane(
        monitor.observe,
        observe_row=monitor.observe_row,
        feedback=monitor.feedback,
        refused=monitor.refused,
        max_in_flight=in_flight,
    )
    for model in models:
        plane.install(model)
    path = folder / "frames.sock"
    app = create_app(plane, status=dict, metrics=str)
    server = HttpServer(app, port=0, frames=FrameFace(plane), frames_socket=path)
    server.start()
    return Served(path, plane, server)


@pytest.fixture(params=["three-classes", "regressor"])
def either(request: pytest.FixtureRequest, make_model: Models, tmp_path: Path) -> Iterator[Served]:
    served = serve(tmp_path, make_model(kind=request.param))
    yield served
    served.close()


@pytest.fixture
def served(make_model: Models, tmp_path: Path) -> Iterator[Served]:
    opened = serve(tmp_path, make_model())
    yield opened
    opened.close()


def frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def numbers(answer: dict[str, Any]) -> np.ndarray[Any, Any]:
    said = answer["scores"] if "scores" in answer else answer["values"]
    return np.frombuffer(said, "<f4") if isinstance(said, bytes) else np.array(said, np.float32)


def alone(served: Served, rows: Any) -> list[Any]:
    """The scores of each row asked alone, which may differ from a large batch's in the last bit."""
    return [np.ravel(served.plane.get().predict(row.reshape(1, -1)).scores) for row in rows]  # type: ignore[arg-type]


def cold(plane: DataPlane) -> None:
    """Take the hot path away: all goes the long way."""
    plane.hot = {}


def test_rows_as_bytes_and_as_lists_are_answered_as_the_model_answers(either: Served) -> None:
    rows, model, caller = training_rows(7), either.plane.get(), either.caller()
    expected = model.predict(rows)
    wanted = expected.scores if expected.scores is not None else expected.values
    assert wanted is not None

    for x in (rows.tobytes(), rows.ravel().tolist(), rows.tolist()):
        answer = caller.ask(x=x, rows=7, id="seven", model="pump", version=1)
        assert (answer["version"], answer["digest"], answer["id"]) == (1, model.digest, "seven")
        assert np.array_equal(numbers(answer), wanted.ravel())
        if expected.labels is not None:
            assert answer["classes"] == expected.labels.tolist()
            assert answer["labels"] == [model.outputs.labels[i] for i in answer["classes"]]


def test_the_hot_path_answers_to_the_byte_what_the_long_way_answers(either: Served) -> None:
    rows = training_rows(8)
    requests = [{"x": x, "id": f"r{i}"} for i, r in enumerate(rows) for x in (r.tobytes(), r.tolist())]
    face = FrameFace(either.plane)
    fast = []
    for request in requests:
        found = face.hot(msgspec.msgpack.encode(request))
        assert found is not None, "the hot path was not taken"
        fast += face.answer_hot(found[0], [found[1]])

    slow = [face.respond(msgspec.msgpack.encode(request)) for request in requests]

    assert [r.body for r in slow if isinstance(r, Reply)] == fast


def test_what_is_pipelined_is_answered_in_order_hot_and_long_mixed(served: Served) -> None:
    rows, caller = training_rows(300), served.caller()
    expected = alone(served, rows)
    requests: list[dict[str, Any]] = [{"x": r.tobytes(), "id": str(i)} for i, r in enumerate(rows)]
    for i in range(0, 300, 7):
        requests[i] = {"x": [[*rows[i].tolist()]], "id": str(i)}  # the long way
    for i in range(3, 300, 50):
        requests[i] = {"x": b"short", "id": str(i)}

    caller.send(*requests)

    for i in range(300):
        answer = caller.read()
        if requests[i]["x"] == b"short":
            assert answer["code"] == "serving.input"
        else:
            assert answer["id"] == str(i)
            assert np.array_equal(numbers(answer), expected[i])


@pytest.mark.parametrize("hot", [True, False])
def test_many_connections_at_once_each_get_their_own_answers(served: Served, hot: bool) -> None:
    rows = training_rows(64)
    expected = alone(served, rows)
    if not hot:
        cold(served.plane)

    def ask(offset: int) -> None:
        caller = Caller(served.path)
        for i in list(range(offset, 64)) * 3:
            answer = caller.ask(x=rows[i].tobytes(), id=f"{offset}/{i}")
            assert answer["id"] == f"{offset}/{i}"
            assert np.array_equal(numbers(answer), expected[i])
        caller.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))
    assert served.plane.errors() == {}


@pytest.mark.parametrize("hot", [True, False])
def test_a_swap_under_way_mixes_no_answer_and_loses_none(served: Served, make_model: Models, hot: bool) -> None:
    models = [make_model(), make_model(2, flip=True)]
    row = training_rows(1)
    said = {m.digest: m.predict(row).scores for m in models}
    done = threading.Event()

    def swap() -> None:
        for i in range(200):
            served.plane.install(models[i % 2])
        done.set()

    thread = threading.Thread(target=swap)
    thread.start()
    caller, seen = served.caller(), 0
    while not done.is_set() or seen < 50:
        answer = caller.ask(x=row.tobytes() if hot else row.tolist())  # a list of rows goes the long way
        assert np.array_equal(numbers(answer), np.ravel(said[answer["digest"]])), answer
        seen += 1
    thread.join()


def test_labels_find_their_predictions_and_ready_says_what_answers(served: Served) -> None:
    caller = served.caller()
    given = caller.ask(x=training_rows(1).tobytes())["id"]

    assert caller.ask(do="feedback", id=given, label="worn") == {"counted": True}
    assert caller.ask(do="feedback", id=given, label="worn") == {"counted": False}
    assert caller.ask(do="feedback", id="nobody", label="worn")["code"] == "serving.unknown-prediction"
    assert caller.ask(do="feedback", id=given)["code"] == "serving.malformed"
    assert caller.ask(do="ready") == {
        "ready": True,
        "model": "pump",
        "version": 1,
        "digest": served.plane.get().digest,
    }
    assert caller.ask(do="ready", version=9)["code"] == "serving.unknown-model"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({}, "serving.input"),
        ({"x": b""}, "serving.input"),
        ({"x": []}, "serving.input"),
        ({"x": b"\0" * 15}, "serving.input"),
        ({"x": [1, 2, 3]}, "serving.input"),
        ({"x": [[1, 2, 3, 4], [1]]}, "serving.input"),
        ({"x": [1, 2, None, 4]}, "serving.input"),
        ({"x": [1, 2, 3, float("nan")]}, "serving.input"),
        ({"x": [1, 2, 3, float("inf")]}, "serving.input"),
        ({"x": [1, 2, 3, 1e300]}, "serving.input"),
        ({"x": np.array([0, 0, np.nan, 0], "<f4").tobytes()}, "serving.input"),
        ({"x": np.array([0, 0, np.inf, 0], "<f4").tobytes()}, "serving.input"),
        ({"x": b"\0" * 16, "rows": 2}, "serving.input"),
        ({"x": b"\0" * 16, "rows": 0}, "serving.input"),
        ({"x": b"\0" * 16, "rows": -1}, "serving.input"),
        ({"x": b"\0" * 16, "rows": 2**60}, "serving.input"),
        ({"x": b"\0" * 16, "rows": "1"}, "serving.malformed"),
        ({"x": ["1", "2", "3", "4"]}, "serving.malformed"),
        ({"x": [True, True, True, True]}, "serving.malformed"),
        ({"x": "text"}, "serving.malformed"),
        ({"x": b"\0" * 16, "rwos": 1}, "serving.malformed"),
        ({"x": b"\0" * 16, "do": "delete"}, "serving.malformed"),
        ({"x": b"\0" * 16, "id": 7}, "serving.malformed"),
        ({"x": b"\0" * 16, "id": "i" * 129}, "serving.malformed"),
        ({"x": b"\0" * 16, "model": "fan"}, "serving.unknown-model"),
        ({"x": b"\0" * 16, "version": 9}, "serving.unknown-model"),
        ([1, 2], "serving.malformed"),
        (None, "serving.malformed"),
    ],
    ids=repr,
)
def test_what_a_request_gets_wrong_is_told_counted_and_costs_only_itself(
    served: Served, request_: Any, code: str
) -> None:
    caller, row = served.caller(), training_rows(1)

    caller.send({"x": row.tobytes(), "id": "before"}, request_, {"x": row.tobytes(), "id": "after"})

    assert caller.read()["id"] == "before"
    refused = caller.read()
    assert set(refused) == {"code", "error"}
    assert refused["code"] == code
    assert refused["error"]
    assert caller.read()["id"] == "after"
    assert served.plane.errors() == {code: 1}
    assert served.plane.stats()[0].requests == 2


def test_a_missing_value_is_welcome_where_the_schema_allows_it(make_model: Models, tmp_path: Path) -> None:
    served = serve(tmp_path, make_model(nullable=("vibration",)))
    try:
        caller = served.caller()
        by_list = caller.ask(x=[0.0, None, 0.0, 0.0], id="a")
        by_bytes = caller.ask(x=np.array([0, np.nan, 0, 0], "<f4").tobytes(), id="a")
        assert len(by_list["scores"]) == 2
        assert np.array_equal(numbers(by_list), numbers(by_bytes), equal_nan=True)
    finally:
        served.close()


def test_without_a_model_there_is_an_answer_too(tmp_path: Path) -> None:
    served = serve(tmp_path)
    try:
        assert served.caller().ask(x=b"\0" * 16)["code"] == "serving.no-model"
        assert served.caller().ask(do="ready")["code"] == "serving.no-model"
    finally:
        served.close()


def test_beyond_the_bound_on_requests_inside_the_answer_comes_at_once(make_model: Models, tmp_path: Path) -> None:
    served = serve(tmp_path, make_model(), in_flight=1)
    try:
        cold(served.plane)
        with served.plane.admission:
            assert served.caller().ask(x=b"\0" * 16)["code"] == "serving.overloaded"
        assert served.caller().ask(x=b"\0" * 16)["classes"]
    finally:
        served.close()


def test_a_frame_that_announces_too_much_is_refused_and_its_connection_ends(served: Served) -> None:
    caller, other = served.caller(), served.caller()
    caller.send({"x": b"\0" * 16, "id": "before"})
    caller.socket.sendall(struct.pack("<I", 2**32 - 1) + b"x" * 100)

    assert caller.read()["id"] == "before"
    assert caller.read()["code"] == "serving.too-large"
    assert caller.read() is None
    assert other.is_open()


def test_a_frame_may_come_in_any_pieces(served: Served) -> None:
    caller = served.caller()
    data = b"".join(frame(msgspec.msgpack.encode({"x": b"\0" * 16, "id": str(i)})) for i in range(3))
    for byte in data:
        caller.socket.sendall(bytes([byte]))

    assert [caller.read()["id"] for _ in range(3)] == ["0", "1", "2"]


def test_many_rows_in_one_large_frame_are_answered_by_a_worker(served: Served) -> None:
    rows = training_rows(60_000)
    expected = served.plane.get().predict(rows).scores
    assert expected is not None
    caller, other = served.caller(), served.caller()

    caller.send({"x": rows.tobytes()}, {"x": rows[:1].tobytes(), "id": "next"})
    assert other.is_open()

    assert np.array_equal(numbers(caller.read()), expected.ravel())
    assert caller.read()["id"] == "next"
    assert caller.ask(x=b"\0" * 16 * 65_537)["code"] == "serving.too-large"


def test_a_client_that_sends_no_more_still_gets_its_answers(served: Served) -> None:
    cold(served.plane)
    caller = served.caller()
    caller.send(*({"x": training_rows(4_500).tobytes(), "id": str(i)} for i in range(2)))
    caller.socket.shutdown(socket.SHUT_WR)

    assert [caller.read()["id"] for _ in range(2)] == ["0", "1"]
    assert caller.read() is None


def test_a_client_that_goes_away_in_the_middle_of_all_this_leaves_nothing_behind(served: Served) -> None:
    for i in range(30):
        caller = served.caller()
        caller.send(*({"x": training_rows(1).tobytes()} for _ in range(i)))
        caller.socket.sendall(struct.pack("<I", 1000) + b"half")
        caller.close()
    served.callers.clear()

    caller = served.caller()
    assert caller.is_open()


@pytest.fixture
def body_seconds() -> float:
    return 0.5


@pytest.fixture
def strict(
    monkeypatch: pytest.MonkeyPatch, make_model: Models, tmp_path: Path, body_seconds: float
) -> Iterator[Served]:
    limits = Limits(
        body_bytes=100_000, buffered_bytes=150_000, connections=3, body_seconds=body_seconds, write_seconds=1,
        linger_seconds=0.2,
    )  # fmt: skip
    monkeypatch.setattr(serving, "FRAME_LIMITS", limits)
    opened = serve(tmp_path, make_model())
    yield opened
    opened.close()


def test_half_a_frame_is_not_waited_for_for_ever_and_a_silent_client_is_left_alone(strict: Served) -> None:
    slow, silent = strict.caller(), strict.caller()
    assert silent.is_open()
    slow.socket.sendall(struct.pack("<I", 100) + b"half")

    assert slow.read()["code"] == "serving.slow"
    assert slow.read() is None
    time.sleep(1.2)  # longer than a frame may take
    assert silent.is_open()


def test_one_client_too_many_is_told_so(strict: Served) -> None:
    callers = [strict.caller() for _ in range(3)]
    assert all(c.is_open() for c in callers)
    late = strict.caller()

    assert late.read()["code"] == "serving.overloaded"
    assert late.read() is None
    assert all(c.is_open() for c in callers)


@pytest.mark.parametrize("body_seconds", [60.0])
def test_large_frames_that_arrive_at_once_are_bounded_together(strict: Served) -> None:
    first, second = strict.caller(), strict.caller()
    first.socket.sendall(struct.pack("<I", 100_000) + b"x" * 90_000)
    time.sleep(0.1)
    second.socket.sendall(struct.pack("<I", 100_000) + b"x" * 90_000)

    assert second.read()["code"] == "serving.overloaded"


def test_a_client_that_does_not_take_its_answers_is_cut_off_and_the_others_are_served(strict: Served) -> None:
    greedy, other = strict.caller(), strict.caller()
    data = frame(msgspec.msgpack.encode({"x": training_rows(5_000).tobytes()})) * 4
    greedy.socket.settimeout(0.5)
    with suppress(TimeoutError):  # nothing is read from whoever does not read
        for _ in range(200):
            greedy.socket.sendall(data)
    assert other.is_open()

    time.sleep(3)
    with pytest.raises(ConnectionError):
        greedy.socket.sendall(data)
    assert other.ask(x=b"\0" * 16)["classes"]


def test_the_socket_is_the_groups_and_goes_with_the_server(served: Served) -> None:
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o660
    caller = served.caller()
    assert caller.is_open()

    served.server.stop()

    assert caller.read() is None
    assert not served.path.exists()


def test_stopping_lets_what_is_inside_finish(served: Served) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        inside.set()
        leave.wait(60)

    served.plane._observe = slow
    caller = served.caller()
    caller.send({"x": training_rows(60_000).tobytes(), "id": "last"})
    assert inside.wait(60)
    stopping = threading.Thread(target=served.server.stop)
    stopping.start()
    time.sleep(0.1)
    leave.set()

    assert caller.read()["id"] == "last"
    assert caller.read() is None
    stopping.join(60)
    assert not stopping.is_alive()


def test_a_dead_programs_socket_is_taken_over_and_a_live_ones_is_not(
    make_model: Models, tmp_path: Path, served: Served
) -> None:
    app = create_app(served.plane, status=dict, metrics=str)
    with pytest.raises(SettingsError) as found:
        HttpServer(app, port=0, frames=FrameFace(served.plane), frames_socket=served.path).start()
    assert found.value.code == "settings.port-taken"
    assert served.caller().is_open()

    dead = tmp_path / "dead.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(dead))
    left.close()
    server = HttpServer(app, port=0, frames=FrameFace(served.plane), frames_socket=dead)
    server.start()
    caller = Caller(dead)
    try:
        assert caller.is_open()
    finally:
        caller.close()
        server.stop()


def plane_with_a_model() -> DataPlane:
    plane = DataPlane(lambda *_: None)
    plane.install(load_model(read_bundle(build())))
    return plane


PLANE = plane_with_a_model()
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(
    st.sampled_from(["x", "rows", "model", "version", "id", "do", "label"]),
    ANYTHING | st.sampled_from([b"\0" * 16, [0.0] * 4, "pump", 1, "predict", "ready"]),
)


@given(st.binary(max_size=80) | (FIELDS | ANYTHING).map(msgspec.msgpack.encode))
def test_whatever_a_frame_holds_there_is_one_answer_with_a_known_code(body: bytes) -> None:
    face = FrameFace(PLANE)
    found = face.hot(body)
    if found is not None:
        answers = face.answer_hot(found[0], [found[1]])
        assert len(answers) == 1
        return
    reply = face.respond(body)
    if isinstance(reply, Reply):
        said = msgspec.msgpack.decode(reply.body[4:])
        assert struct.unpack("<I", reply.body[:4])[0] == len(reply.body) - 4
        assert said.get("code", "serving.runtime") in CODES
        assert said.get("code") != "serving.runtime"
    else:
        reply.close()  # type: ignore[attr-defined]  # a coroutine: it would go to a worker


def test_records_by_feature_name_are_answered_like_rows(served: Served) -> None:
    row, caller = training_rows(1), served.caller()
    record = dict(zip(FEATURES, row[0].tolist(), strict=True))
    by_name, by_number = caller.ask(records=[record], id="a"), caller.ask(x=row[0].tolist(), id="a")

    assert np.array_equal(numbers(by_name), numbers(by_number))
    assert caller.ask(records=[{**record, "rpm": 1}])["code"] == "serving.input"
    assert caller.ask(records=[])["code"] == "serving.input"
    assert caller.ask(records=5)["code"] == "serving.malformed"
