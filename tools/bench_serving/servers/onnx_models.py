"""Bench serving, in a peer's environment: the models that are to be served."""

import os
from pathlib import Path

import numpy as np
import onnxruntime

NAMES = os.environ["BENCH_MODELS"].split(",")
TUNED = os.environ["BENCH_TUNED"] == "1"
PORT = int(os.environ["BENCH_PORT"])


def open_session(name):
    """A session as one gets it, or told to take one thread."""
    path = Path(os.environ["BENCH_FOLDER"]) / f"{name}-1.onnx"
    if not TUNED:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def scores(session, features):
    """The class scores of one row of numbers."""
    row = np.asarray([features], dtype=np.float32)
    return session.run(["scores"], {"features": row})[0][0].tolist()


def all_scores(session, rows):
    """The class scores of rows, as an array."""
    return session.run(["scores"], {"features": rows})[0]
