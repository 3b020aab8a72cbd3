"""Crash test: a row of the table, how it is run, and how what was found is judged.

Rules: the expectation is written before the run and never derived from it; a row that misses it says every way in
which it does.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from lightship_agent.contract.codes import LightshipError

from .device import Device, RowError
from .door import Door
from .plane import Plane

PHASES: Final = ("fetching", "trying", "swapped", "reaching", "idle")
#: The states that update.json goes through in an update that nothing disturbs.
FULL: Final = " → ".join(PHASES)
NOBODY: Final = "–"


def until(phase: str, *, inclusive: bool = False) -> str:
    """The way of an undisturbed update up to a state."""
    at = PHASES.index(phase)
    return " → ".join(PHASES[: at + 1 if inclusive else at])


def way(*parts: str) -> str:
    """States after one another."""
    return " → ".join(part for part in parts if part)


def cut(*runs: str, by: str = "⚡") -> str:
    """The states of several processes, each but the last cut off."""
    return f" {by} ".join(runs).strip()


@dataclass(frozen=True)
class Stage:
    """Where a row is played."""

    plane: Plane
    name: str
    folder: Path
    sockets: Path

    def device(self, *, door: bool = False) -> Device:
        """An enrolled device, which may look for the control plane behind a door."""
        gate = Door(self.plane.url) if door else None
        return Device(self.plane, self.name, self.folder, self.sockets, gate)


@dataclass(frozen=True)
class Ending:
    """What a row without an agent found."""

    path: str
    serves: str
    debris: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the table. `act` plays it with a device; `alone` plays it with no agent, and says how it ended."""

    kind: str
    point: str
    fault: str
    path: str
    serves: str
    act: Callable[[Device], None] | None = None
    alone: Callable[[Stage], Ending] | None = None
    begin: Callable[[Device], None] = lambda device: device.commit(1)
    assigned: int | None = 2
    debris: tuple[str, ...] = ()
    committed: int | None = 1
    door: bool = False  # whether the control plane is behind a door that can be shut
    missing: str = ""  # what the row needs and this machine has not

    @property
    def name(self) -> str:
        """What `--only` matches."""
        return f"{self.kind}: {self.point}: {self.fault}"


def needing(row: Row, what: str) -> Row:
    """The row, skipped where `what` is missing here; "" where nothing is."""
    return replace(row, missing=what)


@dataclass(frozen=True)
class Found:
    """What came of a row. `wrong` is empty where it is as expected."""

    row: Row
    path: str = ""
    serves: str = ""
    debris: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    seconds: float = 0.0
    wrong: tuple[str, ...] = field(default=())
    skipped: str = ""


def play(row: Row, stage: Stage, clean: frozenset[str]) -> Found:
    """Run a row to its end and judge it; whatever happens, no process is left behind.

    Args:
        row: what to do and what to expect.
        stage: a folder that does not exist yet, and a control plane.
        clean: the files that an undisturbed update leaves.
    """
    if row.missing:
        return Found(row, skipped=row.missing)
    began = time.monotonic()
    try:
        found = _with_agent(row, stage, clean) if row.act is not None else _without_agent(row, stage)
    except (RowError, LightshipError, OSError, AssertionError) as e:
        found = Found(row, wrong=(f"{type(e).__name__}: {e}",))
    if not found.wrong:
        shutil.rmtree(stage.folder, ignore_errors=True)
    return Found(
        row, found.path, found.serves, found.debris, found.steps, round(time.monotonic() - began, 1), found.wrong
    )


def _without_agent(row: Row, stage: Stage) -> Found:
    assert row.alone is not None
    stage.folder.mkdir(parents=True)
    ending = row.alone(stage)
    wrong = _differences(row, ending.path, ending.serves, ending.debris)
    return Found(row, ending.path, ending.serves, ending.debris, wrong=wrong)


def _with_agent(row: Row, stage: Stage, clean: frozenset[str]) -> Found:
    device = stage.device(door=row.door)
    try:
        row.begin(device)
        if row.assigned is not None:
            stage.plane.assign(device.name, row.assigned)
        problem = ""
        try:
            assert row.act is not None
            row.act(device)
        except RowError as e:
            problem = str(e)
        return _judge(row, device, clean, problem)
    finally:
        device.close()


def _judge(row: Row, device: Device, clean: frozenset[str], problem: str) -> Found:
    alive = device.process.poll() is None
    serves = device.predicts() if alive else NOBODY
    wrong = [problem] if problem else []
    if alive:
        status = device.stop()
        if status != 0:
            wrong.append(f"a stop ended with {status}: {device.last_words()}")
    path, debris = device.path(), tuple(device.debris(clean))
    wrong += [*_differences(row, path, serves, debris), *device.wrongly_served()]
    steps = device.plane.steps(device.name)
    if row.committed is not None and row.assigned is not None:
        digest = device.plane.versions[row.assigned].digest
        reports = steps.count((digest, "committed", ""))
        wanted = row.committed if serves == f"v{row.assigned}" else 0
        if reports != wanted:
            wrong.append(f"expected {wanted} reports of the commit, found {reports}")
    said = tuple(f"{step} {code}".strip() for _, step, code in steps)
    return Found(row, path, serves, debris, said, wrong=tuple(wrong))


def _differences(row: Row, path: str, serves: str, debris: tuple[str, ...]) -> tuple[str, ...]:
    pairs = (("state path", row.path, path), ("serves", row.serves, serves), ("debris", row.debris, debris))
    unequal = [pair for pair in pairs if pair[1] != pair[2]]
    return tuple(f"{what}: expected {want or 'none'}, found {have or 'none'}" for what, want, have in unequal)
