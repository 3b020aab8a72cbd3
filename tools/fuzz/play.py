"""Fuzz: one target for some seconds or some inputs.

Rules: an input that ends in anything but a value or an allowed error, or takes too long, or needs too much memory, is a
failure, and is kept; a failure does not end the run.
"""

from __future__ import annotations

import resource
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from lightship_agent.contract.codes import LightshipError

from .mutate import Mutator
from .targets import Target

SLOW_SECONDS: Final = 5.0  # of CPU, for one input
MEMORY_MB: Final = 1_024  # of address space above what there is at the start
KEPT: Final = 20  # inputs of failures


class Result(msgspec.Struct, kw_only=True):
    """What came of a target."""

    target: str
    seed: int
    executions: int = 0
    accepted: int = 0
    refused: dict[str, int] = {}
    slowest_ms: float = 0.0
    failures: list[str] = []


def play(target: Target, *, seconds: float, most: int = 10**9, seed: int = 1, keep: Path | None = None) -> Result:
    """Run a target for `seconds`, or `most` inputs."""
    result, refused, kinds = Result(target=target.name, seed=seed), Counter[str](), Counter[str]()
    with target.open() as (seeds, run):
        for data in seeds:
            run(data)  # a seed that is refused would show nothing
        mutator, end = Mutator(seed, seeds), time.monotonic() + seconds
        while result.executions < most and time.monotonic() < end:
            data = mutator.next()
            result.executions += 1
            began, problem = time.process_time(), ""
            try:
                run(data)
                result.accepted += 1
            except LightshipError as e:
                refused[e.code] += 1
                if not e.code.startswith(target.codes):
                    problem = f"the code {e.code}"
            except (Exception, MemoryError) as e:  # noqa: BLE001 - what is sought
                problem = f"{type(e).__name__}: {e}"[:200]
            took = time.process_time() - began
            result.slowest_ms = max(result.slowest_ms, round(took * 1_000, 1))
            if took > SLOW_SECONDS:
                problem = f"{took:.1f} s of CPU"
            if problem:
                kinds[problem.split(":")[0]] += 1
                if kinds[problem.split(":")[0]] <= KEPT:
                    result.failures.append(f"{problem} (input {result.executions}{_kept(keep, target.name, data)})")
    result.refused = dict(refused.most_common())
    return result


def limit_memory() -> None:
    """Bound the address space of this process: an input that asks for more must be refused, and not served."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + MEMORY_MB * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (space, space))


def _kept(folder: Path | None, target: str, data: bytes) -> str:
    if folder is None:
        return f", {data[:80]!r}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target.replace(' ', '-')}-{zlib.crc32(data):08x}"
    path.write_bytes(data)
    return f", {path.name}"
