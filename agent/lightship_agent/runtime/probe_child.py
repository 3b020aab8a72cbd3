"""Runtime: the child of the probe.

    python -m lightship_agent.runtime.probe_child BUNDLE MEMORY_MB CPU_SECONDS PROVIDERS THREADS

Rules:
* it limits itself before it reads one byte of the bundle, and dies with the process that waits for it;
* it prints one line of JSON, measurements or a code, and exits 0; any other end is a failed probe.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from lightship_agent.contract.bundle import Bundle, read_bundle
from lightship_agent.contract.codes import LightshipError, UpdateError
from lightship_agent.offspring import die_with_parent

from .golden import check_bundle
from .model import LoadedModel, load_model
from .probe import ChildReport
from .session import Allowed

_MB: Final = 1024 * 1024
_TIMED_ROWS: Final = 200
_TIMED_SECONDS: Final = 10.0  # a slow model is not asked all of them
_LEAST_ROWS: Final = 20
#: What glibc and onnxruntime say when the address space ends.
_OUT_OF_MEMORY: Final = ("bad_alloc", "bad allocation", "allocate memory", "out of memory", "failed to allocate")


def main(arguments: list[str]) -> int:
    """Probe the bundle named first, within what is named after it."""
    die_with_parent()
    path, memory_mb, cpu_seconds = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    start_mb = _status_mb("VmHWM")
    limit_self(memory_mb, cpu_seconds)
    try:
        report = _measure(path, start_mb, Allowed.parse(arguments[3], int(arguments[4])))
    except MemoryError:
        report = _over_memory(memory_mb)
    except LightshipError as e:
        report = _over_memory(memory_mb) if _is_memory(e) else _failure(e)
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    return 0


def limit_self(memory_mb: int, cpu_seconds: int) -> None:
    """Bound this process: address space above what it has now, CPU seconds, what it writes, and no core file."""
    space = int((_status_mb("VmSize") + memory_mb) * _MB)
    for kind, value in (
        (resource.RLIMIT_AS, space),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, _MB),  # what it says is kept in memory, and it writes nothing else
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (limit, limit))


def _measure(path: Path, start_mb: float, allowed: Allowed) -> ChildReport:
    try:
        bundle = read_bundle(path.read_bytes())
    except OSError as e:
        raise UpdateError("update.probe-failed", f"The bundle can't be read: {e}.") from e
    model = load_model(bundle, allowed=allowed)
    difference = check_bundle(model, bundle)
    latency = latency_ms_p95(model, bundle)
    return ChildReport(
        max_difference=difference,
        latency_ms_p95=latency,
        memory_mb=max(0.0, _status_mb("VmHWM") - start_mb),
    )


def latency_ms_p95(model: LoadedModel, bundle: Bundle) -> float:
    """The 95th percentile of predicting one golden row, in ms, the first runs of the model excluded."""
    times = []
    for ask in _asked(model, bundle):
        begun = time.perf_counter()
        ask()
        times.append(time.perf_counter() - begun)
        if len(times) >= _LEAST_ROWS and sum(times) > _TIMED_SECONDS:
            break
    return float(np.percentile(times, 95)) * 1_000


def _asked(model: LoadedModel, bundle: Bundle) -> Iterator[Callable[[], object]]:
    """One golden row after the other, from the start again where they end."""
    if bundle.tensors is not None:
        feeds = {array.name: array.array() for array in bundle.tensors.inputs}
        rows = bundle.tensors.inputs[0].shape[0]
        names = [output.name for output in bundle.tensors.outputs]
        for i in range(_TIMED_ROWS):
            row = {name: array[i % rows : i % rows + 1] for name, array in feeds.items()}
            yield partial(model.predict_tensors, row, names)
        return
    matrix = bundle.golden.inputs.matrix()
    for i in range(_TIMED_ROWS):
        at = i % len(matrix)
        yield partial(model.predict, matrix[at : at + 1])


def _status_mb(key: str) -> float:
    """A size of this process from the kernel, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise UpdateError("update.probe-failed", f"The kernel does not tell {key} of a process.")


def _is_memory(error: LightshipError) -> bool:
    words = str(error).lower()
    return isinstance(error.__cause__, MemoryError) or any(sign in words for sign in _OUT_OF_MEMORY)


def _over_memory(memory_mb: int) -> ChildReport:
    return ChildReport(
        code="update.budget", message=f"The model needs more than its budget of {memory_mb} MB on this device."
    )


def _failure(error: LightshipError) -> ChildReport:
    if error.code == "update.golden":
        return ChildReport(code=error.code, message=str(error)[:1_000])
    return ChildReport(code="update.probe-failed", message=f"{error.code}: {error}"[:1_000])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
