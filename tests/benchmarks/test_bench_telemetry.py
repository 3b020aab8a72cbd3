"""The tools behind `make bench-telemetry` measure what they say, and its page says which bar is missed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench_telemetry import cost, daily, flash, proof, storm
from bench_telemetry.__main__ import section
from bench_telemetry.cost import Cost, Stalled, Steady
from bench_telemetry.daily import Day
from bench_telemetry.flash import Flash
from bench_telemetry.page import Figures, Told, page
from bench_telemetry.proof import Proof
from bench_telemetry.storm import Storm
from lightship.integrations import mosquitto, rumqttd

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "telemetry.json"
#: What the names of bars are searched for by others.
WORDS = ("lost", "duplicate", "resent", "ingest", "flash", "reconnect", "bytes")
needs_mosquitto = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")


def figures() -> Figures:
    """All of them hold."""
    return Figures(
        machine="a machine",
        measured={"cost": Told(at="2026-01-01 10:00 UTC", load=1.5, seconds=60, revision="abc1234")},
        queue=[Flash(200, 40, 2_000, 0, 5_000, 1_500, 2, 3, 10, 0)],
        proof=[
            Proof(broker, 12_000, 6, 2, 1_400, True, 500, 12_000, 0, 0, 0.05, 80, 50) for broker in ("mosquitto", "x")
        ],
        cost=[Cost("sqlite", "3.1.1", 1, 1_000, 75, 12), Cost("postgres", "5", 50, 1_000, 900, 12)],
        steady=[Steady(1_667, 30, 0.2, 500, 0, 20)],
        stalled=[Stalled(60, 150, 0)],
        storm=[Storm(30, 20, 400, 700)],
        daily=[Day(60, 60, 1_440, 288, 150_000, 300_000, 40_000, {"heartbeat": 1})],
    )


WORSE = [
    ("queue", {"lost": 1}, "lost records"),
    ("queue", {"grouped_bytes": 9_000.0}, "flash bytes per record, synced by ten"),
    ("queue", {"open_ms": 51.0}, "queue: ms of CPU to open"),
    ("proof", {"lost": 1}, "lost reports"),
    ("proof", {"duplicate_rows": 1}, "duplicate rows"),
    ("proof", {"resent": 0.11}, "resent reports"),
    ("proof", {"ingest_kills": 5}, "kills of ingest"),
    ("cost", {"micros": 81.0}, "ingest: µs of CPU per report, one in a message"),
    ("steady", {"share": 0.26}, "share of a core"),
    ("steady", {"rate": 1_000.0}, "messages a second kept up with"),
    ("steady", {"locked": 1}, "database is locked"),
    ("stalled", {"peak_mb": 201.0}, "MB resident"),
    ("stalled", {"lost": 1}, "lost reports, the database stalled"),
    ("storm", {"peak": 801.0}, "reconnect"),
    ("daily", {"wire": 400_001}, "bytes per device and day"),
]


@pytest.mark.parametrize(("part", "changes", "bar"), WORSE, ids=[f"{p} {c}" for p, c, _ in WORSE])
def test_a_worse_figure_loses_its_bar_and_no_other(part: str, changes: dict[str, float], bar: str) -> None:
    found = figures()
    assert [b.name for b in found.bars() if not b.holds] == []
    values = getattr(found, part)
    setattr(found, part, [replace(values[0], **changes), *values[1:]])
    missed = [b.name for b in found.bars() if not b.holds]
    assert len(missed) == 1
    assert bar in missed[0]
    assert f"| {missed[0]} |" in page(found)
    assert page(found).count("**missed**") == 1


def test_what_we_lose_is_said_in_figures_of_this_run() -> None:
    found = figures()
    found.daily.append(replace(found.daily[0], report_seconds=30, wire=900_000))
    found.cost.append(Cost("postgres", "3.1.1", 1, 1_000, 79, 12))
    lines = page(found).partition("## Where we lose")[2].partition("## When")[0].strip().splitlines()
    said = [
        "No bar is missed; nearest to its limit is *ingest: µs of CPU per report, one in a message",
        "A report every 30 s is 3.0 times the bytes of one every 60 s, and more than a device may send a day",
        "MQTT 3.1.1: a report costs ingest 79 µs with its history on PostgreSQL, 75 µs in SQLite.",
        "5.0% was sent again with mosquitto's own queue",
        "5.0% was sent again with x's own queue",
        "The proof's devices share a process and a disk, and they are 50.",
        "Who writes to the fleet's database beside ingest waited up to 20 ms for it.",
        "A fleet that comes back after 30 s comes at 700 a second",
    ]
    assert [line.startswith(f"* {words}") for line, words in zip(lines, said, strict=True)] == [True] * 8
    found.stalled = [Stalled(60, 250, 0)]
    assert "* **Missed**: ingest: MB resident, the database stalled for 60 s, 250; the limit is 200.\n" in page(found)
    assert page(Figures()).partition("## Where we lose")[2].count("*") == 0  # nothing measured, nothing said


def test_the_page_says_of_how_many_revisions_its_parts_are() -> None:
    found = figures()
    assert "at loads of 1.5 to 1.5, of revision abc1234." in page(found)
    found.measured["proof"] = Told(at="2026-01-01 11:00 UTC", load=3, seconds=60, revision="def5678-dirty")
    whole = "Measured from 2026-01-01 10:00 UTC to 2026-01-01 11:00 UTC at loads of 1.5 to 3.0, of 2 revisions"
    assert f"{whole} (at the end)." in page(found)
    assert "| proof | 2026-01-01 11:00 UTC | 3.0 | 60 | def5678-dirty |" in page(found)


def test_what_was_measured_before_is_read_back_whole() -> None:
    said = json.dumps(figures().plain()).encode()
    assert msgspec.json.decode(said, type=Figures) == figures()
    assert "| mosquitto | 12,000 | 6 | 2 |" in section(figures())


def test_every_word_that_is_searched_for_is_in_the_name_of_a_bar() -> None:
    names = " ".join(bar.name for bar in figures().bars())
    assert [word for word in WORDS if word not in names] == []


def test_kills_of_the_writer_lose_nothing_and_flash_is_counted(tmp_path: Path) -> None:
    found = flash.measure(tmp_path / "queue", 4, 1_000_000)
    assert (found.lost, found.over_bytes) == (0, 0)
    assert found.promised > 4
    assert 4_096 < found.each_bytes < 8_192
    assert 409 < found.grouped_bytes < found.each_bytes / 2


def test_a_fleet_that_comes_back_is_spread() -> None:
    assert [s for s in storm.measure() if s.ratio > 2] == []


@pytest.mark.slow
def test_a_day_of_a_device_at_a_slower_cadence_is_fewer_bytes(tmp_path: Path) -> None:
    usual, slower = daily.measure(tmp_path), daily.measure(tmp_path, 900.0)
    assert slower.messages < usual.messages / 2
    assert slower.payload < slower.wire < usual.wire
    assert usual.kinds["window"] == pytest.approx(slower.kinds["window"], rel=0.1)


@pytest.mark.slow
@needs_mosquitto
def test_ingest_is_measured_on_a_real_broker_and_keeps_up_while_others_write(tmp_path: Path) -> None:
    with cost._fed(tmp_path) as (place, out):
        found = cost._cost(place, out, "sqlite", "3.1.1", 50, 20)
    assert 0 < found.report_micros < 10_000  # the page has what a quiet machine takes
    steady = cost.steady(tmp_path, 2.0)
    assert steady.locked == 0
    assert steady.writes > 0


@pytest.mark.slow
@needs_mosquitto
def test_while_the_database_is_locked_nothing_is_lost(tmp_path: Path) -> None:
    assert cost.stalled(tmp_path, 3.0).lost == 0


BROKERS = [
    pytest.param("mosquitto", marks=needs_mosquitto),
    pytest.param(
        "embedded", marks=pytest.mark.skipif(not rumqttd.available(), reason="the broker extra is not installed")
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKERS)
def test_killed_brokers_killed_ingest_and_duplicates_lose_nothing(kind: str, tmp_path: Path) -> None:
    """The whole proof, with a small fleet: acts follow so closely that what is sent again is no measure here."""
    found = proof.measure(tmp_path, kind, devices=6, each=80, overflow=40)
    assert (found.lost, found.duplicate_rows) == (0, 0)
    assert found.stored == found.reports == 480
    assert found.ingest_kills >= 6
    assert found.broker_kills == 2
    assert found.injected > 0


def test_what_is_published_is_whole_and_true_to_its_own_limits() -> None:
    found = json.loads(RESULTS.read_text())
    said = (RESULTS.parent / "telemetry.md").read_text()

    assert found["command"] == "make bench-telemetry"
    assert {p["broker"] for p in found["proof"]} == {"mosquitto", "embedded"}
    assert {(c["history"], c["protocol"]) for c in found["cost"]} >= {("sqlite", "3.1.1"), ("sqlite", "5")}
    for bar in found["bars"]:
        assert bar["holds"] == (bar["value"] >= bar["limit"] if bar["least"] else bar["value"] <= bar["limit"])
        held = "holds" if bar["holds"] else "..missed.."
        assert re.search(rf"^\| {re.escape(bar['name'])} \|.*\| {held} \|$", said, re.M)
