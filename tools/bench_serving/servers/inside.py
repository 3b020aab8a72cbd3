"""Bench serving, in the agent's environment: calls within one process, interleaved.

Usage: inside.py FOLDER. Each line it reads is `MODEL SECONDS [ROWS]`; it answers with a line of JSON: microseconds of a
call, by what was called: `run` (session.run, one thread), `bound` (run_with_iobinding into memory that was bound
once) and `face` (lightship_agent.load(…).predict): the best decile and the median over bursts, and CPU on average.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

import lightship_agent

WIDTH = 30
CALLS = 200


def opened(path):
    """A session that takes one thread, as the agent's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def bound(session, row):
    """A call of the session over memory that is bound once."""
    io = session.io_binding()
    io.bind_input("features", "cpu", 0, np.float32, row.shape, row.ctypes.data)
    label, scores = np.zeros(len(row), np.int64), np.zeros((len(row), 2), np.float32)
    io.bind_output("label", "cpu", 0, np.int64, label.shape, label.ctypes.data)
    io.bind_output("scores", "cpu", 0, np.float32, scores.shape, scores.ctypes.data)
    kept = (label, scores)
    return lambda: (session.run_with_iobinding(io), kept)


def calls(folder, name, rows):
    """What is compared, by name."""
    session = opened(folder / f"{name}-1.onnx")
    face = lightship_agent.load(folder / f"{name}-1.tar")
    row = np.random.default_rng(5).normal(size=(rows, WIDTH)).astype(np.float32)
    said = face.predict(row).scores
    assert np.array_equal(said, session.run(["scores"], {"features": row})[0]), "they do not say the same"
    return {
        "run": lambda: session.run(None, {"features": row}),
        "bound": bound(session, row),
        "face": lambda: face.predict(row),
    }


def measured(compared, seconds, each):
    """Microseconds of a call of each, in bursts that take turns."""
    found = {what: [] for what in compared}
    used = dict.fromkeys(compared, 0.0)
    for call in compared.values():
        for _ in range(20):
            call()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for what, call in compared.items():
            before = time.process_time()
            begun = time.perf_counter()
            for _ in range(each):
                call()
            found[what].append((time.perf_counter() - begun) / each * 1e6)
            used[what] += time.process_time() - before
    return {
        what: {
            "best": float(np.quantile(times, 0.1)),
            "median": float(np.median(times)),
            "cpu": used[what] / len(times) / each * 1e6,
        }
        for what, times in found.items()
    }


def main():
    folder = Path(sys.argv[1])
    cache = {}
    print("ready", flush=True)
    for line in sys.stdin:
        name, seconds, *rows = line.split()
        key = (name, int(rows[0]) if rows else 1)
        if key not in cache:
            cache[key] = calls(folder, *key)
        found = measured(cache[key], float(seconds), CALLS if key[1] == 1 else 1)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
