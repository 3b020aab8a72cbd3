"""Dashboards: of what devices report, and of how it arrives."""

from __future__ import annotations

from typing import Final

from .panels import Dashboard, Panel, Query
from .words import GROUP, MODEL, OF, VERSION, WHICH, stat

DRIFT: Final = Dashboard(
    "lightship-drift",
    "Lightship / Model and drift",
    "Whether a model is still true: alarms within their budget, shift by feature, data quality, labels.",
    (
        (
            "Verdicts",
            (
                Panel(
                    "Devices by verdict",
                    "The last one of each; alarms keep to the false-alarm budget.",
                    stacked=True,
                    queries=(Query(f"sum by (level) (lightship_devices_drift{{{WHICH}, {OF}}})", "{{level}}"),),
                ),
                Panel(
                    "Windows judged per hour",
                    "By verdict.",
                    stacked=True,
                    queries=(
                        Query(
                            "3600 * sum by (level) "
                            f"(rate(lightship_judged_windows_total{{{WHICH}, {OF}}}[$__rate_interval]))",
                            "{{level}}",
                        ),
                    ),
                ),
                Panel(
                    "Open alarms",
                    "By kind and level.",
                    queries=(Query("sum by (kind, level) (lightship_alarms_open)", "{{kind}} {{level}}"),),
                ),
            ),
        ),
        (
            "Features",
            (
                Panel(
                    "Mean shift by feature",
                    "Debiased PSI of windows of the last day; the 15 largest. For display: no alarm is decided by it.",
                    "bargauge",
                    width=8,
                    height=10,
                    steps=(0.1, 0.2),
                    instant=True,
                    queries=(
                        Query(f"topk(15, max by (feature) (lightship:drift_psi:mean1d{{{WHICH}}}))", "{{feature}}"),
                    ),
                ),
                Panel(
                    "Windows beyond 0.2",
                    "Share of windows of the last day, the ten features with most.",
                    width=8,
                    height=10,
                    unit="percentunit",
                    queries=(Query(f"topk(10, lightship:drift_windows_beyond:ratio1d{{{WHICH}}} > 0)", "{{feature}}"),),
                ),
                Panel(
                    "Shift, 95 of 100 windows",
                    "Windows of the last hour with at most this PSI, the ten largest.",
                    width=8,
                    height=10,
                    queries=(
                        Query(
                            "topk(10, histogram_quantile(0.95, sum by (feature, le) "
                            f"(increase(lightship_drift_psi_bucket{{{WHICH}}}[1h]))))",
                            "{{feature}}",
                        ),
                    ),
                ),
            ),
        ),
        (
            "Data and labels",
            (
                Panel(
                    "Data faults that stand",
                    "Devices, by feature.",
                    queries=(
                        Query(
                            f"sum by (kind, feature) (lightship_data_faults_open{{{WHICH}}})", "{{feature}} {{kind}}"
                        ),
                    ),
                ),
                Panel(
                    "What was wrong with data",
                    "Per hour: rows, or windows of a device.",
                    queries=(
                        Query(
                            f"3600 * sum by (kind) (rate(lightship_data_quality_total{{{WHICH}}}[$__rate_interval]))",
                            "{{kind}}",
                        ),
                    ),
                ),
                Panel(
                    "Refused rows",
                    "Share of all rows, over a day.",
                    unit="percentunit",
                    queries=(Query(f"lightship:rows_refused:ratio1d{{{WHICH}}}", VERSION),),
                ),
                Panel(
                    "Wrong predictions",
                    "Share of labelled rows, over a day.",
                    unit="percentunit",
                    queries=(Query(f"lightship:label_errors:ratio1d{{{WHICH}}}", VERSION),),
                ),
                Panel(
                    "Labels per hour",
                    "Rows for which the truth came.",
                    queries=(
                        Query(
                            "3600 * sum by (model, version) "
                            f"(rate(lightship_labelled_rows_total{{{WHICH}}}[$__rate_interval]))",
                            VERSION,
                        ),
                    ),
                ),
                Panel(
                    "Proposals to retrain",
                    "By status.",
                    queries=(
                        Query(
                            f"sum by (model, status) (lightship_retrain_proposals{{{WHICH}}})", "{{model}} {{status}}"
                        ),
                    ),
                ),
            ),
        ),
        (
            "Which ones",
            (
                Panel(
                    "Devices that moved most",
                    "Windows by their largest PSI, of the last judged.",
                    "table",
                    width=24,
                    sql="""
                    SELECT device, device_group, model, version, closed_ms, row_count, psi, level FROM view_windows
                    WHERE judged ORDER BY closed_ms DESC, psi DESC LIMIT 50""",
                ),
            ),
        ),
    ),
    (MODEL, GROUP),
)

