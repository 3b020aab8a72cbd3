"""Models beside the current one: arms answer their keys, shadows answer nobody, and the champion serves on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.agent import tensored
from tests.agent.conftest import training_rows

from lightship_agent.contract.assignment import Beside
from lightship_agent.contract.bundle import Bundle, read_bundle
from lightship_agent.contract.codes import UpdateError
from lightship_agent.contract.messages import Agreement
from lightship_agent.runtime.model import LoadedModel, Prediction
from lightship_agent.serving.company import Company
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.mirror import MAX_WAITING, Challenger, Mirror
from lightship_agent.serving.residents import Residents
from lightship_agent.serving.tensors import InferRequest, Tensor

Open = Callable[..., Bundle]


class Stage:
    """A data plane with a champion, and whoever stands beside it."""

    def __init__(self, champion: Bundle) -> None:
        self.seen: list[int] = []
        self.watched: frozenset[str] = frozenset()
        self.plane = DataPlane(self._observe, observe_row=self._observe_row)
        self.mirror = Mirror()
        self.residents = Residents(self.plane)
        self.company = Company(self.plane, self.residents, self.mirror, self._watch)
        self.champion = self.serve(champion)

    def serve(self, bundle: Bundle) -> LoadedModel:
        """As the agent swaps."""
        with self.company.changing(bundle):
            return self.residents.serve(bundle)

    def stand(self, bundle: Bundle, mode: str = "shadow", experiment: str = "e1", **how: Any) -> str:
        """Have it beside; its digest."""
        beside = Beside(
            experiment=experiment, model=bundle.manifest.model, version=bundle.manifest.version, path="p",
            sha256=bundle.digest, length=1, mode=mode, **how,
        )  # fmt: skip
        self.company.stand(beside, lambda: bundle)
        return bundle.digest

    def _observe(self, model: LoadedModel, rows: Any, _prediction: Prediction, _id: str) -> None:
        self.seen += [model.version] * len(rows)

    def _observe_row(self, model: LoadedModel, _row: Any, _label: int, _top: float, _id: str) -> None:
        self.seen.append(model.version)

    def _watch(self, digests: frozenset[str]) -> None:
        self.watched = digests

    def ask(self, key: str = "", *, rows: int = 1, version: str | None = None) -> int:
        """Ask the long way; the version that answered."""
        data = training_rows()[:rows]
        tensor = Tensor("features", "FP32", data.shape, data)
        response = self.plane.infer(InferRequest((tensor,), "pump", version, key=key))
        model = next(m for m in self.plane.resident() if m.digest == response.parameters["digest"])
        assert str(model.version) == response.model_version
        return model.version

    def ask_hot(self, rows: int = 1) -> None:
        """The hot path, as a face does."""
        for row in training_rows()[:rows]:
            text = {"inputs": [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": row.tolist()}]}
            hot = self.plane.hot[b"pump"]
            parsed = hot.parse(msgspec.json.encode(text))
            assert parsed is not None
            hot.answer_all([parsed])

    def agreed(self) -> list[Agreement]:
        assert self.mirror.drain(10)
        return self.mirror.collect(2_000)


@pytest.fixture
def stage(open_bundle: Open) -> Stage:
    return Stage(open_bundle(1))


# The shadow -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hot", [True, False], ids=["hot path", "long way"])
def test_a_shadow_is_asked_what_the_champion_was_and_nobody_hears_it(
    stage: Stage, open_bundle: Open, hot: bool
) -> None:
    stage.stand(open_bundle(2))

    if hot:
        stage.ask_hot(100)
    else:
        assert stage.ask(rows=100) == 1

    (found,) = stage.agreed()
    assert (found.rows, found.same, found.failures, found.dropped) == (100, 100, 0, 0)
    assert (found.version, found.champion) == (2, stage.champion.digest)
    assert sum(found.differences) == 100
    assert found.difference_max < 1e-6
    assert set(stage.seen) == {1}
    assert [m.version for m in stage.plane.models()] == [1]
    assert [r.version for r in stage.plane.running()] == [1]


def test_a_challenger_that_says_the_opposite_agrees_in_nothing(stage: Stage, open_bundle: Open) -> None:
    stage.stand(open_bundle(2, flip=True))

    stage.ask(rows=200)

    (found,) = stage.agreed()
    assert (found.rows, found.same) == (200, 0)
    taken = stage.champion.predict(training_rows()[:200]).labels
    assert taken is not None
    assert found.confusion == (0, int((taken == 0).sum()), int((taken == 1).sum()), 0)
    assert sum(found.differences) == 0


def test_numbers_agree_when_they_are_nearly_the_same(open_bundle: Open) -> None:
    stage = Stage(open_bundle(1, kind="regressor"))
    stage.stand(open_bundle(2, kind="regressor"))

    stage.ask_hot(20)
    stage.ask(rows=30)

    (found,) = stage.agreed()
    assert (found.rows, found.same, found.confusion) == (50, 50, ())


def test_a_share_of_the_rows_is_a_share(stage: Stage, open_bundle: Open) -> None:
    stage.stand(open_bundle(2), share=0.25)

    for _ in range(5):
        stage.ask(rows=400)
        assert stage.mirror.drain(10)

    (found,) = stage.agreed()
    assert 0.18 < found.rows / 2_000 < 0.32


def test_what_a_challenger_refuses_is_counted_and_the_rest_is_compared(open_bundle: Open) -> None:
    stage = Stage(open_bundle(1, nullable=("vibration",)))
    stage.stand(open_bundle(2))
    rows = training_rows()[:40].copy()
    rows[7, 1] = rows[9, 1] = np.nan

    stage.mirror.observe(stage.champion, rows, stage.champion.predict(rows), "")

    (found,) = stage.agreed()
    assert (found.rows, found.failures) == (38, 2)


def test_when_the_queue_is_full_rows_are_dropped_and_counted_and_the_caller_does_not_wait(
    make_model: Callable[..., LoadedModel],
) -> None:
    champion, mirror = make_model(1), Mirror(max_waiting=10)
    mirror.set([Challenger("e1", make_model(2))])
    rows = training_rows()[:8]
    said = champion.predict(rows)
    begun = time.perf_counter()

    for _ in range(200):
        mirror.observe(champion, rows, said, "")

    assert time.perf_counter() - begun < 1.0
    assert mirror.drain(10)
    (found,) = mirror.collect(1)
    assert found.dropped > 0
    assert found.rows + found.dropped == 1_600
    assert mirror.collect(2) == []


def test_a_request_larger_than_the_queue_is_dropped_whole(stage: Stage, open_bundle: Open) -> None:
    stage.stand(open_bundle(2))
    rows = np.tile(training_rows(), (4, 1))

    stage.mirror.observe(stage.champion, rows, stage.champion.predict(rows), "")

    assert stage.mirror.dropped_total == len(rows) > MAX_WAITING


def test_without_a_shadow_nothing_is_called_but_the_observer(stage: Stage, open_bundle: Open) -> None:
    before = stage.plane._observe_row
    stage.stand(open_bundle(2))
    stage.company.leave("e1")

    assert stage.plane._observe_row is before
    stage.ask_hot(3)
    assert stage.agreed() == []
    assert stage.seen == [1, 1, 1]


def test_two_challengers_are_counted_apart(stage: Stage, open_bundle: Open) -> None:
    stage.stand(open_bundle(2))
    stage.stand(open_bundle(3, flip=True), experiment="e2")

    stage.ask(rows=50)

    assert {(a.experiment, a.rows, a.same) for a in stage.agreed()} == {("e1", 50, 50), ("e2", 50, 0)}


# A/B ------------------------------------------------------------------------------------------------------------------


def test_keys_fall_to_their_arm_and_the_answer_says_by_which_it_was_made(stage: Stage, open_bundle: Open) -> None:
    arm = stage.stand(open_bundle(2), "ab", share=0.3)
    keys = [f"customer-{i}" for i in range(500)]

    found = {key: stage.ask(key) for key in keys}

    assert 0.24 < sum(v == 2 for v in found.values()) / 500 < 0.36
    assert {key: stage.ask(key) for key in keys} == found
    assert stage.watched == {arm}
    assert [r.version for r in stage.plane.running()] == [1, 2]
    assert set(stage.seen) == {1, 2}


def test_without_a_key_or_by_version_nothing_is_dealt(stage: Stage, open_bundle: Open) -> None:
    stage.stand(open_bundle(2), "ab", share=1.0)

    assert {stage.ask() for _ in range(20)} == {1}
    assert {stage.ask(f"k{i}", version="1") for i in range(20)} == {1}
    assert stage.ask("k", version="2") == 2
    assert b"pump" in stage.plane.hot


def test_single_requests_are_dealt_where_the_operator_wants_that(stage: Stage, open_bundle: Open) -> None:
    stage.stand(open_bundle(2), "ab", share=0.5, per_request=True)

    assert {stage.ask() for _ in range(100)} == {1, 2}
    assert b"pump" not in stage.plane.hot
    assert {b"pump/versions/1", b"pump/versions/2"} <= set(stage.plane.hot)


def test_when_an_arm_leaves_its_keys_are_the_champions_and_its_memory_is_free(stage: Stage, open_bundle: Open) -> None:
    stage.stand(open_bundle(2), "ab", share=1.0)
    assert stage.ask("k") == 2

    stage.company.leave("e1")

    assert stage.ask("k") == 1
    assert [m.version for m in stage.plane.resident()] == [1]
    assert stage.watched == frozenset()


def test_another_share_takes_effect_and_keeps_what_was_counted(stage: Stage, open_bundle: Open) -> None:
    arm = stage.stand(open_bundle(2), "ab", share=1.0)
    stage.ask("k")

    stage.stand(open_bundle(2), "ab", share=1e-6)

    assert {stage.ask(f"k{i}") for i in range(20)} == {1}
    assert next(s.rows for s in stage.plane.stats() if s.model.digest == arm) == 1


# Who may stand there --------------------------------------------------------------------------------------------------


def test_what_answers_something_else_may_not_stand_beside(stage: Stage, open_bundle: Open) -> None:
    for other in (open_bundle(2, kind="three-classes"), open_bundle(2, kind="regressor"), open_bundle(2, name="fan")):
        with pytest.raises(UpdateError) as refused:
            stage.stand(other, "ab")
        assert refused.value.code == "update.beside"

    assert stage.company.digests == frozenset()
    assert stage.ask("k") == 1


def test_what_takes_tensors_has_arms_of_the_same_tensors_and_no_shadow(open_bundle: Open) -> None:
    one, two = (
        read_bundle(tensored.bundle(tensored.conv_net(), tensored.COLOUR, tensored.colour_arrays(), version=v))
        for v in (1, 2)
    )
    stage = Stage(one)

    with pytest.raises(UpdateError) as refused:
        stage.stand(two)
    assert refused.value.code == "update.beside"
    stage.stand(two, "ab", share=1.0)
    with pytest.raises(UpdateError):
        stage.stand(open_bundle(3, name="eye"), "ab", experiment="e2")

    assert stage.plane.find("eye", None, "key").model.version == 2
    assert stage.plane.find("eye").model.version == 1


def test_where_nothing_serves_there_is_nothing_to_stand_beside(open_bundle: Open) -> None:
    stage = Stage(open_bundle(1))
    stage.plane.remove("pump")

    with pytest.raises(UpdateError):
        stage.stand(open_bundle(2), "ab")


def test_a_champion_of_another_kind_is_asked_alone_and_one_of_the_old_kind_with_its_company(
    stage: Stage, open_bundle: Open
) -> None:
    stage.stand(open_bundle(2), "ab", share=1.0)
    other = open_bundle(3, kind="three-classes")

    with stage.company.changing(other):
        assert stage.ask("k") == 1
    stage.serve(other)
    assert stage.ask("k") == 3
    stage.serve(open_bundle(1))

    assert stage.ask("k") == 2


def test_a_challenger_that_becomes_champion_answers_everybody(stage: Stage, open_bundle: Open) -> None:
    stage.stand(open_bundle(2), "ab", share=0.3)

    stage.serve(open_bundle(2))
    stage.company.leave("e1")

    assert {stage.ask(f"k{i}") for i in range(20)} == {2}
    assert [m.version for m in stage.plane.models()] == [2]
