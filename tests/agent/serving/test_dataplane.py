"""The data plane: what is answered, what is refused, and what a swap does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.agent.conftest import training_rows

from lightship_agent.contract.codes import ServingError
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.tensors import InferRequest, InferResponse, Tensor

Models = Callable[..., LoadedModel]
Array = np.ndarray[Any, np.dtype[Any]]


class Watcher:
    """Remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, str]] = []
        self.refused: list[tuple[str, int]] = []

    def observe(self, model: LoadedModel, rows: Array, prediction: Any, request_id: str) -> None:
        assert len(prediction) == len(rows)
        self.seen.append((model.digest, len(rows), request_id))

    def refuse(self, model: LoadedModel, rows: int, _data: object) -> None:
        self.refused.append((model.digest, rows))


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def plane(watcher: Watcher, make_model: Models) -> DataPlane:
    plane = DataPlane(watcher.observe, refused=watcher.refuse)
    plane.install(make_model(kind="three-classes"))
    return plane


def ask(data: Array, *, name: str = "features", datatype: str = "FP32", **more: Any) -> InferRequest:
    return InferRequest(inputs=(Tensor(name, datatype, data.shape, data),), **more)


def by_name(response: InferResponse) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in response.outputs}


def refusal(plane: DataPlane, request: InferRequest) -> ServingError:
    with pytest.raises(ServingError) as refused:
        plane.infer(request)
    return refused.value


def test_an_answer_says_label_class_scores_and_who_gave_it(plane: DataPlane, watcher: Watcher) -> None:
    model, rows = plane.get(), training_rows(5)
    response = plane.infer(ask(rows, id="mine"))
    found, expected = by_name(response), model.predict(rows)
    assert found["scores"].shape == (5, 3)
    assert np.array_equal(found["scores"].data, expected.scores)  # type: ignore[arg-type]
    assert np.array_equal(found["class"].data, expected.labels)  # type: ignore[arg-type]
    assert found["label"].data == [model.outputs.labels[i] for i in found["class"].data]
    assert (response.model_version, response.parameters["digest"], response.id) == ("1", model.digest, "mine")
    assert watcher.seen == [(model.digest, 5, "mine")]


def test_one_row_may_come_without_its_first_dimension(plane: DataPlane) -> None:
    row = training_rows(1)
    flat, shaped = plane.infer(ask(row[0])), plane.infer(ask(row))
    assert by_name(flat)["class"].shape == by_name(shaped)["class"].shape == (1,)
    assert by_name(flat)["label"].data == by_name(shaped)["label"].data


def test_generated_ids_are_never_the_same_twice(plane: DataPlane, watcher: Watcher) -> None:
    ids = {plane.infer(ask(training_rows(1))).id for _ in range(50)}
    assert len(ids) == 50
    assert {request_id for _, _, request_id in watcher.seen} == ids


def test_a_regressor_answers_a_value(watcher: Watcher, make_model: Models) -> None:
    plane = DataPlane(watcher.observe)
    plane.install(make_model(kind="regressor"))
    (value,) = plane.infer(ask(training_rows(3))).outputs
    assert (value.name, value.datatype, value.shape) == ("value", "FP32", (3,))


def test_only_the_wanted_outputs_come_in_the_wanted_order(plane: DataPlane) -> None:
    response = plane.infer(ask(training_rows(1), outputs=("scores", "label")))
    assert [tensor.name for tensor in response.outputs] == ["scores", "label"]
    assert refusal(plane, ask(training_rows(1), outputs=("label", "probability"))).code == "serving.output"


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "float64", "bool", "float16"])
def test_numbers_of_any_datatype_are_the_same_numbers(plane: DataPlane, dtype: str) -> None:
    ones = np.ones((1, 4))
    expected = by_name(plane.infer(ask(ones.astype(np.float32))))["scores"].data
    assert np.array_equal(by_name(plane.infer(ask(ones.astype(dtype))))["scores"].data, expected)


