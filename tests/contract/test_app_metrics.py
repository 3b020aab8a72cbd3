"""The application's numbers: taken whole or not at all, bounded, and the same whether counted here or there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.app_metrics import EDGES, MAX_METRICS, AppHistogram, AppNumbers, AppSample, Registry
from lightship_agent.contract.codes import ServingError


def told(name: str = "parts", kind: Any = "counter", **values: Any) -> AppSample:
    return AppSample(name=name, kind=kind, **values)


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    made.take(
        [
            told(value=2.0),
            told("oven", "gauge", value=-3.5),
            told("cycle", "histogram", values=(1.0, 3.0), edges=(1.0, 2.0)),
        ]
    )
    return made


def test_counters_add_gauges_are_set_and_histograms_count(registry: Registry) -> None:
    registry.take([told(value=0.5), told("oven", "gauge", value=9.0), told("cycle", "histogram", values=(0.5, 2.0))])

    assert registry.numbers.counters == {"parts": 2.5}
    assert registry.numbers.gauges == {"oven": 9.0}
    assert registry.numbers.histograms == {"cycle": AppHistogram(edges=(1.0, 2.0), counts=(2, 1, 1), sum=6.5)}


REFUSED = [
    (told("Parts", value=1.0), "serving.metric-name"),
    (told("a" * 65, value=1.0), "serving.metric-name"),
    (told("", value=1.0), "serving.metric-name"),
    (told('x{y="1"}', value=1.0), "serving.metric-name"),
    (told("parts\n", value=1.0), "serving.metric-name"),
    (told("parts_total", value=1.0), "serving.metric-name"),
    (told("parts", "gauge", value=1.0), "serving.metric-kind"),
    (told("cycle", "histogram", values=(1.0,), edges=(1.0, 5.0)), "serving.metric-kind"),
    (told(value=-1.0), "serving.metric-value"),
    (told(value=float("nan")), "serving.metric-value"),
    (told(value=1.7e308), "serving.metric-value"),
    (told(), "serving.metric-value"),
    (told("oven", "gauge", value=float("inf")), "serving.metric-value"),
    (told("oven", "gauge", value=1.0, values=(1.0,)), "serving.metric-value"),
    (told("cycle", "histogram", value=1.0), "serving.metric-value"),
    (told("cycle", "histogram", values=(float("nan"),)), "serving.metric-value"),
    (told("cycle", "histogram", counts=(1,)), "serving.metric-value"),
    (told("cycle", "histogram", counts=(2**53, 0, 0)), "serving.metric-value"),
    (told("other", "histogram", values=(1.0,), edges=(2.0, 1.0)), "serving.metric-value"),
]


@pytest.mark.parametrize(("sample", "code"), REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_told_with_it_is_taken(
    registry: Registry, sample: AppSample, code: str
) -> None:
    before = registry.numbers
    first = told("parts", value=1.7e308) if sample.value == 1.7e308 else told("parts", value=7.0)

    with pytest.raises(ServingError) as refused:
        registry.take([first, sample])

    assert (refused.value.code, registry.numbers) == (code, before)


def test_a_name_too_many_is_refused_and_the_known_ones_still_count() -> None:
    registry = Registry()
    registry.take([told(f"n{i}", value=1.0) for i in range(MAX_METRICS)])

    with pytest.raises(ServingError) as refused:
        registry.take([told("one_more", "gauge", value=1.0)])

    registry.take([told("n0", value=1.0)])
    assert (refused.value.code, len(registry.numbers), registry.numbers.counters["n0"]) == (
        "serving.metric-full",
        MAX_METRICS,
        2.0,
    )


@given(st.lists(st.floats(-1e6, 1e6), max_size=50), st.lists(st.floats(-1e6, 1e6), max_size=50))
def test_values_counted_in_the_application_are_as_if_each_was_told(a: list[float], b: list[float]) -> None:
    apart, together, there = Registry(), Registry(), Registry()
    apart.take([told("x", "histogram", values=tuple(a))])
    there.take([told("x", "histogram", values=tuple(b))])
    counted = there.numbers.histograms["x"]

    apart.take([told("x", "histogram", counts=counted.counts, sum=counted.sum)])
    together.take([told("x", "histogram", values=(*a, *b))])

    ours, theirs = apart.numbers.histograms["x"], together.numbers.histograms["x"]
    assert (ours.counts, ours.edges) == (theirs.counts, EDGES)
    assert ours.sum == pytest.approx(theirs.sum, abs=1e-6)


def test_of_nothing_there_are_no_numbers() -> None:
    assert (len(AppNumbers()), Registry().numbers) == (0, AppNumbers())
