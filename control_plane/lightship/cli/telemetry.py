"""CLI: what devices report: the ingest worker, dead letters, the history."""

from __future__ import annotations

import gc
import signal
import threading
from pathlib import Path
from typing import Any

import click

from lightship.home import Home
from lightship.settings import Settings
from lightship_agent.contract.codes import FleetError
from lightship_agent.logs import configure

from .console import emit, json_option, opened, say, stamp, table, with_home
from .moments import moment
from .otlp import otlp
from .tail import tail

MAX_WORKERS = 16
#: New objects that the collector lets be before it looks: a batch is some ten thousand, none of them in a circle.
COLLECT_AFTER = (20_000, 20, 50)


@click.command()
@click.option("--worker", type=click.IntRange(0, MAX_WORKERS - 1), default=0, show_default=True, help="Its number.")
@click.option("--log-level", default="info", show_default=True, help="How much is logged.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How.")
@json_option
@click.pass_obj
def ingest(settings: Settings, worker: int, log_level: str, log_format: str, as_json: bool) -> None:
    """Store what devices report over MQTT, as one of several workers, until it is told to stop.

    `lightship up` runs the broker, and with `ingest_workers` also these.
    """
    from lightship.fleet.broker import control_plane_context, known_broker, worker_name
    from lightship.monitoring.history import open_history
    from lightship.monitoring.mqtt_ingest import IngestWorker

    configure("lightship", log_level, log_format)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with opened(settings) as home:
        folder = home.path / "broker"
        name = worker_name(worker)
        history = None if settings.history == "off" else open_history(home.path, settings.history)
        working = IngestWorker(
            home.database,
            known_broker(folder),
            control_plane_context(folder, home.ca, name),
            f"lightship-ingest-{worker}",
            history=history,
            protocol=settings.ingest_mqtt,
        )
        working.start()
        # What is here now stays: the collector need not look at it again for every batch.
        gc.freeze()
        gc.set_threshold(*COLLECT_AFTER)
        stop.wait()
        working.stop()
        if history is not None:
            history.close()
        if as_json:
            emit({"worker": worker, "counts": dict(working.counts)})
        else:
            say(f"worker {worker}: {dict(working.counts)}")


@click.group()
def telemetry() -> None:
    """What devices have reported."""


telemetry.add_command(tail)
telemetry.add_command(otlp)


@telemetry.group()
def dead() -> None:
    """Reports that could not be understood."""


@dead.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@click.option("--code", default="", help="Only of this code.")
@json_option
@with_home
def list_(home: Home, limit: int, code: str, as_json: bool) -> None:
    """The newest dead letters."""
    from sqlalchemy import select

    from lightship.storage.models import DeadLetter

    query = select(DeadLetter).order_by(DeadLetter.at.desc()).limit(limit)
    if code:
        query = query.where(DeadLetter.code == code)
    with home.database.read() as session:
        rows: list[dict[str, Any]] = [
            {"id": d.id, "at": d.at, "topic": d.topic, "code": d.code, "detail": d.detail, "bytes": len(d.payload)}
            for d in session.scalars(query)
        ]
    if as_json:
        emit(rows)
        return
    cells = [(r["id"], stamp(r["at"]), r["topic"], r["code"], r["bytes"], str(r["detail"])[:80]) for r in rows]
    table("Dead letters", ("id", "at", "device/kind", "code", "bytes kept", "why"), cells)


@dead.command()
@click.argument("which")
@click.option("--out", type=click.Path(path_type=Path), help="Write what was kept of the message to a file (0600).")
@json_option
@with_home
def show(home: Home, which: str, out: Path | None, as_json: bool) -> None:
    """One dead letter, with what was kept of it."""
    from lightship.storage.models import DeadLetter
    from lightship_agent.files import write_durably

    with home.database.read() as session:
        letter = session.get(DeadLetter, which)
    if letter is None:
        remedy = "`lightship telemetry dead list` has them."
        raise FleetError("fleet.unknown-letter", f"No dead letter {which!r}.", remedy=remedy)
    if out is not None:
        write_durably(out, letter.payload, mode=0o600)
    facts: dict[str, Any] = {
        "id": letter.id,
        "at": letter.at,
        "topic": letter.topic,
        "code": letter.code,
        "detail": letter.detail,
        "payload": letter.payload.hex(),
    }
    if as_json:
        emit(facts)
        return
    table("Dead letter", ("", ""), [(name, stamp(v) if name == "at" else v) for name, v in facts.items()])


@telemetry.command()
@click.option("--since", callback=moment, default="24h", show_default=True, help="A span ago, or a date (UTC).")
@click.option("--until", callback=moment, default="0s", help="The same; default: now.")
@click.option("--device", default="", help="Only of this device.")
@click.option("--rollup", type=click.Choice(["none", "hourly", "daily"]), default="none", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The Parquet file.")
@json_option
@click.pass_obj
def export(settings: Settings, since: int, until: int, device: str, rollup: str, out: Path, as_json: bool) -> None:
    """Write the history to a Parquet file, for DuckDB, Spark and everybody else.

    Needs the extra: pip install 'lightship[parquet]'.
    """
    from lightship.integrations.parquet import write_reports, write_rollups
    from lightship.monitoring.history import open_history

    with opened(settings) as home:
        history = open_history(home.path, settings.history)
        try:
            if rollup == "none":
                rows = write_reports(out, history.read(since, until, device))
            else:
                found = history.rollups(rollup, since, until)
                rows = write_rollups(out, (r for r in found if device in ("", r.device)))
        finally:
            history.close()
    if as_json:
        emit({"rows": rows, "path": str(out)})
    else:
        say(f"{rows} rows in {out}.")
