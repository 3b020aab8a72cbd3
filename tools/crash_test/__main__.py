"""`make crash-test`: play the rows, two at a time; exit 0 only if every row is as expected."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightship_agent.contract.manifest import Requires

from . import bundles, page, rows_clock, rows_plane, rows_state, rows_update, rows_world
from .device import Device
from .plane import Plane, open_plane
from .row import Found, Row, Stage, play


def main(arguments: list[str] | None = None) -> int:
    """Play what is asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="crash_test", description="Fail the real programs; see them recover.")
    parser.add_argument("--only", default="", help="Rows whose name has these words.")
    parser.add_argument("--again", action="store_true", help="Only rows that were not as expected the last time.")
    parser.add_argument("--workers", type=int, default=2, help="So many rows at once.")
    parser.add_argument("--folder", type=Path, default=Path("build/crash-test"), help="Where to play; emptied first.")
    options = parser.parse_args(arguments)
    chosen = [r for r in all_rows() if options.only.lower() in r.name.lower()]
    notes = options.folder.resolve().with_suffix(".jsonl")
    if options.again:
        before = page.noted(chosen, notes)
        chosen = [r for r in chosen if r.name not in before or before[r.name].wrong]
    elif not options.only:
        notes.unlink(missing_ok=True)
    found = run(chosen, options.folder.resolve(), options.workers, notes)
    everything = page.noted(all_rows(), notes)
    if len(everything) == len(all_rows()):
        page.write({area: [everything[row.name] for row in rows] for area, rows in areas().items()})
    failed, skipped = sum(bool(f.wrong) for f in found), sum(bool(f.skipped) for f in found)
    print(f"{len(found)} rows: {len(found) - failed - skipped} as expected, {failed} not, {skipped} skipped")
    return 1 if failed else 0


def areas() -> dict[str, list[Row]]:
    """The whole table, by area."""
    return {
        "An update, failed at each of its points": rows_update.rows(),
        "What a device finds of its own state when it starts": rows_state.rows(),
        "Reports, network and disk": rows_world.rows(),
        "Clocks and certificates": rows_clock.rows(),
        "The control plane: releases and rollouts": rows_plane.rows(),
    }


def all_rows() -> list[Row]:
    """The whole table."""
    return [row for rows in areas().values() for row in rows]


def run(rows: list[Row], folder: Path, workers: int = 2, notes: Path | None = None) -> list[Found]:
    """Play rows, and say so, and note it; what came of each, in their order."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lock, done = threading.Lock(), 0
    with tempfile.TemporaryDirectory(prefix="crash-") as sockets, open_plane(folder) as plane:
        release_all(plane)
        clean = undisturbed(plane, folder / "clean", Path(sockets))

        def one(numbered: tuple[int, Row]) -> Found:
            nonlocal done
            number, row = numbered
            found = play(row, Stage(plane, f"r-{number:03d}", folder / f"{number:03d}", Path(sockets)), clean)
            with lock:
                done += 1
                if notes is not None:
                    page.note(found, notes)
                verdict = "MISS" if found.wrong else "skip" if found.skipped else "ok  "
                page.say(f"{done:3d}/{len(rows)} {verdict} {found.seconds:5.1f} s  #{number:03d} {row.name}")
                for words in (*found.wrong, *([f"needs {found.skipped}"] if found.skipped else [])):
                    page.say(f"        {words}")
            return found

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, enumerate(rows, start=1)))


def release_all(plane: Plane) -> None:
    """Every bundle of the table."""
    for version in (1, 2, 3):
        plane.release(bundles.build(version), version)
    plane.release(bundles.build(4, ballast_bytes=1_500_000), 4)
    plane.release(bundles.build(5, golden_shift=1.0), 5)
    plane.release(bundles.build(9, brittle=True), 9)
    limits = {
        6: Requires(latency_ms=1e-6),
        7: Requires(memory_mb=1),
        8: Requires(device_classes=("other",)),
        10: Requires(probe_seconds=4),
    }
    for version, requires in limits.items():
        plane.release(bundles.build(version, requires=requires), version)


def undisturbed(plane: Plane, folder: Path, sockets: Path) -> frozenset[str]:
    """The files that an update leaves which nothing disturbs."""
    device = Device(plane, "r-000", folder, sockets)
    try:
        device.commit(1)
        plane.assign(device.name, 2)
        device.start()
        device.settles(2)
        device.stop()
        return frozenset(device.names())
    finally:
        device.close()


if __name__ == "__main__":
    sys.exit(main())
