"""Counts of latencies add up exactly, and a quantile of them is close."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import WireError
from lightship_agent.contract.latency import (
    CELLS,
    EDGES,
    EDGES_NS,
    OCTAVES,
    cell,
    cumulative,
    grown,
    merged,
    quantile,
    trimmed,
)
from lightship_agent.contract.messages import Running
from lightship_agent.contract.wire import decode, encode

SECONDS = st.floats(0, 200, allow_nan=False)
MANY = st.lists(SECONDS, max_size=60)


def counted(seconds: list[float]) -> tuple[int, ...]:
    counts = [0] * CELLS
    for s in seconds:
        counts[cell(s)] += 1
    return trimmed(counts)


def test_the_edges_are_those_that_devices_in_the_field_count_with() -> None:
    assert (len(EDGES_NS), EDGES_NS[:5], EDGES_NS[-1]) == (
        41,
        (32_000, 45_255, 64_000, 90_510, 128_000),
        33_554_432_000,
    )
    assert sum(EDGES_NS) == 114_561_919_558


@given(a=MANY, b=MANY, c=MANY)
def test_counted_apart_and_merged_is_counted_together(a: list[float], b: list[float], c: list[float]) -> None:
    assert merged([counted(a), counted(b), counted(c)]) == counted([*c, *a, *b])


@given(MANY, MANY)
def test_what_was_counted_between_two_readings_is_their_difference(a: list[float], b: list[float]) -> None:
    assert grown(counted(a), counted([*a, *b])) == counted(b)


def test_where_counting_began_anew_all_of_it_is_new() -> None:
    assert grown((0, 5, 3), (0, 2, 4)) == (0, 2, 4)


@given(st.lists(st.floats(32e-6, 33.0), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_is_within_its_cell(seconds: list[float], share: float) -> None:
    exact = sorted(seconds)[max(0, math.ceil(share * len(seconds)) - 1)]

    found = quantile(counted(seconds), share)

    assert found is not None
    assert exact / math.sqrt(2) <= found * 1.000001
    assert found <= exact * math.sqrt(2) * 1.000001


def test_of_nothing_there_is_no_quantile_and_beyond_the_last_edge_it_is_that_edge() -> None:
    assert quantile((), 0.5) is None
    assert quantile(counted([100.0]), 0.5) == EDGES[-1]


@given(MANY)
def test_what_is_exposed_by_octave_counts_what_took_at_most_so_long(seconds: list[float]) -> None:
    assert cumulative(counted(seconds)) == tuple(sum(s <= edge for s in seconds) for edge in OCTAVES)


@pytest.mark.parametrize("latencies", [(1,) * (CELLS + 1), (-1,), (2**60,)])
def test_counts_that_fit_no_cells_are_refused(latencies: tuple[int, ...]) -> None:
    running = msgspec.structs.replace(Running(model="m", version=1, digest="a" * 64, since=1), latencies=latencies)

    with pytest.raises(WireError):
        decode(encode(running), Running)
