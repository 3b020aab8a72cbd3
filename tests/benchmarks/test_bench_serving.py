"""The tools behind `make bench-serving` measure what they say, and its page holds what it claims."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench_serving import cast, models
from bench_serving.bars import bars
from bench_serving.figures import Figures
from bench_serving.kept import parts_of
from bench_serving.load import Client, LoadError, Target
from bench_serving.page import page, plain
from bench_serving.plot import picture
from bench_serving.process import CpuMeter, pss, tree
from bench_serving.stats import quantile, slope, spread
from lightship_agent.contract.wire import sha256_hex

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "serving.json"
ROW = models.rows(1)
#: A word of every bar that there has to be.
NEEDED = (
    "CPU per request, of fastapi", "CPU per request, of mlserver", "p50, of fastapi", "p50, of mlserver (workers=0)",
    "p50, of mlserver's default", "p50, of bentoml", "p50, of triton through pytriton", "binary extension", "frames",
    "in-process", "paced 100 requests/s", "idle", "throughput at concurrency 32", "drift, metrics and telemetry on",
    "while an update", "memory: MB of PSS above bare", "forest after load", "after 100,000 requests", "after 20 swaps",
    "soak", "first prediction, of fastapi", "first prediction, of mlserver", "requests that failed", "stale", "mix",
    "digest", "micro-batched",
)  # fmt: skip
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


# What is pure -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_a_spread_lies_within_what_was_seen(values: list[float]) -> None:
    found = spread(values)
    assert min(values) <= found.best <= found.median <= max(values)


def test_quantiles_lie_between_two_values_where_they_do() -> None:
    assert [quantile([3.0, 1.0, 2.0], q) for q in (0, 0.25, 0.5, 1)] == [1.0, 1.5, 2.0, 3.0]


@given(st.floats(-5, 5), st.floats(-100, 100))
def test_a_slope_is_found_again(rise: float, start: float) -> None:
    assert slope([(float(x), start + rise * x) for x in range(9)]) == pytest.approx(rise, abs=1e-6)
    assert slope([(2.0, start), (2.0, start + 1)]) == 0


def measured(**changed: Any) -> Figures:
    """Figures that hold every bar but those that are changed."""
    servers = [*cast.PEERS, "ours", "ours-unix", "ours-frames", "echo"]
    cost = {"ours": 40.0, "ours-unix": 35.0, "ours-frames": 20.0, "echo": 5.0}
    names = [s if isinstance(s, str) else s.name for s in servers]
    bursts = [
        {"who": who, "model": model, "c": c, "rate": 1e6 / cost.get(who, 2_000.0)}
        | dict.fromkeys(("cpu", "p50", "p90", "p99"), cost.get(who, 2_000.0))
        for who in names for model in models.NAMES for c in (1, 8, 32)
    ]  # fmt: skip
    paced = [
        {"who": who, "model": m, "cpu": cost.get(who, 2_000.0)} for who in (*names[:8], "ours") for m in ("hgb", "rf")
    ]
    call = {"run": (10.0, 11.0), "bound": (5.0, 5.5), "face": (6.0, 6.5)}
    inside = [
        {"model": m, **{what: {"best": best, "median": median} for what, (best, median) in call.items()}}
        for m in models.NAMES
    ]
    busy = dict.fromkeys(("requests", "errors"), 0) | {"p99": 150.0, "most": 900.0}
    many = {"json": 5_000.0, "binary": 900.0, "run": 400.0}
    memory = {"idle": 80.0, "idle_cpu": 0.1, "loaded": 82.0, "after": 83.0, "requests": 100_000}
    parts: dict[str, Any] = {
        "sizes": {"ours": {"mb": 180.0, "distributions": 23}},
        "speed": {
            "bursts": bursts, "inside": inside, "paced": paced, "absent": {"kserve": "it fell over"},
            "versions": {"fastapi": "1.0"},
        },
        "watched": {
            "watched": [{"who": w, "c": c, "cpu": 41.0 if w == "on" else 40.0} for w in ("on", "off") for c in (1, 32)],
            "many": [{"how": h, "model": m, "p50": t, "cpu": t} for h, t in many.items() for m in models.NAMES],
        },
        "memory": {
            "bare": {"nothing": 45.0, "hgb": 56.0, "rf": 120.0}, "peers": {"fastapi": memory}, "absent": {},
            "ours": {**memory, "empty": 70.0, "forest": 100.0},
        },
        "starts": {"seconds": {"ours": [0.5], "fastapi": [2.0], "fastapi-written": [2.0], "mlserver": [4.0]}},
        "updates": {
            "windows": [{"how": h, "quiet": {"p99": 100.0, "most": 500.0}, "busy": busy} for h in ("paced", "closed")],
            "before": 80.0, "after_one": 85.0, "after": 86.0, "rate": 200,
        },
        "swaps": {
            "swaps": 1_000, "seconds": 20.0, "median_ms": 19.0, "switches": 998, "failed": 0, "mixed": 0, "unknown": 0,
            "by_version": [5, 5], "burst": {"requests": 10, "p99": 900.0},
        },
        "together": {m: {"asked": 100, "differ": 0} for m in models.NAMES},
        "soak": {
            "requests": 10_000_000, "seconds": 600.0, "ring_dropped": 5.0,
            "points": [(float(i), 80.0 if i else 70.0) for i in range(11)],
        },
    }  # fmt: skip
    for path, value in changed.items():
        *way, last = path.split("__")
        place = parts
        for step in way:
            place = place[step]
        place[last] = value
    told = {"at": "2026-01-01 00:00", "seconds": 1.0, "load": 0.5, "revision": "abc"}
    return Figures({name: {"found": found, **told} for name, found in parts.items()}, "a machine")


def test_there_is_a_bar_for_all_that_was_asked_for_and_good_figures_hold_them() -> None:
    found = bars(measured())
    names = [bar.name for bar in found]
    assert [word for word in NEEDED if not any(word in name for name in names)] == []
    assert [bar.name for bar in found if not bar.holds] == []
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("where", "value", "missed"),
    [
        ("memory__ours__loaded", 90.0, "memory: MB of PSS above bare"),
        ("memory__ours__after", 85.5, "after 100,000 requests"),
        ("memory__ours__idle_cpu", 0.6, "idle"),
        ("updates__after", 90.0, "after 20 swaps"),
        ("swaps__swaps", 999, "swap under full load: swaps"),
        ("swaps__switches", 1_001, "stale"),
        ("swaps__mixed", 1, "mix of versions"),
        ("swaps__unknown", 1, "without the digest"),
        ("swaps__failed", 1, "swap under full load: requests that failed"),
        ("together__rf__differ", 1, "micro-batched"),
        ("starts__seconds__ours", [1.01], "first prediction, of mlserver"),
        ("soak__points", [(float(i), 70.0 + i / 2) for i in range(11)], "soak"),
    ],
)
def test_a_worse_figure_loses_its_bar(where: str, value: Any, missed: str) -> None:
    found = [bar for bar in bars(measured(**{where: value})) if not bar.holds]
    assert any(missed in bar.name for bar in found), found


def test_what_was_not_measured_is_not_held() -> None:
    empty = Figures({}, "a machine")
    assert [bar.name for bar in bars(empty) if bar.holds or bar.value is not None] == []
    assert page(empty).count("**not measured**") == len(bars(empty))
    assert json.loads(json.dumps(plain(empty)))["memory"] is None


def test_the_page_says_every_bar_and_who_was_not_there() -> None:
    figures = measured(memory__ours__loaded=90.0)
    said = page(figures)
    for bar in bars(figures):
        verdict = "holds" if bar.holds else r"\*\*missed\*\*"
        assert re.search(rf"^\| {re.escape(bar.name)} \| .* \| {verdict} \|$", said, re.M), bar
    assert "KServe SDK (tuned) is not in this table: it fell over" in said
    assert "Lightship, frames on a Unix socket" in picture(figures)
    assert all(len(line) <= 400 for line in said.splitlines())


def test_what_is_published_is_whole_and_true_to_its_own_limits() -> None:
    found = json.loads(RESULTS.read_text())
    said = RESULTS.with_suffix(".md").read_text()
    names = [bar["name"] for bar in found["bars"]]

    assert found["command"] == "make bench-serving"
    assert not found["quick"]
    assert [word for word in NEEDED if not any(word in name for name in names)] == []
    for bar in found["bars"]:
        value, limit = bar["value"], bar["limit"]
        assert value is not None, bar
        assert bar["holds"] == (value >= limit if bar["at_least"] else value <= limit), bar
        verdict = "holds" if bar["holds"] else r"\*\*missed\*\*"
        assert re.search(rf"^\| {re.escape(bar['name'])} \|.*\| {verdict} \|$", said, re.M), bar
    assert "</svg>" in RESULTS.with_suffix(".svg").read_text()


def test_why_a_start_is_late_is_told_from_the_steps_that_were_measured() -> None:
    steps = {"python": 0.02, "numpy": 0.06, "onnxruntime": 0.09, "modules": 0.25}
    late = measured(starts__seconds__ours=[1.01], starts__steps=steps)

    assert "python, numpy and onnxruntime take 90 of them" in page(late).lower()
    assert "(20, 40 and 30). Ours takes 1010: 160 go to our modules" in page(late)
    assert "first prediction, of mlserver (workers=0): no reason found yet." in page(
        measured(starts__seconds__ours=[1.01])
    )


def test_a_page_is_made_again_from_what_is_published_of_it() -> None:
    figures = measured(memory__ours__loaded=90.0)
    told = json.loads(json.dumps(plain(figures)))

    again = Figures(parts_of(told, figures.machine), figures.machine)

    assert page(again) == page(figures)
    assert plain(again)["speed"] == told["speed"]


@pytest.mark.parametrize("changed", [{"machine": "another"}, {"quick": True}])
def test_nothing_is_taken_from_another_machines_page_or_a_quick_one(changed: dict[str, Any]) -> None:
    told = plain(measured()) | changed
    assert parts_of(told, measured().machine) == {}


def test_a_part_that_is_not_published_whole_has_to_be_measured_again() -> None:
    told = plain(measured()) | {"speed": None}
    assert "speed" not in parts_of(told, measured().machine)


# The client ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(tmp_path_factory.mktemp("client"))


def answer(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


@contextmanager
def answering(*answers: bytes, slowly: float = 0.0) -> Iterator[str]:
    """A server that gives these answers in turn, over and over, on any number of connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    turn = iter(range(10**9))

    def talk(connection: socket.socket) -> None:
        with connection:
            while connection.recv(65_536):
                time.sleep(slowly)
                connection.sendall(answers[next(turn) % len(answers)])

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@needs_cc
@pytest.mark.parametrize("connections", [1, 4])
def test_the_client_counts_answers_and_how_long_they_took(client: Client, connections: int) -> None:
    with answering(answer(b"{}"), slowly=0.01) as where:
        burst = client.ask(Target(where, client.request("r", cast.oip("m", ROW))), "-c", connections, "-n", 40)
    assert 40 <= burst.requests <= 40 + 2 * connections
    assert burst.errors == 0
    assert 10_000 <= burst.p50 <= burst.p90 <= burst.p99 <= 1.01 * burst.most


