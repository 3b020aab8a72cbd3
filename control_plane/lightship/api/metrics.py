"""API: the control plane's Prometheus metrics: aggregates over the fleet, never a series per device.

Rules:
* every metric has one row in METRICS, from which docs/reference/metrics.md is generated;
* every metric has a bound: what is beyond it is folded into one more set of labels, all `(other)`, and
  `lightship_metrics_folded` says how many were. So the number of series has a bound too, however large the fleet;
* what only grows is counted where it happens (`monitoring/tallies.py`); what may fall is gathered here, by the
  database: no device is a Python object;
* it is gathered once for all who ask within a few seconds.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from lightship.home import Home
from lightship.monitoring.window_tallies import PSI_EDGES
from lightship_agent.contract.latency import OCTAVES

from . import fleet_facts
from .fleet_facts import AGES, EXPIRIES, Labels, Samples

Kind = Literal["gauge", "counter", "histogram", "gauge histogram"]
OTHER: Final = "(other)"
#: Most series of one scrape: the sum of what every metric may have.
BUDGET: Final = 10_000
CACHE_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        most: sets of labels that are told apart; one more holds the others.
        edges: upper edges of the cells of a histogram, but the infinite one.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    most: int = 1
    edges: tuple[float, ...] = ()

    @property
    def series(self) -> int:
        """Most series it may have."""
        sets = self.most + 1 if self.labels else 1
        return sets * (len(self.edges) + 3 if self.edges else 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its series."""
        match self.kind:
            case "histogram":
                endings: tuple[str, ...] = ("_bucket", "_count", "_sum")
            case "gauge histogram":
                endings = ("_bucket", "_gcount", "_gsum")
            case _:
                endings = ("",)
        return tuple(self.name + ending for ending in endings)


