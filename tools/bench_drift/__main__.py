"""`make bench-drift`: simulate, measure, and write docs/benchmarks/drift.md, drift.json and their pictures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from lightship_agent.files import write_durably

from .bench import QUICK, Bench, Sizes

ROOT: Final = Path(__file__).resolve().parents[2]
#: In the order of the page. Each is a module with a function `measure`, or names one.
PARTS: Final = ("quiet", "weeks", "delays", "joint", "fleets", "common_shift", "labels", "peers", "real", "cost")


def main(arguments: list[str] | None = None) -> int:
    """Measure what has not been measured yet, and write; exit 1 where a bar is missed."""
    options = _options(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = options.folder.resolve()
    work = folder / ("quick" if options.quick else "parts")
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, QUICK if options.quick else Sizes(), again=options.again)
    wanted = [p for p in options.only.replace(",", " ").split() if p] or list(PARTS)
    began = time.monotonic()
    again = options.again or bool(options.only)
    missing = {p for p in wanted if again or not (work / f"{p}.json").exists()}
    if missing & {"peers", "real"}:
        _environments(folder)
    for n, part in enumerate(wanted):
        print(f"{time.monotonic() - began:,.0f} s, part {n + 1} of {len(wanted)}", flush=True)
        _measure(bench, part, work / f"{part}.json", again=again)
    if options.measure_only:
        return 0
    return _write(options, work, began)


def _environments(folder: Path) -> None:
    """Made before anything is measured; whose can't be made is told now, and on the page."""
    from .venvs import NAMES, environment

    for name in NAMES:
        there = environment(folder / "environments", name)
        if there.why_not:
            print(f"  {name} will be missing: {there.why_not}", flush=True)


def _write(options: argparse.Namespace, work: Path, began: float) -> int:
    from .bars import bars
    from .page import page, plain
    from .plot import pictures

    figures = {
        part: json.loads((work / f"{part}.json").read_bytes()) for part in PARTS if (work / f"{part}.json").exists()
    }
    options.out.mkdir(parents=True, exist_ok=True)
    told = plain(figures, machine(), quick=options.quick)
    write_durably(options.out / "drift.md", page(figures, machine(), quick=options.quick).encode())
    write_durably(options.out / "drift.json", (json.dumps(told, indent=1) + "\n").encode())
    for name, picture in pictures(figures).items():
        write_durably(options.out / name, picture.encode())
    found = bars(figures)
    for bar in found:
        print(f"{'holds ' if bar.holds else 'MISSED'} {bar.name}: {bar.shown} ({bar.shown_limit})")
    print(f"{options.out / 'drift.md'}, drift.json and pictures, in {time.monotonic() - began:.0f} s")
    return 0 if all(bar.holds for bar in found) else 1


def _measure(bench: Bench, part: str, place: Path, *, again: bool) -> None:
    if place.exists() and not again:
        print(f"{part}: measured before", flush=True)
        return
    print(part, flush=True)
    measure: Callable[[Bench], Any] = import_module(f".{part}", __package__).measure
    began, spent = time.monotonic(), _cpu()
    found = measure(bench)
    told = {
        "found": found,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(_cpu() - spent, 1),
        "at": time.strftime("%F %H:%M"),
        "revision": _revision(),
    }
    write_durably(place, json.dumps(told).encode())


def _cpu() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_drift", description=(__doc__ or "").strip())
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-drift", help="work folder, kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="where the page goes")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--again", action="store_true", help="measure also what the work folder has already")
    parser.add_argument("--only", default="", help=f"parts, measured again: {', '.join(PARTS)}")
    parser.add_argument("--measure-only", action="store_true", help="leave the page alone")
    return parser.parse_args(arguments)


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """What it ran on."""
    return f"{os.cpu_count()} CPUs ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
