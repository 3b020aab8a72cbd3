"""The gate: every limit is checked and said."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.training.gate import decide_gate, require_gate
from lightship.training.metrics import ClassMetrics, Metrics
from lightship_agent.contract.codes import GateError


def metrics(rows: int = 100, **values: float) -> Metrics:
    task = "regression" if "r2" in values else "classification"
    per_class = (ClassMetrics(label="a", precision=0.5, recall=0.6, f1=0.55, support=9),) if task[0] == "c" else ()
    return Metrics(task=task, rows=rows, values=values, per_class=per_class)


def test_a_metric_at_its_limit_holds_and_below_does_not() -> None:
    assert decide_gate(metrics(accuracy=0.9), {"accuracy": 0.9}).passed
    decision = decide_gate(metrics(accuracy=0.89), {"accuracy": 0.9})
    assert not decision.passed
    assert decision.checks[0].sentence == "accuracy is 0.8900, not as expected at least 0.9."


def test_errors_have_an_upper_limit() -> None:
    assert decide_gate(metrics(r2=0.5, mae=3.0), {"mae": 4.0}).passed
    assert not decide_gate(metrics(r2=0.5, mae=5.0), {"mae": 4.0}).passed


def test_a_single_class_can_be_gated() -> None:
    assert decide_gate(metrics(accuracy=0.9), {"recall:a": 0.6}).passed
    assert not decide_gate(metrics(accuracy=0.9), {"recall:a": 0.7}).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_does_not_hold(value: float) -> None:
    assert not decide_gate(metrics(accuracy=value), {"accuracy": 0.1}).passed


def test_what_was_not_measured_does_not_hold() -> None:
    decision = decide_gate(metrics(accuracy=1.0), {"auc": 0.1})
    assert "was not measured" in decision.checks[0].sentence


def test_a_challenger_may_be_a_little_worse_than_the_champion() -> None:
    champion = metrics(accuracy=0.95)
    assert decide_gate(metrics(accuracy=0.94), {}, champion, 0.02).passed
    worse = decide_gate(metrics(accuracy=0.92), {}, champion, 0.02)
    assert not worse.passed
    with pytest.raises(GateError) as caught:
        require_gate(worse)
    assert caught.value.code == "gate.champion"


def test_other_rows_can_not_be_compared() -> None:
    decision = decide_gate(metrics(accuracy=0.99), {}, metrics(rows=50, accuracy=0.5))
    assert not decision.passed
    assert "same rows" in decision.checks[0].sentence


def test_a_broken_minimum_is_named_before_the_champion() -> None:
    decision = decide_gate(metrics(accuracy=0.5), {"accuracy": 0.9}, metrics(accuracy=0.95))
    with pytest.raises(GateError) as caught:
        require_gate(decision)
    assert caught.value.code == "gate.metric"


def test_no_limits_and_no_champion_is_an_open_gate() -> None:
    decision = decide_gate(metrics(accuracy=0.0), {})
    assert decision.passed
    require_gate(decision)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_a_better_model_never_fails_where_a_worse_one_passes(a: float, b: float, limit: float, slack: float) -> None:
    champion = metrics(accuracy=limit)
    worse, better = sorted((a, b))
    if decide_gate(metrics(accuracy=worse), {"accuracy": limit}, champion, slack).passed:
        assert decide_gate(metrics(accuracy=better), {"accuracy": limit}, champion, slack).passed
