"""Bench serving: memory, idle CPU, time from start to first prediction, and what is installed.

Rules: one server at a time, so that nobody's pages are shared with another's; PSS of the whole tree, after a rest.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, Final

from . import cast
from .bench import ROW, Bench
from .cast import Peer
from .helpers import Helper
from .load import LoadError, Target
from .process import CpuMeter, cpu_since_birth, end, pss
from .venvs import NAMES

_REST: Final = 4.0  # seconds
_WARM: Final = 1_000  # requests
#: Of our own memory everything that is bounded is to be full: reports come often, and rows no faster than they count.
REPORTS: Final = "2"  # seconds
RATE: Final = 2_000  # requests a second
#: From the start of a process to its first prediction: seconds, and seconds of CPU.
Start = tuple[float, float]
#: What our own process does on the way there: each with what stands above it, and the last with all that is ours.
STEPS: Final[dict[str, str]] = {
    "python": "",
    "numpy": "import numpy",
    "onnxruntime": "import numpy, onnxruntime",
    "modules": "import gc; gc.disable(); import lightship_agent.cli, lightship_agent.app",
}


def rested(pid: int) -> float:
    """MB of PSS after a rest: the median of some looks."""
    time.sleep(_REST)
    looks = []
    for _ in range(10):
        looks.append(pss(pid))
        time.sleep(0.1)
    return statistics.median(looks)


def measure(bench: Bench) -> dict[str, Any]:
    """Ourselves, the floor, and the peers."""
    found: dict[str, Any] = {"bare": _bare(bench), "ours": _ours(bench), "peers": {}, "absent": {}}
    able, found["absent"] = bench.peers()
    for peer in able:
        print(f"  {peer.name}", flush=True)
        try:
            found["peers"][peer.name] = _peer(bench, peer)
        except LoadError as e:
            found["absent"][peer.name] = str(e)
    return found


def _bare(bench: Bench) -> dict[str, float]:
    found = {}
    bench.scene()  # as many processes share the interpreter's own pages as will when the agent is looked at
    for name in ("-", "hgb", "rf"):
        model = name if name == "-" else str(bench.made / f"{name}-1.onnx")
        with Helper(bench.environment("floor"), "bare.py", model) as helper:
            found["nothing" if name == "-" else name] = rested(helper.pid)
    return found


def _ours(bench: Bench) -> dict[str, float]:
    found = {}
    with bench.scene().agent("memory") as agent:
        agent.waits(lambda: bool(agent.status()), "an answer")
        found["empty"] = rested(agent.process.pid)
    with bench.scene().serving("memory", "hgb") as agent:
        agent.first_answer("hgb", ROW)
        found["idle"] = rested(agent.process.pid)
        found["idle_cpu"] = _idle(agent.process.pid, bench.sizes.idle_seconds)
    with bench.scene().serving("memory", "hgb", REPORT_SECONDS=REPORTS) as agent:
        agent.first_answer("hgb", ROW)
        pid = agent.process.pid
        target = agent.target(bench.client, cast.oip("hgb", ROW), "memory")
        found |= _loaded(bench, target, pid, bench.sizes.requests, "-r", RATE)
    with bench.scene().serving("memory-rf", "rf") as agent:
        agent.first_answer("rf", ROW)
        found["forest"] = rested(agent.process.pid)
    return found


def _peer(bench: Bench, peer: Peer) -> dict[str, float]:
    environment = bench.environment(peer.environment)
    with cast.running(cast.start(peer, environment, bench.folder / "run", bench.made, ("hgb",))) as server:
        server.first_answer("hgb", ROW)
        pid = server.process.pid
        found = {"idle": rested(pid), "idle_cpu": _idle(pid, min(15.0, bench.sizes.idle_seconds))}
        target = server.target(bench.client, "hgb", ROW)
        return found | _loaded(bench, target, pid, bench.sizes.peer_requests)


def _loaded(bench: Bench, target: Target, pid: int, requests: int, *options: str | float) -> dict[str, float]:
    bench.client.ask(target, "-c", 8, "-n", _WARM)
    loaded = rested(pid)
    bench.client.ask(target, *(options or ("-c", 8)), "-n", requests)
    return {"loaded": loaded, "after": rested(pid), "requests": requests}


def _idle(pid: int, seconds: float) -> float:
    """CPU of a core, in percent, while nothing is asked."""
    meter = CpuMeter([pid])
    time.sleep(seconds)
    return 100 * meter.spent() / seconds


def starts(bench: Bench) -> dict[str, Any]:
    """Seconds, and seconds of CPU, from the start of a process to its first prediction; everybody in turn."""
    able, absent = bench.peers()
    takes: dict[str, Callable[[], Start]] = {peer.name: _first(bench, peer) for peer in able}
    takes["bare"] = lambda: _first_bare(bench)
    with bench.scene().serving("starts", "hgb") as agent:

        def ours() -> Start:
            end(agent.process, 30)
            began = time.monotonic()
            agent.start()
            agent.first_answer("hgb", ROW)
            return time.monotonic() - began, cpu_since_birth(agent.process.pid)

        takes["ours"] = ours
        found: dict[str, list[Start]] = {name: [] for name in takes}
        steps: dict[str, list[float]] = {name: [] for name in STEPS}
        for number in range(1 + bench.sizes.starts):
            print(f"  round {number} of {bench.sizes.starts}", flush=True)
            for name, take in takes.items():
                try:
                    took = take()
                except LoadError as e:
                    absent[name] = str(e)
                    continue
                if number:  # the first brings its files into memory
                    found[name].append(took)
            for name, code in STEPS.items():
                steps[name].append(_runs(bench, code))
    seen = {name: took for name, took in found.items() if took}
    return {
        "seconds": {name: [s for s, _ in took] for name, took in seen.items()},
        "cpu": {name: [cpu for _, cpu in took] for name, took in seen.items()},
        "steps": {name: statistics.median(took) for name, took in steps.items()},
        "absent": absent,
    }


def _runs(bench: Bench, code: str) -> float:
    """Seconds that a process of our environment takes which does this and ends."""
    command = [str(bench.environment("ours").python), "-c", f"{code}\nimport os; os._exit(0)"]
    began = time.monotonic()
    subprocess.run(command, env=cast.base_environment(), check=True)
    return time.monotonic() - began


def _first_bare(bench: Bench) -> Start:
    began = time.monotonic()
    with Helper(bench.environment("floor"), "bare.py", str(bench.made / "hgb-1.onnx")) as helper:
        return time.monotonic() - began, cpu_since_birth(helper.pid)


def _first(bench: Bench, peer: Peer) -> Callable[[], Start]:
    def take() -> Start:
        environment = bench.environment(peer.environment)
        with cast.running(cast.start(peer, environment, bench.folder / "run", bench.made, ("hgb",))) as server:
            server.first_answer("hgb", ROW)
            return time.monotonic() - server.started, cpu_since_birth(server.process.pid)

    return take


def sizes(bench: Bench) -> dict[str, Any]:
    """MB and distributions of every environment."""
    found = {}
    for name in NAMES:
        if name in {"floor", "ours"} or any(cast.peer(p).environment == name for p in bench.sizes.peers):
            environment = bench.environment(name)
            if not environment.why_not:
                found[name] = {"mb": environment.size_mb(), "distributions": environment.distributions()}
    return found
