"""Integrations: the fleet's aggregates over OTLP, for whoever collects with OpenTelemetry.

Rules:
* the very numbers of the Prometheus endpoint, with its bounds: never a series per device;
* counters are cumulative sums, histograms are histograms; a histogram that may fall becomes gauges by `le`, because
  OTLP knows none;
* the library is an extra, `pip install 'lightship[otlp]'`; what it needs of secrets (headers, certificates) it reads
  from OpenTelemetry's own environment variables.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, Final

from prometheus_client.metrics_core import Metric as Family

from lightship import __version__
from lightship_agent.contract.codes import LinkError, SettingsError

log = logging.getLogger(__name__)

_SECONDS: Final = 10.0
#: Counting began before anybody asked: OTLP's word for a beginning that is not known.
_BEGINNING: Final = 0


class OtlpExport:
    """A connection to a collector.

    Args:
        endpoint: where metrics are taken over HTTP, `http://host:4318/v1/metrics`.
        environment: the control plane's environment, told as `deployment.environment.name`.
    """

    def __init__(self, endpoint: str, environment: str = "") -> None:
        """Nothing is sent yet.

        Raises:
            SettingsError: settings.missing without the library, settings.invalid for another address.
        """
        if not endpoint.startswith(("http://", "https://")):
            raise SettingsError("settings.invalid", f"endpoint: expected http:// or https://, found {endpoint[:80]!r}.")
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.sdk.metrics import export
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError as e:
            message = "Exporting over OTLP needs a package that is not installed."
            raise SettingsError("settings.missing", message, remedy="pip install 'lightship[otlp]'") from e
        self._kinds = export
        self._scope = InstrumentationScope("lightship", __version__)
        names = {"service.name": "lightship", "service.version": __version__}
        self._resource = Resource({**names, "deployment.environment.name": environment} if environment else names)
        self._endpoint = endpoint
        # Its own way to say that something failed is a log line, and ours is an error.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        self._exporter = OTLPMetricExporter(endpoint=endpoint, timeout=_SECONDS)

    def send(self, families: Iterable[Family], at_ns: int) -> int:
        """Hand over what was gathered; how many metrics.

        Args:
            families: of the Prometheus endpoint.
            at_ns: when, in nanoseconds since 1970.

        Raises:
            LinkError: link.unreachable.
        """
        kinds = self._kinds
        metrics = [metric for family in families if (metric := self._metric(family, at_ns)) is not None]
        scope = kinds.ScopeMetrics(self._scope, metrics, "")
        data = kinds.MetricsData([kinds.ResourceMetrics(self._resource, [scope], "")])
        if self._exporter.export(data) is not kinds.MetricExportResult.SUCCESS:
            raise LinkError("link.unreachable", f"The collector at {self._endpoint} does not take the metrics.")
        return len(metrics)

    def close(self) -> None:
        """Give the connection back."""
        self._exporter.shutdown()

    def _metric(self, family: Family, at: int) -> Any:
        kinds = self._kinds
        if not family.samples:
            return None
        cumulative = kinds.AggregationTemporality.CUMULATIVE
        data: Any
        if family.type == "histogram":
            data = kinds.Histogram(_histograms(kinds, family, at), cumulative)
        else:
            points = [
                kinds.NumberDataPoint(dict(s.labels), _BEGINNING, at, s.value)
                for s in family.samples
                if s.name.endswith(("_bucket", "_total")) or s.name == family.name
            ]
            data = kinds.Sum(points, cumulative, True) if family.type == "counter" else kinds.Gauge(points)
        return kinds.Metric(family.name, family.documentation, _unit(family.name), data)


def _histograms(kinds: Any, family: Family, at: int) -> list[Any]:
    """One point for each set of labels; Prometheus counts up to an edge, OTLP between two."""
    found: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for sample in family.samples:
        labels = {k: v for k, v in sample.labels.items() if k != "le"}
        point = found.setdefault(tuple(sorted(labels.items())), {"below": {}, "sum": 0.0})
        if sample.name.endswith("_bucket"):
            point["below"][float(sample.labels["le"])] = int(sample.value)
        elif sample.name.endswith("_sum"):
            point["sum"] = sample.value
    points = []
    for labels_of, point in found.items():
        edges = sorted(point["below"])
        below = [point["below"][edge] for edge in edges]
        between = [b - a for a, b in zip([0, *below], below, strict=False)]
        bounds = [edge for edge in edges if math.isfinite(edge)]
        unknown = math.nan
        points.append(
            kinds.HistogramDataPoint(
                dict(labels_of), _BEGINNING, at, below[-1], point["sum"], between, bounds, unknown, unknown
            )
        )
    return points


def _unit(name: str) -> str:
    for ending, unit in (("_seconds", "s"), ("_bytes", "By")):
        if name.removesuffix("_total").endswith(ending):
            return unit
    return "1"
