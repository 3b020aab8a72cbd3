"""Dashboards: of the fleet, and of what is rolled out to it."""

from __future__ import annotations

from typing import Final

from .panels import Dashboard, Panel, Query
from .words import GROUP, MODEL, OF, VERSION, WHICH, stat

FLEET: Final = Dashboard(
    "lightship-fleet",
    "Lightship / Fleet",
    "Who is there, what they run, how fast it is, and what is wrong.",
    (
        (
            "Now",
            (
                stat("Active devices", "Enrolled and not revoked.", f'sum(lightship_devices{{state="active", {OF}}})'),
                stat(
                    "Silent",
                    "Share of active devices not heard for fifteen minutes.",
                    f'1 - sum(lightship_report_age_seconds_bucket{{le="900.0", {OF}}}) '
                    f"/ sum(lightship_report_age_seconds_gcount{{{OF}}})",
                    unit="percentunit",
                    steps=(0.01, 0.05),
                ),
                stat(
                    "Critical alarms",
                    "Open, of drift and of data.",
                    'sum(lightship_alarms_open{level="critical"}) or vector(0)',
                    steps=(1, 5),
                ),
                stat(
                    "Quarantined",
                    "Devices whose sensor is not learned from.",
                    "lightship_devices_quarantined",
                    steps=(1, 10),
                ),
                stat(
                    "Certificates run out",
                    "Active devices whose certificate is good for less than three days, or not.",
                    'lightship_certificate_expiry_seconds_bucket{le="259200.0"}',
                    steps=(1, 10),
                ),
                stat(
                    "Rollouts that wait",
                    "Paused: somebody has to decide.",
                    'sum(lightship_rollouts{status="paused"}) or vector(0)',
                    steps=(1,),
                ),
            ),
        ),
        (
            "Devices",
            (
                Panel(
                    "Heard of",
                    "Active devices, and those heard of in the last three minutes.",
                    queries=(
                        Query(f'sum(lightship_devices{{state="active", {OF}}})', "active"),
                        Query(f"sum(lightship_devices_online{{{OF}}})", "online"),
                    ),
                ),
                Panel(
                    "What they run",
                    "By their own reports.",
                    queries=(
                        Query(
                            f'sum by (model, version) (lightship_devices{{state="active", model!="", {OF}}})', VERSION
                        ),
                    ),
                    stacked=True,
                ),
                Panel(
                    "Age of the last report",
                    "Half, and 99 of 100, were heard more recently than this.",
                    unit="s",
                    queries=(
                        Query(
                            f"histogram_quantile(0.5, sum by (le) (lightship_report_age_seconds_bucket{{{OF}}}))",
                            "half",
                        ),
                        Query(
                            f"histogram_quantile(0.99, sum by (le) (lightship_report_age_seconds_bucket{{{OF}}}))",
                            "99 of 100",
                        ),
                    ),
                ),
            ),
        ),
        (
            "Serving",
            (
                Panel(
                    "Rows per second",
                    "Predicted by all devices together.",
                    unit="reqps",
                    stacked=True,
                    queries=(
                        Query(
                            f"sum by (model, version) (rate(lightship_inference_rows_total{{{OF}}}[$__rate_interval]))",
                            VERSION,
                        ),
                    ),
                ),
                Panel(
                    "Latency",
                    "Merged over devices: exact up to the width of a cell.",
                    unit="s",
                    queries=tuple(
                        Query(
                            f"histogram_quantile({q}, sum by (le) "
                            f"(rate(lightship_inference_latency_seconds_bucket{{{OF}}}[$__rate_interval])))",
                            name,
                        )
                        for q, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
                    ),
                ),
                Panel(
                    "Failed requests per second",
                    "Answered with a server error.",
                    unit="reqps",
                    queries=(
                        Query(
                            "sum by (model, version) "
                            f"(rate(lightship_inference_failures_total{{{OF}}}[$__rate_interval]))",
                            VERSION,
                        ),
                    ),
                ),
            ),
        ),
        (
            "Which ones",
            (
                Panel(
                    "Silent the longest",
                    "Active devices, from the database.",
                    "table",
                    width=12,
                    sql="""
                    SELECT device, device_group, last_seen_ms, model, version, drift_level, update_code
                    FROM view_devices WHERE state = 'active' ORDER BY last_seen_ms LIMIT 20""",
                ),
                Panel(
                    "Open alarms",
                    "From the database, the newest first.",
                    "table",
                    width=12,
                    sql="""
                    SELECT opened_ms, level, kind, sentence FROM view_alarms WHERE closed_ms IS NULL
                    ORDER BY opened_ms DESC LIMIT 20""",
                ),
                Panel(
                    "Alerts",
                    "What people are told of, or would be, from the database.",
                    "table",
                    width=24,
                    height=6,
                    sql="""
                    SELECT began_ms, status, severity, kind, findings, sentence FROM view_alerts
                    WHERE status <> 'resolved' ORDER BY began_ms DESC LIMIT 20""",
                ),
            ),
        ),
    ),
    (GROUP,),
)

