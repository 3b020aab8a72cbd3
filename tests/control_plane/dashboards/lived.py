"""A fleet that has lived, and goes on: what a Prometheus server finds when it looks at a control plane."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from tests.control_plane.dashboards.files import ALERTS, RECORDING
from tests.control_plane.things import until
from tests.control_plane.web import believable

from lightship.api.operator_api import create_operator_app
from lightship.app import _Server
from lightship.fleet.broker import free_port
from lightship.home import Home
from lightship.monitoring import tallies
from lightship.monitoring.tallies import Counts, key
from lightship.monitoring.window_tallies import PSI_EDGES
from lightship.storage.models import AgreementRow, Alarm, ExperimentRow, IngestBeat
from lightship.web.pages import add_pages
from lightship_agent.contract.latency import OCTAVES

FEATURES = ("current", "pressure", "speed", "temperature", "vibration")


def fill(home: Home) -> None:
    """A believable fleet, an experiment, a fault and a worker."""
    now = believable.fill(home)
    with home.database.write() as session:
        session.add(IngestBeat(worker="lightship-ingest-0", at=now))
        session.add(
            ExperimentRow(
                id="e1", name="Wider trees", group="plant-north", model=believable.MODEL, version=4, digest="d" * 64,
                mode="shadow", share=0.0, per_request=False, status="running", created_by="user:ann", created_at=now,
            )
        )  # fmt: skip
        session.add(
            AgreementRow(
                experiment="e1", device="meter-1", champion="c" * 64, began_at=now, updated_at=now, rows=900, same=873
            )
        )
        session.add(
            Alarm(
                id="f1", kind="data", model=believable.MODEL, digest="", device="meter-2", level="critical",
                sentence="meter-2: pressure does not move any more.", evidence={"kind": "stuck", "feature": "pressure"},
                opened_at=now,
            )
        )  # fmt: skip


def passing(step: int) -> Counts:
    """What a second of such a fleet adds to the counters."""
    found: Counts = {}
    for group, rows in (("plant-north", 40), ("plant-south", 25)):
        for version, share in ((2, 3), (4, 1)):
            of = {"group": group, "model": believable.MODEL, "version": version}
            found[key("lightship_inference_rows_total", **of)] = rows * share
            found[key("lightship_inference_failures_total", **of)] = step % 5 == 0
            found[key("lightship_inference_latency_seconds_sum", **of)] = rows * share * 0.002
            for edge, part in zip(OCTAVES[4:9], (2, 5, 9, 3, 1), strict=True):
                found[key("lightship_inference_latency_seconds_bucket", **of, le=edge)] = rows * share * part / 20
            for level, n in (("ok", 5), ("warning", 1)):
                found[key("lightship_judged_windows_total", **of, level=level)] = n
    of = {"model": believable.MODEL, "version": 2}
    for i, feature in enumerate(FEATURES):
        for edge, n in zip((*PSI_EDGES[i : i + 3], "+Inf"), (6, 3, 1, 0.2), strict=True):
            found[key("lightship_drift_psi_bucket", **of, feature=feature, le=edge)] = n
        found[key("lightship_drift_psi_sum", **of, feature=feature)] = 0.1 * (i + 1)
    for name, n in (("watched_rows", 500), ("refused_rows", 3), ("labelled_rows", 90), ("label_errors", 4)):
        found[key(f"lightship_{name}_total", **of)] = n
    found[key("lightship_data_quality_total", **of, kind="stuck")] = 1
    for kind, n in (("tele", 8), ("event", 1), ("state", 0.2)):
        found[key("lightship_ingest_messages_total", kind=kind)] = n
    for kind, n in (("heartbeat", 30), ("window", 4), ("labels", 2)):
        found[key("lightship_ingest_records_total", kind=kind)] = n
    found[key("lightship_ingest_dead_total", code="wire.malformed")] = 0.1
    for name, n in (("duplicates", 1), ("gaps", 0.5), ("resend_requests", 0.3)):
        found[key(f"lightship_ingest_{name}_total")] = n
    return found


@contextmanager
def going_on(home: Home) -> Iterator[None]:
    """Count on, every half second, while the caller looks."""
    stop = threading.Event()

    def go() -> None:
        step = 0
        while not stop.wait(0.5):
            step += 1
            with home.database.write() as session:
                now = int(time.time() * 1_000)
                tallies.add(session, passing(step), now)
                session.merge(IngestBeat(worker="lightship-ingest-0", at=now))

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def operator_server(home: Home) -> Iterator[int]:
    """The dashboard and the operator API on loopback; its port."""
    port = free_port("127.0.0.1")
    app = create_operator_app(home)
    add_pages(app, home)
    config = uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off", log_level="warning", access_log=False)
    server = _Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        until(lambda: server.started)
        yield port
    finally:
        app.state.live.stop()
        server.should_exit = True
        thread.join(timeout=60)


@contextmanager
def prometheus_server(folder: Path, scraped: int, program: str) -> Iterator[str]:
    """A Prometheus that scrapes the port every second, with our rules evaluated as often; its address."""
    port = free_port("127.0.0.1")
    for path in (RECORDING, ALERTS):
        (folder / path.name).write_text(path.read_text().replace("interval: 30s", "interval: 1s"))
    target = {"job_name": "lightship", "static_configs": [{"targets": [f"127.0.0.1:{scraped}"]}]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [RECORDING.name, ALERTS.name],
        "scrape_configs": [target],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    words = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    process = subprocess.Popen(words)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=2) as reply:
            return bool(reply.status == 200)
        return False

    try:
        until(ready, 180)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def asked(url: str, path: str, **parameters: str) -> dict[str, Any]:
    """What its API says, also of what it refuses."""
    query = urllib.parse.urlencode(parameters)
    try:
        with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=60) as reply:
            found: dict[str, Any] = json.load(reply)
    except urllib.error.HTTPError as e:
        found = json.load(e)
    return found
