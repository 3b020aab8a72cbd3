"""What an agent costs that nobody asks: the way to its first answer, the time it takes from others, and its memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.agent.app.agents import PACKAGES, RunningAgent
from tests.agent.app.test_cli import seeded
from tests.agent.conftest import build
from tests.agent.link.field import Field

from lightship_agent.contract.bundle import read_bundle

#: Needed for the network, which is asked after the committed model answers.
LATER = ("httpx", "cryptography", "paho", "tuf", "securesystemslib", "sqlite3", "urllib.request", "multiprocessing")


def test_on_the_way_to_the_first_answer_nothing_is_loaded_that_only_the_network_needs() -> None:
    code = f"import sys, lightship_agent.app; print([m for m in {LATER} if m in sys.modules])"

    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": PACKAGES, "PATH": os.environ["PATH"]},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip

    assert done.stdout.strip() == "[]"


def test_on_the_way_to_the_first_answer_hardly_a_class_is_written_by_the_library_for_dataclasses() -> None:
    # It compiles each class's methods from text: half a millisecond, where a struct takes a hundredth of that.
    code = (
        "import sys, dataclasses, lightship_agent.app; "
        "print(*{c.__name__ for m in list(sys.modules.values()) if m.__name__.startswith('lightship_agent') "
        "for c in vars(m).values() if isinstance(c, type) and dataclasses.is_dataclass(c)})"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": PACKAGES, "PATH": os.environ["PATH"]},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip

    assert done.stdout.split() == ["StreamKey"]  # one of its fields is not compared, which a struct can't say


def cpu_seconds(pid: int) -> float:
    """On a CPU so far, of all threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def pss_mb(pid: int | str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


BARE = """
import sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.stdin.buffer.read(), options, providers=["CPUExecutionProvider"])
for _ in range(100):
    session.run(None, {session.get_inputs()[0].name: np.zeros((1, 4), np.float32)})
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024)
"""


@pytest.mark.slow
def test_an_idle_agent_takes_next_to_nothing(field: Field, tmp_path: Path) -> None:
    state, digest = seeded(field)
    everything = {"REPORT_SECONDS": "60", "POLL_SECONDS": "900", "FRAMES_SOCKET": str(tmp_path / "frames.sock")}

    with RunningAgent(state, **everything) as agent:
        agent.wait_for(digest)
        time.sleep(5)  # what follows a start has settled
        before, began = cpu_seconds(agent.process.pid), time.monotonic()
        time.sleep(15)
        share = (cpu_seconds(agent.process.pid) - before) / (time.monotonic() - began)
        memory = pss_mb(agent.process.pid)
        assert agent.terminate() == 0

    assert share <= 0.005
    assert memory <= bare_mb() + 30


def bare_mb() -> float:
    """Python, numpy, onnxruntime and the same model, and nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", BARE], input=read_bundle(build(1)).model, capture_output=True, timeout=120, check=True,
        env={"PATH": os.environ["PATH"], "ORT_DISABLE_TELEMETRY": "1"},
    )  # fmt: skip
    return float(done.stdout)
