"""Update: the child of the check: `python -m lightship_agent.update.check_child WALL_SECONDS`, request on stdin.

Rules:
* it limits itself before it imports or reads anything else, and dies with the process that waits for it;
* it is nicer than the agent: whoever serves goes first;
* it prints one line of JSON, a reply or a code, and exits 0; any other end is a failed check.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lightship_agent.offspring import die_with_parent

if TYPE_CHECKING:
    from .check import ChildReply

CPU_SECONDS: Final = 60
MEMORY_MB: Final = 256  # of address space above what the bare interpreter has
FILE_MB: Final = 16  # no metadata is larger
_MB: Final = 1024 * 1024
_MAX_REQUEST: Final = 256 * 1024  # bytes


def main(arguments: list[str]) -> int:
    """Check the one request on standard input, within limits, for at most that many seconds."""
    die_with_parent()
    limit_self(int(arguments[0]))
    import msgspec

    from .check import ChildReply

    try:
        answer = _answer(sys.stdin.buffer.read(_MAX_REQUEST))
    except MemoryError:
        answer = ChildReply(code="update.check-failed", message=f"The check needs more than {MEMORY_MB} MB.")
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
    return 0


def limit_self(wall_seconds: int) -> None:
    """Bound this process: wall and CPU seconds, address space, file size, priority, and no core file."""
    signal.alarm(wall_seconds)
    space = _virtual_size() + MEMORY_MB * _MB
    for kind, value in (
        (resource.RLIMIT_AS, space),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, FILE_MB * _MB),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (limit, limit))
    # Beyond the file size a write shall fail like on a full disk, and not kill.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(10)


def _virtual_size() -> int:
    """Bytes of address space in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _answer(data: bytes) -> ChildReply:
    from lightship_agent.contract.codes import LightshipError

    from .check import ChildReply, check, read_request

    try:
        request = read_request(data)
        # Set here, a proxy's password is not in the environment that the kernel shows.
        os.environ.update(request.proxies)
        return ChildReply(reply=check(request.check))
    except LightshipError as e:
        return ChildReply(code=e.code, message=e.message[:4_000], remedy=e.remedy[:1_000])
    except MemoryError:
        raise
    except Exception as e:  # noqa: BLE001 - whatever foreign bytes brought about is an answer, and has a code
        return ChildReply(code="update.check-failed", message=f"Unexpected: {type(e).__name__}: {e}."[:4_000])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
