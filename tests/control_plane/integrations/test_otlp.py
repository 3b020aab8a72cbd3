"""The fleet's aggregates at a real OTLP receiver: a process of its own that reads the protobuf it is sent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.control_plane.things import add_device, envelope, heartbeat, register, until

from lightship.api.metrics import gather
from lightship.cli import cli
from lightship.home import Home
from lightship.integrations import otlp
from lightship.monitoring import ingest, tallies
from lightship.storage.audit import now_ms
from lightship_agent.contract.codes import LightshipError, SettingsError
from lightship_agent.contract.wire import pack

needs_otlp = pytest.mark.extras("opentelemetry.proto")
#: Takes what is posted to /v1/metrics, reads it as OTLP does, and writes it down; refuses everything else.
RECEIVER = """
import gzip, json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest, ExportMetricsServiceResponse)

class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        good = self.path == "/v1/metrics" and self.headers["content-type"] == "application/x-protobuf"
        if good:
            request = ExportMetricsServiceRequest.FromString(body)
            with open(sys.argv[1], "a") as out:
                out.write(json.dumps(MessageToDict(request)) + "\\n")
        self.send_response(200 if good else 400)
        self.end_headers()
        self.wfile.write(ExportMetricsServiceResponse().SerializeToString())
    def log_message(self, *_):
        pass

server = HTTPServer(("127.0.0.1", 0), Receiver)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def receiver(out: Path) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", RECEIVER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1/metrics"
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def metrics_in(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last message: attributes of its resource, and its metrics by name."""
    (resource,) = json.loads(out.read_text().splitlines()[-1])["resourceMetrics"]
    (scope,) = resource["scopeMetrics"]
    attributes = {a["key"]: a["value"]["stringValue"] for a in resource["resource"]["attributes"]}
    return attributes, {metric["name"]: metric for metric in scope["metrics"]}


@pytest.fixture
def fleet(home: Home) -> Home:
    register(home, 1, released=False)
    add_device(home, "pump-1", seen_ago=1)
    counts = tallies.Tallies(home.database)
    for s, latencies in ((1, (0, 3)), (2, (0, 5, 1))):
        beat = heartbeat(s, latencies=latencies, requests=sum(latencies), busy_us=300)
        with home.database.write() as session:
            ingest.receive(session, "pump-1", "tele", pack(envelope(beat)), now_ms())
        counts.take(tallies.counted(session))
    counts.flush(now=True)
    return home


@needs_otlp
def test_a_collector_gets_sums_gauges_and_histograms_that_are_those_of_the_metrics_page(
    fleet: Home, tmp_path: Path
) -> None:
    out = tmp_path / "received"
    with receiver(out) as endpoint:
        words = ["--home", str(fleet.path), "telemetry", "otlp", "--endpoint", endpoint, "--once", "--json"]
        done = CliRunner().invoke(cli, words, catch_exceptions=False)

    assert done.exit_code == 0
    attributes, found = metrics_in(out)
    assert (attributes["service.name"], json.loads(done.stdout)["metrics"]) == ("lightship", len(found))
    (point,) = found["lightship_inference_latency_seconds"]["histogram"]["dataPoints"]
    told = {a["key"]: a["value"]["stringValue"] for a in point["attributes"]}
    assert (told["model"], told["version"]) == ("pump", "1")
    assert int(point["count"]) == sum(map(int, point["bucketCounts"]))
    assert len(point["bucketCounts"]) == len(point["explicitBounds"]) + 1
    records = found["lightship_ingest_records"]["sum"]
    assert (records["isMonotonic"], records["aggregationTemporality"]) == (True, "AGGREGATION_TEMPORALITY_CUMULATIVE")
    (online,) = found["lightship_devices_online"]["gauge"]["dataPoints"]
    assert online["asDouble"] == 1.0
    assert "le" in {a["key"] for a in found["lightship_report_age_seconds"]["gauge"]["dataPoints"][0]["attributes"]}
    families = {family.name for family in gather(fleet) if family.samples}
    assert set(found) == families


@needs_otlp
def test_it_sends_again_and_again_until_it_is_told_to_stop(fleet: Home, tmp_path: Path) -> None:
    out, log = tmp_path / "received", tmp_path / "log"
    with receiver(out) as endpoint, log.open("wb") as told:
        words = ["-m", "lightship", "--home", str(fleet.path), "telemetry", "otlp", "--endpoint", endpoint]
        words += ["--every", "1"]
        process = subprocess.Popen([sys.executable, *words], stderr=told)
        try:
            until(lambda: out.exists() and len(out.read_text().splitlines()) >= 2, 180)
        finally:
            process.terminate()
            status = process.wait(60)
    assert status == 0


@needs_otlp
def test_a_collector_that_is_not_there_is_an_error_with_a_code(fleet: Home) -> None:
    words = ["--home", str(fleet.path), "telemetry", "otlp", "--endpoint", "http://127.0.0.1:9/v1/metrics", "--once"]
    with pytest.raises(LightshipError) as refused:
        CliRunner().invoke(cli, words, catch_exceptions=False)
    assert refused.value.code == "link.unreachable"


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError) as refused:
        otlp.OtlpExport("collector:4318")
    assert refused.value.code == "settings.invalid"


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.metric_exporter", None)
    with pytest.raises(SettingsError, match=r"lightship\[otlp\]") as refused:
        otlp.OtlpExport("http://127.0.0.1:4318/v1/metrics")
    assert refused.value.code == "settings.missing"
