"""`make bench-drift`: simulate, and write docs/benchmarks/drift.md and drift.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Final

from lightship_agent.files import write_durably

from . import measures
from .page import Figures, page

ROOT: Final = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="bench_drift", description=(__doc__ or "").strip())
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="where the page goes")
    parser.add_argument("--years", type=int, default=40, help="device-years of independent rows")
    parser.add_argument("--dependent-years", type=int, default=2, help="device-years of every dependent nature")
    parser.add_argument("--runs", type=int, default=40, help="devices per shift")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    figures = measure(measures.Size(options.years, options.dependent_years, options.runs))
    options.out.mkdir(parents=True, exist_ok=True)
    write_durably(options.out / "drift.md", page(figures).encode())
    write_durably(options.out / "drift.json", (json.dumps(figures.plain(), indent=1) + "\n").encode())
    for bar in figures.bars():
        print(f"{'holds ' if bar.holds else 'MISSED'} {bar.name}: {bar.value:,.3g} (limit {bar.limit:,.3g})")
    print(f"{options.out / 'drift.md'} and drift.json, in {time.monotonic() - began:.0f} s")
    return 0 if all(bar.holds for bar in figures.bars()) else 1


def measure(size: measures.Size) -> Figures:
    """Everything, one after the other."""
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"
    print("joint drift, fleets, labels, cost", flush=True)
    joint, fleets = measures.joint_drift(), measures.fleets()
    concept, cost = measures.concept_drift(), measures.cost()
    print("delays", flush=True)
    delays = measures.delays(size)
    print("false alarms", flush=True)
    quiet = measures.false_alarms(size)
    return Figures(size, quiet, delays, joint, fleets, concept, cost, machine)


if __name__ == "__main__":
    sys.exit(main())
