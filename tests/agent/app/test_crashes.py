"""The real agent, killed at each named instruction of an update and started again: it always ends where it should."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.agent.conftest import build
from tests.agent.link.field import Field, open_field

from lightship.storage.models import UpdateStep
from lightship_agent.update import machine as m
from lightship_agent.update.store import BundleStore, StateFile

from .agents import RunningAgent

PHASES = ("fetching", "trying", "swapped", "reaching", "idle")
SAVES = tuple(f"{when}-save-{phase}" for phase in PHASES for when in ("before", "after"))
FAIL_POINTS = (*SAVES, "before-store", "probing", "soaking")
#: Once the commit is on disk it stands; before that, the device was still running what it had.
COMMITTED_BY = ("after-save-idle",)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Outcome:
    """What was found of one device."""

    killed_by: int
    state_after_kill: m.UpdateState
    final: m.UpdateState
    exit_status: int
    files: tuple[str, ...]
    steps: tuple[tuple[str, str], ...]


def crash(field: Field, folder: Path, fail_point: str, old: bytes, digests: tuple[str, str]) -> Outcome:
    """Kill the agent there while it updates from the first to the second, start it again, wait, stop it."""
    state = folder / fail_point
    with RunningAgent(state, fail_point=fail_point) as agent:
        killed_by = agent.process.wait(60)
    after_kill = StateFile(state).load()
    with RunningAgent(state) as agent:
        agent.wait_for(digests[1])
        status = agent.terminate()
    names = sorted(p.relative_to(state).as_posix() for p in state.rglob("*") if p.is_file())
    with field.home.database.read() as session:
        rows = session.query(UpdateStep).where(UpdateStep.device == fail_point).order_by(UpdateStep.at, UpdateStep.s)
        steps = tuple((r.state, r.code) for r in rows)
    return Outcome(killed_by, after_kill, StateFile(state).load(), status, tuple(names), steps)


@pytest.fixture(scope="module")
def digests() -> list[str]:
    """Of the first and the second bundle; filled by `outcomes`."""
    return []


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, empty_home: Path, digests: list[str]
) -> Iterator[dict[str, Outcome]]:
    """Every crash, two at a time, before one control plane."""
    folder = tmp_path_factory.mktemp("crash")
    with open_field(folder, empty_home) as field:
        old, first, second = build(1), field.release(1), field.release(2, flip=True)
        digests += [first.digest, second.digest]
        for name in FAIL_POINTS:
            state = field.enrolled(name).folder.parent
            current = m.Target.of(field.assignment(name, first, seq=0))
            BundleStore(state).put(first.digest, old)
            StateFile(state).save(m.UpdateState(current=current))
            field.assign(name, second)
        with ThreadPoolExecutor(3) as pool:
            both = (first.digest, second.digest)
            found = pool.map(lambda name: crash(field, folder, name, old, both), FAIL_POINTS)
            yield dict(zip(FAIL_POINTS, found, strict=True))


@pytest.mark.parametrize("fail_point", FAIL_POINTS)
def test_an_agent_killed_there_is_on_the_old_model_or_committed_and_ends_committed(
    outcomes: dict[str, Outcome], digests: list[str], fail_point: str
) -> None:
    found, (first, second) = outcomes[fail_point], digests

    assert found.killed_by == -signal.SIGKILL
    before = found.state_after_kill.current
    assert before is not None
    assert before.sha256 == (second if fail_point in COMMITTED_BY else first)
    after = found.final
    assert (after.phase, after.candidate, after.floor) == ("idle", None, 1)
    assert (after.current and after.current.sha256, after.previous and after.previous.sha256) == (second, first)
    assert after.penalties == {}
    assert found.exit_status == 0


@pytest.mark.parametrize("fail_point", FAIL_POINTS)
def test_an_agent_killed_there_leaves_no_debris(
    outcomes: dict[str, Outcome], digests: list[str], fail_point: str
) -> None:
    names = [n for n in outcomes[fail_point].files if not n.startswith(("tuf/", "outbox/", "identity/"))]

    assert names == sorted(
        [*(f"bundles/{d}.tar" for d in digests), "boot", "committed.json", "latest-time", "update.json", "windows.json"]
    )


@pytest.mark.parametrize("fail_point", FAIL_POINTS)
def test_an_agent_killed_there_reports_one_commit_and_the_cut_where_it_may_be_the_bundles_fault(
    outcomes: dict[str, Outcome], fail_point: str
) -> None:
    steps = outcomes[fail_point].steps
    phase_on_disk = outcomes[fail_point].state_after_kill.phase

    assert steps.count(("committed", "")) == (0 if fail_point in COMMITTED_BY else 1)
    assert steps.count(("failed", "update.interrupted")) == int(phase_on_disk in {"trying", "swapped", "reaching"})
    assert {code for _, code in steps} <= {"", "update.interrupted"}
