"""The demo's report: one file, everything in it, nothing made up."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tests.control_plane.web import believable

from demo.report_page import render_report
from lightship.api import views
from lightship.home import Home

KEYS = (
    "title",
    "started",
    "seconds",
    "passed",
    "model",
    "broker",
    "steps",
    "windows",
    "rollouts",
    "versions",
    "alarms",
    "exposures",
    "events",
    "devices",
    "drift_examples",
    "accuracy",
)


@pytest.fixture(scope="module")
def report(home: Home) -> dict[str, Any]:
    with home.database.read() as session:
        found = {
            "title": "Lightship demo",
            "started": 1_750_000_000_000,
            "seconds": 171.4,
            "passed": False,
            "model": "digits",
            "broker": "mosquitto, a process of its own.",
            "steps": [
                {"name": "Ship", "expected": "two", "happened": "two", "seconds": 3.5, "passed": True},
                {"name": "Watch", "expected": "quiet", "happened": "noise", "seconds": 60.0, "passed": False},
            ],
            "windows": views.window_series(session, "digits"),
            "rollouts": views.rollout_list(session),
            "versions": views.models(session),
            "alarms": views.alarms(session),
            "exposures": {str(v): views.exposures(session, "digits", v) for v in (1, 2, 3)},
            "devices": views.devices(session),
            "drift_examples": [{"name": "pixel 3,4 on meter-3", "reference": [5, 9, 2], "current": [1, 2, 9]}],
            "accuracy": {"meter-1": {"1": {"labelled": 200, "errors": 10}, "2": {"labelled": 0, "errors": 0}}},
        }
        first = views.window_series(session, "digits", "meter-1")["meter-1"]
        found["events"] = [{"at": first[9]["at"], "label": "Version 3 is taken back"}]
    whole: dict[str, Any] = json.loads(json.dumps(found))
    return whole


def said(html: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


def test_the_report_is_one_file_that_asks_nobody(report: dict[str, Any]) -> None:
    html = render_report(report)
    assert "<script" not in html
    assert "src=" not in html
    assert "url(" not in html
    assert all(a.startswith("#") for a in re.findall(r'href="([^"]*)"', html))
    assert "default-src &#39;none&#39;" in html


def test_the_report_says_what_failed_and_who_was_served_by_the_bad_version(report: dict[str, Any]) -> None:
    text = said(render_report(report))
    assert "■ failed 1 of 2 steps went as expected in 2 min 51 s" in text
    assert "Watch quiet noise 1 min ■ failed" in text
    assert (
        "Who was ever served by version 3, and for how long 2 of 8 devices, 7 min in sum, 10,500 predictions." in text
    )
    assert "Nobody is served by it now" in text
    assert "95.0 % of 200" in text
    assert "Version 3 is taken back" in text
    assert "● meter-1 taken back" in text


def test_a_device_still_on_the_bad_version_is_named(report: dict[str, Any]) -> None:
    spans = [{**e, "ended_at": None} if e["device"] == "meter-2" else e for e in report["exposures"]["3"]]
    text = said(render_report({**report, "exposures": {**report["exposures"], "3": spans}}))
    assert "still served by meter-2." in text


@pytest.mark.parametrize("missing", KEYS)
def test_a_missing_key_leaves_out_its_section_and_nothing_else(report: dict[str, Any], missing: str) -> None:
    html = render_report({k: v for k, v in report.items() if k != missing})
    assert html.rstrip().endswith("</html>")
    without = {"windows": 'id="accuracy"', "exposures": 'id="served"', "steps": 'id="steps"', "alarms": 'id="alarms"'}
    assert missing not in without or without[missing] not in html


def test_nothing_at_all_gives_a_page_that_claims_nothing() -> None:
    text = said(render_report({}))
    assert "no verdict" in text
    assert "passed" not in text


def test_rows_with_missing_keys_do_not_break_it() -> None:
    sparse = {
        "steps": [{}],
        "rollouts": [{}, {"status": "rolled-back", "waves": [["a"]]}],
        "versions": [{}],
        "alarms": [{}],
        "devices": [{}],
        "exposures": {"1": [{}, {"device": "a", "began_at": 5}], "2": []},
        "events": [{"label": "never"}],
        "windows": {"a": [{"at": 3}], "b": []},
        "drift_examples": [{}],
        "accuracy": {"a": {}},
    }
    assert "</html>" in render_report(sparse)


def test_words_from_a_device_stay_words(report: dict[str, Any]) -> None:
    nasty = "<script>alert(1)</script>"
    changed = {
        **report,
        "title": nasty,
        "broker": nasty,
        "events": [{"at": 1, "label": nasty}],
        "alarms": [{"sentence": nasty}],
    }
    html = render_report({**changed, "windows": {nasty: report["windows"]["meter-1"]}})
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_many_devices_share_one_chart(report: dict[str, Any]) -> None:
    html = render_report(report)
    assert len(report["windows"]) == len(believable.names(8))
    assert html.count("8 devices") >= 2
    few = {d: report["windows"][d] for d in ("meter-1", "meter-2", "meter-3")}
    assert render_report({**report, "windows": few}).count('class="plot chart"') == 6
