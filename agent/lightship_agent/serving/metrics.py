"""Serving: the agent's numbers as Prometheus text.

Rules:
* every metric stands in `METRICS`, and the reference page is generated from that table;
* names carry their unit; counters end in _total; nothing is rendered that is not in the table.

Source: the Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Final, Literal, NamedTuple

from lightship_agent.contract.app_metrics import AppNumbers
from lightship_agent.contract.latency import OCTAVES, cumulative

from .slot import ModelStats

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Metric(NamedTuple):
    """One row of the table."""

    name: str
    type: Literal["counter", "gauge", "summary", "histogram"]
    help: str


class Sample(NamedTuple):
    """A value with its labels; `suffix` is _sum or _count of a summary, and _bucket of a histogram."""

    value: float
    labels: Mapping[str, str] = {}
    suffix: str = ""


METRICS: Final[tuple[Metric, ...]] = (
    Metric("lightship_agent_info", "gauge", "Always 1; the agent's version as a label."),
    Metric("lightship_agent_uptime_seconds", "gauge", "Seconds since the agent started."),
    Metric(
        "lightship_agent_model_info",
        "gauge",
        "Always 1 per model in memory; version, digest, provider and precision as labels.",
    ),
    Metric(
        "lightship_agent_model_memory_bytes",
        "gauge",
        "Memory of each model in memory, as measured when it was loaded; busy is 1 for what serves, soaks or is held.",
    ),
    Metric("lightship_agent_requests_total", "counter", "Answered requests per model and version."),
    Metric("lightship_agent_rows_total", "counter", "Predicted rows per model and version."),
    Metric("lightship_agent_failures_total", "counter", "Requests the runtime failed to answer."),
    Metric("lightship_agent_errors_total", "counter", "Refused and failed requests by error code."),
    Metric(
        "lightship_agent_latency_seconds", "summary", "Time to answer a request inside the agent; recent quantiles."
    ),
    Metric(
        "lightship_agent_request_seconds",
        "histogram",
        "The same in buckets that add up over devices; reports have twice as many.",
    ),
    Metric("lightship_agent_queue_depth", "gauge", "Requests that are being answered."),
    Metric("lightship_agent_ring_dropped_rows_total", "counter", "Rows overwritten before the monitor counted them."),
    Metric("lightship_agent_shadow_rows_total", "counter", "Rows that challengers in the shadow answered too."),
    Metric("lightship_agent_shadow_agreeing_rows_total", "counter", "Of them, those answered alike."),
    Metric("lightship_agent_shadow_failures_total", "counter", "Rows that a challenger in the shadow failed at."),
    Metric("lightship_agent_shadow_dropped_rows_total", "counter", "Rows that found the shadow's queue full."),
    Metric("lightship_agent_data_fault", "gauge", "1 while a hard data fault stands, by model, feature and kind."),
    Metric("lightship_agent_outbox_records", "gauge", "Reports waiting to be sent."),
    Metric("lightship_agent_outbox_dropped_total", "counter", "Reports dropped because the outbox was full."),
    Metric("lightship_agent_link_connections_total", "counter", "MQTT sessions begun since the agent started."),
    Metric("lightship_agent_link_rtt_seconds", "gauge", "From a report to the broker's answer, smoothed."),
    Metric("lightship_agent_update_state", "gauge", "1 for the state the update machine is in."),
    Metric("lightship_agent_update_waiting", "gauge", "1 while a bundle may not be fetched or installed yet."),
    Metric("lightship_agent_update_penalties", "gauge", "Bundles that failed too often here and wait."),
    Metric(
        "lightship_agent_metadata_expiry_seconds",
        "gauge",
        "Seconds until signed metadata expires, by role, as of the last check; below 0 updates stop.",
    ),
    Metric("lightship_agent_degraded", "gauge", "1 for each mode in which the agent does less than all its work."),
    Metric("lightship_agent_throttled", "gauge", "1 while heat or want of power slows the processor."),
    Metric("lightship_agent_health_cpu_percent", "gauge", "Busy share of all CPUs since the last reading."),
    Metric("lightship_agent_health_load_1m", "gauge", "Load average of one minute."),
    Metric("lightship_agent_health_memory_self_mb", "gauge", "Proportional set size of the agent, MB."),
    Metric("lightship_agent_health_memory_available_mb", "gauge", "Memory available to programs, MB."),
    Metric("lightship_agent_health_disk_free_mb", "gauge", "Free space where the agent keeps its state, MB."),
    Metric("lightship_agent_health_temperature_c", "gauge", "The hottest thermal zone, degrees Celsius."),
    Metric("lightship_agent_health_uptime_s", "gauge", "Seconds since the device booted."),
)
_PREFIX: Final = "lightship_agent_"
#: Before the names that the application gives its own numbers.
APP_PREFIX: Final = "lightship_app_"


def render(values: Mapping[str, Iterable[Sample]]) -> str:
    """The exposition of `values`, in the table's order; metrics without a sample are left out.

    Args:
        values: samples by full metric name; names that are not in `METRICS` are ignored.
    """
    lines: list[str] = []
    for metric in METRICS:
        samples = list(values.get(metric.name, ()))
        if not samples:
            continue
        lines += [f"# HELP {metric.name} {_escape(metric.help)}", f"# TYPE {metric.name} {metric.type}"]
        lines += [f"{metric.name}{s.suffix}{_labels(s.labels)} {_number(s.value)}" for s in samples]
    return "\n".join(lines) + "\n" if lines else ""


def plane_samples(stats: Iterable[ModelStats], errors: Mapping[str, int]) -> dict[str, list[Sample]]:
    """What the data plane counts, by metric name."""
    found: dict[str, list[Sample]] = {}

    def add(name: str, sample: Sample) -> None:
        found.setdefault(_PREFIX + name, []).append(sample)

    for s in stats:
        who = {"model": s.model.name, "version": str(s.model.version)}
        made = {"digest": s.model.digest, "provider": s.model.provider, "precision": s.model.precision}
        add("model_info", Sample(1, {**who, **made}))
        add("requests_total", Sample(s.requests, who))
        add("rows_total", Sample(s.rows, who))
        add("failures_total", Sample(s.failures, who))
        add("latency_seconds", Sample(s.p50_ms / 1_000, {**who, "quantile": "0.5"}))
        add("latency_seconds", Sample(s.p95_ms / 1_000, {**who, "quantile": "0.95"}))
        add("latency_seconds", Sample(s.seconds, who, "_sum"))
        add("latency_seconds", Sample(s.requests, who, "_count"))
        for edge, below in zip(OCTAVES, cumulative(s.latencies), strict=True):
            add("request_seconds", Sample(below, {**who, "le": _number(edge)}, "_bucket"))
        add("request_seconds", Sample(s.requests, {**who, "le": "+Inf"}, "_bucket"))
        add("request_seconds", Sample(s.seconds, who, "_sum"))
        add("request_seconds", Sample(s.requests, who, "_count"))
    for code, count in sorted(errors.items()):
        add("errors_total", Sample(count, {"code": code}))
    return found


def render_application(numbers: AppNumbers) -> str:
    """The exposition of the application's own numbers."""
    lines: list[str] = []
    for kind, plain in (("counter", numbers.counters), ("gauge", numbers.gauges)):
        for name, value in sorted(plain.items()):
            full = f"{APP_PREFIX}{name}{'_total' if kind == 'counter' else ''}"
            lines += [f"# TYPE {full} {kind}", f"{full} {_number(value)}"]
    for name, h in sorted(numbers.histograms.items()):
        full, below = APP_PREFIX + name, list(accumulate(h.counts))
        lines.append(f"# TYPE {full} histogram")
        edges = [*map(_number, h.edges), "+Inf"]
        lines += [f'{full}_bucket{{le="{edge}"}} {n}' for edge, n in zip(edges, below, strict=True)]
        lines += [f"{full}_sum {_number(h.sum)}", f"{full}_count {below[-1]}"]
    return "\n".join(lines) + "\n" if lines else ""


def health_samples(health: Mapping[str, float]) -> dict[str, list[Sample]]:
    """Device health, by metric name."""
    return {f"{_PREFIX}health_{key}": [Sample(value)] for key, value in health.items()}


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = ",".join(f'{key}="{_escape(value, quote=True)}"' for key, value in labels.items())
    return "{" + pairs + "}"


def _escape(text: str, *, quote: bool = False) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quote else escaped


def _number(value: float) -> str:
    if math.isfinite(value):
        return f"{value:.10g}" if isinstance(value, float) else str(value)
    return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