@needs_cc
def test_a_refusal_is_no_answer(client: Client) -> None:
    with answering(answer(b"{}"), answer(b"busy", "503 Service Unavailable")) as where:
        target = Target(where, client.request("r", cast.oip("m", ROW)))
        with pytest.raises(LoadError, match="busy"):
            client.ask(target, "-n", 10)
        burst = client.ask(target, "-n", 10, tolerant=True)
    assert (burst.requests, burst.errors) == (10, pytest.approx(10, abs=1))


@needs_cc
def test_a_paced_client_measures_from_when_it_should_have_asked(client: Client) -> None:
    with answering(answer(b"{}"), slowly=0.04) as where:
        target = Target(where, client.request("r", cast.oip("m", ROW)))
        burst = client.ask(target, "-r", 50, "-t", 1)
    # Each answer takes twice as long as there is between two requests: who waits for the answer sees 40 ms only.
    assert burst.most > 200_000


@needs_cc
def test_the_client_knows_whose_an_answer_is(client: Client, tmp_path: Path) -> None:
    old, new = sha256_hex(b"old"), sha256_hex(b"new")
    expected = tmp_path / "expected"
    expected.write_text(f'{old} "data":[1.0]\n{new} "data":[2.0]\n')
    said = [
        f'{{"digest":"{digest}","data":[{score}]}}'
        for digest, score in ((old, 1.0), (new, 2.0), (old, 2.0), (sha256_hex(b""), 1.0))
    ]
    with answering(*(answer(s.encode()) for s in said)) as where:
        target = Target(where, client.request("r", cast.oip("m", ROW)))
        running = client.begin(target, "-n", 400, "-e", str(expected))
        os.waitid(os.P_PID, running._process.pid, os.WEXITED | os.WNOWAIT)  # it has asked so often, and ended
        _, found = running.stop()
    assert (found["mixed"], found["unknown"], found["by_version"]) == (100, 100, [200, 100])
    assert found["switches"] == 200