_VERSION = ("model", "version")
_GAUGES: Final = (
    Metric("lightship_devices", "gauge", "Devices.", ("group", "state", *_VERSION), 1_000),
    Metric("lightship_devices_online", "gauge", "Devices heard of in the last three minutes.", ("group",), 100),
    Metric("lightship_devices_running", "gauge", "Active devices that report running a version.", _VERSION, 200),
    Metric("lightship_devices_drift", "gauge", "Active devices by the level of their last drift verdict.",
           ("group", "model", "level"), 200),
    Metric("lightship_devices_phase", "gauge", "Active devices by what their update is at.", ("phase",), 40),
    Metric("lightship_devices_quarantined", "gauge", "Devices whose sensor is quarantined."),
    Metric("lightship_devices_cloned", "gauge", "Devices whose identity is in use twice."),
    Metric("lightship_devices_certificate_expired", "gauge", "Active devices whose certificate has run out."),
    Metric("lightship_certificate_expiry_seconds", "gauge histogram",
           "Active devices by how long their certificate is still good.", edges=EXPIRIES),
    Metric("lightship_report_age_seconds", "gauge histogram", "Active devices by how long ago they were heard.",
           ("group",), 50, AGES),
    Metric("lightship_sessions_to_cut", "gauge", "Revoked devices whose MQTT session has not been cut yet."),
    Metric("lightship_rollouts", "gauge", "Rollouts by status.", ("status",), 10),
    Metric("lightship_rollout_devices", "gauge",
           "Devices of a rollout under way, or over for less than a quarter of an hour: waiting, told, done or failed.",
           ("rollout", *_VERSION, "phase"), 200),
    Metric("lightship_experiments", "gauge", "Experiments.", ("mode", "status"), 10),
    Metric("lightship_experiment_rows", "gauge", "Rows that champion and challenger of a running experiment answered.",
           ("experiment", *_VERSION), 50),
    Metric("lightship_experiment_agreeing_rows", "gauge", "Of them, those answered alike.",
           ("experiment", *_VERSION), 50),
    Metric("lightship_alarms_open", "gauge", "Open alarms.", ("kind", "level"), 30),
    Metric("lightship_alerts", "gauge", "Alerts that wait or are open.", ("kind", "severity", "status"), 60),
    Metric("lightship_alert_messages", "gauge", "Messages to people, by channel: queued, sent or given up, of late.",
           ("channel", "state"), 60),
    Metric("lightship_data_faults_open", "gauge", "Hard data faults that stand, in devices.",
           ("model", "kind", "feature"), 200),
    Metric("lightship_retrain_proposals", "gauge", "Proposals to retrain.", ("model", "status"), 100),
    Metric("lightship_ingest_dead_letters", "gauge", "Messages that could not be understood, and are kept."),
    Metric("lightship_ingest_held_records", "gauge", "Records that came ahead of a gap and wait for it to be filled."),
    Metric("lightship_ingest_worker_seen_timestamp_seconds", "gauge",
           "When an ingest worker was last connected and at work.", ("worker",), 64),
    Metric("lightship_reports_lost", "gauge", "Reports that devices dropped, their outbox full, before we had them."),
    Metric("lightship_audit_events", "gauge", "Events in the audit log."),
    Metric("lightship_tuf_metadata_expiry_seconds", "gauge", "Seconds until release metadata expires.", ("role",), 20),
)  # fmt: skip
_COUNTERS: Final = (
    Metric("lightship_inference_rows_total", "counter", "Rows that devices report to have predicted.",
           ("group", *_VERSION), 300),
    Metric("lightship_inference_failures_total", "counter", "Requests that devices answered with a server error.",
           ("group", *_VERSION), 300),
    Metric("lightship_inference_latency_seconds", "histogram",
           "Time that devices took to answer a request, merged over them: exact in every cell.",
           ("group", *_VERSION), 60, OCTAVES),
    Metric("lightship_judged_windows_total", "counter", "Windows judged for drift, by verdict.",
           ("group", *_VERSION, "level"), 600),
    Metric("lightship_drift_psi", "histogram",
           "Debiased PSI of a feature in each judged window; the 40 most important ones of a model are told apart.",
           (*_VERSION, "feature"), 200, PSI_EDGES),
    Metric("lightship_watched_rows_total", "counter", "Rows in judged windows.", _VERSION, 100),
    Metric("lightship_refused_rows_total", "counter", "Rows that devices refused, in judged windows.", _VERSION, 100),
    Metric("lightship_data_quality_total", "counter",
           "What was wrong with data before any statistics, in judged windows: rows, or windows of a device.",
           (*_VERSION, "kind"), 200),
    Metric("lightship_labelled_rows_total", "counter", "Rows for which a label came.", _VERSION, 100),
    Metric("lightship_label_errors_total", "counter", "Labelled rows that were predicted wrong.", _VERSION, 100),
    Metric("lightship_ingest_messages_total", "counter", "Messages stored.", ("kind",), 10),
    Metric("lightship_ingest_records_total", "counter", "Records stored for the first time.", ("kind",), 30),
    Metric("lightship_ingest_duplicates_total", "counter", "Records that were stored before, and left out."),
    Metric("lightship_ingest_gaps_total", "counter", "Messages after which earlier ones were missing."),
    Metric("lightship_ingest_resend_requests_total", "counter", "Requests to devices to send reports again."),
    Metric("lightship_ingest_dead_total", "counter", "Messages that could not be understood, by code.", ("code",), 60),
    Metric("lightship_ingest_dead_dropped_total", "counter", "Dead letters that made room for newer ones."),
)  # fmt: skip
_ABOUT_ITSELF: Final = (
    Metric("lightship_metrics_folded", "gauge", "Sets of labels beyond a metric's bound, told as `(other)`.",
           ("metric",), 60),
    Metric("lightship_metrics_gather_seconds", "gauge", "How long it took to gather these metrics."),
)  # fmt: skip
METRICS: Final[tuple[Metric, ...]] = (*_GAUGES, *_COUNTERS, *_ABOUT_ITSELF)


