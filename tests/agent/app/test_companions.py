"""The real agent with something beside what serves: killed on the way, started again."""

from __future__ import annotations

import signal

import msgspec
import pytest
from tests.agent.link.field import Field, until

from lightship.storage.models import ModelVersion
from lightship_agent.contract.assignment import Beside
from lightship_agent.update.beside import BesideState

from .agents import RunningAgent

pytestmark = pytest.mark.slow


def told(field: Field, serves: ModelVersion, beside: ModelVersion, seq: int) -> None:
    companion = Beside(
        experiment="e1", model=beside.model, version=beside.version, path=beside.path, sha256=beside.digest,
        length=beside.length, mode="ab", share=0.5,
    )  # fmt: skip
    assignment = field.assignment("press-1", serves, seq=seq, beside=(companion,))
    field.deliver("press-1", field.sign(assignment))


@pytest.mark.parametrize("where", ["probing", "standing-beside", "file-renamed(beside.json)"])
def test_killed_while_a_companion_comes_the_champion_serves_at_once_and_the_companion_follows(
    field: Field, where: str
) -> None:
    state = field.enrolled().folder.parent
    first, second = field.release(1), field.release(2, flip=True)
    field.assign("press-1", first)
    with RunningAgent(state) as agent:
        agent.wait_for(first.digest)
        agent.terminate()
    told(field, first, second, seq=5)

    with RunningAgent(state, fail_point=where) as agent:
        assert agent.process.wait(60) == -signal.SIGKILL
    with RunningAgent(state) as agent:
        until(lambda: [b["state"] for b in agent.status().get("beside", [])] == ["up"], 180)
        assert agent.serving() == [first.digest, second.digest]
        agent.terminate()

    kept = msgspec.json.decode((state / "beside.json").read_bytes(), type=BesideState)
    assert (kept.trying, [b.sha256 for b in kept.wanted]) == ((), [second.digest])