@needs_cc
def test_the_floor_answers_whatever_is_asked(client: Client) -> None:
    where = f"127.0.0.1:{cast.free_ports(1)}"
    with subprocess.Popen([str(client.program), "echo", where, "100"]) as floor:
        target = Target(where, client.request("r", cast.oip("m", ROW)), (floor.pid,))
        host, port = where.split(":")
        cast.first_answer((host, int(port)), cast.oip("m", ROW), floor, Path("floor"))  # type: ignore[arg-type]
        burst = client.ask(target, "-c", 8, "-n", 2_000)
        floor.terminate()
    assert 0 < burst.cpu < 1_000


# Processes, requests, models ----------------------------------------------------------------------------------------


def test_cpu_and_memory_are_those_of_the_whole_tree() -> None:
    child = "held = bytearray(40 << 20); held[::4096] = b'x' * len(held[::4096]); sum(range(5_000_000))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child + '; print(flush=True); input()'!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        meter = CpuMeter([parent.pid])
        parent.stdout.readline()
        assert len(tree(parent.pid)) == 2
        assert pss(parent.pid) > 45
        assert 0.01 < meter.spent() < 30
        parent.communicate(b"\n")
    assert pss(parent.pid) == 0


def test_every_kind_of_answer_is_read() -> None:
    oip = {"outputs": [{"name": "label", "data": [1]}, {"name": "scores", "data": [0.25, 0.75]}]}
    assert cast.scores_in(json.dumps(oip).encode()) == [0.25, 0.75]
    assert cast.scores_in(b'{"label":1,"scores":[0.25,0.75]}') == [0.25, 0.75]


