"""How far a device's reports have come: against a set, whatever order they come in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightship.monitoring.cursors import MAX_AHEAD, MAX_SPANS, Cursor

Step = tuple[str, int]
steps = st.lists(st.tuples(st.sampled_from(["take", "take", "take", "drop"]), st.integers(1, 40)), max_size=80)


@given(steps)
def test_each_record_is_taken_once_and_what_is_missing_is_exactly_what_was_not(story: list[Step]) -> None:
    cursor, taken, given_up = Cursor(), set[int](), set[int]()
    for what, n in story:
        if what == "drop":
            given_up |= {s for s in range(1, n) if s not in taken}
            cursor.drop_below(n)
        else:
            assert cursor.take(n) == (n not in taken and n not in given_up)
            if n not in given_up:
                taken.add(n)
    settled = taken | given_up
    assert all(s in settled for s in range(1, cursor.next_seq))
    assert cursor.next_seq not in settled
    highest = max(settled, default=0)
    asked = {s for first, last in cursor.missing() for s in range(first, last + 1)}
    assert asked == {s for s in range(cursor.next_seq, highest) if s not in settled}
    assert cursor.lost == len(given_up)
    assert cursor.waiting == len([s for s in taken if s > cursor.next_seq])


def test_spans_and_records_ahead_are_bounded_and_the_rest_is_left_to_the_device() -> None:
    scattered = Cursor()
    assert sum(scattered.take(s) for s in range(3, 1_000, 2)) == MAX_SPANS
    assert not scattered.take(10_001)
    many = Cursor()
    assert sum(many.take(s) for s in range(2, 10_000)) == MAX_AHEAD
    assert many.missing() == [(1, 1)]
    assert many.take(1)
    assert many.next_seq == MAX_AHEAD + 2
