"""Bench drift: what watching costs the device and the control plane, in CPU, memory and bytes.

Rules: medians of the process's own CPU time; bytes are of the envelope that the broker gets.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bench_serving.venvs import environment
from lightship.data.profile import reference_profile
from lightship.monitoring.drift import watch_stream
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.memory import Memory, pack
from lightship_agent.contract.messages import Envelope, PackedMoments, Window, packed
from lightship_agent.contract.profile import Binner, ReferenceProfile, WindowCounts, merge
from lightship_agent.contract.wire import encode
from lightship_agent.contract.wire import pack as wire_pack
from lightship_agent.monitor.ring import RowRing
from lightship_agent.monitor.tally import Tally

from .bench import FEATURES, Bench
from .streams import REFERENCE, ROWS

_SIZES: Final = (200, 1_000, 2_000, 5_000, 10_000, 20_000, 100_000)
_DIGEST: Final = hashlib.sha256(b"pump").hexdigest()  # one that can't be compressed
_NAMES: Final = tuple(f"feature_{i}" for i in range(FEATURES))


def measure(bench: Bench) -> dict[str, Any]:
    """All of it."""
    rng = np.random.default_rng(19)
    profile = _profile(rng)
    rows = rng.standard_normal((1_000, FEATURES)).astype(np.float32)
    labels, tops = rng.integers(0, 2, 1_000), (0.5 + rng.random(1_000) / 2).astype(np.float32)
    tally, binner = Tally(profile), Binner(profile.features)
    bins = _cpu(lambda: binner.count(rows))
    whole = _cpu(lambda: tally.count(rows, labels, tops))
    judged, remembered = _evaluation(profile, binner, rng)
    return {
        "payload": {str(n): _payload(_window(profile, rng, n)) for n in _SIZES},
        "ms_per_1000_rows_bins": bins,
        "ms_per_1000_rows": whole,
        "us_per_row_hot_path": _hot_path(rows),
        "device_state_bytes": tally.state_bytes,
        "ms_per_evaluation": judged,
        "memory_bytes": remembered,
        **_merged(profile, rng),
        **_device(bench),
        **_memory(bench, profile),
    }


#: What an agent imports to count rows, and what that takes.
_COUNTING: Final = """
import json, sys
import numpy as np
from lightship_agent.contract.profile import FeatureBins
from lightship_agent.monitor import tally
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
before = resident()
from lightship.data.profile import reference_profile
rng = np.random.default_rng(0)
rows = rng.standard_normal((10_000, 30)).astype(np.float32)
counter = tally.Tally(reference_profile(rows, [f"f{i}" for i in range(30)]))
for _ in range(20):
    counter.count(rng.standard_normal((200, 30)).astype(np.float32), np.full(200, -1), np.full(200, np.nan, np.float32))
print(json.dumps({"after_import_mb": before, "resident_mb": resident()}))
"""


def _device(bench: Bench) -> dict[str, float]:
    """Memory of a process that counts, and what the agent's own environment takes of disk."""
    done = subprocess.run([sys.executable, "-c", _COUNTING], check=True, capture_output=True, text=True)
    told: dict[str, float] = json.loads(done.stdout)
    there = environment(bench.folder / "agent", "ours")
    return told if there.why_not else {**told, "installed_mb": there.size_mb()}


def _memory(bench: Bench, profile: ReferenceProfile) -> dict[str, float]:
    """What counting adds to a process that has numpy and the contract."""
    place = bench.folder / "profile.msgpack"
    place.write_bytes(encode(profile))
    program = Path(__file__).with_name("memory_of_counting.py")
    done = subprocess.run([sys.executable, str(program), str(place)], check=True, capture_output=True, text=True)
    told: dict[str, float] = json.loads(done.stdout)
    return told


def _profile(rng: np.random.Generator) -> ReferenceProfile:
    rows = rng.standard_normal((REFERENCE, FEATURES)).astype(np.float32)
    scores = rng.dirichlet([1, 1], REFERENCE).astype(np.float32)
    return reference_profile(rows, list(_NAMES), scores.argmax(axis=1), scores, ("healthy", "worn"))


def _window(profile: ReferenceProfile, rng: np.random.Generator, rows: int, number: int = 1_234) -> Window:
    """A window as a device sends it."""
    tally = Tally(profile)
    for at in range(0, rows, 1_000):
        n = min(1_000, rows - at)
        tops = (0.5 + rng.random(n) / 2).astype(np.float32)
        tally.count(rng.standard_normal((n, FEATURES)).astype(np.float32), rng.integers(0, 2, n), tops)
    counts, _ = tally.take()
    return Window(
        s=4_711, t=1_700_000_000_000, model="pump", version=7, digest=_DIGEST, schema=_DIGEST[::-1], w=number,
        opened=1_700_000_000_000, rows=rows, counts=packed(counts.counts), predictions=packed(counts.predictions),
        scores=packed(counts.scores), distances=packed(counts.distances), moments=PackedMoments.of(counts.moments),
    )  # fmt: skip


def _payload(window: Window) -> int:
    return len(wire_pack(Envelope(e="0123456789abcdef", b=3, us=123_456, lo=1, r=(window,))))


def _merged(profile: ReferenceProfile, rng: np.random.Generator) -> dict[str, float]:
    """Milliseconds that the windows of a thousand devices take to become one."""
    windows = [_window(profile, rng, ROWS, n) for n in range(1_000)]
    contents = [w.content() for w in windows]
    one_by_one = reduce(add, contents)
    if merge([w.content() for w in windows]) != one_by_one:
        raise AssertionError("Merging at once is not adding.")
    arrays = np.array([w.counts for w in contents])
    return {
        "ms_to_merge_1000": _cpu(lambda: merge([w.content() for w in windows])),
        "ms_to_add_1000_as_arrays": _cpu(lambda: arrays.sum(axis=0)),
    }


def _hot_path(rows: npt.NDArray[np.float32]) -> float:
    """Microseconds to leave a row to the monitor: all that serving waits for."""
    ring = RowRing(len(rows), FEATURES)

    def push() -> None:
        for row in rows:
            ring.push_row(row, 1, 0.75, "0123456789abcdef")
        ring.drain()

    return 1_000 * _cpu(push) / len(rows)


def _evaluation(profile: ReferenceProfile, binner: Binner, rng: np.random.Generator) -> tuple[float, int]:
    windows: list[WindowCounts] = []
    memory: Memory | None = None
    spent = []
    settings = DriftSettings()
    for _ in range(64):
        drawn = rng.standard_normal((ROWS, FEATURES)).astype(np.float32)
        windows.append(WindowCounts(rows=ROWS, counts=tuple(int(c) for c in binner.count(drawn)),
                                    predictions=(100, 100), scores=(0,) * 42))  # fmt: skip
        began = time.process_time()
        memory = watch_stream(profile, windows, 0, settings, memory, "k").memory
        spent.append(1_000 * (time.process_time() - began))
    assert memory is not None
    return statistics.mean(spent), len(pack(memory))


def _cpu(work: Callable[[], object], times: int = 20) -> float:
    """Milliseconds, the median of some."""
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(1_000 * (time.process_time() - began))
    return statistics.median(found)
