"""Models in memory under a budget: real sessions, a real data plane."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import msgspec
import pytest
from tests.agent.conftest import training_rows

from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import BundleError, ServingError, UpdateError
from lightship_agent.monitor.monitor import Monitor
from lightship_agent.runtime.model import LoadedModel, load_model
from lightship_agent.serving import residents as module
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.frames import FrameFace
from lightship_agent.serving.hot import HotRow
from lightship_agent.serving.residents import Residents
from lightship_agent.serving.tensors import InferRequest, Tensor

Bundles = Callable[..., Bundle]
MB = 1_000_000


@pytest.fixture
def plane() -> DataPlane:
    return DataPlane(lambda *_: None)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`held(n)`: from now on every load makes this process n bytes larger."""
    said = [0, 0]

    def own_bytes() -> int:
        said[1] += said[0] if said[1] >= 0 else 0
        return said[1]

    def grow(n: int) -> None:
        said[0] = n

    monkeypatch.setattr(module, "own_bytes", own_bytes)
    return grow


def versions(plane: DataPlane) -> tuple[list[int], list[int]]:
    """What is current, and what is in memory."""
    return [m.version for m in plane.models()], sorted(m.version for m in plane.resident())


def ask(plane: DataPlane, version: int) -> None:
    row = training_rows(1)
    plane.infer(InferRequest((Tensor("features", "FP32", row.shape, row),), "pump", str(version)))


def test_both_versions_are_in_memory_until_the_update_is_settled(plane: DataPlane, open_bundle: Bundles) -> None:
    residents, old, new = Residents(plane, spare=0), open_bundle(1), open_bundle(2)
    residents.serve(old)
    residents.serve(new)
    assert versions(plane) == ([2], [1, 2])

    residents.settle([old.digest, new.digest])

    assert versions(plane) == ([2], [2])


def test_the_version_before_stays_where_a_spare_is_wanted_and_going_back_loads_nothing(
    plane: DataPlane, open_bundle: Bundles
) -> None:
    loaded: list[str] = []

    def load(bundle: Bundle) -> LoadedModel:
        loaded.append(bundle.digest)
        return load_model(bundle)

    residents, old, new = Residents(plane, spare=1, load=load), open_bundle(1), open_bundle(2)
    for bundle in (old, new):
        residents.serve(bundle)
        residents.settle([old.digest, new.digest])

    residents.serve(old)

    assert versions(plane) == ([1], [1, 2])
    assert loaded == [old.digest, new.digest]


def test_what_failed_does_not_stay_however_many_spares_there_are(plane: DataPlane, open_bundle: Bundles) -> None:
    residents, good, bad = Residents(plane, spare=9), open_bundle(1), open_bundle(2)
    residents.serve(good)
    residents.serve(bad)
    residents.serve(good)

    residents.settle([good.digest])

    assert versions(plane) == ([1], [1])
    with pytest.raises(ServingError, match="not in memory"):
        ask(plane, 2)


def test_while_an_update_soaks_what_served_before_is_never_let_go_of(
    plane: DataPlane, open_bundle: Bundles, held: Callable[[int], None]
) -> None:
    held(10 * MB)
    residents = Residents(plane, budget=25 * MB)
    residents.serve(open_bundle(1))
    residents.serve(open_bundle(2))

    with pytest.raises(ServingError) as refused:
        residents.load(open_bundle(3))

    assert refused.value.code == "serving.memory"
    assert versions(plane) == ([2], [1, 2])


def test_the_longest_unasked_makes_room_for_what_is_loaded(
    plane: DataPlane, open_bundle: Bundles, held: Callable[[int], None]
) -> None:
    held(10 * MB)
    residents = Residents(plane, budget=35 * MB)
    residents.serve(open_bundle(1))
    residents.load(open_bundle(2))
    residents.load(open_bundle(3))
    ask(plane, 2)

    residents.load(open_bundle(4))

    assert versions(plane) == ([1], [1, 2, 4])


def test_what_a_shadow_needs_stays(plane: DataPlane, open_bundle: Bundles, held: Callable[[int], None]) -> None:
    held(10 * MB)
    residents, shadow = Residents(plane, budget=25 * MB, spare=0), open_bundle(2)
    residents.serve(open_bundle(1))
    residents.load(shadow)
    residents.hold([shadow.digest])
    with pytest.raises(ServingError):
        residents.load(open_bundle(3))
    residents.settle([])
    assert versions(plane) == ([1], [1, 2])

    residents.hold([])
    residents.load(open_bundle(3))

    assert versions(plane) == ([1], [1, 3])


