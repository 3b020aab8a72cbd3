"""Plots are well-formed XML whatever they are given, and say in words what they show."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.web import figures, plots
from lightship.web.scales import DAY, HOUR, MINUTE, TimeScale, ValueScale, duration, moment, number

SVG = "{http://www.w3.org/2000/svg}"
NOON = 1_750_000_000_000

times = st.integers(min_value=-(2**53), max_value=2**53)
values = st.none() | st.floats()
words = st.text(max_size=40)
points = st.lists(st.tuples(times, values), max_size=12).map(lambda p: sorted(p, key=lambda x: x[0]))
series = st.builds(plots.Series, words, points, words)
marks = st.lists(st.builds(plots.Mark, times, words), max_size=4)
bands = st.lists(st.builds(plots.Band, times, st.none() | times, words, words), max_size=3)
dots = st.lists(st.builds(plots.Dot, times, st.floats(), words, words), max_size=3)
lanes = st.lists(
    st.builds(plots.Lane, words, st.lists(st.builds(plots.Span, times, st.none() | times, words, words), max_size=4)),
    max_size=6,
)


def tree(markup: str) -> ET.Element:
    """Parsed; and nothing in it that a strict content policy or a second copy on the page would break."""
    root = ET.fromstring(markup)
    for element in root.iter():
        assert not {"style", "id"} & set(element.attrib)
        assert element.tag.rsplit("}", 1)[-1] not in ("script", "style")
        assert not any(name.startswith("on") for name in element.attrib)
    return root


def everything_said(markup: str) -> str:
    return " ".join(tree(markup).itertext())


def lines(markup: str, css: str = "line") -> list[ET.Element]:
    return [e for e in tree(markup).iter(f"{SVG}polyline") if css in e.get("class", "").split()]


def numbers_in(markup: str) -> list[float]:
    attributes = ("x", "y", "width", "height", "x1", "x2", "y1", "y2", "cx", "cy")
    found = [e.get(a, "").rstrip("%") for e in tree(markup).iter() for a in attributes if e.get(a)]
    return [float(v) for v in found]


@settings(max_examples=120, deadline=None)
@given(
    st.lists(series, max_size=16),
    words,
    words,
    marks,
    bands,
    dots,
    st.none() | st.tuples(times, times),
    st.booleans(),
    st.booleans(),
)
def test_a_line_chart_of_anything_is_well_formed_and_finite(
    found: list[plots.Series],
    title: str,
    label: str,
    marked: list[plots.Mark],
    banded: list[plots.Band],
    dotted: list[plots.Dot],
    span: tuple[int, int] | None,
    root: bool,
    percent: bool,
) -> None:
    markup = plots.line_chart(
        found,
        title=title,
        y_label=label,
        marks=marked,
        bands=banded,
        dots=dotted,
        times=span,
        root=root,
        percent=percent,
    )
    assert all(math.isfinite(v) for v in numbers_in(markup))


@settings(max_examples=80, deadline=None)
@given(lanes, words, marks, st.none() | st.tuples(times, times))
def test_a_timeline_of_anything_is_well_formed_and_finite(
    found: list[plots.Lane], title: str, marked: list[plots.Mark], span: tuple[int, int] | None
) -> None:
    markup = plots.timeline(found, title=title, marks=marked, times=span)
    assert all(math.isfinite(v) for v in numbers_in(markup))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(), max_size=30), st.lists(st.floats(), max_size=30), words, st.lists(words, max_size=30))
def test_a_histogram_of_anything_is_well_formed_and_finite(
    then: list[float], now: list[float], title: str, cells: list[str]
) -> None:
    markup = plots.histogram_pair(then, now, title, cells=cells, ends=(title, title))
    assert all(math.isfinite(v) for v in numbers_in(markup))


@settings(max_examples=80, deadline=None)
@given(st.lists(values, max_size=40), words)
def test_a_sparkline_of_anything_is_well_formed_and_finite(found: list[float | None], title: str) -> None:
    markup = plots.sparkline(found, title=title)
    assert all(math.isfinite(v) for v in numbers_in(markup))


def test_words_from_outside_stay_words() -> None:
    nasty = "<script>alert('x')</script>\x00\ud800 & \"co\""
    span = plots.Span(NOON, None, nasty, 'x" onload="alert(1)')
    chart = plots.line_chart(
        [plots.Series(nasty, [(NOON, 0.5), (NOON + 1, 0.6)], nasty), plots.Series("b", [(NOON, 0.4)])],
        title=nasty,
        y_label=nasty,
        marks=[plots.Mark(NOON, nasty)],
        bands=[plots.Band(NOON, None, nasty, nasty)],
    )
    for markup in (chart, plots.timeline([plots.Lane(nasty, [span])], title=nasty), plots.sparkline([1], title=nasty)):
        assert "<script" not in markup
        assert "<script>alert('x')</script>�� & \"co\"" in everything_said(markup)


def test_a_chart_without_a_value_says_so() -> None:
    empty: Sequence[Sequence[plots.Series]] = ([], [plots.Series("a", [])], [plots.Series("a", [(NOON, None)])])
    for found in empty:
        assert "No data yet." in everything_said(plots.line_chart(found, title="t", y_label="y"))


def test_a_single_point_is_a_dot_and_not_a_line() -> None:
    markup = plots.line_chart([plots.Series("a", [(NOON, 0.5)])], title="t", y_label="y")
    assert not lines(markup)
    assert len(list(tree(markup).iter(f"{SVG}circle"))) == 1


def test_a_gap_breaks_the_line_in_two() -> None:
    gap = [(NOON, 1.0), (NOON + 1, 2.0), (NOON + 2, None), (NOON + 3, math.nan), (NOON + 4, 2.0), (NOON + 5, 3.0)]
    assert len(lines(plots.line_chart([plots.Series("a", gap)], title="t", y_label="y"))) == 2


def test_of_many_devices_only_the_worst_have_colours_and_names() -> None:
    found = [plots.Series(f"d{i}", [(NOON, 0.9), (NOON + 1, i / 40)]) for i in range(30)]
    markup = plots.line_chart(found, title="t", y_label="y", low_is_worse=True)
    assert len(lines(markup, "rest")) == 26
    labels = {e.text for e in tree(markup).iter(f"{SVG}text") if "end-label" in e.get("class", "")}
    assert labels == {"d0", "d1", "d2", "d3"}
    assert "26 others" in everything_said(markup)


def test_names_at_the_ends_of_lines_never_cover_each_other() -> None:
    found = [plots.Series(f"d{i}", [(NOON, 0.5), (NOON + 1, 0.5)]) for i in range(12)]
    markup = plots.line_chart(found, title="t", y_label="y", height=180)
    places = sorted(float(e.get("y", 0)) for e in tree(markup).iter(f"{SVG}text") if "end-label" in e.get("class", ""))
    assert len(places) == 12
    assert all(b - a >= 12.9 for a, b in itertools.pairwise(places))


def test_a_long_line_is_thinned_but_keeps_its_extremes() -> None:
    found = [(NOON + i, 9.0 if i == 7_777 else 1.0 + (i % 3) / 10) for i in range(20_000)]
    markup = plots.line_chart([plots.Series("a", found)], title="t", y_label="y")
    drawn = lines(markup)[0].get("points", "").split()
    assert len(drawn) <= plots.MAX_POINTS + 2
    assert min(float(p.split(",")[1]) for p in drawn) < 20  # the one high point is near the top


def test_what_lies_outside_the_given_times_is_left_out() -> None:
    found = [plots.Series("a", [(NOON, 1.0), (NOON + 10, 1.0), (NOON + 20, 1.0), (NOON + 99, 5.0)])]
    late = [plots.Mark(NOON + 99, "later")]
    markup = plots.line_chart(found, title="t", y_label="y", times=(NOON, NOON + 20), marks=late)
    assert len(lines(markup)[0].get("points", "").split()) == 3
    assert "later" not in everything_said(markup)


def test_a_lasting_span_reaches_the_end_and_a_short_one_is_there() -> None:
    spans = [plots.Span(NOON, NOON + 1, "v1"), plots.Span(NOON + 1, None, "v2")]
    markup = plots.timeline([plots.Lane("d", spans)], title="t", times=(NOON, NOON + 10 * HOUR))
    drawn = [e for e in tree(markup).iter(f"{SVG}svg") if "span" in e.get("class", "").split()]
    assert [e.get("class") for e in drawn] == ["span ", "span  lasting"]
    assert drawn[1].get("width") == "100.00%"


def test_both_histograms_are_shares_of_their_own_sum() -> None:
    markup = plots.histogram_pair([10, 30], [3, 1], "pixel", cells=["low", "high"])
    assert "low: reference 25.0 %, now 75.0 %" in everything_said(markup)


def test_a_sparkline_without_a_value_is_a_dash_with_its_reason() -> None:
    root = tree(plots.sparkline([None, None], title="no labels yet"))
    assert (root.text, root.get("title")) == ("–", "no labels yet")


def test_every_picture_has_a_title_and_a_description() -> None:
    chart = tree(plots.line_chart([plots.Series("a", [(NOON, 0.5), (NOON + 1, 0.7)])], title="Drift", y_label="y"))
    svg = next(e for e in chart.iter(f"{SVG}svg") if e.get("role") == "img")
    title, desc = svg.find(f"{SVG}title"), svg.find(f"{SVG}desc")
    assert title is not None
    assert desc is not None
    assert title.text == "Drift"
    assert "a ends at 0.7" in (desc.text or "")


@pytest.mark.parametrize(
    ("span", "pattern"),
    [
        (30_000, r"\d\d:\d\d:\d\d"),
        (20 * MINUTE, r"\d\d:\d\d"),
        (3 * DAY, r"\d\d \w{3} \d\d:\d\d"),
        (60 * DAY, r"\d\d \w{3}"),
    ],
)
def test_time_ticks_read_as_their_span_requires(span: int, pattern: str) -> None:
    ticks = TimeScale(NOON, NOON + span).ticks()
    assert 2 <= len(ticks) <= 9
    assert all(re.fullmatch(pattern, t.text) for t in ticks)


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e9), st.booleans())
def test_value_ticks_are_few_ordered_and_inside(low: float, span: float, root: bool) -> None:
    ticks = ValueScale.over([low, low + span], root=root).ticks()
    assert 1 <= len(ticks) <= 10
    assert [t.at for t in ticks] == sorted(t.at for t in ticks)
    assert all(0 <= t.at <= 1 for t in ticks)


def test_numbers_and_lengths_read_well() -> None:
    assert [number(0.1 + 0.2, 0.1), number(0.5, 0.1, percent=True), number(1e-9)] == ["0.3", "50 %", "1e-09"]
    assert [duration(4.25), duration(61), duration(3_600), duration(90_000), duration(-1)] == [
        "4.2 s",
        "1 min 1 s",
        "1 h",
        "1 d 1 h",
        "–",
    ]
    assert moment(2**60).endswith(" ms")


def test_devices_are_listed_as_people_count() -> None:
    assert sorted(["meter-10", "meter-2", "a", "10", "9"], key=figures.natural) == [
        "a",
        "meter-2",
        "meter-10",
        "9",
        "10",
    ]