def test_requests_carry_the_same_row() -> None:
    numbers = ROW[0].tolist()
    for kind in ("oip", "bento", "features"):
        head, _, body = cast.request_of(kind, "hgb", ROW).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        plain_body = json.loads(body)
        assert plain_body.get("features", plain_body.get("inputs", [{}])[0].get("data")) == numbers
    binary = cast.oip_binary("hgb", ROW)
    assert binary.endswith(ROW.astype("<f4").tobytes())
    assert cast.frame(ROW)[4:].endswith(ROW.astype("<f4").tobytes())


@pytest.mark.slow
def test_a_model_is_made_once_and_a_server_that_says_otherwise_is_noticed(tmp_path: Path) -> None:
    made = models.make(tmp_path, "mlp")
    again = models.make(tmp_path, "mlp")
    other = models.reversioned(tmp_path, "mlp", 3)
    assert made == again
    assert other.onnx == made.onnx
    assert other.bundle != made.bundle
    import onnxruntime

    found = onnxruntime.InferenceSession(made.onnx).run(["scores"], {"features": ROW})[0][0]
    cast.agrees(json.dumps({"scores": found.tolist()}).encode(), "mlp", tmp_path, ROW)
    with pytest.raises(LoadError, match="expected"):
        cast.agrees(json.dumps({"scores": (found + np.float32(1e-3)).tolist()}).encode(), "mlp", tmp_path, ROW)


def test_every_peer_has_its_environment_pinned_and_its_program() -> None:
    folder = ROOT / "tools" / "bench_serving"
    for peer in cast.PEERS:
        lines = (folder / "environments" / f"{peer.environment}.txt").read_text().split()
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), peer
        assert any(line.startswith("onnxruntime==") for line in lines), peer
    assert len({dataclasses.astuple(p) for p in cast.PEERS}) == len(cast.PEERS)
