"""Hard faults are found in the window that shows them, said once, and over once; healthy windows show none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom
from tests.agent.conftest import Floats

from lightship.data.profile import reference_profile
from lightship_agent.contract.profile import ReferenceProfile
from lightship_agent.monitor.faults import CLEAN_WINDOWS, FAULT_CODES, FaultBook, FaultFinder, Found
from lightship_agent.monitor.tails import beta_binomial_tail
from lightship_agent.monitor.tally import Tally

NAMES = ("pressure", "temperature", "balance", "door", "colour")
COLOURS = ("red", "green", "blue")
NONE = np.empty(0, np.float32)


def world(n: int, seed: int) -> Floats:
    """Pascals, kelvins, something around zero, a bit, a category."""
    rng = np.random.default_rng(seed)
    columns = [
        rng.normal(101_325, 500, n), rng.normal(300, 5, n), rng.normal(0, 1, n), rng.integers(0, 2, n),
        rng.integers(0, 3, n),
    ]  # fmt: skip
    return np.stack(columns, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def profile() -> ReferenceProfile:
    return reference_profile(world(4_000, 1), NAMES, categories={"colour": COLOURS})


def found(profile: ReferenceProfile, rows: Floats) -> set[tuple[str, str]]:
    tally = Tally(profile)
    tally.count(rows, np.full(len(rows), -1), np.full(len(rows), np.nan, np.float32))
    return {(f.kind, NAMES[f.feature]) for f in FaultFinder(profile).find(*tally.take())}


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_window_shows_nothing(profile: ReferenceProfile, seed: int) -> None:
    assert found(profile, world(200, 100 + seed)) == set()


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_what_drifts_is_no_fault(profile: ReferenceProfile, shift: float) -> None:
    rows = world(200, 7) + np.array([500, 5, 1, 0, 0], np.float32) * np.float32(shift)
    assert found(profile, rows) == set()


def test_a_stuck_sensor_is_found_and_a_door_that_stays_shut_is_none(profile: ReferenceProfile) -> None:
    rows = world(200, 2)
    rows[:, 1] = 301.5
    rows[:, 3] = 1
    rows[:, 4] = 2
    assert found(profile, rows) == {("stuck", "temperature")}


def test_a_value_that_stood_still_as_long_in_training_is_not_stuck() -> None:
    reference = world(4_000, 1)
    reference[100:250, 1] = 301.5
    rows = world(200, 2)
    rows[:, 1] = 301.5
    assert found(reference_profile(reference, NAMES), rows) == set()


@pytest.mark.parametrize("factor", [1_000, 0.001, 10, 0.1])
def test_another_unit_is_found(profile: ReferenceProfile, factor: float) -> None:
    rows = world(200, 3)
    rows[:, 0] *= np.float32(factor)
    assert ("unit", "pressure") in found(profile, rows)


def test_celsius_for_kelvin_is_another_unit_and_a_hot_day_is_not(profile: ReferenceProfile) -> None:
    celsius, hot = world(200, 4), world(200, 4)
    celsius[:, 1] -= np.float32(273.15)
    hot[:, 1] += 60
    assert ("unit", "temperature") in found(profile, celsius)
    assert found(profile, hot) == {("range", "temperature")}


def test_a_feature_around_zero_has_no_order_of_magnitude(profile: ReferenceProfile) -> None:
    rows = world(200, 5)
    rows[:, 2] *= 1_000
    assert found(profile, rows) == {("range", "balance")}


def test_two_swapped_columns_are_both_named(profile: ReferenceProfile) -> None:
    rows = world(200, 6)
    rows[:, [0, 1]] = rows[:, [1, 0]]
    assert {("swapped", "pressure"), ("swapped", "temperature")} <= found(profile, rows)


def test_missing_and_new_categories_are_found_by_their_rate(profile: ReferenceProfile) -> None:
    some, many = world(200, 8), world(200, 8)
    some[:8, 2], some[:8, 4] = np.nan, 3
    many[:60, 2], many[:60, 4] = np.nan, 3
    assert found(profile, some) == set()
    assert found(profile, many) == {("missing", "balance"), ("category", "colour")}


def test_a_feature_that_is_gone_is_missing_and_nothing_else(profile: ReferenceProfile) -> None:
    rows = world(200, 9)
    rows[:, 0] = np.nan
    assert found(profile, rows) == {("missing", "pressure")}


def test_a_short_window_is_no_evidence(profile: ReferenceProfile) -> None:
    rows = world(49, 9)
    rows[:, 0] = np.nan
    assert found(profile, rows) == set()


def test_one_wild_value_is_no_fault(profile: ReferenceProfile) -> None:
    rows = world(200, 10)
    rows[17, :3] = 1e6
    assert found(profile, rows) == set()


def test_every_kind_has_a_code_of_its_own() -> None:
    assert len(set(FAULT_CODES.values())) == len(FAULT_CODES) == 6


# Said once, over once ------------------------------------------------------------------------------------------------

STUCK = Found("stuck", 3, 1.0)


def test_an_event_is_said_when_it_begins_and_when_it_is_over() -> None:
    book = FaultBook()
    said = [book.note(now, telling=True) for now in ([], [STUCK], [STUCK], [], [STUCK], [], [], [])]

    assert [[(c.kind, c.feature, c.raised) for c in changes] for changes in said] == [
        [], [("stuck", 3, True)], [], [], [], [], [("stuck", 3, False)], [],
    ]  # fmt: skip
    assert book.standing == []


def test_a_window_too_short_to_tell_ends_nothing() -> None:
    book = FaultBook()
    book.note([STUCK], telling=True)
    for _ in range(5):
        assert book.note([], telling=False) == []
    assert book.standing == [("stuck", 3)]


@given(
    windows=st.lists(st.sets(st.sampled_from([STUCK, Found("unit", 0, 0.9), Found("missing", 1, 0.5)])), max_size=20)
)
def test_beginnings_and_ends_take_turns(windows: list[set[Found]]) -> None:
    book = FaultBook()
    changes = [c for found in windows for c in book.note(sorted(found), telling=True)]
    for _ in range(CLEAN_WINDOWS):
        changes += book.note([], telling=True)

    for key in {(c.kind, c.feature) for c in changes}:
        turns = [c.raised for c in changes if (c.kind, c.feature) == key]
        assert turns == [True, False] * (len(turns) // 2)
    assert book.standing == []


# The tail ------------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 400), share=st.floats(0, 1), a=st.floats(0.5, 900), b=st.floats(1, 20_000))
def test_the_tail_is_scipys(n: int, share: float, a: float, b: float) -> None:
    x = min(n, int(np.ceil(n * share)))
    tail = beta_binomial_tail(x, n, a, b)
    known = float(betabinom.pmf(np.arange(x, n + 1), n, a, b).sum())  # its own `sf` is 1 less the rest
    if x <= n * a / (a + b):
        assert tail == 1.0
    elif known > 1e-13:
        assert tail == pytest.approx(known, rel=1e-6)
    assert beta_binomial_tail(n + 1, n, a, b) == 0.0
