"""The ring keeps the newest rows, in order, and counts what it lost."""

from __future__ import annotations

import threading
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.monitor.ring import NO_CLASS, RowRing


def numbered(first: int, n: int, width: int = 3) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Rows that carry their own number."""
    return np.repeat(np.arange(first, first + n, dtype=np.float32)[:, None], width, axis=1)


def push(ring: RowRing, first: int, n: int) -> None:
    numbers = np.arange(first, first + n)
    ring.push(numbered(first, n), numbers, numbers.astype(np.float32) / np.float32(1000), f"r{first}")


@given(pushes=st.lists(st.integers(1, 12), max_size=30), capacity=st.integers(1, 25))
def test_what_comes_out_is_the_newest_of_what_went_in(pushes: list[int], capacity: int) -> None:
    ring, total = RowRing(capacity, 3), 0
    for n in pushes:
        push(ring, total, n)
        total += n

    block = ring.drain()

    kept = list(range(max(0, total - capacity), total))
    assert block.rows[:, 0].tolist() == kept
    assert block.labels.tolist() == kept
    assert np.allclose(block.top_scores, np.array(kept) / 1000)
    assert ring.dropped == total - len(kept)


@given(pushes=st.lists(st.integers(1, 12), min_size=1, max_size=30), capacity=st.integers(1, 25))
def test_every_kept_row_is_found_through_its_request(pushes: list[int], capacity: int) -> None:
    ring, total = RowRing(capacity, 3), 0
    for n in pushes:
        push(ring, total, n)
        total += n

    block = ring.drain()

    found = {}
    requests = block.requests
    for name, first, rows in zip(requests.ids, requests.firsts.tolist(), requests.rows.tolist(), strict=True):
        for i in range(max(0, -first), rows):
            found[first + i] = int(name[1:]) + i
    assert found == dict(enumerate(block.labels.tolist()))


def push_somehow(ring: RowRing, how: str, first: int, n: int) -> list[str]:
    """Push n rows: one by one, together, or as those of one request; the id that each of them is found by."""
    rows, numbers = numbered(first, n), list(range(first, first + n))
    names = [f"r{number}" for number in numbers]
    if how == "one request":
        push(ring, first, n)
        return [f"r{first}+{i}" if n > 1 else f"r{first}" for i in range(n)]
    if how == "together":
        ring.push_rows(rows, numbers, [number / 1000 for number in numbers], names)
        return names
    for row, number, name in zip(rows, numbers, names, strict=True):
        ring.push_row(row, number, number / 1000, name)
    return names


@given(
    pushes=st.lists(st.tuples(st.sampled_from(["alone", "together", "one request"]), st.integers(1, 9)), max_size=30),
    capacity=st.integers(1, 25),
)
def test_however_rows_are_pushed_they_are_the_same_rows_of_the_same_requests(
    pushes: list[tuple[str, int]], capacity: int
) -> None:
    ring, names = RowRing(capacity, 3), []
    for _ in range(2):  # the second buffer, and then the first again
        names = []
        for how, n in pushes:
            names += push_somehow(ring, how, len(names), n)
        block = ring.drain()
    kept = list(range(len(names)))[max(0, len(names) - capacity) :]

    found = {}
    requests = block.requests
    for name, first, rows in zip(requests.ids, requests.firsts.tolist(), requests.rows.tolist(), strict=True):
        for i in range(max(0, -first), rows):
            found[first + i] = f"{name}+{i}" if rows > 1 else name

    assert block.rows[:, 0].tolist() == block.labels.tolist() == kept
    assert np.allclose(block.top_scores, np.array(kept) / 1000)
    assert [found[i] for i in range(len(kept))] == [names[i] for i in kept]
    assert requests.firsts.tolist() == sorted(requests.firsts.tolist())


@given(pushes=st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=40))
def test_draining_in_between_loses_nothing(pushes: list[tuple[int, bool]]) -> None:
    ring, total, seen = RowRing(1_000, 3), 0, []
    for n, drain in pushes:
        push(ring, total, n)
        total += n
        if drain:
            seen += ring.drain().labels.tolist()
    seen += ring.drain().labels.tolist()
    assert seen == list(range(total))
    assert ring.dropped == 0


@given(pushes=st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=30), asked=st.integers(0, 40))
def test_the_newest_rows_are_told_drained_or_not(pushes: list[tuple[int, bool]], asked: int) -> None:
    ring, total, since, before = RowRing(9, 3), 0, 0, 0
    for n, drained in pushes:
        push(ring, total, n)
        total, since = total + n, since + n
        if drained:
            ring.drain()
            ring.drain()  # of nothing, which changes nothing
            before, since = since, 0

    told = ring.newest(asked)[:, 0].tolist()

    # Each buffer holds nine rows at most; what is told has no holes.
    held = 9 if since > 9 else since + min(before, 9)
    assert told == list(range(total - min(asked, held), total))


def test_a_drained_block_is_not_touched_by_later_pushes() -> None:
    ring = RowRing(4, 3)
    push(ring, 0, 4)
    block = ring.drain()
    for first in (10, 20, 30):
        push(ring, first, 4)
        ring.drain()
    assert block.labels.tolist() == [0, 1, 2, 3]
    assert not np.shares_memory(block.rows, ring.drain().rows)


def test_a_regressor_has_neither_class_nor_score() -> None:
    ring = RowRing(8, 3)
    ring.push(numbered(0, 1), None, None, "one")
    ring.push(numbered(1, 2), None, None, "two")
    block = ring.drain()
    assert block.labels.tolist() == [NO_CLASS] * 3
    assert np.isnan(block.top_scores).all()


def test_eight_pushers_and_a_drainer_account_for_every_row() -> None:
    ring, drained = RowRing(512, 3), 0

    def work() -> None:
        for i in range(600):
            push(ring, i, 1 + i % 3)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        drained += len(ring.drain())
    for thread in threads:
        thread.join()
    drained += len(ring.drain())
    assert drained + ring.dropped == 8 * sum(1 + i % 3 for i in range(600))


def test_the_cost_of_a_push_is_shown() -> None:
    ring, row, label = RowRing(4_096, 30), np.zeros((1, 30), np.float32), np.zeros(1, np.int64)
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        for _ in range(1_000):
            ring.push(row, label, 0.5, "id")
        best = min(best, (time.perf_counter() - begun) * 1_000)
    print(f"ring push: {best:.2f} µs a row of 30")
    assert len(ring.drain()) == 4_096
