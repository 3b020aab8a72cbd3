"""The tools behind `make bench-drift` measure what they say, its bars can be lost, and its page is what it claims."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench_drift import common_shift as common
from bench_drift import joint, quiet, real, rules
from bench_drift.__main__ import PARTS, main
from bench_drift.bars import Bar, bars
from bench_drift.bench import Bench, Sizes
from bench_drift.datasets import Dataset
from bench_drift.delays import category_shift
from bench_drift.fleets import Fleet
from bench_drift.page import page
from bench_drift.plot import pictures
from bench_drift.streams import INDEPENDENT, NATURES, REFERENCE, ROWS, dependent, independent
from lightship.monitoring.replay import Hit
from lightship.monitoring.two_sample import two_sample

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "drift.json"
Parts = dict[str, Any]


def test_independent_streams_are_what_they_are_called() -> None:
    counts, reference = independent(np.random.default_rng(1), 300, 8)
    assert (counts.sum(axis=2) == ROWS).all()
    assert (reference.sum(axis=1) == REFERENCE).all()
    assert two_sample(counts, reference).statistic.mean() == pytest.approx(9.0, abs=0.6)


@pytest.mark.parametrize("nature", NATURES)
def test_dependent_streams_have_the_references_law_and_more_spread_than_chance(nature: str) -> None:
    counts, reference = dependent(nature, np.random.default_rng(2), 480, 3)
    assert (counts.sum(axis=2) == ROWS).all()
    tests = two_sample(counts, reference)
    assert tests.statistic.mean() > 9.6
    if "0.99" not in nature:
        shares = counts.sum(axis=(0, 1)) / counts.sum()
        assert shares == pytest.approx(np.full(10, 0.1), abs=0.02)


def test_a_category_shift_moves_what_it_says() -> None:
    cuts = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    before, after = (category_shift(d).shares(cuts, 0) for d in (0.0, 0.1))
    assert np.abs(after - before).sum() / 2 == pytest.approx(0.1)


def test_tests_that_follow_each_other_are_one_alarm_and_devices_are_told_apart() -> None:
    hits = [Hit(10, 0, 1), Hit(11, 3, 1), Hit(13, 0, 1), Hit(40, 0, 1), Hit(11, 30, 1)]
    assert quiet.events(hits, per_device=30) == 3
    assert quiet.events([], per_device=30) == 0
    # After a block of 16 only the next ones of its length could have seen the end of it.
    assert quiet.events([Hit(15, 0, 16), Hit(47, 0, 16)], per_device=30) == 1


def test_the_upper_end_of_no_alarms_at_all_is_not_zero() -> None:
    assert quiet.upper(0, 0.01) == pytest.approx(-math.log(0.01))
    assert quiet.upper(3, 0.01) > quiet.upper(2, 0.01)


def test_swapped_columns_are_seen_and_nothing_is_not(tmp_path: Path) -> None:
    found = {(j["change"], j["rows"]): j for j in joint.measure(Bench(tmp_path, Sizes(repeats=5)))}
    assert found["nothing", 1_000]["pairs"] == 0.0
    assert found["two columns swapped", 1_000] == {
        "change": "two columns swapped", "rows": 1_000, "histograms": 0.0, "distance": 1.0, "pairs": 1.0, "named": 1.0,
    }  # fmt: skip


def test_the_rewritten_distance_is_wassersteins() -> None:
    from scipy.stats import wasserstein_distance  # type: ignore[import-untyped]

    rng = np.random.default_rng(3)
    reference, hours = rng.standard_normal((1_000, 2)), rng.standard_normal((3, 200, 2)) + 0.3
    found = rules.wasserstein(hours, reference)
    expected = wasserstein_distance(reference[:, 1], hours[2, :, 1]) / reference[:, 1].std()
    assert found[2, 1] == pytest.approx(expected, rel=1e-9)


def test_a_real_fault_is_seen_and_its_feature_is_named() -> None:
    rng = np.random.default_rng(4)
    rows = np.exp(rng.standard_normal((3_000, 4))).astype(np.float32)
    rows[:, 2:] = np.round(rows[:, 2:])
    found = real._dataset(Dataset("made up", "here", ("a", "b", "c", "d"), rows), rng, 3)
    seen = {fault["fault"]: fault for fault in found["faults"]}
    assert found["hurt"] in "ab"
    assert (seen["nothing"]["seen"], seen["unit error × 1000"]["seen"], seen["stuck sensor"]["seen"]) == (0.0, 1.0, 1.0)
    assert seen["unit error × 1000"]["named"] == 1.0
    assert found["hurt"] in seen["unit error × 1000"]["said"]


def test_a_year_of_looks_in_which_nothing_happens_is_quiet() -> None:
    found = common._quiet("nothing", 2, 400)
    assert found == {"nature": "nothing", "years": pytest.approx(2 * 400 / 8_760), "alarms": 0.0}


@pytest.mark.slow
def test_a_shift_of_all_devices_alarms_unless_it_is_below_the_floor() -> None:
    assert common._delay(0.5, 1, 0.005) in range(1, 10)
    assert common._delay(0.05, 1, 0.02) is None


@pytest.mark.slow
def test_looks_drawn_by_their_law_are_like_looks_at_counts() -> None:
    rng, fleet = np.random.default_rng(5), Fleet(np.random.default_rng(6), 0.3)
    for shift in (0.0, 0.1):
        drawn = [s.ratio for s in common._look(rng, np.full(200, shift)).streams]
        counted = [common._one(fleet, rng, shift).streams[0].ratio for _ in range(200)]
        # Ten cells know a little less of a mean than the rows themselves.
        assert np.mean(counted) == pytest.approx(np.mean(drawn), rel=0.2)
        assert np.quantile(counted, 0.9) == pytest.approx(np.quantile(drawn, 0.9), rel=0.25)


def test_a_small_run_through_the_whole_rule_is_resumed_from_what_it_kept(tmp_path: Path) -> None:
    sizes = Sizes(years=1, year=96, workers=2)
    found = quiet.measure(Bench(tmp_path, sizes))
    assert [(q["nature"], q["floor"]) for q in found] == [
        (INDEPENDENT, 0.0),
        *((n, 0.02) for n in (INDEPENDENT, *NATURES)),
    ]
    kept = next(tmp_path.glob("*/AR(1) 0.9,*.json"))
    kept.write_text(json.dumps([7, 6, 5, 4, 3]))
    again = next(q for q in quiet.measure(Bench(tmp_path, sizes)) if q["nature"] == "AR(1) 0.9")
    assert again["criticals"] == pytest.approx(4 / again["years"])


@pytest.fixture(scope="module")
def stored() -> Parts:
    if not RESULTS.exists():
        pytest.skip("make bench-drift has not been run")
    parts: Parts = json.loads(RESULTS.read_text()).get("parts", {})
    if not parts:
        pytest.skip("the stored run is of an older tool")
    return parts


def test_the_stored_figures_are_those_of_the_page(stored: Parts) -> None:
    told = json.loads(RESULTS.read_text())
    text = RESULTS.with_suffix(".md").read_text()
    assert set(stored) == set(PARTS)
    assert not told["quick"]
    assert len({bar["name"] for bar in told["bars"]}) == len(told["bars"])
    assert all(bar["name"] in text for bar in told["bars"])
    assert text.count("**missed**") == sum(not bar["holds"] for bar in told["bars"])
    assert [bar.plain() for bar in bars(stored)] == told["bars"]


def test_every_bar_can_be_lost(stored: Parts) -> None:
    names = {bar.name for bar in bars(stored)}
    lost = {bar.name for bar in bars(_ruined(stored)) if not bar.holds}
    assert lost == names
    assert {bar.name for bar in bars({}) if bar.holds} == set()


def test_the_page_says_what_was_missed_and_why(stored: Parts) -> None:
    ruined = page(_ruined(stored), "a machine", quick=True)
    assert ruined.count("**missed**") == len(bars(stored))
    assert "Missed, and why" in ruined
    assert "A quick run" in ruined
    assert "no reason found yet" not in page(stored, "a machine", quick=False)


def test_a_figure_that_never_came_is_null_and_missed() -> None:
    assert Bar("delay", math.inf, 3.0).plain()["value"] is None
    assert not Bar("delay", math.nan, 3.0).holds
    assert not Bar("share", math.nan, 0.5, at_least=True).holds


def test_pictures_are_drawings_without_a_program_in_them(stored: Parts) -> None:
    drawn = pictures(stored)
    assert set(drawn) == {"drift-false-alarms.svg", "drift-delays.svg"}
    assert all(text.startswith("<svg") and "<script" not in text for text in drawn.values())
    assert "Lightship" in drawn["drift-false-alarms.svg"]


def test_what_was_measured_before_is_not_measured_again(tmp_path: Path, stored: Parts) -> None:
    work = tmp_path / "work" / "parts"
    work.mkdir(parents=True)
    for name, told in stored.items():
        (work / f"{name}.json").write_text(json.dumps(told))
    code = main(["--folder", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    assert code == int(any(not bar.holds for bar in bars(stored)))
    assert json.loads((tmp_path / "out" / "drift.json").read_text())["bars"] == json.loads(RESULTS.read_text())["bars"]


LOST_WHEN_LARGE = (
    "ms_per_1000_rows", "us_per_row_hot_path", "device_state_bytes", "counting_adds_own_mb", "memory_bytes",
    "ms_to_merge_1000",
)  # fmt: skip


def _ruined(stored: Parts) -> Parts:
    """The same run, had everything gone wrong."""
    parts = copy.deepcopy(stored)
    for q in parts["quiet"]["found"]:
        q.update(years=1, warnings=99.0, records=99.0, criticals=99.0)
    for told in parts["weeks"]["found"]:
        told["criticals"] = [9.0, 9.0]
    for d in parts["delays"]["found"]:
        d["warning"] = None
    for j in parts["joint"]["found"]:
        j["pairs"] = 1.0 if j["change"] == "nothing" else 0.0
    for fleet in parts["fleets"]["found"]:
        fleet.update(false_alarms=99.0, delays=dict.fromkeys(fleet["delays"]))
    common = parts["common_shift"]["found"]
    common.update(quiet=[{**common["quiet"][0], "alarms": 99.0}], default=dict.fromkeys(common["default"]))
    parts["labels"]["found"] = {"delays": [{"rate": 0.2, "labels": None}], "false_alarms": 9.0, "years": 1}
    tools = parts["peers"]["found"]["tools"]
    parts["peers"]["found"]["tools"] = {"Lightship": tools["Lightship"]}
    tools["Lightship"]["alarms"][INDEPENDENT]["alarming_hours"] = 9
    parts["real"]["found"]["datasets"] = parts["real"]["found"]["datasets"][:1]
    for fault in parts["real"]["found"]["datasets"][0]["faults"]:
        fault["seen"] = 1.0 if fault["fault"] == "nothing" else 0.0
    cost = parts["cost"]["found"]
    cost["payload"] = dict.fromkeys(cost["payload"], 9_999)
    cost.update(dict.fromkeys(LOST_WHEN_LARGE, 1e9))
    return parts
