"""Bench serving: what drift, metrics and telemetry cost a request, and what many rows in one request cost.

Rules: *on* is an agent that watches, is scraped every second, and reports every five over MQTT; *off* is the same faces
and the same data plane in a process that does none of it. They take turns.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

from . import cast, models
from .awake import awake
from .bench import ROW, Bench
from .helpers import Helper
from .load import LoadError, Target
from .process import CpuMeter
from .scene import Agent

_CONCURRENCIES: Final = (1, 32)
_SECONDS: Final = 4  # times those of a burst: several reports have to fall into them
MANY: Final = 1_000  # rows of a large request


def measure(bench: Bench) -> dict[str, Any]:
    """Both."""
    with awake():
        return {"watched": _watching(bench), "many": _many(bench)}


def _watching(bench: Bench) -> list[dict[str, Any]]:
    port = cast.free_ports(1)
    seen, order = [], random.Random(5)
    with (
        bench.scene().serving("watched", "hgb", REPORT_SECONDS="5") as agent,
        Helper(bench.environment("ours"), "without.py", str(bench.made / "hgb-1.tar"), str(port)) as without,
        _scraped(agent),
    ):
        request = cast.oip("hgb", ROW)
        targets = {
            "on": agent.target(bench.client, request, "watched"),
            "off": Target(f"127.0.0.1:{port}", bench.client.request("without", request), (without.pid,)),
        }
        jobs = [(who, c) for who in targets for c in _CONCURRENCIES]
        for number in range(bench.sizes.rounds):
            print(f"  round {number + 1} of {bench.sizes.rounds}", flush=True)
            order.shuffle(jobs)
            for who, c in jobs:
                options = ("-t", _SECONDS * bench.sizes.seconds)
                meter = CpuMeter(targets[who].pids)
                if c == 1:
                    burst = bench.client.ask_alone(targets[who], *options)
                else:
                    burst = bench.client.ask(targets[who], "-c", c, *options)
                beside = 1e6 * sum(meter.by_thread()[1:]) / burst.requests  # in other threads than the one that answers
                seen.append({"who": who, "c": c, "beside": beside, **asdict(burst)})
        if agent.status().get("link", {}).get("mqtt") != "up":
            raise LoadError("The agent that is to report has no broker.")
    return seen


@contextmanager
def _scraped(agent: Agent) -> Iterator[None]:
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(1.0):
            agent.metrics()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _many(bench: Bench) -> list[dict[str, Any]]:
    table = models.rows(MANY, seed=98)
    seen = []
    with Helper(bench.environment("ours"), "inside.py", str(bench.made)) as inside:
        for name in models.NAMES:
            with bench.scene().serving(f"many-{name}", name) as agent:
                targets = {
                    "json": agent.target(bench.client, cast.oip(name, table), f"{name}-many-json"),
                    "binary": agent.target(bench.client, cast.oip_binary(name, table), f"{name}-many-binary"),
                }
                for _ in range(bench.sizes.rounds):
                    for how, target in targets.items():
                        burst = bench.client.ask(target, "-t", bench.sizes.seconds)
                        seen.append({"how": how, "model": name, **asdict(burst)})
                    inside.tell(f"{name} {bench.sizes.seconds} {MANY}")
                    run = inside.answer()["run"]
                    seen.append({"how": "run", "model": name, "p50": run["median"], "cpu": run["cpu"]})
    return seen
