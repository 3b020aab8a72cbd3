"""Windows are a function of the rows' order, never of how they were pushed."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.agent.conftest import Floats, Kind, build, training_rows

from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.messages import Fault, Together, Window
from lightship_agent.contract.moments import Distance, Moments, Standardiser, moments_of, products_of
from lightship_agent.contract.profile import Binner, WindowCounts, count_outputs, empty_counts
from lightship_agent.monitor.stream import StreamMonitor
from lightship_agent.runtime.model import LoadedModel, load_model


@functools.cache
def model(kind: Kind = "three-classes") -> LoadedModel:
    return load_model(read_bundle(build(kind=kind)), since_ms=1)


@functools.cache
def answered(kind: Kind = "three-classes") -> tuple[Floats, np.ndarray, np.ndarray]:
    rows = training_rows(300, seed=3) * np.float32(1.5)
    found = model(kind).predict(rows)
    labels = np.full(300, -1) if found.labels is None else found.labels
    tops = found.values[:, 0] if found.scores is None else found.scores.max(axis=1)
    return rows, labels, tops


def feed(stream: StreamMonitor, cuts: Iterable[int], kind: Kind = "three-classes", now: int = 5) -> list[Window]:
    rows, labels, tops = answered(kind)
    windows, at = [], 0
    for end in [*sorted(cuts), len(rows)]:
        windows += stream.push(rows[at:end], labels[at:end], tops[at:end], now)
        at = end
    return windows


def counts_of(window: Window) -> WindowCounts:
    return window.content()


@functools.cache
def aside_of(size: int) -> list[Together | Fault]:
    stream = StreamMonitor(model(), size)
    feed(stream, [])
    return stream.take_aside()


@given(cuts=st.lists(st.integers(0, 300), max_size=20), size=st.integers(1, 120))
def test_splitting_the_pushes_never_changes_a_window(cuts: list[int], size: int) -> None:
    whole = feed(StreamMonitor(model(), size), [])
    stream = StreamMonitor(model(), size)
    split = feed(stream, cuts)
    assert split == whole
    assert stream.take_aside() == aside_of(size)
    assert [w.w for w in whole] == list(range(300 // size))
    assert all(w.rows == size for w in whole)


@pytest.mark.parametrize("kind", ["classifier", "three-classes", "regressor"])
@pytest.mark.parametrize("size", [1, 7, 64, 300, 1_000])
def test_the_windows_together_are_the_counts_of_all_rows(kind: Kind, size: int) -> None:
    stream = StreamMonitor(model(kind), size)
    windows = feed(stream, [11, 12, 200], kind) + stream.flush(6)

    profile = model(kind).profile
    merged = sum((counts_of(w) for w in windows), empty_counts(profile))

    rows = answered(kind)[0]
    assert merged.rows == 300
    assert list(merged.counts) == Binner(profile.features).count(rows).tolist()
    found = model(kind).predict(rows)
    if found.labels is not None:
        predictions, scores = count_outputs(found.labels, found.scores, len(profile.labels))
        assert list(merged.predictions) == predictions.tolist()
        assert list(merged.scores) == scores.tolist()


def test_a_flush_closes_early_and_the_next_row_starts_the_next_window() -> None:
    stream = StreamMonitor(model(), 50)
    rows, labels, tops = answered()
    assert stream.push(rows[:60], labels[:60], tops[:60], 10)[0].w == 0
    (early,) = stream.flush(20)
    (full,) = stream.push(rows[60:110], labels[60:110], tops[60:110], 30)
    assert (early.w, early.rows, early.opened, early.t) == (1, 10, 10, 20)
    assert (full.w, full.rows, full.opened) == (2, 50, 30)
    assert stream.flush(40) == []


def test_a_flush_exactly_at_a_border_adds_nothing() -> None:
    stream = StreamMonitor(model(), 300)
    assert len(feed(stream, [])) == 1
    assert stream.flush(9) == []
    assert stream.window == 1


def test_refused_rows_are_counted_in_the_open_window_without_being_rows() -> None:
    stream = StreamMonitor(model(), 300)
    stream.refuse(3, 4)
    (window,) = feed(stream, [])
    assert (window.invalid, window.rows, window.opened) == (3, 300, 4)
    stream.refuse(2, 8)
    (only_refused,) = stream.flush(9)
    assert (only_refused.rows, only_refused.invalid, only_refused.w) == (0, 2, 1)


@given(cuts=st.lists(st.integers(0, 300), max_size=8), size=st.integers(1, 90), first=st.integers(0, 5))
def test_the_announced_windows_are_the_ones_the_rows_land_in(cuts: list[int], size: int, first: int) -> None:
    stream = StreamMonitor(model(), size, first_window=first)
    rows, labels, tops = answered()
    announced: list[int] = []
    closed: list[Window] = []
    at = 0
    for end in [*sorted(cuts), 300]:
        announced += stream.windows_of(end - at, 1).tolist()
        closed += stream.push(rows[at:end], labels[at:end], tops[at:end], 1)
        at = end
    closed += stream.flush(2)
    assert [(w.w, w.rows) for w in closed] == [(w, announced.count(w)) for w in sorted(set(announced))]
    assert min(announced) == first


@given(
    steps=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 700)), min_size=1, max_size=30),
    size=st.integers(1, 60),
    least=st.integers(1, 2_000),
)
def test_a_window_is_never_younger_than_its_least_age_and_loses_no_row(
    steps: list[tuple[int, int]], size: int, least: int
) -> None:
    stream = StreamMonitor(model(), size, min_age_ms=least)
    rows, labels, tops = answered()
    announced: list[int] = []
    closed: list[Window] = []
    now = 1_000
    for count, later in steps:
        now += later
        announced += stream.windows_of(count, now).tolist()
        closed += stream.push(rows[:count], labels[:count], tops[:count], now)
    full = len(closed)
    closed += stream.flush(now)

    assert [(w.w, w.rows) for w in closed] == [(w, announced.count(w)) for w in sorted(set(announced))]
    assert all(w.t - w.opened >= least and w.rows >= size for w in closed[:full])
    assert sum(w.rows for w in closed) == sum(count for count, _ in steps)


def test_a_full_window_that_grew_old_without_rows_is_due_and_the_next_row_closes_it() -> None:
    stream = StreamMonitor(model(), 50, min_age_ms=1_000)
    rows, labels, tops = answered()
    assert stream.push(rows[:80], labels[:80], tops[:80], 0) == []
    assert not stream.is_due(999)
    assert stream.is_due(1_000)
    (closed,) = stream.push(rows[:1], labels[:1], tops[:1], 1_500)

    assert (closed.w, closed.rows, closed.t, stream.open_rows) == (0, 80, 1_500, 1)


def test_a_clock_that_is_set_back_does_not_keep_a_window_open_for_ever() -> None:
    stream = StreamMonitor(model(), 50, min_age_ms=1_000)
    rows, labels, tops = answered()
    stream.push(rows[:80], labels[:80], tops[:80], 10_000_000)
    stream.set_back(5_000)

    assert not stream.is_due(5_999)
    assert stream.is_due(6_000)


# Moments, distances, products, values --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 64, 300])
def test_moments_products_and_distances_of_the_windows_are_those_of_all_rows(size: int) -> None:
    reference = model().profile.moments
    assert reference is not None
    assert reference.distance is not None
    stream = StreamMonitor(model(), size)
    windows = feed(stream, [11, 12, 200]) + stream.flush(6, last=True)

    steps = Standardiser(reference.scales).steps(answered()[0])
    pairs, (sums, squares, lags) = moments_of(steps)
    merged = sum((counts_of(w) for w in windows), empty_counts(model().profile))
    together = [t for t in stream.take_aside() if isinstance(t, Together)]

    assert merged.moments == Moments(
        rows=300, pairs=pairs, sums=tuple(sums.tolist()), squares=tuple(squares.tolist()), lags=tuple(lags.tolist())
    )
    assert sum(merged.distances) == 300
    distances = Distance(reference.inverse, 4).of(steps)
    assert list(merged.distances) == Binner([reference.distance]).count(distances).tolist()
    assert sum(t.products.rows for t in together) == 300
    assert [sum(c) for c in zip(*(t.products.sums for t in together), strict=True)] == products_of(steps).tolist()


def test_products_travel_with_every_eighth_window_and_say_which() -> None:
    stream = StreamMonitor(model(), 10)
    windows = feed(stream, [])
    together = [t for t in stream.take_aside() if isinstance(t, Together)]
    assert [(t.first, t.w, t.products.rows) for t in together] == [(0, 7, 80), (8, 15, 80), (16, 23, 80)]
    assert len(windows) == 30
    stream.flush(6, last=True)
    (rest,) = stream.take_aside()
    assert isinstance(rest, Together)
    assert (rest.first, rest.w, rest.products.rows) == (24, 29, 60)


def test_a_regressors_values_are_counted_in_the_cells_of_its_profile() -> None:
    stream = StreamMonitor(model("regressor"), 100)
    windows = feed(stream, [], "regressor")
    values = answered("regressor")[2]
    bins = model("regressor").profile.values
    assert bins is not None
    total = np.array([w.content().values for w in windows]).sum(axis=0)
    assert total.tolist() == Binner([bins]).count(values[:, None]).tolist()
    assert windows[0].predictions == windows[0].scores == ()


def test_a_profile_of_an_older_release_counts_what_it_knows() -> None:
    whole = model()
    older = msgspec.structs.replace(whole, profile=msgspec.structs.replace(whole.profile, moments=None))
    stream = StreamMonitor(older, 100)
    windows = feed(stream, [])
    assert [w.counts for w in windows] == [w.counts for w in feed(StreamMonitor(whole, 100), [])]
    assert {(w.moments, w.distances, w.values) for w in windows} == {(None, (), ())}
    assert stream.take_aside() == []
