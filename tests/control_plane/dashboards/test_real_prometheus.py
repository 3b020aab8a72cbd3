"""Every panel and every rule, by a Prometheus server that has scraped a control plane."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.control_plane.dashboards.files import DASHBOARDS, expressions, filled
from tests.control_plane.dashboards.lived import asked, fill, going_on, operator_server, prometheus_server
from tests.control_plane.things import until

from lightship.api import metrics
from lightship.home import Home

PROGRAM = shutil.which("prometheus")
#: Panels that show nothing of a fleet that is well.
EMPTY = {"Sets of labels folded", "Rollouts that wait", "What updates are at", "Messages to people"}


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="prometheus is not installed")
def test_a_real_prometheus_evaluates_every_panel_and_every_rule(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PROGRAM is not None
    monkeypatch.setattr(metrics, "CACHE_SECONDS", 0.2)
    fill(home)
    with going_on(home), operator_server(home) as port, prometheus_server(tmp_path, port, PROGRAM) as url:
        until(lambda: asked(url, "query", query="lightship:label_errors:ratio1d > 0")["data"]["result"], 180)
        until(
            lambda: asked(url, "query", query="lightship:inference_latency_seconds:p95_15m > 0")["data"]["result"], 60
        )

        rules = [r for g in asked(url, "rules")["data"]["groups"] for r in g["rules"]]
        found = {
            (p.stem, title, e): asked(url, "query", query=filled(e)) for p in DASHBOARDS for title, e in expressions(p)
        }

    assert {r["name"]: r["lastError"] for r in rules if r["health"] != "ok"} == {}
    assert {which: reply for which, reply in found.items() if reply["status"] != "success"} == {}
    assert len(found) > 50
    assert {title for (_, title, _), reply in found.items() if not reply["data"]["result"]} <= EMPTY
