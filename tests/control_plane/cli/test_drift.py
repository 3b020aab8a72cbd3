"""Drift on the command line: two files compared for CI, words about a device, and what would be seen."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sqlalchemy import select
from tests.control_plane.monitoring.streams import Stream
from tests.control_plane.things import add_device

from lightship.cli import main
from lightship.home import Home
from lightship.monitoring.common_shift import Common, to_bytes
from lightship.monitoring.drift import watch_stream
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.explain import explain
from lightship.monitoring.layout import Layout
from lightship.monitoring.memory import Memory
from lightship.monitoring.performance import Labelled
from lightship.monitoring.simulate import analytic_windows, mean_shift, what_is_seen
from lightship.monitoring.verdict import Verdict
from lightship.storage.models import Alarm, CommonMemory, Device


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = 0
    try:
        main([str(w) for w in words])
    except SystemExit as e:
        status = int(e.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def table(
    path: Path, seed: int, rows: int = 800, shift: float = 0.0, header: str = "a,b,kind", swap: bool = False
) -> Path:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(rows)
    b = 0.7 * a + 0.7 * rng.standard_normal(rows) + shift
    if swap:
        b = -b
    kinds = rng.choice(["oak", "ash", "<b>elm"], rows)
    path.write_text("\n".join([header, *(f"{x:.5f},{y:.5f},{k}" for x, y, k in zip(a, b, kinds, strict=True)), ""]))
    return path


# -- compare ------------------------------------------------------------------------------------------------------


def test_two_files_alike_are_no_drift_and_the_report_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    then, now, out = table(tmp_path / "then.csv", 1), table(tmp_path / "now.csv", 2), tmp_path / "report.html"
    status, _, said = run(capsys, "drift", "compare", then, now, "--out", out)
    assert status == 0
    assert "No drift" in said
    assert "No drift." in out.read_text()


def test_a_shifted_column_ends_with_28_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    then, now = table(tmp_path / "then.csv", 1), table(tmp_path / "now.csv", 2, shift=0.8)
    out = tmp_path / "report.html"
    status, printed, _ = run(capsys, "drift", "compare", then, now, "--out", out, "--json")
    found = json.loads(printed)
    assert status == 28
    assert found["drift"] is True
    assert found["drifted"][0] == "b"
    page = out.read_text()
    assert "<svg" in page
    assert "<b>elm" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_columns_that_part_are_seen_though_each_looks_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    then, now = table(tmp_path / "then.csv", 1), table(tmp_path / "now.csv", 2, swap=True)
    status, printed, _ = run(capsys, "drift", "compare", then, now, "--out", tmp_path / "r.html", "--json")
    found = json.loads(printed)
    assert status == 28
    assert found["joint_drift"] is True
    assert set(found["joint"]["pair"]) == {"a", "b"}
    assert not {"a", "b"} & set(found["drifted"])


def test_a_column_left_out_may_do_as_it_likes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    then, now = table(tmp_path / "then.csv", 1), table(tmp_path / "now.csv", 2, shift=3.0)
    words = ("drift", "compare", then, now, "--out", tmp_path / "r.html", "--exclude", "b")
    assert run(capsys, *words)[0] == 0


@pytest.mark.parametrize("header", ["a,c,kind", "a,b"])
def test_other_columns_are_an_error_and_leave_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], header: str
) -> None:
    then, now, out = table(tmp_path / "then.csv", 1), table(tmp_path / "now.csv", 2, header=header), tmp_path / "r.html"
    status, printed, said = run(capsys, "drift", "compare", then, now, "--out", out, "--json")
    assert status == 13
    assert json.loads(said)["code"].startswith("data.")
    assert printed == ""
    assert not out.exists()


def test_a_false_alarm_is_as_rare_as_was_asked_for(tmp_path: Path) -> None:
    from lightship.data.csv_loader import load_columns
    from lightship.monitoring.compare import compare

    alarms = 0
    for seed in range(60):
        schema, then = load_columns(table(tmp_path / "then.csv", 2 * seed, rows=400))
        _, now = load_columns(table(tmp_path / "now.csv", 2 * seed + 1, rows=400), schema=schema)
        alarms += compare(then, now, schema, alpha=0.05, floor=0.0).drift
    assert alarms <= 60 * 0.05 + 3 * np.sqrt(60 * 0.05)


# -- explain ------------------------------------------------------------------------------------------------------


def told(shift: float, healthy: int = 60, labels: list[Labelled] | None = None) -> tuple[Verdict, str]:
    stream, settings = Stream(70, features=3), DriftSettings()
    windows = [*stream.windows(healthy), *stream.windows(12, shift=shift)]
    memory: Memory | None = None
    for w in range(len(windows)):
        first = max(0, w + 1 - settings.history)
        verdict, memory = watch_stream(
            stream.profile, windows[first : w + 1], first, settings, memory, "k", labels=labels or []
        )
    return verdict, "\n".join(explain("pump-1", verdict, settings))


def test_a_healthy_device_is_said_to_be_and_how_well_it_is_known() -> None:
    verdict, said = told(0.0)
    assert verdict.level == "ok"
    assert "Nothing stands out." in said
    assert "judged by 71 windows of its own" in said


def test_a_shift_is_told_with_its_size_its_time_and_why_it_is_critical() -> None:
    verdict, said = told(1.2)
    assert verdict.level == "critical"
    assert "f2 has shifted: PSI 1." in said
    assert "the ranks of this device's own windows say so too" in said


def test_a_short_history_is_admitted() -> None:
    assert "19 of 48 windows" in told(0.0, healthy=8)[1]


def test_errors_are_told_beside_what_was_promised() -> None:
    said = told(0.0, labels=[Labelled(w, 50, 20) for w in range(40, 50)])[1]
    assert "40.0% were wrong" in said
    assert "The model has become worse." in said


def test_a_device_that_is_unknown_or_not_yet_judged_is_an_error(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    add_device(home, "pump-1")
    for name, status, code in (("nobody", 25, "fleet.unknown-device"), ("pump-1", 28, "drift.unknown")):
        found, _, said = run(capsys, "--home", home.path, "drift", "explain", name, "--json")
        assert (found, json.loads(said)["code"]) == (status, code)


def test_what_all_devices_show_together_is_told_of_each(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    add_device(home, "pump-1", running_model="pump", running_digest="0" * 64)
    stream, settings = Stream(71, features=3), DriftSettings()
    layout = Layout(stream.profile, settings, {})
    with home.database.write() as session:
        device = session.get_one(Device, "pump-1")
        device.verdict = {"digest": "0" * 64, "verdict": msgspec.to_builtins(told(0.0, healthy=8)[0])}
        fresh = Common.fresh("0" * 64, layout, settings)
        session.add(CommonMemory(model="pump", looks=0, state=to_bytes(fresh)))
    status, said, _ = run(capsys, "--home", home.path, "drift", "explain", "pump-1")
    assert status == 0
    assert "Devices are compared together once 10 of them have a history of their own." in said


def test_an_alarm_shared_with_others_is_told_as_long_as_it_stands_to_those_who_have_a_part_in_it(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = Verdict(level="ok", window=5, rows=200, tested=(1,), alarms=(), evidence=(), quality=(), p_value=0.5)
    stored = {"digest": "a" * 64, "verdict": msgspec.to_builtins(quiet)}
    for name in ("pump-1", "pump-2"):
        add_device(home, name, verdict=stored)
    told = [("segment", "pump", None), ("segment", "pump", 9), ("segment", "oven", None), ("fleet", "pump", None)]
    with home.database.write() as session:
        for device in session.scalars(select(Device)):
            device.running_model = "pump"
        for i, (kind, model, closed) in enumerate(told):
            evidence = {"segment": "site=north", "devices": ["pump-1"]}
            sentence = f"Sentence {i}."
            alarm = Alarm(id=f"{i:012}", kind=kind, model=model, level="critical", sentence=sentence, evidence=evidence)
            alarm.digest = alarm.device = ""
            alarm.opened_at, alarm.closed_at = 1, closed
            session.add(alarm)

    status, said, _ = run(capsys, "--home", home.path, "drift", "explain", "pump-1")
    _, other, _ = run(capsys, "--home", home.path, "drift", "explain", "pump-2", "--json")

    assert status == 0
    assert [s for s in said.splitlines() if "a part in" in s] == [
        "It has a part in this: Sentence 0.",
        "It has a part in this: Sentence 3.",
    ]
    assert not any("a part in this" in s for s in json.loads(other)["sentences"])


# -- simulate -----------------------------------------------------------------------------------------------------


def test_what_is_simulated_agrees_with_what_is_computed() -> None:
    settings = DriftSettings()
    (half, none) = what_is_seen(
        (mean_shift(0.5), mean_shift(0.05)), settings, rows=200, streams=30, runs=8, drifting=40
    )
    assert half.analytic == 2.0
    assert half.warning is not None
    assert half.warning <= 3
    assert half.critical is not None
    assert none.analytic is None
    assert none.critical is None


def test_more_rows_and_a_larger_budget_see_sooner() -> None:
    few = analytic_windows(0.06, DriftSettings(), 200, 30, 10_000)
    assert analytic_windows(0.06, DriftSettings(), 2_000, 30, 10_000) <= few
    assert analytic_windows(0.06, DriftSettings(budget=100), 200, 30, 10_000) <= few


@pytest.mark.slow
def test_the_table_is_for_people_and_the_json_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--home", tmp_path, "drift", "simulate", "--runs", 4, "--rows", 1_000, "--budget", 10)
    status, printed, _ = run(capsys, *words, "--json")
    assert status == 0
    assert json.loads(printed)[3]["warning"] == 1.0
