"""What somebody at a device may tell its agent: a real agent, and the commands beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.agent.link.field import Field, until

from lightship_agent.contract.codes import EXIT_STATUS

from .agents import RunningAgent, command


def updated_twice(field: Field) -> tuple[Path, list[str]]:
    """A device that came from version 1 to version 2, its agent stopped; both digests."""
    state = field.enrolled().folder.parent
    digests = []
    with RunningAgent(state, POLL_SECONDS="1") as agent:
        for version in (field.release(1), field.release(2, flip=True)):
            field.assign("press-1", version)
            agent.wait_for(version.digest)
            digests.append(version.digest)
        assert agent.terminate() == 0
    return state, digests


@pytest.mark.slow
def test_a_rollback_takes_effect_at_once_lasts_over_a_restart_and_is_reported(field: Field) -> None:
    state, (first, second) = updated_twice(field)
    with RunningAgent(state) as agent:
        agent.wait_for(second)

        done = command("rollback", "--reason", "it misreads sevens", "--json", state=state)

        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["taken"] == "yes"
        assert first[:12] in json.loads(done.stdout)["committed"]
        agent.wait_for(first)
        assert agent.terminate() == 0
    with RunningAgent(state, POLL_SECONDS="1") as agent:
        agent.wait_for(first)
        status = command("status", "--url", f"http://127.0.0.1:{_port(agent)}", state=state).stdout
    assert f"in the penalty box: {second[:12]}" in status


def test_without_a_version_before_there_is_no_rollback(field: Field) -> None:
    state = field.enrolled().folder.parent
    before = sorted(p.name for p in state.rglob("*"))

    done = command("rollback", "--reason", "why not", "--json", state=state)

    assert json.loads(done.stderr)["code"] == "update.no-way-back"
    assert done.returncode == EXIT_STATUS["update"]
    assert sorted(p.name for p in state.rglob("*")) == before


def test_a_retry_without_an_agent_says_that_it_waits(field: Field) -> None:
    state = field.enrolled().folder.parent

    done = command("retry", "--wait", "0.2", "--json", state=state)

    assert done.returncode == 0
    assert json.loads(done.stdout)["taken"].startswith("no: ")
    assert [p.name for p in (state / "orders").iterdir()] == ["clear-penalties"]
    with RunningAgent(state) as agent:
        until(lambda: not any((state / "orders").iterdir()))
        assert agent.terminate() == 0


@pytest.mark.slow
def test_a_bundle_in_the_penalty_box_is_tried_again_when_the_device_is_told_to(field: Field) -> None:
    state = field.enrolled().folder.parent
    bad = field.release(1, golden_shift=0.01)
    field.assign("press-1", bad)
    with RunningAgent(state, POLL_SECONDS="0.3") as agent:
        until(lambda: bad.digest in agent.status().get("update", {}).get("penalties", {}), 180)
        until(lambda: agent.log.read_text().count("failed update.golden") == 3, 180)

        done = command("retry", "--json", state=state)

        assert json.loads(done.stdout)["taken"] == "yes"
        until(lambda: agent.log.read_text().count("failed update.golden") == 4, 180)


def test_a_folder_of_no_agent_takes_no_orders(tmp_path: Path) -> None:
    done = command("retry", "--json", state=tmp_path / "state")

    assert json.loads(done.stderr)["code"] == "enrol.not-enrolled"
    assert not (tmp_path / "state").exists()


def _port(agent: RunningAgent) -> int:
    log = agent.log.read_text()
    return int(log.rpartition("serving on ('127.0.0.1', ")[2].partition(")")[0])
