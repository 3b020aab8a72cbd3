"""Counts of faults are sparse, and merge by addition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.quality import FOUND, REFUSED, WHOLE, QualityCount, merge_quality

KINDS = sorted({**REFUSED, **FOUND})
SOME = st.lists(
    st.builds(QualityCount, st.sampled_from(KINDS), st.integers(WHOLE, 3), st.integers(0, 2**40)), max_size=8
).map(tuple)


@given(a=SOME, b=SOME, c=SOME)
def test_merge_is_associative_and_commutative(
    a: tuple[QualityCount, ...], b: tuple[QualityCount, ...], c: tuple[QualityCount, ...]
) -> None:
    assert merge_quality(merge_quality(a, b), c) == merge_quality(a, merge_quality(b, c))
    assert merge_quality(a, b) == merge_quality(b, a)


@given(a=SOME, b=SOME)
def test_nothing_is_lost_and_nothing_is_there_that_did_not_happen(
    a: tuple[QualityCount, ...], b: tuple[QualityCount, ...]
) -> None:
    merged = merge_quality(a, b)

    assert sum(q.count for q in merged) == sum(q.count for q in (*a, *b))
    assert all(q.count for q in merged)
    assert len({(q.kind, q.feature) for q in merged}) == len(merged)


def test_no_kind_is_both_of_refused_rows_and_of_windows() -> None:
    assert not set(REFUSED) & set(FOUND)
    assert all(len(kind) <= 16 for kind in KINDS)
