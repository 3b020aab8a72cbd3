"""The dashboard over a real home: what it shows, that it escapes, and that it holds its policy."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from sqlalchemy import select
from tests.control_plane.web import believable
from tests.control_plane.web.browser import Browser

from lightship.alerting import store
from lightship.alerting.decide import Alert, Member
from lightship.cli import cli
from lightship.home import Home
from lightship.storage.audit import now_ms
from lightship.storage.models import Alarm, AuditEvent, Device, RolloutRow, Run
from lightship.web import facts, pages, words
from lightship.web.pages import HERE, POLICY

EVERY_PAGE = (
    "/",
    "/devices/meter-1",
    "/devices/meter-3",
    "/rollouts/c0de0002",
    "/rollouts/c0de0003",
    "/rollouts/c0de0004",
    "/models/digits",
    "/alarms",
    "/audit",
    "/audit?subject=c0de0003",
)
NASTY = "<script>alert(1)</script>\"'"


def said(html: str) -> str:
    """The words of a page, as a reader meets them."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


@pytest.mark.parametrize("path", EVERY_PAGE)
def test_every_page_is_strictly_guarded_and_needs_nothing_from_elsewhere(client: Browser, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    # What the policy would forbid must not be there: inline styles and scripts, other hosts.
    assert " style=" not in answer.text
    assert "<style" not in answer.text
    assert re.findall(r"<script[^>]*>", answer.text) == [
        f'<script src="/static/live.js?v={_asset_digest(answer.text, "live.js")}" defer>'
    ]
    addresses = re.findall(r'(?:src|href|action)="([^"]+)"', answer.text)
    assert all(a.startswith(("/", "#", "data:image/svg+xml,")) and not a.startswith("//") for a in addresses)


def _asset_digest(html: str, name: str) -> str:
    found = re.search(rf"/static/{name}\?v=([0-9a-f]+)", html)
    assert found
    return found[1]


def test_the_overview_puts_failures_first(client: Browser) -> None:
    html = client.get("/").text
    text = said(html)
    order = [text.index(w) for w in ("Needs attention", "Rollouts under way", "Devices 8", "Versions", "Open alarms")]
    assert order == sorted(order)
    assert "meter-3 drifts in pixel_3_4, pixel_2_4." in text
    assert "meter-6 did not take its update: update.golden" in text
    assert "meter-5 was last heard 21 min ago." in text
    assert "lightship retrain run p2" in text
    attention = html[html.index('class="attention"') : html.index("h-rollouts")]
    tones = re.findall(r'<li class="(\w+)">', attention)
    assert tones == sorted(tones, key=["bad", "hold", "busy", "warn", "wait"].index)
    rows = re.findall(r'data-label="Device"><a class="id" href="/devices/([\w-]+)"', html)
    assert rows[0] == "meter-3"
    assert set(rows[1:3]) == {"meter-6", "meter-4"} or rows[1] == "meter-6"
    assert len(rows) == 8


def test_the_overview_shows_the_rollout_with_its_waves_and_the_gate_in_words(client: Browser) -> None:
    text = said(client.get("/").text)
    assert "digits@4 replaces digits@2" in text
    assert "canary 2 of 2 done" in text
    assert "Holding: Errors: 3 of 114 labels against 21 of 702 of the control" in text
    assert "Both predict alike." in text
    assert "lightship rollout pause c0de0004" in text
    assert "forced Field trial, agreed with the plant." in text


def test_a_device_page_explains_its_verdict_its_history_and_its_health(client: Browser) -> None:
    sick, well = said(client.get("/devices/meter-3").text), said(client.get("/devices/meter-6").text)
    assert "pixel_3_4: shift over 2 windows, from window 38, confirmed." in sick
    assert "pixel_7_7 ▲ stuck 100.0 % 31.0 %" in sick
    assert "temperature 74.5 °C" in sick
    assert "Where it differs most from the training data" in sick
    assert "■ failed update.golden 3 of 16 golden rows differ" in well
    assert "No feature differs by more than the tolerated effect." in well


def test_a_device_page_says_what_labels_tell_of_its_errors_and_residuals(client: Browser, home: Home) -> None:
    moved = {"side": "up", "labelled": 400, "share": 0.41, "expected": 0.25, "tolerated": 0.29, "bias": 0.6,
             "spread": 1.02, "since": 30, "evidence": 3.0, "alarm": True}  # fmt: skip
    with home.database.write() as session:
        device = session.get_one(Device, "meter-3")
        device.verdict = {**device.verdict, "verdict": {**device.verdict["verdict"], "residuals": [moved]}}
    page = said(client.get("/devices/meter-3").text)
    assert "The residuals have moved up: 41.0% of 400 labelled rows since window 30" in page
    assert "bias about +0.60 sd" in page


def test_a_feature_that_drifts_at_every_length_of_window_is_one_line() -> None:
    alarms = [
        {"name": name, "kind": "shift", "level_windows": span, "first_window": 64 - span, "confirmed": True}
        for span in (1, 2, 4)
        for name in ("width", "height")
    ]
    shaky = {"name": "width", "kind": "stuck", "level_windows": 1, "first_window": 63, "confirmed": False}
    found = facts.findings([shaky, *alarms])
    assert [(f["name"], f["kind"], f["over"], f["plural"], f["first"]) for f in found] == [
        ("width", "shift", "1, 2 and 4", True, 60),
        ("height", "shift", "1, 2 and 4", True, 60),
        ("width", "stuck", "1", False, 63),
    ]


def test_a_rolled_back_version_tells_who_was_ever_served_by_it(client: Browser) -> None:
    html = client.get("/rollouts/c0de0003").text
    text = said(html)
    assert "Served by version 3: 2 devices" in text
    assert "meter-1 digits@3 ■ rolled back" in text
    assert "v3 ✕ rolled back" in text
    assert "● meter-1 taken back" in text
    assert "· meter-7 never told" in text


def test_a_finished_rollout_is_shown_as_it_was_not_as_devices_are_now(client: Browser) -> None:
    text = said(client.get("/rollouts/c0de0002").text)
    assert "● meter-1 done" in text  # it runs version 4 today
    assert "rest 3 of 3 done" in text


def test_a_model_page_tells_where_every_version_comes_from(client: Browser) -> None:
    text = said(client.get("/models/digits").text)
    for words_ in ("digits-train@1", "random-forest", "scikit-learn 1.7.2", "label flips 0", "balanced accuracy"):
        assert words_ in text
    assert "accuracy is 0.9720, as expected at least 0.9." in text
    assert "past a gate, with the reason: “Field trial, agreed with the plant.”" in text


def test_the_audit_page_shows_one_subject_when_asked(client: Browser) -> None:
    everything, one = said(client.get("/audit").text), said(client.get("/audit?subject=c0de0003").text)
    assert "home.create" in everything
    assert "home.create" not in one
    assert "rollout.transition" in one


def test_the_alarms_page_shows_what_people_are_told_of_and_escapes_what_devices_say(fresh_home: Home) -> None:
    now = now_ms()
    member = Member(subject="press-1", group="pumps")
    told = Alert(
        id="a1b2c3", kind="degraded", severity="critical", sentence=f"press-1 is {NASTY}", members={"d": member},
        status="open", began=now, opened_at=now, told="critical", told_at=now, number=1,
    )  # fmt: skip
    with fresh_home.database.write() as session:
        store.save(session, [store.columns(told)])
        store.mute(session, "group:fans", until=now + 60_000, actor="user:ann", reason="New floor.", now=now)
    page = Browser(fresh_home).get("/alarms").text
    assert NASTY not in page
    words_of_it = said(page)
    assert "lightship alert ack a1b2c3" in words_of_it
    assert "group:fans until" in words_of_it
    assert "No alert is open." not in words_of_it


def test_an_empty_home_has_pages_too_and_they_say_how_to_begin(fresh_home: Home) -> None:
    client = Browser(fresh_home)
    text = said(client.get("/").text)
    assert "Nothing needs attention." in text
    assert "lightship device token" in text
    assert [client.get(p).status_code for p in ("/alarms", "/audit", "/models/none")] == [200, 200, 404]


@pytest.mark.parametrize("path", ["/nowhere", "/devices/nobody", "/rollouts/none", "/models/none", "/static/other.js"])
def test_a_path_that_leads_nowhere_gets_a_page_in_the_same_look(client: Browser, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-security-policy"] == POLICY
    assert "Off the chart" in answer.text


def test_programs_get_their_errors_as_json(client: Browser) -> None:
    for path in ("/api/v1/nowhere", "/api/v1/devices/nobody"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/json"


def test_what_a_stranger_wrote_is_shown_and_never_run(fresh_home: Home) -> None:
    believable.fill(fresh_home)
    with fresh_home.database.write() as session:
        device = session.get_one(Device, "meter-3")
        device.labels = {NASTY: NASTY}
        device.update_detail, device.update_state, device.agent = NASTY, NASTY, NASTY
        device.health = {NASTY: NASTY}
        device.verdict = {
            "verdict": {**device.verdict["verdict"], "evidence": [{"name": NASTY, "current": [1], "psi": 1.0}]}
        }
        session.get_one(Alarm, "a1").sentence = NASTY
        session.get_one(RolloutRow, "c0de0004").reason = NASTY
        session.get_one(Run, "run-4").recipe = {NASTY: [NASTY]}
        session.scalars(select(AuditEvent)).all()[-1].subject = NASTY
    client = Browser(fresh_home)
    for path in (*EVERY_PAGE, f"/devices/{NASTY}", f"/audit?subject={NASTY}"):
        html = client.get(path).text
        assert "<script>" not in html, path
    assert "&lt;script&gt;alert(1)" in client.get("/").text
    assert "&lt;script&gt;alert(1)" in client.get("/devices/meter-3").text


def test_a_sparse_or_odd_json_column_never_breaks_a_page(fresh_home: Home) -> None:
    believable.fill(fresh_home)
    with fresh_home.database.write() as session:
        device = session.get_one(Device, "meter-1")
        device.verdict, device.health, device.running, device.labels = {}, {"x": None}, [], {}
        device.running_model, device.running_version, device.last_seen = "", 0, 0
        run = session.get_one(Run, "run-4")
        run.metrics, run.gate, run.parity, run.recipe, run.environment = {}, {}, {}, {}, {}
        run.ended_at = None
        row = session.get_one(RolloutRow, "c0de0004")
        row.gate = {"verdict": {"outcome": "fail", "checks": []}}
        row.plan = {**row.plan, "wave_specs": [{"name": ""}] * 3}
    client = Browser(fresh_home)
    assert {client.get(p).status_code for p in EVERY_PAGE} == {200}


def test_pages_write_nothing(fresh_home: Home) -> None:
    believable.fill(fresh_home)
    with fresh_home.database.read() as session:
        before = facts.overview(session, 0)
    client = Browser(fresh_home)
    for path in EVERY_PAGE:
        client.get(path)
        assert client.ask("POST", path).status_code == 405
    with fresh_home.database.read() as session:
        after = facts.overview(session, 0)
    for moving in ("rollouts", "ended"):  # statuses of devices depend on the clock
        before.pop(moving), after.pop(moving)
    assert repr(after) == repr(before)


def test_a_large_fleet_is_cut_after_those_that_need_attention(fresh_home: Home) -> None:
    believable.fill(fresh_home, devices=260)
    client = Browser(fresh_home)
    text = said(client.get("/").text)
    model, rollout = said(client.get("/models/digits").text), said(client.get("/rollouts/c0de0002").text)
    assert "Who was ever served by version 2 260 devices" in model
    assert "The newest 100 of 262 spans. lightship model exposure digits@2 lists all." in model
    assert "Served by version 2: 260 devices" in rollout
    assert "Showing 200 of 260, those that need attention first." in text
    assert "meter-3 " in text
    assert len(client.get("/").text) < 400_000


def test_styles_and_script_may_be_kept_only_under_the_address_with_their_digest(client: Browser) -> None:
    lasting = client.get(f"/static/lightship.css?v={_asset_digest(client.get('/').text, 'lightship.css')}")
    plain = client.get("/static/lightship.css")
    assert lasting.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert plain.headers["cache-control"] == "no-cache"
    again = client.get("/static/lightship.css", headers={"If-None-Match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["..%2fpages.py", "%2e%2e/pages.py", "base.html"])
def test_nothing_but_the_two_files_is_served(client: Browser, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


def test_the_script_is_small_and_the_sheet_asks_nobody(client: Browser) -> None:
    script = (HERE / "static" / "live.js").read_text()
    sheet = (HERE / "static" / "lightship.css").read_text()
    assert len(script.splitlines()) < 60
    assert "innerHTML" not in script
    assert "eval" not in script
    assert "url(" not in sheet
    assert "@import" not in sheet
    assert "http" not in sheet


@pytest.mark.parametrize("line", sorted(words.COMMANDS.values()))
def test_every_command_the_pages_name_exists(line: str) -> None:
    command: click.Command = cli
    for word in line.split()[1:]:
        if isinstance(command, click.Group) and word in command.commands:
            command = command.commands[word]
        else:
            assert word.startswith("{")
    assert command is not cli


def test_every_state_has_a_shape_of_its_tone() -> None:
    assert set(words.TONE.values()) <= set(words.SHAPES)
    assert len(set(words.SHAPES.values())) == len(words.SHAPES)
    assert "someday" in words.status("someday")
    assert "unknown" in words.status("")


def test_the_templates_and_static_files_lie_in_the_package() -> None:
    names = {p.name for p in Path(pages.HERE).rglob("*") if p.is_file()}
    assert {"base.html", "overview.html", "missing.html", "lightship.css", "live.js"} <= names
