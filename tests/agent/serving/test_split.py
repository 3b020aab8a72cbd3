"""A/B: the same key, the same arm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import ServingError
from lightship_agent.serving.split import Arm, Split

KEYS = [f"customer-{i}" for i in range(2_000)]


def split(share: float, **how: bool) -> Split:
    return Split((Arm("e1", 2, share, **how),))


@given(st.text(min_size=1, max_size=64), st.floats(0.01, 1.0))
def test_the_same_key_gets_the_same_arm_whenever_it_asks(key: str, share: float) -> None:
    assert len({split(share).choose(key) for _ in range(3)}) == 1


def test_the_share_of_the_keys_is_the_share() -> None:
    mine = [k for k in KEYS if split(0.3).choose(k) == 2]

    assert 0.27 < len(mine) / len(KEYS) < 0.33


def test_a_larger_share_only_adds_keys() -> None:
    few, more = ({k for k in KEYS if split(s).choose(k)} for s in (0.1, 0.4))

    assert few < more


def test_two_experiments_do_not_share_their_cards() -> None:
    first = {k for k in KEYS if Split((Arm("e1", 2, 0.5),)).choose(k)}
    second = {k for k in KEYS if Split((Arm("e2", 2, 0.5),)).choose(k)}

    assert 0.4 < len(first & second) / len(first) < 0.6


def test_of_two_arms_the_first_takes_its_share_and_the_second_of_what_is_left() -> None:
    both = Split((Arm("e1", 2, 0.5), Arm("e2", 3, 0.5)))
    found = [both.choose(k) for k in KEYS]

    assert 0.47 < found.count(2) / len(KEYS) < 0.53
    assert 0.22 < found.count(3) / len(KEYS) < 0.28


def test_without_a_key_the_champion_answers() -> None:
    assert {split(1.0).choose("") for _ in range(100)} == {None}


def test_where_single_requests_are_dealt_too_each_is_for_itself() -> None:
    found = [split(0.5, per_request=True).choose("") for _ in range(400)]

    assert set(found) == {None, 2}


def test_a_key_without_end_is_refused() -> None:
    with pytest.raises(ServingError) as refused:
        split(0.5).choose("k" * 257)

    assert refused.value.code == "serving.malformed"