def bad(value: float, at: int = 2) -> Array:
    row = np.zeros((2, 4), np.float64)
    row[1, at] = value
    return row


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ask(np.zeros((1, 4), np.float32), name="input"), "Expected one input 'features', found 'input'"),
        (InferRequest(inputs=()), "found none"),
        (InferRequest(inputs=ask(np.zeros((1, 4))).inputs * 2), "found 'features', 'features'"),
        (ask(np.zeros((1, 3), np.float32)), r"\[rows, 4\] or \[4\], found \[1, 3\]"),
        (ask(np.zeros((4, 1), np.float32)), r"found \[4, 1\]"),
        (ask(np.zeros(8, np.float32)), r"found \[8\]"),
        (ask(np.zeros((0, 4), np.float32)), r"found \[0, 4\]"),
        (ask(np.zeros((1, 1, 4), np.float32)), r"found \[1, 1, 4\]"),
        (InferRequest(inputs=(Tensor("features", "BYTES", (4,), ["a", "b", "c", "d"]),)), "datatype 'BYTES'"),
        (ask(bad(np.nan)), "Row 1: feature 'current' has no value"),
        (ask(bad(np.inf)), "Row 1: feature 'current' is infinite"),
        (ask(bad(1e300)), "Row 1: feature 'current' is infinite"),
        (ask(np.full((1, 4), 2**24 + 1)), "too large to be exact"),
        (ask(np.full((1, 4), 2**60)), "too large to be exact"),
    ],
)
def test_what_the_schema_does_not_ask_for_is_refused(
    plane: DataPlane, watcher: Watcher, request_: InferRequest, said: str
) -> None:
    with pytest.raises(ServingError, match=said) as refused:
        plane.infer(request_)
    assert refused.value.code == "serving.input"
    assert watcher.seen == []
    assert len(watcher.refused) == 1
    assert plane.errors() == {"serving.input": 1}
    assert plane.running()[0].requests == 0


def test_a_missing_value_is_welcome_where_the_schema_allows_it(watcher: Watcher, make_model: Models) -> None:
    plane = DataPlane(watcher.observe)
    plane.install(make_model(nullable=("current",)))
    assert plane.infer(ask(bad(np.nan))).outputs
    assert refusal(plane, ask(bad(np.nan, at=1))).code == "serving.input"


def test_a_batch_beyond_the_bound_is_refused(plane: DataPlane) -> None:
    assert refusal(plane, ask(np.zeros((65_537, 4), np.float32))).code == "serving.too-large"
    assert refusal(plane, ask(training_rows(1), id="x" * 129)).code == "serving.malformed"


def test_models_are_found_by_name_and_version(plane: DataPlane, make_model: Models) -> None:
    assert plane.get("pump", "1") is plane.get()
    for name, version in (("fan", None), ("pump", "2"), ("pump", "01")):
        with pytest.raises(ServingError) as refused:
            plane.get(name, version)
        assert refused.value.code == "serving.unknown-model"
    plane.install(make_model(name="fan"))
    with pytest.raises(ServingError, match="Several models are here"):
        plane.get()


def test_a_device_without_a_model_says_so(watcher: Watcher) -> None:
    assert refusal(DataPlane(watcher.observe), ask(training_rows(1))).code == "serving.no-model"


def test_install_returns_the_model_it_replaced_and_remove_the_last(plane: DataPlane, make_model: Models) -> None:
    first, second = plane.get(), make_model(2)
    assert plane.install(second) is first
    assert plane.remove("pump") is second
    assert plane.remove("pump") is None
    assert plane.models() == ()


def test_a_version_that_was_replaced_answers_whoever_names_it_and_is_counted_but_not_watched(
    plane: DataPlane, watcher: Watcher, make_model: Models
) -> None:
    first, second = plane.get(), make_model(2, kind="three-classes", flip=True)
    plane.install(second)
    pinned, plain = (plane.infer(ask(training_rows(2), model="pump", version=v)) for v in ("1", None))
    assert (pinned.parameters["digest"], plain.parameters["digest"]) == (first.digest, second.digest)
    assert np.array_equal(by_name(pinned)["scores"].data, first.predict(training_rows(2)).scores)  # type: ignore[arg-type]
    assert watcher.seen == [(second.digest, 2, plain.id)]
    assert {s.model.version: s.requests for s in plane.stats("pump")} == {1: 1, 2: 1}
    assert [r.version for r in plane.running()] == [2]
    assert plane.models() == (second,)
    assert set(plane.resident()) == {first, second}
    assert set(plane.hot) == {b"pump", b"pump/versions/1", b"pump/versions/2"}


def test_what_is_kept_beside_answers_by_version_and_is_watched_only_if_kept_so(
    plane: DataPlane, watcher: Watcher, make_model: Models
) -> None:
    challenger = make_model(3, kind="three-classes")
    plane.keep(challenger, watched=True)
    assert plane.infer(ask(training_rows(1), model="pump", version="3", id="a")).model_version == "3"
    assert plane.infer(ask(training_rows(1), model="pump", id="b")).model_version == "1"
    assert [request_id for _, _, request_id in watcher.seen] == ["a", "b"]


def test_what_is_dropped_answers_nobody_and_the_current_version_can_not_be_dropped(
    plane: DataPlane, make_model: Models
) -> None:
    first, second = plane.get(), make_model(2, kind="three-classes")
    plane.install(second)
    assert plane.drop(second.digest) is None
    assert plane.drop(first.digest) is first
    assert plane.drop(first.digest) is None
    gone = refusal(plane, ask(training_rows(1), model="pump", version="1"))
    assert (gone.code, "of pump is not in memory; 2 is" in str(gone)) == ("serving.unknown-model", True)
    assert plane.resident() == (second,)
    assert set(plane.hot) == {b"pump", b"pump/versions/2"}