def test_a_model_that_turns_out_too_large_goes_again_and_what_serves_goes_on(
    plane: DataPlane, open_bundle: Bundles, held: Callable[[int], None]
) -> None:
    residents = Residents(plane, budget=25 * MB)
    held(10 * MB)
    residents.serve(open_bundle(1))
    held(20 * MB)

    with pytest.raises(ServingError, match="The model needs about 20000000 bytes") as refused:
        residents.serve(open_bundle(2))

    assert refused.value.code == "serving.memory"
    assert versions(plane) == ([1], [1])
    assert residents.tidy()
    # Once measured, it is refused before it is loaded.
    residents_load = residents._load_model
    residents._load_model = lambda _: pytest.fail("loaded again")
    with pytest.raises(ServingError):
        residents.load(open_bundle(2))
    residents._load_model = residents_load
    ask(plane, 1)


def test_a_device_without_memory_refuses_before_it_loads_and_serves_what_it_has(
    plane: DataPlane, open_bundle: Bundles
) -> None:
    residents = Residents(plane, available=lambda: 1 * MB)
    residents.serve(open_bundle(1))  # alone, it is never refused

    with pytest.raises(ServingError, match="1000000 bytes are available"):
        residents.serve(open_bundle(2))

    assert versions(plane) == ([1], [1])


def test_a_size_is_at_least_that_of_the_graph(
    plane: DataPlane, open_bundle: Bundles, held: Callable[[int], None]
) -> None:
    held(-5 * MB)  # another thread gave memory back meanwhile
    residents, bundle = Residents(plane), open_bundle(1)
    residents.serve(bundle)
    (one,) = residents.residents()
    assert (one.size, one.busy) == (len(bundle.model), True)


def test_whatever_the_runtime_raises_the_old_model_goes_on(plane: DataPlane, open_bundle: Bundles) -> None:
    residents = Residents(plane)
    residents.serve(open_bundle(1))
    with pytest.raises(BundleError):
        residents.serve(msgspec.structs.replace(open_bundle(2), model=b"not a graph", digest="f" * 64))

    def broken(_: Bundle) -> LoadedModel:
        raise RuntimeError("segment lost")

    residents._load_model = broken
    with pytest.raises(UpdateError, match="RuntimeError: segment lost") as failed:
        residents.serve(open_bundle(3))
    assert failed.value.code == "update.swap"
    assert versions(plane) == ([1], [1])


def test_a_model_of_another_name_stays_to_be_gone_back_to_and_answers_nobody(
    plane: DataPlane, open_bundle: Bundles
) -> None:
    residents, pump, fan = Residents(plane), open_bundle(1), open_bundle(1, name="fan")
    residents.serve(pump)
    residents.serve(fan)
    residents.settle([pump.digest, fan.digest])
    assert [m.name for m in plane.resident()] == ["fan"]
    assert {r.digest for r in residents.residents()} == {pump.digest, fan.digest}

    residents._load_model = lambda _: pytest.fail("loaded again")
    residents.serve(pump)

    assert [m.name for m in plane.models()] == ["pump"]


def test_what_serves_is_not_dropped_and_serving_nothing_drops_all(plane: DataPlane, open_bundle: Bundles) -> None:
    residents, bundle = Residents(plane), open_bundle(1)
    residents.serve(bundle)
    residents.load(open_bundle(2))
    assert not residents.drop(bundle.digest)
    assert not residents.drop("0" * 64)

    residents.serve_nothing()

    assert (plane.models(), plane.resident(), residents.residents()) == ((), (), ())
    assert residents.tidy()
    assert not residents.tidy()


def test_a_dropped_model_leaves_memory_at_once_whoever_was_shown_it(open_bundle: Bundles) -> None:
    monitor = Monitor(64)
    plane = DataPlane(monitor.observe, observe_row=monitor.observe_row)
    residents, frames, old = Residents(plane, spare=0), FrameFace(plane), open_bundle(1)
    session = weakref.ref(residents.serve(old)._session)
    ask(plane, 1)
    plane.hot[b"pump"].answer(HotRow(training_rows(1)[0].tobytes(), "hot"))
    asked = msgspec.msgpack.encode({"x": training_rows(1)[0].tobytes()})
    assert frames.hot(asked) is not None
    gc.disable()
    try:
        new = residents.serve(open_bundle(2))
        assert session() is not None  # it soaks: the old one stays
        residents.settle([old.digest, new.digest])
        assert session() is None
    finally:
        gc.enable()


def test_who_serves_again_is_counted_from_that_moment(plane: DataPlane, open_bundle: Bundles) -> None:
    residents, bundle = Residents(plane), open_bundle(1)
    first = residents.serve(bundle)
    ask(plane, 1)
    again = residents.serve(bundle)
    assert again.since_ms >= first.since_ms
    assert msgspec.structs.replace(again, since_ms=0).digest == first.digest
    assert [s.requests for s in plane.stats()] == [0]
