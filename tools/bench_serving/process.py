"""Bench serving: what a process and all its children take of CPU and memory.

Rules: CPU is the kernel's own account of nanoseconds on a processor (schedstat), of every thread of the tree: other
programs on the machine do not change it much. Memory is PSS, of the tree.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_KB: Final = 1024
_MB: Final = 1024 * 1024


def tree(pid: int) -> list[int]:
    """The process and everything below it."""
    found = [pid]
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [below for word in tasks.read_text().split() for below in tree(int(word))]
    return found


@contextmanager
def on_one_cpu(pids: Iterable[int]) -> Iterator[None]:
    """Until the end of the block these trees, and what we start, have one CPU between them.

    With two, each request is handed over by an interrupt from one to the other and back, which on a virtual machine
    costs more than a C server's whole answer, is counted as the server's, and happens in some bursts and not in others.
    """
    before: dict[int, set[int]] = {}
    tasks = [int(task.name) for pid in pids for below in tree(pid) for task in Path(f"/proc/{below}/task").iterdir()]
    one = {min(os.sched_getaffinity(0))}
    try:
        for task in [0, *tasks]:
            with contextlib.suppress(OSError):  # a thread that has ended
                before[task] = os.sched_getaffinity(task)
                os.sched_setaffinity(task, one)
        yield
    finally:
        for task, cpus in before.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(task, cpus)


class CpuMeter:
    """Seconds of CPU of some trees since it was made."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._before = _looked(self._pids)

    def spent(self) -> float:
        """So far, threads that have ended left out."""
        return sum(self.by_thread())

    def by_thread(self) -> list[float]:
        """The same of each thread by itself, the busiest first."""
        return sorted(
            ((ns - self._before.get(task, 0)) / 1e9 for task, ns in _looked(self._pids).items()), reverse=True
        )


def _looked(pids: Iterable[int]) -> dict[str, int]:
    """Nanoseconds of every thread of the trees."""
    found = {}
    for pid in pids:
        for process in tree(pid):
            for task in Path(f"/proc/{process}/task").glob("*/schedstat"):
                with contextlib.suppress(OSError):
                    found[str(task)] = int(task.read_text().split()[0])
    return found


def cpu_since_birth(pid: int) -> float:
    """Seconds of CPU of the tree, from the start of each process."""
    return sum(_looked((pid,)).values()) / 1e9


def pss(pid: int) -> float:
    """MB of proportional set size, of the tree."""
    total = 0
    for process in tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * _KB
    return total / _MB


def end(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """Ask a process that leads a group to stop, wait, and end whatever is left of the group."""
    group = process.pid
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    process.wait()