def test_going_back_counts_anew(plane: DataPlane, make_model: Models) -> None:
    first = plane.get()
    plane.infer(ask(training_rows(1)))
    plane.install(make_model(2, kind="three-classes"))
    plane.install(first)
    assert plane.get() is first
    assert {s.model.version: s.requests for s in plane.stats()} == {1: 0, 2: 0}


def test_who_found_a_model_before_a_swap_is_answered_by_it_and_watched(
    plane: DataPlane, watcher: Watcher, make_model: Models
) -> None:
    found = plane.find("pump")
    plane.install(make_model(2, kind="three-classes"))
    plane.drop(found.model.digest)
    assert plane.answer(ask(training_rows(1), id="late"), by=found).model_version == "1"
    assert watcher.seen == [(found.model.digest, 1, "late")]


def test_an_observer_that_fails_costs_no_prediction(make_model: Models, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("disk on fire")

    plane = DataPlane(broken)
    plane.install(make_model())
    for _ in range(3):
        assert plane.infer(ask(training_rows(1))).outputs
    assert len(caplog.records) == 1
    assert "disk on fire" in caplog.text


def test_requests_beyond_the_bound_are_turned_away_at_once(make_model: Models) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        inside.set()
        leave.wait(60)

    plane = DataPlane(slow, max_in_flight=1)
    plane.install(make_model())
    thread = threading.Thread(target=plane.infer, args=(ask(training_rows(1)),))
    thread.start()
    inside.wait(60)

    begun = time.monotonic()
    assert refusal(plane, ask(training_rows(1))).code == "serving.overloaded"
    assert time.monotonic() - begun < 30  # the one inside stays for a minute
    leave.set()
    thread.join()
    assert plane.infer(ask(training_rows(1))).outputs
    assert plane.errors() == {"serving.overloaded": 1}


def test_counters_tell_rows_requests_and_latency(plane: DataPlane) -> None:
    plane.infer(ask(training_rows(3)))
    plane.infer(ask(training_rows(1)))
    (stats,) = plane.stats("pump")
    assert (stats.requests, stats.rows, stats.failures) == (2, 4, 0)
    assert 0 < stats.p50_ms <= stats.p95_ms
    assert plane.stats("fan") == ()
    (running,) = plane.running()
    assert (running.requests, running.digest) == (4, plane.get().digest)
    assert (sum(running.latencies), sum(stats.latencies)) == (2, 2)
    assert running.busy_us == round(stats.seconds * 1e6)
    assert (refusal(plane, ask(np.zeros((1, 2)))).code, plane.running()[0].errors) == (
        "serving.input",
        {"serving.input": 1},
    )


def test_feedback_goes_to_whoever_keeps_predictions(make_model: Models, watcher: Watcher) -> None:
    plane = DataPlane(watcher.observe, feedback=lambda model, name, label: (model, name, label) == ("pump", "a", "ok"))
    plane.install(make_model())
    assert plane.feedback("pump", "a", "ok")
    assert not plane.feedback("pump", "a", "worn")
    with pytest.raises(ServingError, match="No model 'fan'"):
        plane.feedback("fan", "a", "ok")


def test_without_a_ledger_no_prediction_is_known(plane: DataPlane) -> None:
    with pytest.raises(ServingError) as refused:
        plane.feedback("pump", "a", "healthy")
    assert refused.value.code == "serving.unknown-prediction"


def test_twenty_swaps_under_eight_threads_cost_no_request_and_mix_no_answer(make_model: Models) -> None:
    models = {1: make_model(1), 2: make_model(2, flip=True)}
    rows = training_rows(8)
    said = {version: model.predict(rows) for version, model in models.items()}
    observed: list[str] = []
    plane = DataPlane(lambda model, *_: observed.append(model.digest))
    plane.install(models[1])
    stop, failures, answers = threading.Event(), [], []

    def client() -> None:
        while not stop.is_set():
            try:
                answers.append(plane.infer(ask(rows)))
            except Exception as e:  # the test's question is whether any happens
                failures.append(e)

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for i in range(20):
        time.sleep(0.02)
        plane.install(models[1 + (i + 1) % 2])
    stop.set()
    for thread in threads:
        thread.join()

    assert failures == []
    assert {a.model_version for a in answers} == {"1", "2"}
    for answer in answers:
        version = int(answer.model_version)
        assert answer.parameters["digest"] == models[version].digest
        assert np.array_equal(by_name(answer)["class"].data, said[version].labels)  # type: ignore[arg-type]
    assert len(observed) == len(answers)
