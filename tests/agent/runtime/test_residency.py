"""What may stay in memory: the decider alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import ServingError
from lightship_agent.runtime.residency import RESERVE, Need, Resident, estimate, make_room, surplus


def resident(digest: str, size: int = 10, used: float = 0.0, *, busy: bool = False) -> Resident:
    return Resident(digest, size, used, busy)


RESIDENTS = st.lists(
    st.builds(Resident, st.uuids().map(str), st.integers(0, 100), st.floats(0, 100), st.booleans()), max_size=8
)


def test_where_there_is_room_nothing_goes() -> None:
    assert make_room([resident("a")], Need(10, 10), budget=20, available=None) == ()
    assert make_room([resident("a")], Need(10, 10), budget=0, available=RESERVE + 10) == ()
    assert make_room([resident("a")], Need(10**12, 10**12), budget=0, available=None) == ()


def test_the_longest_unused_goes_first_and_no_more_than_is_needed() -> None:
    held = [resident("old", used=1), resident("older", used=0), resident("new", used=2)]
    assert make_room(held, Need(10, 10), budget=30, available=None) == ("older",)
    assert make_room(held, Need(11, 11), budget=30, available=None) == ("older", "old")


def test_what_is_busy_never_goes_however_long_unused() -> None:
    held = [resident("serves", used=0, busy=True), resident("idle", used=9)]
    assert make_room(held, Need(10, 10), budget=20, available=None) == ("idle",)
    with pytest.raises(ServingError, match=r"of 20 bytes for models 20 are taken") as refused:
        make_room(held, Need(11, 11), budget=20, available=None)
    assert refused.value.code == "serving.memory"
    assert "LIGHTSHIP_AGENT_MODELS_MB" in refused.value.remedy


def test_what_the_device_has_bounds_the_height_of_loading() -> None:
    held = [resident("serves", busy=True)]
    assert make_room(held, Need(10, 50), budget=0, available=RESERVE + 50) == ()
    with pytest.raises(ServingError, match="49 bytes are available|are available"):
        make_room(held, Need(10, 50), budget=0, available=RESERVE + 49)


def test_the_only_model_is_never_refused() -> None:
    assert make_room([], Need(10**12, 10**12), budget=1, available=0) == ()


def test_trees_are_expected_to_grow_more_than_networks() -> None:
    forest, network = estimate(b"TreeEnsembleClassifier" * 1_000), estimate(b"Gemm" * 5_500)
    assert forest.settled > network.settled > 22_000
    assert forest.peak > network.peak > network.settled


def test_of_what_nobody_needs_the_last_used_stay() -> None:
    held = [resident("a", used=1), resident("b", used=3), resident("c", used=2), resident("serves", busy=True)]
    assert surplus(held, 1) == ("c", "a")
    assert surplus(held, 0) == ("b", "c", "a")
    assert surplus(held, 3) == ()


@given(held=RESIDENTS, settled=st.integers(0, 300), budget=st.integers(1, 400))
def test_what_goes_is_idle_is_enough_and_not_one_too_many(held: list[Resident], settled: int, budget: int) -> None:
    by_digest = {r.digest: r for r in held}
    taken = sum(r.size for r in held)
    try:
        gone = make_room(held, Need(settled, settled), budget=budget, available=None)
    except ServingError:
        assert sum(r.size for r in held if r.busy) + settled > budget
        return
    assert not any(by_digest[d].busy for d in gone)
    if held:
        left = taken - sum(by_digest[d].size for d in gone)
        assert left + settled <= budget
        assert not gone or left + by_digest[gone[-1]].size + settled > budget
