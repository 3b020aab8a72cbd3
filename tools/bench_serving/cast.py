"""Bench serving: the servers as processes, what one asks them, and whether they all say the same."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from . import models
from .load import Client, LoadError, Target
from .process import end
from .venvs import Environment

_SERVERS: Final = Path(__file__).with_name("servers")
_PATIENCE: Final = 240.0
#: Beyond any difference of float32, and of the text that it is written as.
_TOLERANCE: Final = 1e-6


@dataclass(frozen=True)
class Peer:
    """A server somebody else wrote: how it is started, and whether its sessions take one thread or as they come."""

    name: str
    title: str
    environment: str
    kind: str  # features | bento | oip
    tuned: bool


PEERS: Final = (
    Peer("fastapi-written", "FastAPI as written (def, default session)", "fastapi", "features", tuned=False),
    Peer("fastapi", "FastAPI (async, tuned)", "fastapi", "features", tuned=True),
    Peer("mlserver", "MLServer (workers=0, tuned)", "mlserver", "oip", tuned=True),
    Peer("mlserver-default", "MLServer (its defaults)", "mlserver", "oip", tuned=False),
    Peer("kserve", "KServe SDK (tuned)", "kserve", "oip", tuned=True),
    Peer("litserve", "LitServe (tuned)", "litserve", "features", tuned=True),
    Peer("bentoml", "BentoML (tuned)", "bentoml", "bento", tuned=True),
    Peer("pytriton", "Triton through pytriton (tuned)", "pytriton", "oip", tuned=True),
)


def peer(name: str) -> Peer:
    """The peer of that name."""
    return next(p for p in PEERS if p.name == name)


def http_request(path: str, body: bytes, content_type: str = "application/json", **headers: int) -> bytes:
    """The bytes of a POST on a connection that is kept alive."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {content_type}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def oip(model: str, rows: npt.NDArray[np.float32]) -> bytes:
    """A request of the Open Inference Protocol, in JSON."""
    tensor = {"name": "features", "shape": list(rows.shape), "datatype": "FP32", "data": rows.ravel().tolist()}
    return http_request(f"/v2/models/{model}/infer", _compact({"inputs": [tensor]}))


