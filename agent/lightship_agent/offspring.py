"""Child processes: what each of ours does first, so that none outlives the agent that waits for it.

Rules: it imports nothing heavy, for a child calls it before it limits itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, even one that is stopped or hangs.

    Where there is no such call the child's other limits have to do.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
