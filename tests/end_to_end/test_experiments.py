"""A shadow and an A/B as an operator has them: `lightship up`, an agent of its own, and the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.agent.app.agents import RunningAgent
from tests.agent.conftest import training_rows
from tests.control_plane.fleet.test_up import lightship, up
from tests.control_plane.things import ACTOR, enrolled, make_champion, register, until

from lightship.fleet import director
from lightship.home import Home

pytestmark = pytest.mark.slow
KEYS = [f"customer-{i}" for i in range(500)]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home as `lightship init` leaves it."""
    Home.create(tmp_path / "home").close()
    opened = Home.open(tmp_path / "home")
    yield opened
    opened.close()


def experiment(home: Home, *words: str) -> Any:
    return json.loads(lightship(home.path, "experiment", *words, "--json"))


def ask(client: httpx.Client, row: int, **parameters: str) -> tuple[str, str]:
    """The version that answered, and the digest it says."""
    data = training_rows()[row % 400].tolist()
    asked: dict[str, Any] = {"inputs": [{"name": "features", "shape": [1, 4], "datatype": "FP32", "data": data}]}
    said = client.post("/v2/models/pump/infer", json={**asked, **({"parameters": parameters} if parameters else {})})
    assert said.status_code == 200, said.text
    body = said.json()
    return body["model_version"], body["parameters"]["digest"]


def states(agent: RunningAgent) -> list[str]:
    return [b["state"] for b in agent.status().get("beside", [])]


def test_a_shadow_then_an_ab_then_nothing_is_left(home: Home, tmp_path: Path) -> None:
    one, two = register(home, 1), register(home, 2)  # the second says the opposite of the first
    make_champion(home, 1)
    with up(home.path, "none"):
        addresses = re.findall(r"https://127\.0\.0\.1:\d+", (home.path.parent / "up.log").read_text())
        identity = enrolled(home, addresses[-1], tmp_path, "pump-1")
        with home.database.write() as session:
            director.assign(session, home.keys, device="pump-1", version=one, rollout="r", actor=ACTOR)
        state = identity.folder.parent
        with (
            RunningAgent(state, POLL_SECONDS="1") as agent,
            httpx.Client(
                transport=httpx.HTTPTransport(uds=str(agent.socket)), base_url="http://agent", timeout=60
            ) as client,
        ):
            agent.wait_for(one.digest)

            experiment(home, "start", "pumps", "pump@2", "--shadow", "--name", "shade")
            until(lambda: states(agent) == ["up"], 180)
            assert {ask(client, i) for i in range(200)} == {("1", one.digest)}
            until(lambda: (experiment(home, "show", "shade")["agreement"] or {}).get("rows") == 200, 180)
            shown = experiment(home, "show", "shade")
            assert (shown["agreement"]["same"], shown["agreement"]["failures"]) == (0, 0)
            assert shown["devices"] == {"pump-1": {"state": "up", "code": ""}}
            experiment(home, "stop", "shade")
            until(lambda: states(agent) == [], 180)

            experiment(home, "start", "pumps", "pump@2", "--share", "0.3", "--name", "third")
            until(lambda: states(agent) == ["up"], 180)
            arms = {key: ask(client, i, key=key) for i, key in enumerate(KEYS)}
            assert set(arms.values()) == {("1", one.digest), ("2", two.digest)}
            assert 0.24 < sum(version == "2" for version, _ in arms.values()) / len(KEYS) < 0.36
            assert {key: ask(client, i, key=key) for i, key in enumerate(KEYS)} == arms
            until(lambda: experiment(home, "show", "third")["challenger"]["requests"] > 200, 180)
            experiment(home, "stop", "third", "--reason", "seen enough")

            until(lambda: states(agent) == [] and agent.serving() == [one.digest], 180)
            assert {ask(client, i, key=key)[0] for i, key in enumerate(KEYS[:50])} == {"1"}
            assert [p.stem for p in (state / "bundles").iterdir()] == [one.digest]
            assert experiment(home, "show", "third")["status"] == "stopped"
