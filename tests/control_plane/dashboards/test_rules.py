"""Rules, by the tools of Prometheus and Alertmanager themselves: each alert fires when it should, and not before."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.control_plane.dashboards.files import ALERTMANAGER, ALERTS, PROMETHEUS, RECORDING

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)

_BY = 'group="g",model="m",version="1"'


class Case(NamedTuple):
    """Series every minute that make an alert fire at `at`, and others that don't."""

    alert: str
    bad: dict[str, str]
    good: dict[str, str]
    at: str = "30m"


_WORKER = 'lightship_ingest_worker_seen_timestamp_seconds{worker="w"}'
_CERTIFICATES = 'lightship_certificate_expiry_seconds_bucket{le="259200.0"}'
_AGES = ('lightship_report_age_seconds_bucket{group="g",le="900.0"}', 'lightship_report_age_seconds_gcount{group="g"}')
_PHASES = tuple(
    f'lightship_rollout_devices{{rollout="r",model="m",version="1",phase="{p}"}}' for p in ("done", "failed")
)
_SERVED = tuple(f"lightship_inference_{n}{{{_BY}}}" for n in ("failures_total", "latency_seconds_count"))
CASES = (
    Case("LightshipDown", {'up{job="lightship"}': "0x60"}, {'up{job="lightship"}': "1x60"}),
    Case("LightshipDevicesSilent", dict(zip(_AGES, ("80x60", "100x60"), strict=True)),
         dict(zip(_AGES, ("96x60", "100x60"), strict=True))),
    Case("LightshipIngestWorkerMissing", {_WORKER: "0x60"}, {_WORKER: "0+60x60"}),
    Case("LightshipReportsLost", {"lightship_reports_lost": "5x20 9x40"}, {"lightship_reports_lost": "5x60"}),
    Case("LightshipReportsHeld", {"lightship_ingest_held_records": "3x120"},
         {"lightship_ingest_held_records": "3x20 0x100"}, "90m"),
    Case("LightshipDeadLetters", {'lightship_ingest_dead_total{code="wire.malformed"}': "0+2x60"},
         {'lightship_ingest_dead_total{code="wire.malformed"}': "0x20 1x40"}),
    Case("LightshipCertificatesExpireSoon", {_CERTIFICATES: "2x500"}, {_CERTIFICATES: "0x500"}, "7h"),
    Case("LightshipSigningStalled", {'lightship_tuf_metadata_expiry_seconds{role="timestamp"}': "170000-60x90"},
         {'lightship_tuf_metadata_expiry_seconds{role="timestamp"}': "600000-60x90"}, "60m"),
    Case("LightshipKeyHoldersNeeded", {'lightship_tuf_metadata_expiry_seconds{role="root"}': "1000000x120"},
         {'lightship_tuf_metadata_expiry_seconds{role="root"}': "9000000x120"}, "90m"),
    Case("LightshipRolloutPaused", {'lightship_rollouts{status="paused"}': "1x60"},
         {'lightship_rollouts{status="running"}': "1x60"}),
    Case("LightshipRolloutFailing", dict(zip(_PHASES, ("8x60", "2x60"), strict=True)),
         dict(zip(_PHASES, ("99x60", "1x60"), strict=True))),
    Case("LightshipDriftAlarm", {'lightship_alarms_open{kind="local",level="critical"}': "1x60"},
         {'lightship_alarms_open{kind="local",level="warning"}': "1x60"}),
    Case("LightshipDataFault", {'lightship_data_faults_open{model="m",kind="stuck",feature="f"}': "1x60"},
         {'lightship_data_faults_open{model="m",kind="stuck",feature="f"}': "1x5 0x60"}),
    Case("LightshipInferenceFailing", dict(zip(_SERVED, ("0+5x60", "0+100x60"), strict=True)),
         dict(zip(_SERVED, ("0x60", "0+100x60"), strict=True))),
    Case("LightshipDeviceCloned", {"lightship_devices_cloned": "1x60"}, {"lightship_devices_cloned": "0x60"}),
    Case("LightshipRevokedStillConnected", {"lightship_sessions_to_cut": "1x60"},
         {"lightship_sessions_to_cut": "1x3 0x60"}),
    Case("LightshipAlertsUndelivered", {'lightship_alert_messages{channel="ops",state="given-up"}': "1x60"},
         {'lightship_alert_messages{channel="ops",state="sent"}': "9x60"}),
    Case("LightshipMetricsFolded", {'lightship_metrics_folded{metric="lightship_devices"}': "4x120"}, {}, "90m"),
)  # fmt: skip


def promtool(*words: object) -> str:
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def case_file(tmp_path: Path, tests: list[dict[str, Any]]) -> Path:
    """JSON is YAML too."""
    path = tmp_path / "case.yml"
    rules = [str(RECORDING), str(ALERTS)]
    path.write_text(json.dumps({"rule_files": rules, "evaluation_interval": "1m", "tests": tests}))
    return path


def firing(case: Case, series: dict[str, str], value: int) -> dict[str, Any]:
    counted = f'count(ALERTS{{alertname="{case.alert}",alertstate="firing"}}) or vector(0)'
    expected = {"expr": counted, "eval_time": case.at, "exp_samples": [{"labels": "{}", "value": value}]}
    values = [{"series": name, "values": text} for name, text in series.items()]
    return {"interval": "1m", "input_series": values, "promql_expr_test": [expected]}


def test_the_rules_and_the_example_of_a_configuration_are_good() -> None:
    promtool("check", "rules", RECORDING, ALERTS)
    assert "2 rule files found" in promtool("check", "config", PROMETHEUS / "prometheus.example.yml")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.alert)
def test_an_alert_fires_when_it_should_and_not_before(case: Case, tmp_path: Path) -> None:
    promtool("test", "rules", case_file(tmp_path, [firing(case, case.bad, 1), firing(case, case.good, 0)]))


def test_every_alert_has_a_case() -> None:
    assert sorted(c.alert for c in CASES) == sorted(re.findall(r"- alert: (\S+)", ALERTS.read_text()))


def test_a_case_that_does_not_hold_is_noticed(tmp_path: Path) -> None:
    case = CASES[0]
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", case_file(tmp_path, [firing(case, case.good, 1)]))


def test_what_an_alert_says_names_the_thing_and_its_number(tmp_path: Path) -> None:
    expected = {
        "exp_labels": {"severity": "page", "group": "g"},
        "exp_annotations": {
            "summary": "20% of the devices of g have been silent for fifteen minutes.",
            "description": "The broker, the way to it, or the devices: `lightship device list`.",
        },
    }
    series = [{"series": n, "values": v} for n, v in zip(_AGES, ("80x60", "100x60"), strict=True)]
    said = {"eval_time": "30m", "alertname": "LightshipDevicesSilent", "exp_alerts": [expected]}
    promtool(
        "test", "rules", case_file(tmp_path, [{"interval": "1m", "input_series": series, "alert_rule_test": [said]}])
    )


@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is missing (Debian: prometheus-alertmanager)")
@pytest.mark.parametrize(("severity", "receiver"), [("page", "duty"), ("ticket", "tickets")])
def test_pages_go_to_whoever_is_on_duty_and_tickets_to_the_queue(severity: str, receiver: str) -> None:
    config = ALERTMANAGER / "alertmanager.example.yml"
    subprocess.run(["amtool", "check-config", config], check=True, capture_output=True)
    words = ["amtool", "config", "routes", "test", f"--config.file={config}", f"--verify.receivers={receiver}"]
    done = subprocess.run(
        [*words, f"severity={severity}", "alertname=LightshipX"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, receiver), done.stderr
