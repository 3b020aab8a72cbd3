"""The token bucket: whoever waits as told stays within the rate, and gets it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.update.rate import TokenBucket, bucket_for

amounts = st.lists(st.integers(0, 100_000), min_size=1, max_size=50)
rates = st.floats(1.0, 1e7)


@given(rates, amounts, st.lists(st.floats(0, 5), min_size=50, max_size=50))
def test_whoever_waits_as_told_never_gets_more_than_the_rate_the_bucket_and_one_chunk(
    rate: float, chunks: list[int], idle: list[float]
) -> None:
    bucket, now, got = TokenBucket(rate), 0.0, 0

    for chunk, extra in zip(chunks, idle, strict=False):
        got += chunk
        now += bucket.take(chunk, now) + extra
        assert got - max(chunks) <= bucket.burst + rate * now * (1 + 1e-9) + 1e-6


@given(rates, amounts)
def test_a_wait_is_no_longer_than_the_rate_demands(rate: float, chunks: list[int]) -> None:
    bucket, now = TokenBucket(rate, burst=0.0), 0.0

    for chunk in chunks:
        now += bucket.take(chunk, now)

    assert now == pytest.approx(sum(chunks) / rate, rel=1e-6, abs=1e-6)


@given(rates, st.floats(0, 1e9))
def test_a_bucket_that_rested_gives_its_burst_and_no_more(rate: float, rest: float) -> None:
    bucket = TokenBucket(rate, burst=1_000)
    bucket.take(0, 0.0)

    assert bucket.take(1_000, rest) == 0
    assert bucket.take(1_000, rest) == pytest.approx(1_000 / rate)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(-1e6, 1e6)), min_size=1, max_size=30))
def test_a_clock_that_jumps_back_neither_fills_the_bucket_nor_stops_it(takes: list[tuple[int, float]]) -> None:
    bucket = TokenBucket(1_000)
    total = sum(amount for amount, _ in takes)

    for amount, now in takes:
        assert 0 <= bucket.take(amount, now) <= total / 1_000


def test_no_cap_is_no_bucket_and_a_kilobyte_is_a_thousand_bytes() -> None:
    bucket = bucket_for(5)

    assert bucket_for(0) is None
    assert bucket is not None
    assert (bucket.rate, bucket.burst) == (5_000, 1_250)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_never_earns_is_a_bug(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        TokenBucket(rate)
