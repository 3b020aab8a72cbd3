"""Bench serving, in the agent's environment: its faces, its data plane and its monitor, and a model swapped again and
again while it is asked.

Usage: swapping.py PORT TIMES BUNDLE BUNDLE. Serves the first, says `ready`, waits for a line, swaps TIMES times to the
other one as the agent does it (load, install, let go of the one before, trim), says what each took as JSON, and serves
until its input ends.
"""

import json
import sys
import time
from pathlib import Path

from lightship_agent.contract.bundle import read_bundle
from lightship_agent.monitor.monitor import Monitor
from lightship_agent.runtime.memory import trim_memory
from lightship_agent.runtime.model import load_model
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import create_app
from lightship_agent.serving.server import HttpServer


def main():
    port, times = int(sys.argv[1]), int(sys.argv[2])
    bundles = [read_bundle(Path(path).read_bytes()) for path in sys.argv[3:5]]
    monitor = Monitor(200)
    plane = DataPlane(monitor.observe, observe_row=monitor.observe_row, observe_rows=monitor.observe_rows)
    plane.install(load_model(bundles[0]))
    server = HttpServer(create_app(plane, status=dict, metrics=str), port=port)
    server.start()
    print("ready", flush=True)
    sys.stdin.readline()
    took, begun = [], time.perf_counter()
    for n in range(1, times + 1):
        at = time.perf_counter()
        plane.install(load_model(bundles[n % 2]))
        trim_memory()
        took.append(time.perf_counter() - at)
        if n % 20 == 0:
            monitor.collect(time.time_ns() // 1_000_000)
    seconds = time.perf_counter() - begun
    print(json.dumps({"swaps": times, "seconds": seconds, "median_ms": 1e3 * sorted(took)[len(took) // 2]}), flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
