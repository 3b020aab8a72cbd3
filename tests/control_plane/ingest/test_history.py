"""The history of reports: each once, dropped when it is old, summed up by hour and day, handed to other tools."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.control_plane.things import add_device, envelope, heartbeat

from lightship.cli import cli
from lightship.fleet.broker import free_port
from lightship.home import Home
from lightship.monitoring import ingest
from lightship.monitoring.history import (
    DAY_MS,
    GRACE_MS,
    HOUR_MS,
    OLDEST_MS,
    History,
    Keep,
    Report,
    open_history,
    remember,
    roll_up,
)
from lightship.monitoring.tail import Once
from lightship_agent.contract.codes import LightshipError
from lightship_agent.contract.messages import Heartbeat
from lightship_agent.contract.wire import encode, pack

NOW = 1_780_000_000_000
DAY = NOW - NOW % DAY_MS
KEEP = Keep(raw=7 * DAY_MS, hourly=90 * DAY_MS, daily=730 * DAY_MS, raw_bytes=10**9)
_INITDB = shutil.which("initdb") or shutil.which("initdb", path="/usr/lib/postgresql/15/bin")


def report(seq: int, ts: int = NOW, device: str = "pump-1", **health: float) -> Report:
    body = encode(Heartbeat(s=seq, t=ts, health=health or {"cpu": float(seq)}))
    return Report(device, ts, "0" * 16, seq, NOW, "heartbeat", False, body)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A PostgreSQL of our own."""
    pytest.importorskip("psycopg")
    if _INITDB is None:
        pytest.skip("postgresql is not installed")
    # The server refuses to run as root, and nobody else may look into pytest's folders.
    bin_folder, folder = Path(_INITDB).parent, Path(tempfile.mkdtemp(prefix="lightship-pg-"))
    folder.chmod(0o777)
    port = free_port("127.0.0.1")
    become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    data = folder / "data"
    subprocess.run([*become, bin_folder / "initdb", "-D", data, "-U", "lightship", "-A", "trust"], check=True,
                   capture_output=True, cwd=folder)  # fmt: skip
    words = [
        *become,
        bin_folder / "postgres",
        "-D",
        data,
        "-p",
        str(port),
        "-k",
        folder,
        "-c",
        "listen_addresses=127.0.0.1",
    ]
    process = subprocess.Popen([*words, "-c", "fsync=off"], stderr=subprocess.DEVNULL, cwd=folder)
    try:
        url = f"postgresql://lightship@127.0.0.1:{port}/postgres"
        end = time.monotonic() + 120
        while True:
            try:
                open_history(folder, url).close()
                break
            except LightshipError:
                assert time.monotonic() < end
                time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # and it waits for nobody
        process.wait(60)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=[pytest.mark.extras("psycopg"), pytest.mark.system])])