ROLLOUT: Final = Dashboard(
    "lightship-rollout",
    "Lightship / Rollout",
    "How far a new version is, who refuses it, and whether it does as well as the one before.",
    (
        (
            "Under way",
            (
                Panel(
                    "Devices by phase",
                    "Of rollouts under way, and of those that ended within a quarter of an hour.",
                    width=12,
                    stacked=True,
                    queries=(
                        Query(
                            f"sum by (model, version, phase) (lightship_rollout_devices{{{WHICH}}})",
                            VERSION + " {{phase}}",
                        ),
                    ),
                ),
                Panel(
                    "Done",
                    "Share of the devices of a rollout that run it and have committed it.",
                    "bargauge",
                    unit="percentunit",
                    width=6,
                    most=1.0,
                    queries=(
                        Query(
                            f'sum by (rollout, model, version) (lightship_rollout_devices{{phase="done", {WHICH}}}) '
                            f"/ (sum by (rollout, model, version) (lightship_rollout_devices{{{WHICH}}}) > 0)",
                            VERSION,
                        ),
                    ),
                ),
                Panel(
                    "Failed",
                    "Share of the devices that were told. A rollout pauses by its own rule.",
                    "bargauge",
                    unit="percentunit",
                    width=6,
                    most=1.0,
                    steps=(0.05, 0.1),
                    queries=(Query(f"lightship:rollout_failed:ratio{{{WHICH}}}", VERSION),),
                ),
            ),
        ),
        (
            "Versions",
            (
                Panel(
                    "Devices by version",
                    "By their own reports.",
                    width=8,
                    stacked=True,
                    queries=(Query(f"sum by (model, version) (lightship_devices_running{{{WHICH}}})", VERSION),),
                ),
                Panel(
                    "What updates are at",
                    "Active devices whose update machine does not rest.",
                    width=8,
                    stacked=True,
                    queries=(Query('sum by (phase) (lightship_devices_phase{phase!~"idle|unknown"})', "{{phase}}"),),
                ),
                Panel(
                    "Rollouts by status",
                    "All that are known.",
                    width=8,
                    queries=(Query("sum by (status) (lightship_rollouts)", "{{status}}"),),
                ),
                Panel(
                    "Latency p95 by version",
                    "Of the slowest group; old and new side by side.",
                    unit="s",
                    width=8,
                    queries=(
                        Query(
                            f"max by (model, version) (lightship:inference_latency_seconds:p95_15m{{{WHICH}}})", VERSION
                        ),
                    ),
                ),
                Panel(
                    "Failed requests by version",
                    "Share of all requests.",
                    unit="percentunit",
                    width=8,
                    queries=(Query(f"lightship:inference_failures:ratio15m{{{WHICH}}}", VERSION),),
                ),
                Panel(
                    "Wrong predictions by version",
                    "Share of labelled rows, over a day.",
                    unit="percentunit",
                    width=8,
                    queries=(Query(f"lightship:label_errors:ratio1d{{{WHICH}}}", VERSION),),
                ),
            ),
        ),
        (
            "Experiments",
            (
                Panel(
                    "Agreement with the champion",
                    "Share of rows answered alike by champion and challenger.",
                    unit="percentunit",
                    width=12,
                    most=1.0,
                    queries=(
                        Query(
                            f"lightship_experiment_agreeing_rows{{{WHICH}}} "
                            f"/ (lightship_experiment_rows{{{WHICH}}} > 0)",
                            "{{experiment}} " + VERSION,
                        ),
                    ),
                ),
                Panel(
                    "Experiments",
                    "By mode and status.",
                    width=12,
                    queries=(Query("sum by (mode, status) (lightship_experiments)", "{{mode}} {{status}}"),),
                ),
            ),
        ),
        (
            "Which ones",
            (
                Panel(
                    "Rollouts",
                    "From the database, the newest first.",
                    "table",
                    width=12,
                    sql="""
                    SELECT rollout, model, version, status, reason, updated_ms FROM view_rollouts
                    ORDER BY created_ms DESC LIMIT 20""",
                ),
                Panel(
                    "Updates that failed",
                    "Steps as devices reported them, the newest first.",
                    "table",
                    width=12,
                    sql="""
                    SELECT at_ms, device, rollout, state, code, detail FROM view_update_steps
                    WHERE state IN ('failed', 'refused') ORDER BY at_ms DESC LIMIT 20""",
                ),
            ),
        ),
    ),
    (MODEL,),
)
