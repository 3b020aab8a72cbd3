"""Reasons over HTTP: the shares add up, they are bounded, and a prediction never waits for them."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.agent.app.agents import command
from tests.agent.conftest import FEATURES, training_rows
from tests.agent.serving.test_http import Served, code, serve

from lightship_agent.client import Client
from lightship_agent.contract.codes import ServingError
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.runtime.reasons import explain_rows

Models = Callable[..., LoadedModel]
EXPLAIN = "/v2/models/pump/explain"
ROWS = training_rows(3, seed=9)


@pytest.fixture
def tcp(make_model: Models, tmp_path: Path) -> Iterator[Served]:
    yield from serve([make_model(kind="three-classes")], tmp_path)


@pytest.fixture
def regressor(make_model: Models, tmp_path: Path) -> Iterator[Served]:
    yield from serve([make_model(kind="regressor")], tmp_path)


def tensors(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in response.json()["outputs"]}


def test_the_shares_add_up_to_the_score_of_the_class_the_model_chose(tcp: Served) -> None:
    response = tcp.infer(ROWS, EXPLAIN, id="why", parameters={"permutations": 20})

    body, found, said = response.json(), tensors(response), tcp.plane.get().predict(ROWS)
    assert said.labels is not None
    assert said.scores is not None
    background = tcp.plane.get().predict(training_rows()[:24]).scores
    assert background is not None
    assert found["attributions"].shape == (3, 4)
    assert found["explained"] == pytest.approx(said.scores[np.arange(3), said.labels], abs=1e-6)
    assert found["base"] == pytest.approx(background.mean(axis=0)[said.labels], abs=1e-6)
    assert found["attributions"].sum(axis=1) + found["base"] == pytest.approx(found["explained"], abs=1e-6)
    assert np.abs(found["gap"]).max() < 1e-6
    assert (body["id"], body["model_name"], body["model_version"]) == ("why", "pump", "1")
    assert body["parameters"] == {
        "digest": tcp.plane.get().digest, "permutations": 20, "seed": 0, "background_rows": 24,
    }  # fmt: skip


def test_the_words_name_the_features_that_moved_it_most(tcp: Served) -> None:
    response = tcp.infer(ROWS, EXPLAIN, parameters={"top": 2, "permutations": 40})

    shares, told = tensors(response)["attributions"], response.json()["explanations"]
    assert len(told) == 3
    for i, one in enumerate(told):
        order = np.argsort(-np.abs(shares[i]))[:2]
        assert [t["feature"] for t in one["top"]] == [FEATURES[j] for j in order]
        assert [t["attribution"] for t in one["top"]] == [shares[i, j] for j in order]
        assert set(one["top"][0]) == {"feature", "value", "attribution"}
    # The models listen to the first two features alone.
    assert {t["feature"] for one in told for t in one["top"]} == {"temperature", "vibration"}


def test_a_regressors_value_is_explained(regressor: Served) -> None:
    response = regressor.infer(ROWS[:1], EXPLAIN, parameters={"permutations": 48})

    usual = training_rows()[:24].mean(axis=0)
    assert tensors(response)["attributions"][0] == pytest.approx((ROWS[0] - usual) * np.array([1, 0.5, 0, 0]), abs=1e-4)
    assert response.json()["explanations"][0]["target"] == "value"


def test_the_same_request_has_the_same_reasons_and_a_binary_one_too(tcp: Served) -> None:
    tensor = {"name": "features", "datatype": "FP32", "shape": [3, 4], "parameters": {"binary_data_size": ROWS.nbytes}}
    head = httpx.Request("POST", "http://a", json={"inputs": [tensor], "parameters": {"seed": 4}}).content
    headers = {"Inference-Header-Content-Length": str(len(head))}

    binary = tcp.client.post(EXPLAIN, content=head + ROWS.tobytes(), headers=headers)

    plain = tcp.infer(ROWS, EXPLAIN, parameters={"seed": 4})
    assert tensors(plain)["attributions"].tolist() == tensors(binary)["attributions"].tolist()
    assert tensors(tcp.infer(ROWS, EXPLAIN))["attributions"].tolist() != tensors(plain)["attributions"].tolist()


def test_the_newest_rows_the_device_answered_are_explained_without_being_sent(tcp: Served) -> None:
    for row in ROWS:
        tcp.infer(row[None])
    own = tcp.client.post(EXPLAIN, json={"id": "own", "parameters": {"newest": 2, "permutations": 20}})

    sent = tcp.infer(ROWS[1:], EXPLAIN, id="own", parameters={"permutations": 20})
    assert own.status_code == 200
    assert own.json() == sent.json()


def test_rows_of_its_own_that_the_device_has_not_are_refused(tcp: Served) -> None:
    none = tcp.client.post(EXPLAIN, json={"parameters": {"newest": 4}})
    both = tcp.infer(ROWS, EXPLAIN, parameters={"newest": 1})
    many = tcp.client.post(EXPLAIN, json={"parameters": {"newest": 17}})

    assert [code(r) for r in (none, both, many)] == [
        (400, "serving.input"), (400, "serving.malformed"), (400, "serving.malformed"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "parameters", "expected"),
    [
        (np.zeros((17, 4)), {}, (413, "serving.too-large")),
        (np.zeros((16, 4)), {"permutations": 1_000}, (200, "")),
        (np.zeros((1, 4)), {"permutations": 0}, (400, "serving.malformed")),
        (np.zeros((1, 4)), {"permutations": 1_001}, (400, "serving.malformed")),
        (np.zeros((1, 4)), {"seed": -1}, (400, "serving.malformed")),
        (np.zeros((1, 4)), {"top": "many"}, (400, "serving.malformed")),
        (np.zeros((1, 3)), {}, (400, "serving.input")),
    ],
)
def test_what_is_asked_is_bounded(
    tcp: Served, rows: np.ndarray, parameters: dict[str, Any], expected: tuple[int, str]
) -> None:
    response = tcp.infer(rows, EXPLAIN, parameters=parameters)

    if expected[0] == 200:
        assert response.status_code == 200
    else:
        assert code(response) == expected
        assert tcp.plane.errors() == {expected[1]: 1}


def test_a_wide_model_is_bounded_by_what_it_would_have_to_predict(tcp: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightship_agent.serving.explaining.MAX_EVALUATIONS", 100)

    assert code(tcp.infer(ROWS, EXPLAIN)) == (413, "serving.too-large")
    assert tcp.infer(ROWS[:1], EXPLAIN, parameters={"permutations": 5}).status_code == 200


def test_a_bundle_without_background_rows_says_so(make_model: Models, tmp_path: Path) -> None:
    for served in serve([make_model(background=False)], tmp_path):
        assert code(served.infer(ROWS, EXPLAIN)) == (409, "serving.no-background")
        assert served.infer(ROWS).status_code == 200


def test_an_unknown_model_or_version_is_refused(tcp: Served) -> None:
    assert code(tcp.infer(ROWS, "/v2/models/fan/explain")) == (404, "serving.unknown-model")
    assert code(tcp.infer(ROWS, "/v2/models/pump/versions/9/explain")) == (404, "serving.unknown-model")
    assert tcp.infer(ROWS, "/v2/models/pump/versions/1/explain").status_code == 200
    assert code(tcp.client.get(EXPLAIN)) == (405, "serving.method")


def test_an_explanation_is_nobodys_measurement(tcp: Served) -> None:
    tcp.infer(ROWS, EXPLAIN)

    assert tcp.plane.stats()[0].rows == 0


def test_predictions_go_on_while_explanations_wait_and_the_third_is_refused(
    tcp: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def held(*arguments: Any, **named: Any) -> Any:
        assert go_on.wait(60)
        return explain_rows(*arguments, **named)

    monkeypatch.setattr("lightship_agent.serving.explaining.explain_rows", held)
    answers: queue.Queue[httpx.Response] = queue.Queue()
    asking = [threading.Thread(target=lambda: answers.put(tcp.infer(ROWS, EXPLAIN))) for _ in range(3)]
    for thread in asking:
        thread.start()
    refused = answers.get(timeout=60)  # of three, one is at work and one waits

    assert code(refused) == (503, "serving.overloaded")
    assert refused.headers["retry-after"] == "1"
    assert tcp.infer(ROWS).status_code == 200
    assert tcp.infer(ROWS[:1]).status_code == 200
    assert answers.empty()
    go_on.set()
    for thread in asking:
        thread.join(60)
    assert [answers.get_nowait().status_code for _ in range(2)] == [200, 200]


def test_an_explanation_ends_when_its_time_is_over(tcp: Served) -> None:
    response = tcp.client.post(
        EXPLAIN,
        json={"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}]},
        headers={"Request-Timeout": "0"},
    )

    assert code(response) == (504, "serving.deadline")


def test_a_program_asks_for_reasons(tcp: Served) -> None:
    with Client("http://{}:{}".format(*(tcp.server.address or ()))) as client:
        (one,) = client.explain(ROWS[0], permutations=30, top=4)

    assert one.target in ("healthy", "worn", "broken")
    assert one.base + sum(r.attribution for r in one.reasons) == pytest.approx(one.explained, abs=1e-6)
    assert {r.feature: r.value for r in one.reasons} == dict(zip(FEATURES, ROWS[0].tolist(), strict=True))


def test_in_a_terminal_the_newest_rows_are_told_with_what_moved_them(make_model: Models, tmp_path: Path) -> None:
    for served in serve([make_model(kind="three-classes")], tmp_path, unix=True):
        for row in ROWS:
            served.infer(row[None])
        socket = str(tmp_path / "agent.sock")
        told = command("explain", "--json", "--newest", "2", state=tmp_path, SOCKET=socket)
        words = command("explain", "--newest", "1", "--top", "2", state=tmp_path, SOCKET=socket)
        with Client(f"unix:{socket}") as client:
            own = client.explain(newest=2)

    assert [one["explained"] for one in json.loads(told.stdout)] == [one.explained for one in own]
    assert words.stdout.count("\n") == 3
    assert "temperature" in words.stdout


def test_there_are_no_reasons_over_frames(tmp_path: Path) -> None:
    with Client(f"frames:{tmp_path / 'none.sock'}") as client, pytest.raises(ServingError, match="Unix socket") as no:
        client.explain(ROWS)
    assert no.value.code == "serving.not-found"
