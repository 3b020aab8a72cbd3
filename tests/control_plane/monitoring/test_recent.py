"""A device's recent past in columns: what was counted in them, not since ever; nothing where nothing was reported."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightship.monitoring.history import Report
from lightship.monitoring.recent import recent, sparkline
from lightship_agent.contract.app_metrics import AppNumbers
from lightship_agent.contract.messages import AnyRecord, Application, Heartbeat, Running
from lightship_agent.contract.wire import encode

MINUTE = 60_000


def report(at: int, record: AnyRecord) -> Report:
    return Report("pump-1", at, "e", 1, at, "x", False, encode(record))


def beat(at: int, latencies: tuple[int, ...], *, since: int = 1, digest: str = "a" * 64, **more: object) -> Report:
    running = Running(model="pump", version=1, digest=digest, since=since, requests=sum(latencies), latencies=latencies)
    return report(at, Heartbeat(s=1, t=at, running=(running,), **more))  # type: ignore[arg-type]


def test_a_column_has_what_was_counted_in_it_and_a_restart_begins_anew() -> None:
    told = [
        beat(0, (100, 0)),
        beat(5 * MINUTE, (110, 0), errors={"serving.input": 4}),
        beat(15 * MINUTE, (110, 4), errors={"serving.input": 7}),
        beat(16 * MINUTE, (3,), since=2, errors={"serving.input": 7}),
        beat(25 * MINUTE, (5,), since=2, errors={"serving.input": 1}),
    ]

    found = recent(told, 0, 40 * MINUTE, columns=4)

    assert found.rows["requests"] == (10, 7, 2, None)
    assert found.rows["errors"] == (4, 3, 1, None)
    assert (found.seconds, found.reports) == (600.0, 5)


def test_quantiles_are_of_the_column_alone_and_of_all_models_together() -> None:
    told = [
        beat(0, (0,)),
        beat(1, (0,), digest="b" * 64),
        beat(MINUTE, (90,)),
        beat(MINUTE, (0, 0, 0, 0, 0, 0, 0, 0, 10), digest="b" * 64),
    ]

    rows = recent(told, 0, 2 * MINUTE, columns=1).rows

    p50, p99 = rows["latency_p50_ms"][0], rows["latency_p99_ms"][0]
    assert p50 is not None
    assert p99 is not None
    assert p50 < 0.033
    assert 0.3 < p99 < 0.52


def test_health_drift_and_the_applications_numbers_are_means_of_a_column() -> None:
    told = [
        report(0, Heartbeat(s=1, t=0, health={"temperature_c": 40.0, "memory_self_mb": 60.0})),
        report(MINUTE, Heartbeat(s=2, t=0, health={"temperature_c": 50.0})),
        report(MINUTE, Application(s=3, t=0, since=0, numbers=AppNumbers(gauges={"oven": 7.0}))),
        Report("pump-1", 1, "e", 9, 1, "later", False, b"\x81\xa1k\xa5later"),
    ]

    rows = recent(told, 0, 2 * MINUTE, columns=1, drift=[(1, 0.2), (2, None), (MINUTE, 0.4), (9 * MINUTE, 5.0)]).rows

    assert {name: rows[name][0] for name in ("temperature_c", "memory_mb", "app.oven")} == {
        "temperature_c": 45.0,
        "memory_mb": 60.0,
        "app.oven": 7.0,
    }
    assert rows["drift"][0] is not None
    assert abs(rows["drift"][0] - 0.3) < 1e-9


@given(st.lists(st.none() | st.floats(-1e9, 1e9), max_size=60))
def test_a_sparkline_has_a_character_for_each_column_or_none_at_all(values: list[float | None]) -> None:
    text = sparkline(values)

    assert len(text) == (len(values) if any(v is not None for v in values) else 0)
    assert [c == " " for c in text] == [v is None for v in values][: len(text)]


def test_the_least_is_the_lowest_bar_and_the_greatest_the_highest() -> None:
    assert sparkline([1.0, None, 4.5, 8.0]) == "▁ ▅█"
    assert sparkline([3.0, 3.0]) == "▁▁"
