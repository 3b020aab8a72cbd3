"""`make bench-serving`: measure, and write docs/benchmarks/serving.md and serving.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lightship_agent.files import write_durably

from . import changes, memory, speed, watched
from .bars import bars
from .bench import QUICK, Bench, Sizes
from .figures import Figures
from .kept import parts_of
from .load import Client
from .page import page, plain
from .plot import picture

ROOT: Final = Path(__file__).resolve().parents[2]
PARTS: Final[dict[str, Callable[[Bench], Any]]] = {
    "sizes": memory.sizes,
    "speed": speed.measure,
    "watched": watched.measure,
    "memory": memory.measure,
    "starts": memory.starts,
    "updates": changes.updates,
    "swaps": changes.swaps,
    "together": changes.together,
    "soak": changes.soak,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; exit 1 where a bar is missed."""
    options = _options(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives us
    sizes = replace(QUICK if options.quick else Sizes(), **_given(options))
    folder = options.folder.resolve()
    work = folder / ("quick" if options.quick else "parts")
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, sizes, Client(folder))
    wanted = [p for p in options.only.replace(",", " ").split() if p] or list(PARTS)
    began = time.monotonic()
    for part in wanted:
        _measure(bench, part, work / f"{part}.json", again=options.again or bool(options.only))
    before = {} if options.quick else _published(options.out / "serving.json")
    figures = Figures(_measured(work, before), _machine(), quick=options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    write_durably(options.out / "serving.md", page(figures).encode())
    write_durably(options.out / "serving.json", (json.dumps(plain(figures), indent=1) + "\n").encode())
    write_durably(options.out / "serving.svg", picture(figures).encode())
    found = bars(figures)
    for bar in found:
        value = "not measured" if bar.value is None else f"{bar.value:,.3g}"
        limit = f"{'at least' if bar.at_least else 'at most'} {bar.limit:,g}"
        print(f"{'holds ' if bar.holds else 'MISSED'} {bar.name}: {value} ({limit})")
    print(f"{options.out / 'serving.md'} and serving.json, in {time.monotonic() - began:.0f} s")
    return 0 if all(bar.holds for bar in found) else 1


def _published(page: Path) -> dict[str, Any]:
    """The parts that the page which is there already was made of."""
    return parts_of(json.loads(page.read_bytes()), _machine()) if page.exists() else {}


def _measured(work: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Every part as it was measured last, here or for the page, in the order of `PARTS`."""
    here = {part: json.loads(place.read_bytes()) for part in PARTS if (place := work / f"{part}.json").exists()}
    return {p: max((of[p] for of in (before, here) if p in of), key=_at) for p in PARTS if p in before or p in here}


def _at(part: dict[str, Any]) -> str:
    return str(part["at"])


def _measure(bench: Bench, part: str, place: Path, *, again: bool) -> None:
    if place.exists() and not again:
        print(f"{part}: measured before", flush=True)
        return
    print(part, flush=True)
    began = time.monotonic()
    with bench.alone():
        found = PARTS[part](bench)
    told = {
        "found": found,
        "seconds": round(time.monotonic() - began, 1),
        "load": os.getloadavg()[1],
        "at": time.strftime("%F %H:%M"),
        "revision": _revision(),
    }
    write_durably(place, json.dumps(told).encode())


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = ("rounds", "soak", "requests", "peer_requests", "updates", "swaps", "starts")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.peers is not None:
        given["peers"] = tuple(options.peers.replace(",", " ").split())
    return given


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_serving", description=(__doc__ or "").strip())
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-serving", help="work folder, kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="where the page goes")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--again", action="store_true", help="measure also what the work folder has already")
    parser.add_argument("--only", default="", help=f"parts, measured again: {', '.join(PARTS)}")
    parser.add_argument("--peers", default=None, help="servers to compare with; as a rule all")
    for name in ("rounds", "soak", "requests", "peer-requests", "updates", "swaps", "starts"):
        parser.add_argument(f"--{name}", type=int, default=None)
    return parser.parse_args(arguments)


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _machine() -> str:
    return f"{os.cpu_count()} CPUs ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
