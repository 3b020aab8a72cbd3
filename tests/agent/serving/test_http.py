"""Real HTTP over loopback and over a Unix socket."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.agent.conftest import training_rows

from lightship_agent.contract.codes import CODES, SettingsError
from lightship_agent.monitor.monitor import Monitor
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import STATUS, create_app
from lightship_agent.serving.metrics import METRICS, Sample, plane_samples, render
from lightship_agent.serving.oip import MAX_BODY
from lightship_agent.serving.server import HttpServer

Models = Callable[..., LoadedModel]
INFER = "/v2/models/pump/infer"


class Served:
    """A data plane behind a running server, and a client for it."""

    def __init__(self, server: HttpServer, plane: DataPlane, client: httpx.Client) -> None:
        self.server, self.plane, self.client = server, plane, client

    def infer(self, rows: Any, path: str = INFER, **more: Any) -> httpx.Response:
        array = np.asarray(rows)
        tensor = {"name": "features", "datatype": "FP32", "shape": list(array.shape), "data": array.tolist()}
        return self.client.post(path, json={"inputs": [tensor], **more})


def serve(models: list[LoadedModel], tmp_path: Path, *, unix: bool = False) -> Iterator[Served]:
    monitor = Monitor(64)
    plane = DataPlane(monitor.observe, feedback=monitor.feedback, refused=monitor.refused, newest=monitor.newest)
    for model in models:
        plane.install(model)
    app = create_app(
        plane,
        status=lambda: {"degraded": ["link"]},
        metrics=lambda: render(plane_samples(plane.stats(), plane.errors())),
    )
    path = tmp_path / "agent.sock"
    server = HttpServer(app, port=None if unix else 0, unix_socket=path if unix else None)
    server.start()
    try:
        address = "http://agent" if unix else "http://{}:{}".format(*(server.address or ()))
        transport = httpx.HTTPTransport(uds=str(path)) if unix else None
        with httpx.Client(base_url=address, transport=transport, timeout=30) as client:
            yield Served(server, plane, client)
    finally:
        server.stop()


@pytest.fixture(params=["tcp", "unix"])
def served(request: pytest.FixtureRequest, make_model: Models, tmp_path: Path) -> Iterator[Served]:
    yield from serve([make_model(kind="three-classes")], tmp_path, unix=request.param == "unix")


@pytest.fixture
def tcp(make_model: Models, tmp_path: Path) -> Iterator[Served]:
    yield from serve([make_model()], tmp_path)


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Served]:
    yield from serve([], tmp_path)


def code(response: httpx.Response) -> tuple[int, str]:
    body = response.json()
    assert set(body) == {"error", "code"}
    assert response.headers["content-type"] == "application/json"
    return response.status_code, body["code"]


def test_a_prediction_over_the_wire_is_the_models_own(served: Served) -> None:
    rows = training_rows(6)
    response = served.infer(rows, id="seven")
    body, expected = response.json(), served.plane.get().predict(rows)
    outputs = {o["name"]: o for o in body["outputs"]}
    assert response.status_code == 200
    assert (body["model_name"], body["model_version"], body["id"]) == ("pump", "1", "seven")
    assert body["parameters"] == {"digest": served.plane.get().digest}
    assert outputs["scores"]["shape"] == [6, 3]
    assert np.array_equal(np.array(outputs["scores"]["data"], np.float32), expected.scores.ravel())  # type: ignore[union-attr]
    assert outputs["class"]["data"] == expected.labels.tolist()  # type: ignore[union-attr]
    assert [h for h in response.headers if h in ("server", "date")] == []


def test_binary_tensors_there_and_back(served: Served) -> None:
    rows = training_rows(3)
    tensor = {"name": "features", "datatype": "FP32", "shape": [3, 4], "parameters": {"binary_data_size": rows.nbytes}}
    text = json.dumps(
        {"inputs": [tensor], "outputs": [{"name": "scores", "parameters": {"binary_data": True}}, {"name": "label"}]}
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"}

    response = served.client.post(INFER, content=text + rows.tobytes(), headers=headers)

    length = int(response.headers["inference-header-content-length"])
    head = json.loads(response.content[:length])
    assert response.headers["content-type"] == "application/octet-stream"
    assert [o["name"] for o in head["outputs"]] == ["scores", "label"]
    scores = np.frombuffer(response.content[length:], "<f4").reshape(3, 3)
    assert np.array_equal(scores, served.plane.get().predict(rows).scores)  # type: ignore[arg-type]


def test_the_service_describes_itself(served: Served) -> None:
    get = served.client.get
    assert get("/v2").json() == get("/v2/").json()
    assert "binary_tensor_data" in get("/v2").json()["extensions"]
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"ready": True}
    assert get("/v2/health").json() == {"degraded": ["link"]}
    assert get("/v2/models/pump/ready").json() == {"name": "pump", "ready": True}
    metadata = get("/v2/models/pump/versions/1").json()
    assert metadata["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 4]}]
    assert [o["name"] for o in metadata["outputs"]] == ["label", "class", "scores"]
    index = served.client.post("/v2/repository/index", content=b"")
    assert index.json() == [{"name": "pump", "version": "1", "state": "READY", "reason": ""}]


def test_the_described_outputs_are_the_answered_ones(make_model: Models, tmp_path: Path) -> None:
    for kind in ("classifier", "regressor"):
        for served in serve([make_model(kind=kind)], tmp_path):
            described = served.client.get("/v2/models/pump").json()["outputs"]
            answered = served.infer(training_rows(2)).json()["outputs"]
            assert [(o["name"], o["datatype"]) for o in described] == [(o["name"], o["datatype"]) for o in answered]
            assert [len(o["shape"]) for o in described] == [len(o["shape"]) for o in answered]


@pytest.mark.parametrize(
    ("method", "path", "status", "expected"),
    [
        ("GET", "/", 404, "serving.not-found"),
        ("GET", "/v2/nothing", 404, "serving.not-found"),
        ("GET", "/v2/models/", 404, "serving.not-found"),
        ("GET", INFER, 405, "serving.method"),
        ("DELETE", "/v2/models/pump", 405, "serving.method"),
        ("POST", "/metrics", 405, "serving.method"),
        ("GET", "/v2/repository/index", 405, "serving.method"),
        ("GET", "/v2/models/fan", 404, "serving.unknown-model"),
        ("GET", "/v2/models/fan/ready", 404, "serving.unknown-model"),
        ("GET", "/v2/models/fan/stats", 404, "serving.unknown-model"),
        ("GET", "/v2/models/pump/versions/2", 404, "serving.unknown-model"),
        ("GET", "/v2/models/pump/versions/2/ready", 404, "serving.unknown-model"),
    ],
)
def test_wrong_paths_and_methods_get_the_protocols_error(
    served: Served, method: str, path: str, status: int, expected: str
) -> None:
    response = served.client.request(method, path)
    assert code(response) == (status, expected)
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2/health/live", "/v2/models/pump", INFER])
def test_head_is_refused_without_a_body_and_the_connection_goes_on(served: Served, path: str) -> None:
    before = served.plane.errors().get("serving.method", 0)

    for _ in range(2):
        refused = served.client.head(path)
        assert (refused.status_code, refused.content) == (405, b"")
        assert served.client.get("/v2/health/live").json() == {"live": True}

    assert served.plane.errors()["serving.method"] == before + 2


def test_what_a_request_gets_wrong_is_told_and_nothing_is_counted_as_served(served: Served) -> None:
    row = training_rows(1)
    one = {"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    post = served.client.post
    assert code(served.infer(row, path="/v2/models/fan/infer")) == (404, "serving.unknown-model")
    assert code(served.infer(row, path="/v2/models/pump/versions/9/infer")) == (404, "serving.unknown-model")
    assert code(served.infer(row, outputs=[{"name": "probability"}])) == (400, "serving.output")
    assert code(served.infer(row[:, :3])) == (400, "serving.input")
    assert code(post(INFER, json={"inputs": [{**one, "name": "x"}]})) == (400, "serving.input")
    assert code(post(INFER, json={"inputs": [{**one, "datatype": "BYTES"}]})) == (400, "serving.input")
    assert code(post(INFER, json={"inputs": [{**one, "data": [1, None, 3, 4]}]})) == (400, "serving.input")
    assert code(post(INFER, content=json.dumps({"inputs": [one]})[:-9])) == (400, "serving.malformed")
    assert code(post(INFER, content=b"")) == (400, "serving.malformed")
    for length in ("-1", "x", "0", "99999", "1e3", "9" * 40):
        headers = {"Inference-Header-Content-Length": length}
        assert code(post(INFER, json={"inputs": [one]}, headers=headers)) == (400, "serving.malformed")
    assert code(post(INFER, content=b"x", headers={"Content-Encoding": "gzip"})) == (400, "serving.malformed")
    assert served.plane.running()[0].requests == 0
    assert served.infer(row).status_code == 200


def test_a_huge_body_is_refused_announced_or_not(tcp: Served) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BODY // 2**20 + 2):
            yield b" " * 2**20

    assert code(tcp.client.post(INFER, content=b" " * (MAX_BODY + 1))) == (413, "serving.too-large")
    assert code(tcp.client.post(INFER, content=chunks())) == (413, "serving.too-large")
    assert tcp.infer(training_rows(1)).status_code == 200


def test_a_large_batch_is_answered_and_one_row_too_many_is_not(tcp: Served) -> None:
    rows = np.zeros((65_537, 4), np.float32)
    for n, status in ((65_536, 200), (65_537, 413)):
        tensor = {"name": "features", "datatype": "FP32", "shape": [n, 4], "parameters": {"binary_data_size": n * 16}}
        text = json.dumps({"inputs": [tensor], "outputs": [{"name": "class"}]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        response = tcp.client.post(INFER, content=text + rows[:n].tobytes(), headers=headers)
        assert response.status_code == status


def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nobody(tcp: Served) -> None:
    with socket.create_connection(tcp.server.address or ("", 0)) as left:
        left.sendall(f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{".encode())
    assert tcp.infer(training_rows(1)).status_code == 200


def test_without_a_model_the_device_lives_but_is_not_ready(empty: Served) -> None:
    ready = empty.client.get("/v2/health/ready")
    assert code(ready) == (503, "serving.no-model")
    assert int(ready.headers["retry-after"]) > 0
    assert empty.client.get("/v2/health/live").status_code == 200
    assert code(empty.infer(training_rows(1))) == (503, "serving.no-model")
    assert empty.client.post("/v2/repository/index", json={"ready": True}).json() == []


def test_overload_is_told_with_a_time_to_come_back(make_model: Models, tmp_path: Path) -> None:
    for served in serve([make_model()], tmp_path):
        held = [served.plane.admission for _ in range(64)]
        for ticket in held:
            ticket.__enter__()
        response = served.infer(training_rows(1))
        assert code(response) == (503, "serving.overloaded")
        assert response.headers["retry-after"] == "1"
        assert served.client.get("/v2/health/live").status_code == 200
        for ticket in held:
            ticket.__exit__(None, None, None)
        assert served.infer(training_rows(1)).status_code == 200


def test_labels_find_their_predictions(tcp: Served) -> None:
    path = "/v2/models/pump/feedback"
    tcp.infer(training_rows(1), id="a")
    tcp.infer(training_rows(2), id="b")
    post = tcp.client.post
    assert post(path, json={"id": "a", "label": "worn"}).json() == {"counted": 1, "duplicates": 0, "refused": []}
    assert post(path, json={"id": "a", "label": "worn"}).json()["duplicates"] == 1
    assert code(post(path, json={"id": "z", "label": "worn"})) == (404, "serving.unknown-prediction")
    assert code(post(path, json={"id": "b:0", "label": "blue"})) == (400, "serving.input")
    assert code(post(path, json={"id": "b:0"})) == (400, "serving.malformed")
    assert code(post("/v2/models/fan/feedback", json={"id": "a", "label": "x"})) == (404, "serving.unknown-model")
    many = post(path, json=[{"id": "b:0", "label": "worn"}, {"id": "b:1", "label": 5}, {"id": "b", "label": "worn"}])
    assert (many.json()["counted"], many.json()["duplicates"]) == (1, 0)
    assert [r["code"] for r in many.json()["refused"]] == ["serving.input", "serving.unknown-prediction"]


def test_numbers_can_be_scraped(tcp: Served) -> None:
    tcp.infer(training_rows(3))
    tcp.client.get("/nowhere")
    response = tcp.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'lightship_agent_requests_total{model="pump",version="1"} 1' in response.text
    assert 'lightship_agent_rows_total{model="pump",version="1"} 3' in response.text
    assert 'lightship_agent_errors_total{code="serving.not-found"} 1' in response.text
    assert 'lightship_agent_latency_seconds_count{model="pump",version="1"} 1' in response.text
    buckets = [line for line in response.text.splitlines() if line.startswith("lightship_agent_request_seconds_bucket")]
    assert buckets[0].startswith('lightship_agent_request_seconds_bucket{model="pump",version="1",le="3.2e-05"} ')
    assert buckets[-1] == 'lightship_agent_request_seconds_bucket{model="pump",version="1",le="+Inf"} 1'
    below = [int(line.rpartition(" ")[2]) for line in buckets]
    assert (below, len(below)) == (sorted(below), 22)
    (stats,) = tcp.client.get("/v2/models/pump/stats").json()["model_stats"]
    assert (stats["inference_count"], stats["execution_count"]) == (3, 1)


def test_an_unforeseen_failure_is_an_error_without_innards(tcp: Served, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> dict[str, Any]:
        raise ZeroDivisionError("secret detail")

    server = HttpServer(create_app(tcp.plane, status=broken, metrics=str), port=0)
    server.start()
    try:
        response = httpx.get("http://{}:{}/v2/health".format(*(server.address or ())))
    finally:
        server.stop()
    assert code(response) == (500, "serving.runtime")
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


def test_swaps_over_the_wire_fail_no_request(make_model: Models, tmp_path: Path) -> None:
    models = {1: make_model(1), 2: make_model(2, flip=True)}
    row = training_rows(1)
    labels = {v: m.outputs.labels[m.predict(row).labels.item()] for v, m in models.items()}  # type: ignore[union-attr]
    for served in serve([models[1]], tmp_path):
        stop = threading.Event()
        answers: list[httpx.Response] = []

        def client(
            served: Served = served, stop: threading.Event = stop, answers: list[httpx.Response] = answers
        ) -> None:
            while not stop.is_set():
                answers.append(served.infer(row))

        threads = [threading.Thread(target=client) for _ in range(8)]
        for thread in threads:
            thread.start()
        for i in range(20):
            time.sleep(0.03)
            served.plane.install(models[1 + (i + 1) % 2])
        stop.set()
        for thread in threads:
            thread.join()
        assert {a.status_code for a in answers} == {200}
        for answer in (response.json() for response in answers):
            version = int(answer["model_version"])
            assert answer["parameters"]["digest"] == models[version].digest
            assert answer["outputs"][0]["data"] == [labels[version]]


def test_a_taken_port_is_said_before_anything_starts(tcp: Served) -> None:
    host, port = tcp.server.address or ("", 0)
    threads = threading.active_count()
    with pytest.raises(SettingsError, match=f"{host}:{port} is in use") as refusal:
        HttpServer(create_app(tcp.plane, status=dict, metrics=str), host=host, port=port).start()
    assert refusal.value.code == "settings.port-taken"
    assert threading.active_count() == threads


def test_a_unix_socket_is_for_owner_and_group_and_goes_with_the_server(make_model: Models, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    for _ in serve([make_model()], tmp_path, unix=True):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with pytest.raises(SettingsError, match="Another program listens"):
            HttpServer(create_app(DataPlane(print), status=dict, metrics=str), unix_socket=path).start()
        assert path.exists()
    assert not path.exists()


def test_a_socket_left_by_a_dead_process_is_replaced_but_a_file_is_not(tmp_path: Path) -> None:
    stale, file = tmp_path / "stale.sock", tmp_path / "file"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    file.write_text("precious")
    app = create_app(DataPlane(print), status=dict, metrics=str)
    server = HttpServer(app, unix_socket=stale)
    server.start()
    server.stop()
    with pytest.raises(SettingsError, match="not a socket"):
        HttpServer(app, unix_socket=file).start()
    assert file.read_text() == "precious"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "127.0.0.1.5"])
def test_an_address_that_is_not_ours_is_an_invalid_setting(host: str) -> None:
    app = create_app(DataPlane(print), status=dict, metrics=str)
    with pytest.raises(SettingsError) as refusal:
        HttpServer(app, host=host, port=0).start()
    assert refusal.value.code == "settings.invalid"


def test_a_server_without_an_address_is_refused() -> None:
    with pytest.raises(SettingsError) as refusal:
        HttpServer(create_app(DataPlane(print), status=dict, metrics=str))
    assert refusal.value.code == "settings.missing"


def test_stopping_lets_the_running_request_finish(make_model: Models, tmp_path: Path) -> None:
    entered = threading.Event()

    def slow(*_: object) -> None:
        entered.set()
        time.sleep(0.5)

    plane = DataPlane(slow)
    plane.install(make_model())
    server = HttpServer(create_app(plane, status=dict, metrics=str), port=0)
    server.start()
    url = "http://{}:{}".format(*(server.address or ())) + INFER
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(url, json={"inputs": [tensor]}, timeout=20).status_code)
    )
    thread.start()
    entered.wait(60)
    server.stop()
    thread.join()
    assert answers == [200]
    assert not server.is_running


def test_every_serving_code_has_a_status() -> None:
    assert set(STATUS) == {known for known in CODES if known.startswith("serving.")}


def test_metrics_are_rendered_as_prometheus_reads_them() -> None:
    text = render(
        {
            "lightship_agent_update_state": [Sample(1, {"state": 'a"b\\c\nd'})],
            "lightship_agent_uptime_seconds": [Sample(12.5)],
            "lightship_agent_health_load_1m": [Sample(float("nan"))],
            "not_in_the_table": [Sample(1)],
        }
    )
    assert 'lightship_agent_update_state{state="a\\"b\\\\c\\nd"} 1\n' in text
    assert "# TYPE lightship_agent_uptime_seconds gauge\nlightship_agent_uptime_seconds 12.5\n" in text
    assert "lightship_agent_health_load_1m NaN" in text
    assert "not_in_the_table" not in text
    assert render({}) == ""
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert all(metric.name.endswith("_total") == (metric.type == "counter") for metric in METRICS)