def oip_binary(model: str, rows: npt.NDArray[np.float32]) -> bytes:
    """The same with the binary tensor extension, both ways."""
    data = rows.astype("<f4").tobytes()
    size = {"binary_data_size": len(data)}
    tensor = {"name": "features", "shape": list(rows.shape), "datatype": "FP32", "parameters": size}
    head = _compact({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    path, kind = f"/v2/models/{model}/infer", "application/octet-stream"
    return http_request(path, head + data, kind, Inference_Header_Content_Length=len(head))


def frame(rows: npt.NDArray[np.float32]) -> bytes:
    """A frame with rows as bytes."""
    import msgspec

    body = msgspec.msgpack.encode({"x": rows.astype("<f4").tobytes()})
    return len(body).to_bytes(4, "little") + body


def _compact(plain: Any) -> bytes:
    return json.dumps(plain, separators=(",", ":")).encode()


def request_of(kind: str, model: str, rows: npt.NDArray[np.float32]) -> bytes:
    """How that kind of server is asked about one row."""
    if kind == "oip":
        return oip(model, rows)
    features = rows[0].tolist()
    if kind == "bento":
        return http_request("/predict", _compact({"model": model, "features": features}))
    return http_request(f"/{model}/predict", _compact({"features": features}))


def scores_in(body: bytes) -> list[float]:
    """The class scores in anybody's answer."""
    said = json.loads(body)
    if "outputs" in said:
        return list(next(o["data"] for o in said["outputs"] if o["name"] == "scores"))
    return list(said["scores"])


@dataclass
class Server:
    """A peer that runs."""

    peer: Peer
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    started: float  # on the monotonic clock

    def target(self, client: Client, model: str, rows: npt.NDArray[np.float32]) -> Target:
        """Itself, asked about that row."""
        request = client.request(f"{self.peer.name}-{model}", request_of(self.peer.kind, model, rows))
        return Target(f"127.0.0.1:{self.port}", request, (self.process.pid,))

    def first_answer(self, model: str, rows: npt.NDArray[np.float32]) -> bytes:
        """Ask until it answers; the body.

        Raises:
            LoadError: it ended, or does not answer in time.
        """
        data = request_of(self.peer.kind, model, rows)
        return first_answer(("127.0.0.1", self.port), data, self.process, self.log)


def first_answer(where: tuple[str, int], data: bytes, process: subprocess.Popen[bytes], log: Path) -> bytes:
    """Ask a process that was just started until it answers with 200; the body.

    Raises:
        LoadError: it ended, or does not answer in time.
    """
    deadline = time.monotonic() + _PATIENCE
    said = b""
    while time.monotonic() < deadline and process.poll() is None:
        try:
            status, said = ask_once(where, data)
            if status == 200:
                return said
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.005)
    words = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    told = said.decode(errors="replace") or (words[-1] if words else "")
    message = f"{log.stem} does not answer: {told[-300:]}"
    raise LoadError(message)


def ask_once(where: tuple[str, int], data: bytes) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body."""
    with socket.create_connection(where, timeout=30) as connection:
        connection.sendall(data)
        answer = http.client.HTTPResponse(connection, method="POST")
        answer.begin()
        return answer.status, answer.read()


def start(p: Peer, environment: Environment, folder: Path, made: Path, names: Sequence[str]) -> Server:
    """Start a peer that serves those models out of `made`."""
    port = free_ports(3)
    run = folder / p.name
    run.mkdir(parents=True, exist_ok=True)
    variables = {
        **base_environment(),
        "BENCH_FOLDER": str(made),
        "BENCH_MODELS": ",".join(names),
        "BENCH_PORT": str(port),
        "BENCH_TUNED": "1" if p.tuned else "0",
        "PYTHONPATH": str(_SERVERS),
        "HOME": str(run),
    }
    command, more = _command(p, environment, run, port, names)
    log = run / f"{p.name}.log"
    with log.open("wb") as out:
        started = time.monotonic()
        process = subprocess.Popen(
            command, env=variables | more, cwd=run, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    return Server(p, port, process, log, started)


def _command(
    p: Peer, environment: Environment, run: Path, port: int, names: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    python = str(environment.python)
    if p.environment == "mlserver":
        for name in names:
            settings = {"name": name, "implementation": "mlserver_runtime.OnnxRuntime"}
            (run / name).mkdir(exist_ok=True)
            (run / name / "model-settings.json").write_text(json.dumps(settings))
        ports = {f"MLSERVER_{what}_PORT": str(port + n) for n, what in enumerate(("HTTP", "GRPC", "METRICS"))}
        workers = {"MLSERVER_PARALLEL_WORKERS": "0"} if p.tuned else {}
        # Its log of every request is off, as everybody's is here.
        more = {**ports, **workers, "MLSERVER_HOST": "127.0.0.1", "MLSERVER_DEBUG": "false"}
        return [str(environment.folder / "bin" / "mlserver"), "start", str(run)], more
    if p.environment == "bentoml":
        options = "api_server.logging.access.enabled=False"
        more = {"BENTOML_HOME": str(run), "BENTOML_DO_NOT_TRACK": "True", "BENTOML_CONFIG_OPTIONS": options}
        command = [str(environment.folder / "bin" / "bentoml"), "serve", "bentoml_server:Scorer"]
        return [*command, "--host", "127.0.0.1", "--port", str(port)], more
    scripts = {"fastapi-written": "fastapi_def.py", "fastapi": "fastapi_async.py"}
    return [python, str(_SERVERS / scripts.get(p.name, f"{p.name}_server.py"))], {}


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """A server that is ended with the block."""
    try:
        yield server
    finally:
        end(server.process)


def base_environment() -> dict[str, str]:
    """What every server is told; the machine's libraries shall not take threads that nobody asked for."""
    kept = {k: v for k, v in os.environ.items() if k in {"PATH", "LANG", "TMPDIR"}}
    return {**kept, "ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}


def agrees(body: bytes, model: str, made: Path, rows: npt.NDArray[np.float32]) -> None:
    """Refuse to measure a server that says something else than the model does.

    Raises:
        LoadError: it does.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(made / f"{model}-1.onnx", providers=["CPUExecutionProvider"])
    expected = session.run(["scores"], {"features": rows})[0][0]
    found = scores_in(body)
    if len(found) != len(expected) or not np.allclose(found, expected, atol=_TOLERANCE, rtol=0):
        message = f"expected {expected.tolist()}, found {found}: {body[:200]!r}"
        raise LoadError(message)


def free_ports(count: int) -> int:
    """The first of so many ports beside each other that nobody uses."""
    for _ in range(200):
        with contextlib.ExitStack() as taken:
            first = taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            try:
                for n in range(1, count):
                    taken.enter_context(socket.create_server(("127.0.0.1", first + n)))
            except OSError:
                continue
            return int(first)
    raise LoadError("There are no free ports.")


def versions_of(environment: Environment, name: str) -> str:
    """What is pinned there of that distribution."""
    pattern = re.compile(rf"^{re.escape(name)}-([\w.]+)\.dist-info$", re.IGNORECASE)
    names = [p.name for p in environment.folder.glob("lib/python*/site-packages/*.dist-info")]
    return next((m[1] for m in map(pattern.match, names) if m), "")


__all__ = ["PEERS", "Peer", "Server", "models"]
