"""`make bench-update`: measure, and write docs/benchmarks/update.md and update.json."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Final

from lightship_agent.files import write_durably

from . import agents, deltas, dying, kinds, looks
from .page import Figures, page

ROOT: Final = Path(__file__).resolve().parents[2]
_RUNS: Final = 5
_AGENTS: Final = 2


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="bench_update", description=(__doc__ or "").strip())
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-update", help="work folder; emptied")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="where the page goes")
    parser.add_argument("--runs", type=int, default=_RUNS, help="runs of each look")
    parser.add_argument("--agents", type=int, default=_AGENTS, help="whole agents for each length of the list")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    figures = measure(options.folder.resolve(), options.runs, options.agents)
    options.out.mkdir(parents=True, exist_ok=True)
    write_durably(options.out / "update.md", page(figures).encode())
    write_durably(options.out / "update.json", (json.dumps(figures.plain(), indent=1) + "\n").encode())
    missed = [bar for bar in figures.bars() if not bar.holds]
    for bar in figures.bars():
        print(f"{'holds ' if bar.holds else 'MISSED'} {bar.name}: {bar.value:,.3g} (limit {bar.limit:,g})")
    print(f"{options.out / 'update.md'} and update.json, in {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


def measure(folder: Path, runs: int, many: int) -> Figures:
    """Everything, one after the other."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print("120 MB over a link that dies", flush=True)
    crossing = dying.measure(folder / "dying")
    print("models", flush=True)
    old, new = kinds.tables()
    models = (kinds.to_onnx(kinds.forest(old)), kinds.to_onnx(kinds.forest(new)))
    print("whole agents", flush=True)
    seen = agents.measure(folder / "agents", models, many)
    print("looks", flush=True)
    shapes = looks.measure(folder / "looks", models, runs)
    print("deltas", flush=True)
    logging.disable(logging.WARNING)  # the quantiser has advice for larger networks than ours
    patched = deltas.measure()
    shutil.rmtree(folder)
    return Figures(shapes, seen, patched, crossing, _machine(), runs)


def _machine() -> str:
    return f"{os.cpu_count()} CPUs ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
