"""Bench serving: CPUs that do not fall asleep between a request and the next.

Rules: one process of the idle class per CPU, which anybody else pushes aside at once; as long as the block lasts. A CPU
that fell asleep takes tens of microseconds to wake up, more on a virtual machine, and whether it did depends on what
else the machine does: bursts came in two kinds, twice as dear the one as the other, a C echo server's too. Paced
requests are measured without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from .process import end

_SPIN: Final = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"


@contextmanager
def awake() -> Iterator[None]:
    """Until the end of the block."""
    spinning = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in spinning:
            end(process)
