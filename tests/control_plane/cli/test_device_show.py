"""`lightship device show`: the recent past as bars for people, as numbers for machines."""

from __future__ import annotations

import json

from click.testing import CliRunner
from tests.control_plane.things import add_device, envelope, heartbeat

from lightship.cli import cli
from lightship.home import Home
from lightship.monitoring import ingest
from lightship.monitoring.history import open_history, remember
from lightship.storage.audit import now_ms
from lightship_agent.contract.app_metrics import AppNumbers
from lightship_agent.contract.messages import Application
from lightship_agent.contract.wire import pack


def told(home: Home, *records: object) -> None:
    message = ingest.Incoming("pump-1", "tele", pack(envelope(*records)))  # type: ignore[arg-type]
    understood = [(message, ingest.understand(message))]
    history = open_history(home.path, "")
    remember(home.database, history, understood, now_ms())
    history.close()
    with home.database.write() as session:
        ingest.store_all(session, understood, now_ms())


def show(home: Home, *more: str) -> str:
    done = CliRunner().invoke(
        cli, ["--home", str(home.path), "device", "show", "pump-1", *more], catch_exceptions=False
    )
    assert done.exit_code == 0
    return done.output


def test_the_last_hours_are_bars_and_with_json_numbers(home: Home) -> None:
    add_device(home, "pump-1")
    now = now_ms()
    numbers = AppNumbers(counters={"parts_made": 12.0})
    told(
        home,
        heartbeat(1, t=now - 3_600_000, latencies=(0, 5)),
        heartbeat(2, t=now - 1_800_000, latencies=(0, 25), errors={"serving.input": 1}),
        heartbeat(3, t=now - 60_000, latencies=(0, 26)),
        Application(s=4, t=now - 50_000, since=1, numbers=numbers),
    )

    text, said = show(home), json.loads(show(home, "--hours", "2", "--json"))

    assert any(line.split()[1:2] == ["requests"] and "█" in line and "▁" in line for line in text.splitlines())
    assert "latency_p99_ms" in text
    assert "parts_made" in text
    rows = said["recent"]["rows"]
    assert [v for v in rows["requests"] if v is not None] == [20, 1]
    assert len(rows["requests"]) == 48
    assert said["app"]["counters"] == {"parts_made": 12.0}


def test_where_nothing_was_kept_it_says_so_and_makes_no_file(home: Home) -> None:
    add_device(home, "pump-1")

    assert "No reports of the last 24 h" in show(home)
    assert not (home.path / "telemetry.db").exists()
