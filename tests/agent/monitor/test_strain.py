"""The device at its limits, read from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightship_agent.monitor.degraded import Degraded, means, state_of
from lightship_agent.monitor.strain import HOT, MEMORY, Strain

ZONE = "sys/class/thermal/thermal_zone0"
COOLING = "sys/class/thermal/cooling_device0"
COUNTER = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
BOARD = "sys/devices/platform/soc/soc:firmware/get_throttled"
TRIP = {f"{ZONE}/trip_point_0_type": "passive\n", f"{ZONE}/trip_point_0_temp": "85000\n"}
WELL = {
    **TRIP,
    f"{ZONE}/temp": "61000\n",
    f"{COOLING}/type": "cpufreq-cpu0\n",
    f"{COOLING}/cur_state": "0\n",
    COUNTER: "3\n",
    BOARD: "50000\n",  # it has happened since boot, and does not now
    "proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 400000 kB\n",
    "proc/pressure/memory": "some avg10=4.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.50 avg60=0.00 total=1\n",
}


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_device_that_is_well_is_strained_by_nothing(tmp_path: Path) -> None:
    strain = Strain(put(tmp_path, WELL))

    assert [strain.codes() for _ in range(3)] == [[], [], []]


def test_where_the_kernel_tells_nothing_nothing_is_said(tmp_path: Path) -> None:
    assert Strain(tmp_path).codes() == []


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({f"{ZONE}/temp": "85000\n"}, HOT),
        ({f"{ZONE}/trip_point_0_type": "critical\n", f"{ZONE}/temp": "99000\n"}, HOT),
        ({f"{COOLING}/cur_state": "2\n"}, HOT),
        ({f"{COOLING}/type": "Processor\n", f"{COOLING}/cur_state": "1\n"}, HOT),
        ({BOARD: "50005\n"}, HOT),
        ({"proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 40000 kB\n"}, MEMORY),
        ({"proc/pressure/memory": "full avg10=35.10 avg60=2.00 avg300=0.00 total=9\n"}, MEMORY),
    ],
)
def test_each_limit_is_seen_and_over_when_it_is_over(tmp_path: Path, files: dict[str, str], code: str) -> None:
    strain = Strain(put(tmp_path, WELL))
    put(tmp_path, files)
    assert strain.codes() == [code]
    put(tmp_path, WELL)
    assert strain.codes() == []


@pytest.mark.parametrize(
    "files",
    [
        {f"{ZONE}/trip_point_0_type": "active\n", f"{ZONE}/temp": "99000\n"},  # a fan turns
        {f"{ZONE}/trip_point_0_temp": "0\n"},
        {f"{COOLING}/type": "LCD\n", f"{COOLING}/cur_state": "3\n"},
        {BOARD: "what\n", COUNTER: "\n", f"{ZONE}/temp": "-\n", "proc/meminfo": "MemTotal:\n"},
    ],
)
def test_what_is_no_limit_of_the_processor_is_not_taken_for_one(tmp_path: Path, files: dict[str, str]) -> None:
    strain = Strain(put(tmp_path, {**WELL, **files}))
    assert [strain.codes(), strain.codes()] == [[], []]


def test_a_throttling_counter_that_grows_says_something_for_a_minute(tmp_path: Path) -> None:
    now = [0.0]
    strain = Strain(put(tmp_path, WELL), clock=lambda: now[0])
    assert strain.codes() == []
    put(tmp_path, {COUNTER: "4\n"})
    assert strain.codes() == [HOT]
    now[0] = 59.0
    assert strain.codes() == [HOT]
    now[0] = 61.0
    assert strain.codes() == []
    put(tmp_path, {COUNTER: "0\n"})  # the driver was loaded anew
    assert strain.codes() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(WELL)), noise=st.binary(max_size=60))
def test_no_file_however_strange_stops_the_look(tmp_path: Path, name: str, noise: bytes) -> None:
    put(tmp_path, WELL)
    (tmp_path / name).write_bytes(noise)
    assert set(Strain(tmp_path).codes()) <= {HOT, MEMORY}


def test_a_mode_has_begun_when_it_was_first_seen_and_anew_after_it_was_over() -> None:
    seen = Degraded()
    assert [(m.code, m.since) for m in seen.seen([HOT], 10)] == [(HOT, 10)]
    assert [(m.code, m.since) for m in seen.seen([MEMORY, HOT], 20)] == [(MEMORY, 20), (HOT, 10)]
    assert seen.seen([], 30) == ()
    assert [(m.code, m.since) for m in seen.seen([HOT, HOT], 40)] == [(HOT, 40)]


def test_only_without_a_model_is_the_agent_unhealthy() -> None:
    assert [state_of(c) for c in ([], [HOT], ["serving.no-model", HOT])] == ["ok", "degraded", "unhealthy"]


@pytest.mark.parametrize("code", ["serving.no-model", "trust.expired", "trust.rollback", "data.stuck", HOT, MEMORY])
def test_every_mode_says_what_it_means(code: str) -> None:
    assert means(code).endswith(".")
