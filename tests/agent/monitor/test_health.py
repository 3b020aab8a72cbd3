"""Health is what the kernel tells, and what it does not tell is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightship_agent.monitor.health import CpuMeter, read_health


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A device's proc and sys, made of files."""
    files = {
        "proc/stat": "cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 2 3\n",
        "proc/loadavg": "0.52 0.40 0.30 1/100 999\n",
        "proc/uptime": "1234.5 999.9\n",
        "proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable:  524288 kB\n",
        "proc/self/smaps_rollup": "00400000-7ff ---p [rollup]\nRss: 4096 kB\nPss:   2048 kB\n",
        "sys/class/thermal/thermal_zone0/temp": "41500\n",
        "sys/class/thermal/thermal_zone1/temp": "52000\n",
        "sys/class/thermal/thermal_zone2/temp": "-274000\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_device_tells_how_it_is(device: Path) -> None:
    meter = CpuMeter()
    first = read_health(device, root=device, meter=meter)
    (device / "proc/stat").write_text("cpu  150 0 125 725 100 0 0 0 0 0\n")
    second = read_health(device, root=device, meter=meter)

    assert "cpu_percent" not in first  # nothing to compare with yet
    assert second["cpu_percent"] == 75.0
    assert second["load_1m"] == 0.52
    assert second["uptime_s"] == 1234.5
    assert second["memory_available_mb"] == 512.0
    assert second["memory_self_mb"] == 2.0
    assert second["temperature_c"] == 52.0
    assert second["disk_free_mb"] > 0


def test_a_reading_that_comes_too_soon_repeats_the_last_answer(device: Path) -> None:
    meter, stat = CpuMeter(), device / "proc/stat"
    answers = []
    for line in ("cpu 0 0 0 0 0 0 0 0", "cpu 50 0 0 150 0 0 0 0", "cpu 60 0 0 150 0 0 0 0"):
        stat.write_text(line)
        answers.append(read_health(device, root=device, meter=meter).get("cpu_percent"))
    assert answers == [None, 25.0, 25.0]


def test_a_missing_or_broken_source_is_absent_and_the_rest_stays(device: Path) -> None:
    (device / "proc/loadavg").write_text("")
    (device / "proc/meminfo").unlink()
    (device / "proc/self/smaps_rollup").unlink()
    for zone in device.glob("sys/class/thermal/*/temp"):
        zone.write_text("n/a")
    found = read_health(device / "absent", root=device, meter=CpuMeter())
    assert set(found) == {"uptime_s"}


def test_without_a_rollup_the_resident_set_is_told(device: Path) -> None:
    (device / "proc/self/smaps_rollup").unlink()
    (device / "proc/self/status").write_text("Name: x\nVmRSS:\t 3072 kB\n")
    assert read_health(device, root=device)["memory_self_mb"] == 3.0


def test_this_machine_answers_too(tmp_path: Path) -> None:
    found = read_health(tmp_path)
    assert found["memory_self_mb"] > 1
    assert found["uptime_s"] > 0
