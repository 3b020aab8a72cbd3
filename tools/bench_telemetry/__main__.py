"""`make bench-telemetry`: measure, and write docs/benchmarks/telemetry.md and telemetry.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

import reliability_page
from lightship_agent.files import write_durably

from . import cost, daily, flash, proof, storm
from .page import COMMAND, Figures, Told, page
from .site import postgres

ROOT: Final = Path(__file__).resolve().parents[2]
SECTION: Final = "telemetry"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    kills: int = 200
    queue_bytes: int = flash.LIMIT
    devices: int = 50
    each: int = 240
    overflow: int = 1_400
    messages: tuple[int, int] = (20_000, 1_000)
    steady: float = 30.0
    stalled: float = 60.0


SMALL: Final = Size(4, 2_000_000, 4, 60, 40, (1_000, 40), 2.0, 3.0)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="bench_telemetry", description=(__doc__ or "").strip())
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-telemetry", help="work folder; emptied")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="where the page goes")
    parser.add_argument("--only", default="", help="parts to measure anew, by commas; the others stay as they are")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    options = parser.parse_args(arguments)
    began, chosen = time.monotonic(), [part for part in options.only.split(",") if part]
    figures = measure(
        options.folder.resolve(), SMALL if options.quick else Size(), chosen, _before(options.out, chosen)
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_durably(options.out / "telemetry.md", page(figures).encode())
    write_durably(options.out / "telemetry.json", (json.dumps(figures.plain(), indent=1) + "\n").encode())
    if options.out == ROOT / "docs" / "benchmarks":
        reliability_page.put(SECTION, section(figures))
    for bar in figures.bars():
        print(f"{'holds ' if bar.holds else 'MISSED'} {bar.name}: {bar.value:,.4g} (limit {bar.limit:,g})")
    print(f"{options.out / 'telemetry.md'} and telemetry.json, in {time.monotonic() - began:.0f} s")
    return 0 if all(bar.holds for bar in figures.bars()) else 1


def measure(folder: Path, size: Size, chosen: list[str], figures: Figures) -> Figures:
    """The parts that are asked for, one after the other; all if none is named."""
    parts: dict[str, Callable[[], list[Any]]] = {
        "storm": storm.measure,
        "daily": lambda: [daily.measure(folder), daily.measure(folder, 60.0)],
        "queue": lambda: [flash.measure(folder / "queue", size.kills, size.queue_bytes)],
        "cost": lambda: _costs(folder, size.messages),
        "steady": lambda: [cost.steady(folder, size.steady)],
        "stalled": lambda: [cost.stalled(folder, size.stalled)],
        "proof": lambda: [
            proof.measure(folder, kind, size.devices, size.each, size.overflow) for kind in ("mosquitto", "embedded")
        ],
    }
    figures.machine = (
        f"{os.cpu_count()} CPUs ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"
    )
    for part, measured in parts.items():
        if chosen and part not in chosen:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(part, flush=True)
        load, began = os.getloadavg()[0], time.monotonic()
        setattr(figures, part, measured())
        figures.measured[part] = Told(
            at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            load=round(load, 1),
            seconds=round(time.monotonic() - began, 1),
            revision=_revision(),
        )
        print(f"  {getattr(figures, part)}", flush=True)
    shutil.rmtree(folder)
    return figures


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _costs(folder: Path, messages: tuple[int, int]) -> list[cost.Cost]:
    with postgres() as url:
        if not url:
            print("  PostgreSQL or its driver is not installed: SQLite alone")
        return cost.measure(folder, url, messages)


def _before(out: Path, chosen: list[str]) -> Figures:
    """What was measured earlier, where only some parts are measured now."""
    if not chosen or not (out / "telemetry.json").exists():
        return Figures()
    return msgspec.json.decode((out / "telemetry.json").read_bytes(), type=Figures, strict=False)


def section(figures: Figures) -> str:
    """The text of the section in docs/reliability.md."""
    rows = [
        (
            p.broker, f"{p.reports:,}", str(p.ingest_kills), str(p.broker_kills), f"{p.outage:,}", f"{p.injected:,}",
            str(p.lost), str(p.duplicate_rows), f"{p.resent:.1%}",
        )
        for p in figures.proof
    ]  # fmt: skip
    columns = (
        "broker", "reports", "ingest killed", "broker killed", "messages while ingest was away", "sent twice", "lost",
        "duplicate rows", "sent again",
    )  # fmt: skip
    queue = "".join(
        f"\n\nThe device's own queue: {f.kills} kills of its writer, {f.refused} of them on a full disk, most with a "
        f"torn tail: **{f.lost} of {f.promised:,} confirmed records lost**."
        for f in figures.queue
    )
    stalled = "".join(
        f" The database locked for {s.seconds:.0f} s: {s.lost} reports lost, {s.peak_mb:.0f} MB at most."
        for s in figures.stalled
    )
    return f"`{COMMAND}`.\n\n{reliability_page.table(columns, rows)}{queue}{stalled}"


if __name__ == "__main__":
    sys.exit(main())
