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

from . import bundles, rows_plane, rows_state, rows_update, rows_world
from .device import Device
from .plane import Plane, open_plane
from .row import Found, Row, Stage, play


def main(arguments: list[str] | None = None) -> int:
    """Play what is asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="crash_test", description="Fail the real agent; see it recover.")
    parser.add_argument("--only", default="", help="Rows whose name has these words.")
    parser.add_argument("--rows", type=int, default=0, help="At most so many rows.")
    parser.add_argument("--folder", type=Path, default=Path("build/crash-test"), help="Where to play; emptied first.")
    options = parser.parse_args(arguments)
    chosen = [r for r in all_rows() if options.only.lower() in r.name.lower()]
    found = run(chosen[: options.rows or None], options.folder.resolve())
    failed = [f for f in found if f.wrong]
    print(f"{len(found)} rows, {len(failed)} not as expected")
    return 1 if failed else 0


def all_rows() -> list[Row]:
    """The whole table."""
    return [*rows_update.rows(), *rows_state.rows(), *rows_world.rows(), *rows_plane.rows()]


def run(rows: list[Row], folder: Path, workers: int = 2) -> list[Found]:
    """Play rows, and say so; what came of each, in their order."""
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
                verdict = "MISS" if found.wrong else "skip" if found.skipped else "ok  "
                place = f"{done:3d}/{len(rows)} {verdict} {found.seconds:5.1f} s"
                print(f"{place}  #{number:03d} {row.name} {found.skipped}", flush=True)
                for words in found.wrong:
                    print(f"        {words}", flush=True)
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