INGEST: Final = Dashboard(
    "lightship-ingest",
    "Lightship / Ingest health",
    "Whether every report arrives: messages, duplicates, gaps, dead letters, workers, signing.",
    (
        (
            "Now",
            (
                stat(
                    "Reports lost",
                    "Dropped by devices whose outbox was full, since ever.",
                    "lightship_reports_lost",
                    steps=(1,),
                ),
                stat("Held", "Records that came ahead of a gap.", "lightship_ingest_held_records", steps=(1, 1_000)),
                stat("Dead letters", "Kept for inspection.", "lightship_ingest_dead_letters", steps=(1, 1_000)),
                stat(
                    "Oldest sign of a worker",
                    "Seconds since the worker that is quietest was at work.",
                    "max(time() - lightship_ingest_worker_seen_timestamp_seconds)",
                    unit="s",
                    steps=(20, 60),
                ),
                stat(
                    "Timestamp expires",
                    "Signed anew by the online key at half its life.",
                    'min(lightship_tuf_metadata_expiry_seconds{role="timestamp"})',
                    unit="s",
                ),
                stat(
                    "Time to gather metrics",
                    "One scrape's work for the database.",
                    "lightship_metrics_gather_seconds",
                    unit="s",
                    steps=(2, 5),
                ),
            ),
        ),
        (
            "Stream",
            (
                Panel(
                    "Messages per second",
                    "Stored, by kind.",
                    unit="cps",
                    stacked=True,
                    queries=(
                        Query("sum by (kind) (rate(lightship_ingest_messages_total[$__rate_interval]))", "{{kind}}"),
                    ),
                ),
                Panel(
                    "Records per second",
                    "Stored for the first time, by kind.",
                    unit="cps",
                    stacked=True,
                    queries=(
                        Query("sum by (kind) (rate(lightship_ingest_records_total[$__rate_interval]))", "{{kind}}"),
                    ),
                ),
                Panel(
                    "Duplicates",
                    "Share of records that were stored before.",
                    unit="percentunit",
                    queries=(Query("lightship:ingest_duplicates:ratio5m", "duplicates"),),
                ),
                Panel(
                    "Gaps and requests",
                    "Messages after which something was missing, and requests to send it again.",
                    unit="cps",
                    queries=(
                        Query("sum(rate(lightship_ingest_gaps_total[$__rate_interval]))", "gaps"),
                        Query("sum(rate(lightship_ingest_resend_requests_total[$__rate_interval]))", "requests"),
                    ),
                ),
                Panel(
                    "Not understood, by code",
                    "Messages that became dead letters, per second.",
                    unit="cps",
                    queries=(Query("sum by (code) (rate(lightship_ingest_dead_total[$__rate_interval]))", "{{code}}"),),
                ),
                Panel(
                    "Workers",
                    "Seconds since each was last connected and at work.",
                    unit="s",
                    steps=(20, 60),
                    queries=(Query("time() - lightship_ingest_worker_seen_timestamp_seconds", "{{worker}}"),),
                ),
            ),
        ),
        (
            "Around it",
            (
                Panel(
                    "Messages to people",
                    "About alerts, by channel: queued, sent or given up, of late.",
                    queries=(Query("sum by (channel, state) (lightship_alert_messages)", "{{channel}} {{state}}"),),
                ),
                Panel(
                    "Signed lists expire in",
                    "By role.",
                    unit="s",
                    queries=(Query("lightship_tuf_metadata_expiry_seconds", "{{role}}"),),
                ),
                Panel(
                    "Sets of labels folded",
                    "Metrics that have more than are told apart.",
                    queries=(Query("sum by (metric) (lightship_metrics_folded)", "{{metric}}"),),
                ),
            ),
        ),
        (
            "Which ones",
            (
                Panel(
                    "Outboxes that ran over",
                    "From the database.",
                    "table",
                    width=12,
                    sql="""
                    SELECT device, device_group, lost, stored_to, updated_ms FROM view_outboxes WHERE lost > 0
                    ORDER BY lost DESC LIMIT 20""",
                ),
                Panel(
                    "Dead letters",
                    "From the database, the newest first.",
                    "table",
                    width=12,
                    sql="""
                    SELECT at_ms, topic, code, detail FROM view_dead_letters ORDER BY at_ms DESC LIMIT 20""",
                ),
            ),
        ),
    ),
)