class Exposition:
    """The metrics of a home, gathered at most every few seconds, however many ask."""

    def __init__(self, home: Home, seconds: float | None = None) -> None:
        """Nothing is gathered yet."""
        self._home = home
        self._seconds = CACHE_SECONDS if seconds is None else seconds
        self._lock = threading.Lock()
        self._text = b""
        self._at = -math.inf

    def text(self) -> bytes:
        """The exposition text; who asks while it is gathered waits for it, and gathers nothing."""
        with self._lock:
            if time.monotonic() - self._at > self._seconds:
                self._text = render(self._home)
                self._at = time.monotonic()
            return self._text


def render(home: Home) -> bytes:
    """The exposition text, gathered now."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Gathered(gather(home)))
    return generate_latest(registry)


def gather(home: Home) -> list[Family]:
    """The metrics as they are now, within their bounds."""
    began = time.monotonic()
    with home.database.read() as session:
        found = fleet_facts.gather(session)
        tallies = fleet_facts.tallies(session)
    found["lightship_tuf_metadata_expiry_seconds"] = fleet_facts.metadata_expiries(home)
    return list(_families(found, tallies, began))


class _Gathered(Collector):
    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def _families(found: Mapping[str, Samples], tallies: Mapping[str, Samples], began: float) -> Iterator[Family]:
    folded: dict[Labels, float] = {}
    for metric in (*_GAUGES, *_COUNTERS):
        if metric.kind == "histogram":
            samples = _cells(metric, tallies)
        elif metric.kind == "counter":
            samples = tallies.get(metric.name, {})
        else:
            samples = found.get(metric.name, {})
        if not metric.labels:
            samples = samples or {(): (0.0,) * (len(metric.edges) + 2 if metric.edges else 1)}
        kept = _bounded(metric, samples)
        if len(kept) < len(samples):
            folded[(metric.name,)] = len(samples) - len(kept) + 1
        yield _family(metric, kept)
    itself: tuple[Samples, Samples] = ({labels: (n,) for labels, n in folded.items()}, {(): (_since(began),)})
    for metric, samples in zip(_ABOUT_ITSELF, itself, strict=True):
        yield _family(metric, samples)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)


def _bounded(metric: Metric, samples: Samples) -> Samples:
    """At most so many sets of labels: the largest of gauges, the oldest of counters, which must never jump."""
    if len(samples) <= metric.most or not metric.labels:
        return samples
    falls = metric.kind in ("gauge", "gauge histogram")
    ranked = sorted(samples, key=lambda labels: -max(samples[labels])) if falls else list(samples)
    kept = {labels: samples[labels] for labels in ranked[: metric.most]}
    rest = [samples[labels] for labels in ranked[metric.most :]]
    kept[(OTHER,) * len(metric.labels)] = tuple(map(sum, zip(*rest, strict=True)))
    return kept


def _cells(metric: Metric, tallies: Mapping[str, Samples]) -> Samples:
    """A histogram from its tallies: how many in each cell, and their sum."""
    edges = [*map(str, metric.edges), "+Inf"]
    sums = tallies.get(f"{metric.name}_sum", {})
    found: dict[Labels, list[float]] = {}
    for (*labels, edge), (n,) in tallies.get(f"{metric.name}_bucket", {}).items():
        cells = found.setdefault(tuple(labels), [0.0] * len(edges))
        if edge in edges:
            cells[edges.index(edge)] += n
    return {labels: (*cells, *sums.get(labels, (0.0,))) for labels, cells in found.items()}


def _family(metric: Metric, samples: Samples) -> Family:
    if metric.kind == "gauge":
        gauge = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, (value,) in samples.items():
            gauge.add_metric(labels, value)
        return gauge
    if metric.kind == "counter":
        counter = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, (value,) in samples.items():
            counter.add_metric(labels, value)
        return counter
    edges = [*map(str, metric.edges), "+Inf"]
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, (*cells, total) in samples.items():
            histogram.add_metric(labels, list(zip(edges, accumulate(cells), strict=True)), total)
        return histogram
    spread = GaugeHistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, (*cells, total) in samples.items():
        spread.add_metric(labels, list(zip(edges, accumulate(cells), strict=True)), total)
    return spread
