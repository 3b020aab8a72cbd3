"""Bench serving: models that change while they are asked: updates, swaps, and rows that are answered together.

Rules: an update is a real one, from the director's signature to the device's commit; the thousand swaps are made in a
process that has the agent's faces, data plane, monitor and loader, since an update brings its own waiting time. An
answer counts for a version by the digest in it, and has to hold that version's own scores.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from lightship_agent.contract.wire import sha256_hex

from . import cast, models
from .bench import ROW, Bench
from .helpers import Helper
from .load import Target
from .memory import RATE, REPORTS, rested

#: Before memory is compared, so many rows that all that is bounded is full.
_REMEMBERED: Final = 25_000
_QUIET: Final = 4.0  # seconds
_RATE: Final = 200  # requests a second, as many as a busy device is asked
_TOGETHER: Final = 32
_REPEATED: Final = 40


def updates(bench: Bench) -> dict[str, Any]:
    """Latency while updates come, and between them; memory before and after all of them."""
    windows = []
    with bench.scene().serving("updates", "hgb", POLL_SECONDS="1", SOAK_SECONDS="1", REPORT_SECONDS=REPORTS) as agent:
        target = agent.target(bench.client, cast.oip("hgb", ROW), "updates")
        bench.client.ask(target, "-r", RATE, "-n", _REMEMBERED)
        before = rested(agent.process.pid)
        after_one = 0.0
        for number in range(2, 2 + bench.sizes.updates):
            print(f"  update {number - 1} of {bench.sizes.updates}", flush=True)
            bench.scene().release("hgb", number)
            how = "paced" if number % 2 else "closed"
            options = ("-r", _RATE) if number % 2 else ()
            quiet = bench.client.ask(target, "-t", _QUIET, *options)
            running = bench.client.begin(target, *options)
            began = time.monotonic()
            agent.settles(bench.scene().assign("updates", "hgb", number), step=0.5)
            took = time.monotonic() - began
            busy, _ = running.stop(tolerant=True)
            windows.append({"how": how, "seconds": took, "quiet": asdict(quiet), "busy": asdict(busy)})
            if number == 2:
                after_one = rested(agent.process.pid)
        after = rested(agent.process.pid)
    return {"windows": windows, "before": before, "after_one": after_one, "after": after, "rate": _RATE}


def swaps(bench: Bench) -> dict[str, Any]:
    """Swaps under full load, and what was answered meanwhile."""
    made = [models.make(bench.made, "hgb", version) for version in (1, 2)]
    expected = bench.made / "expected"
    expected.write_text("".join(f"{sha256_hex(m.bundle)} {_scores_text(m.onnx)}\n" for m in made))
    port = cast.free_ports(1)
    paths = [str(bench.made / f"hgb-{m.version}.tar") for m in made]
    with Helper(bench.environment("ours"), "swapping.py", str(port), str(bench.sizes.swaps), *paths) as helper:
        request = bench.client.request("swaps", cast.oip("hgb", ROW))
        target = Target(f"127.0.0.1:{port}", request, (helper.pid,))
        before = rested(helper.pid)
        running = bench.client.begin(target, "-c", 8, "-e", str(expected))
        time.sleep(0.5)
        helper.tell()
        done = helper.answer()
        burst, said = running.stop(tolerant=True)
        after = rested(helper.pid)
    kept = {k: said[k] for k in ("switches", "mixed", "unknown", "by_version")}
    return {**done, **kept, "burst": asdict(burst), "failed": burst.errors, "before": before, "after": after}


def _scores_text(onnx: bytes) -> str:
    """The scores as they stand in an answer; the path of the file does not matter, the words do."""
    import msgspec
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    found: list[float] = session.run(["scores"], {"features": ROW})[0][0].tolist()
    return f'"data":{msgspec.json.encode(found).decode()}'


def together(bench: Bench) -> dict[str, Any]:
    """Answers to rows that come at once, on as many connections, against the answers to each alone."""
    found: dict[str, Any] = {}
    for name in models.NAMES:
        with bench.scene().serving(f"together-{name}", name) as agent, ExitStack() as stack:
            address = ("127.0.0.1", agent.port)
            lines = [stack.enter_context(socket.create_connection(address, 30)) for _ in range(_TOGETHER)]
            differ = asked = 0
            for repeat in range(_REPEATED):
                rows = models.rows(_TOGETHER, seed=1_000 + repeat)
                requests = [cast.oip(name, rows[i : i + 1]) for i in range(_TOGETHER)]
                alone = [_outputs(_ask(lines[0], r)) for r in requests]
                for line, request in zip(lines, requests, strict=True):
                    line.sendall(request)
                at_once = [_outputs(_read(line)) for line in lines]
                differ += sum(a != b for a, b in zip(alone, at_once, strict=True))
                asked += len(requests)
            found[name] = {"asked": asked, "differ": differ}
    return found


def _ask(line: socket.socket, request: bytes) -> bytes:
    line.sendall(request)
    return _read(line)


def _read(line: socket.socket) -> bytes:
    answer = http.client.HTTPResponse(line, method="POST")
    answer.begin()
    return answer.read()


def _outputs(body: bytes) -> str:
    """What does not name the request: the outputs, as they are written."""
    return json.dumps(json.loads(body)["outputs"])


def soak(bench: Bench) -> dict[str, Any]:
    """Memory over so many requests at full speed."""
    points: list[tuple[float, float]] = []
    with bench.scene().serving("soak", "hgb", REPORT_SECONDS=REPORTS) as agent:
        target = agent.target(bench.client, cast.oip("hgb", ROW), "soak")
        step = max(1_000, bench.sizes.soak // 100)
        asked, began = 0, time.monotonic()
        points.append((0.0, _looked(agent.process.pid)))
        while asked < bench.sizes.soak:
            burst = bench.client.ask(target, "-c", 32, "-n", min(step, bench.sizes.soak - asked))
            asked += burst.requests
            points.append((asked / 1e6, _looked(agent.process.pid)))
            if len(points) % 10 == 0:
                print(f"  {asked:,} requests, {points[-1][1]:.1f} MB", flush=True)
        seconds = time.monotonic() - began
        dropped = _number(agent.metrics(), "lightship_agent_ring_dropped_rows_total")
    return {"requests": asked, "seconds": seconds, "points": points, "ring_dropped": dropped}


def _looked(pid: int) -> float:
    from .process import pss

    return pss(pid)


def _number(metrics: str, name: str) -> float:
    return next((float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name)), 0.0)


__all__ = ["Path", "soak", "swaps", "together", "updates"]
