"""Swaps under full load, over real HTTP: nothing fails, nothing is stale, nothing is mixed, and memory stays level."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.agent.conftest import training_rows

from lightship_agent.contract.bundle import Bundle
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import create_app
from lightship_agent.serving.residents import Residents
from lightship_agent.serving.server import HttpServer

Bundles = Callable[..., Bundle]
ROW = training_rows(3)


@dataclass
class Swaps:
    """How far the swapping is: `begun` counts before a swap, `done` after it; swap i installs bundle i % 2."""

    digests: tuple[str, str]
    begun: int = 0
    done: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)


@dataclass
class Tally:
    """What one connection saw."""

    answers: int = 0
    certain: int = 0  # answers that only one version may have given, for no swap happened meanwhile
    failed: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)


def body_of(rows: Any) -> bytes:
    tensor = {"name": "features", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def request_of(body: bytes) -> bytes:
    return b"POST /v2/models/pump/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def read(stream: Any) -> tuple[int, dict[str, Any]]:
    line = stream.readline()
    assert line, "the server hung up"
    status = int(line.split()[1])
    length = 0
    while (line := stream.readline()) != b"\r\n":
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return status, json.loads(stream.read(length))


def ask_on(address: tuple[str, int], swaps: Swaps, expected: dict[str, list[float]], *, rows: Any, depth: int) -> Tally:
    """Ask on one connection, `depth` requests at a time, until the swapping is over; judge every answer."""
    tally = Tally()
    together = request_of(body_of(rows)) * depth
    with socket.create_connection(address, timeout=30) as connection, connection.makefile("rb") as stream:
        while not swaps.stopped.is_set():
            before = swaps.done
            connection.sendall(together)
            for _ in range(depth):
                status, said = read(stream)
                after = swaps.begun
                tally.answers += 1
                if status != 200:
                    tally.failed.append(f"{status} {said}")
                    continue
                digest = said["parameters"]["digest"]
                allowed = {swaps.digests[i % 2] for i in range(before, min(after, before + 1) + 1)}
                tally.certain += len(allowed) == 1
                if digest not in allowed:
                    tally.stale.append(f"{digest[:12]} after swap {before}")
                scores = next(o["data"] for o in said["outputs"] if o["name"] == "scores")
                if np.array(scores, np.float32).tolist() != expected[digest][: len(scores)]:
                    tally.mixed.append(f"{digest[:12]} gave {scores}")
    return tally


def swap_under_load(open_bundle: Bundles, times: int, *, pause: float) -> list[Tally]:
    """Swap so often between two versions that say the opposite, while several connections ask as fast as they can."""
    plane = DataPlane(lambda *_: None)
    residents = Residents(plane)
    bundles = [open_bundle(1), open_bundle(2, flip=True)]
    expected = {}
    for bundle in reversed(bundles):
        model = residents.serve(bundle)
        alone = [model.predict(row.reshape(1, -1)).scores for row in ROW]
        expected[bundle.digest] = np.concatenate(alone).ravel().tolist()  # type: ignore[arg-type]
        together = model.predict(ROW).scores
        assert together is not None
        assert together.ravel().tolist() == expected[bundle.digest]
    swaps = Swaps((bundles[0].digest, bundles[1].digest))
    server = HttpServer(create_app(plane, status=dict, metrics=str), port=0)
    server.start()
    assert server.address is not None
    tallies: list[Tally] = []

    def client(rows: Any, depth: int) -> None:
        assert server.address is not None
        tallies.append(ask_on(server.address, swaps, expected, rows=rows, depth=depth))

    # One row: the hot path; eight of them at once: answered together; three rows: the long way.
    kinds = [(ROW[:1], 1), (ROW[:1], 1), (ROW[:1], 8), (ROW, 1)]
    threads = [threading.Thread(target=client, args=kind) for kind in kinds]
    try:
        for thread in threads:
            thread.start()
        for i in range(1, times + 1):
            time.sleep(pause)
            swaps.begun = i
            residents.serve(bundles[i % 2])
            swaps.done = i
    finally:
        swaps.stopped.set()
        for thread in threads:
            thread.join(60)
        server.stop()
    assert plane.errors() == {}
    return tallies


def judge(tallies: list[Tally], times: int) -> None:
    assert len(tallies) == 4
    assert list(itertools.chain(*(t.failed for t in tallies)))[:3] == []
    assert list(itertools.chain(*(t.stale for t in tallies)))[:3] == []
    assert list(itertools.chain(*(t.mixed for t in tallies)))[:3] == []
    answers, certain = sum(t.answers for t in tallies), sum(t.certain for t in tallies)
    assert answers > times
    assert certain > answers / 4, "so few answers fell between two swaps that nothing is proved"


def test_a_hundred_swaps_under_load_fail_no_request_and_give_no_stale_or_mixed_answer(open_bundle: Bundles) -> None:
    judge(swap_under_load(open_bundle, 100, pause=0.01), 100)


@pytest.mark.slow
def test_a_thousand_swaps_under_load_fail_no_request_and_give_no_stale_or_mixed_answer(open_bundle: Bundles) -> None:
    judge(swap_under_load(open_bundle, 1_000, pause=0.01), 1_000)


#: A process of its own, so that what the tests leave in memory does not count: two forests in turns, loaded each time.
_TWENTY = """
import sys
from pathlib import Path
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.runtime.memory import own_bytes
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.residents import Residents

residents = Residents(DataPlane(lambda *_: None), spare=0)
bundles = [Path(name) for name in sys.argv[1:3]]

def update(path):
    bundle = read_bundle(path.read_bytes())
    residents.serve(bundle)
    residents.settle([bundle.digest])
    del bundle
    residents.tidy()
    return own_bytes()

first = update(bundles[0])
held = [update(bundles[i % 2]) for i in range(1, 21)]
assert len(residents.residents()) == 1
print(first, held[-1], max(held))
"""


@pytest.mark.slow
def test_twenty_updates_later_a_forest_takes_what_it_took_at_first(tmp_path: Path, forest_bundle: Any) -> None:
    paths = [tmp_path / f"{version}.tar" for version in (1, 2)]
    for version, path in enumerate(paths, 1):
        path.write_bytes(forest_bundle(version))

    done = subprocess.run(
        [sys.executable, "-c", _TWENTY, *map(str, paths)], capture_output=True, text=True, check=True, timeout=300
    )

    first, last, most = map(int, done.stdout.split())
    assert last <= 1.10 * first, done.stdout
    assert most <= 1.15 * first, done.stdout
