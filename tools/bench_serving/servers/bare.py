"""Bench serving: python, numpy, onnxruntime and a model, and nothing else: the floor of memory.

Usage: bare.py MODEL.onnx|-. Says `ready`, and waits for the end of its input.
"""

import sys

import numpy as np
import onnxruntime

if sys.argv[1] != "-":
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    row = np.zeros((1, session.get_inputs()[0].shape[1]), dtype=np.float32)
    for _ in range(100):
        session.run(None, {"features": row})
print("ready", flush=True)
sys.stdin.read()
