"""Runtime: onnxruntime, loaded so that it keeps what it sees to itself.

Rules: every other module takes onnxruntime from here. Its official Linux wheels, from 1.29 on, report their use to
their maker and leave a device id in the home folder, unless a variable says no before they load. Whoever wants that
can set `ORT_DISABLE_TELEMETRY=0`.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime  # reads the variable while it loads

__all__ = ["onnxruntime"]