def history(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[History]:
    url = request.getfixturevalue("server") if request.param == "postgres" else ""
    made = open_history(tmp_path, url)
    if request.param == "postgres":
        with made._transaction() as cursor:  # type: ignore[attr-defined]
            cursor.execute("TRUNCATE reports, due, hourly, daily")
    yield made
    made.close()


def all_of(history: History) -> list[Report]:
    return list(history.read(0, 2**60))


def test_what_comes_again_is_kept_once(history: History) -> None:
    assert history.write([report(1), report(2)]) == 2
    assert history.write([report(2), report(3), report(3)]) == 1
    assert all_of(history) == [report(1), report(2), report(3)]


def test_every_text_number_and_byte_comes_back_as_it_was(history: History) -> None:
    odd = report(1)._replace(
        device='däv "1",{NULL}\\', seq=2**63 - 1, kind="", approx=True, body=bytes(range(256)) + b"\\x00"
    )
    empty = report(2, NOW + 1, "NULL")._replace(body=b"")
    assert history.write([]) == 0
    assert history.write([odd, empty]) == 2
    assert sorted(all_of(history)) == sorted([odd, empty])


def test_arrivals_come_in_their_order_in_parts_and_none_is_left_out(history: History) -> None:
    first = history.end()
    history.write([report(n, NOW - n)._replace(recv=NOW + n) for n in range(1, 26)])
    history.write([report(1, NOW, "pump-0")._replace(recv=NOW + 30)])
    mark, once, shown = first, Once(), list[int]()
    for _ in range(5):
        mark, found = history.arrivals(mark, ["pump-1", "pump-9"], 10)
        shown += [r.seq for r in once.new(found)]
    assert shown == list(range(1, 26))
    history.write([report(26)._replace(recv=NOW + 31)])
    assert [r.seq for r in once.new(history.arrivals(mark, ["pump-1"], 100)[1])] == [26]


def test_it_is_read_by_device_and_time(history: History) -> None:
    history.write([report(2, NOW + 5), report(1), report(1, NOW - DAY_MS, "pump-0"), report(9, NOW + 10)])
    assert [(r.device, r.seq) for r in history.read(0, NOW + 10)] == [("pump-0", 1), ("pump-1", 1), ("pump-1", 2)]
    assert [r.seq for r in history.read(NOW, NOW + 11, "pump-1")] == [1, 2, 9]


def test_hours_and_days_are_summed_up_and_again_when_something_comes_late(history: History) -> None:
    history.write([report(1, DAY, cpu=1.0), report(2, DAY + 1, cpu=3.0), report(3, DAY + HOUR_MS, cpu=8.0)])
    assert roll_up(history, DAY + 2 * HOUR_MS + GRACE_MS) == 2
    assert [r.numbers["health.cpu"] for r in history.rollups("hourly", 0, 2**60)] == [
        (2, 4.0, 1.0, 3.0),
        (1, 8.0, 8.0, 8.0),
    ]
    assert [r.numbers["health.cpu"] for r in history.rollups("daily", 0, 2**60)] == [(3, 12.0, 1.0, 8.0)]
    assert roll_up(history, DAY + 2 * HOUR_MS + GRACE_MS) == 0
    history.write([report(4, DAY + 2, cpu=2.0)])
    assert roll_up(history, DAY + 2 * HOUR_MS + GRACE_MS) == 1
    assert [r.numbers["health.cpu"] for r in history.rollups("daily", 0, 2**60)] == [(4, 14.0, 1.0, 8.0)]


def test_an_hour_that_is_not_over_is_not_summed_up(history: History) -> None:
    history.write([report(1, DAY)])
    assert roll_up(history, DAY + HOUR_MS) == 0


def test_what_is_too_old_is_dropped_and_its_sums_stay(history: History) -> None:
    old = DAY - 30 * DAY_MS
    history.write([report(1, old)._replace(recv=old), report(2)])
    roll_up(history, NOW)
    history.prune(NOW, KEEP)
    assert [r.seq for r in all_of(history)] == [2]
    assert len(list(history.rollups("daily", 0, 2**60))) >= 1
    history.prune(NOW + 800 * DAY_MS, KEEP)
    assert all_of(history) == []
    assert list(history.rollups("daily", 0, 2**60)) == []


def test_a_file_that_is_too_large_loses_its_oldest(tmp_path: Path) -> None:
    history = open_history(tmp_path, "")
    history.write([report(n) for n in range(1, 2_000)])
    history.prune(NOW, KEEP._replace(raw_bytes=10_000))
    assert all_of(history) == []
    history.close()


@pytest.mark.parametrize("url", ["mysql://x", "postgresql://me:secret@host/db"])
def test_an_address_of_another_kind_or_with_a_password_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(LightshipError) as e:
        open_history(tmp_path, url)
    assert e.value.code == "settings.invalid"
    assert "secret" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_only_active_devices_under_their_own_tenant_are_remembered_and_no_clock_is_believed_blindly(home: Home) -> None:
    add_device(home, "pump-1")
    add_device(home, "pump-2", state="revoked")
    history = open_history(home.path, "")
    said = envelope(heartbeat(1, t=NOW), heartbeat(2, t=NOW + HOUR_MS), heartbeat(3, t=NOW - OLDEST_MS - 1))

    def comes(device: str, tenant: str) -> int:
        message = ingest.Incoming(device, "tele", pack(said), tenant)
        return remember(home.database, history, [(message, ingest.understand(message))], NOW)

    assert comes("pump-2", "default") == comes("pump-3", "default") == comes("pump-1", "another") == 0
    assert comes("pump-1", "default") == 3
    assert [(r.seq, r.ts, r.approx) for r in all_of(history)] == [(1, NOW, False), (2, NOW, True), (3, NOW, True)]
    history.close()


@pytest.mark.extras
def test_it_is_exported_as_parquet(home: Home, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    now = int(time.time() * 1_000)
    history = open_history(home.path, "")
    history.write([report(n, now - n * 1_000) for n in range(1, 6)])
    history.close()
    out = tmp_path / "out.parquet"
    done = CliRunner().invoke(cli, ["--home", str(home.path), "telemetry", "export", "--out", str(out), "--json"])
    assert json.loads(done.stdout)["rows"] == 5
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    assert {r["seq"] for r in rows} == {1, 2, 3, 4, 5}
    assert dict(rows[0]["numbers"]) == {"health.cpu": float(rows[0]["seq"])}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")] == []


def test_dead_letters_are_listed_and_shown(home: Home, tmp_path: Path) -> None:
    add_device(home, "pump-1")
    with home.database.write() as session:
        ingest.receive(session, "pump-1", "tele", b"\xff noise", NOW)

    def runs(*words: str) -> Any:
        done = CliRunner().invoke(cli, ["--home", str(home.path), "telemetry", "dead", *words, "--json"])
        return json.loads(done.stdout) if done.exit_code == 0 else done.exception

    (letter,) = runs("list")
    assert (letter["topic"], letter["code"]) == ("pump-1/tele", "wire.malformed")
    assert runs("list", "--code", "wire.tenant") == []
    shown = runs("show", letter["id"], "--out", str(tmp_path / "kept"))
    assert bytes.fromhex(shown["payload"]) == (tmp_path / "kept").read_bytes() == b"\xff noise"
    assert getattr(runs("show", "nosuch"), "code", "") == "fleet.unknown-letter"
