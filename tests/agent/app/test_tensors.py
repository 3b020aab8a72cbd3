"""A model of images on a whole agent: assigned, downloaded, tried, served, and served again after a restart."""

from __future__ import annotations

import httpx
import pytest
from tests.agent import tensored
from tests.agent.app.agents import RunningAgent
from tests.agent.link.field import Field, until


def ask(agent: RunningAgent) -> httpx.Response:
    pixels = tensored.pixels()
    tensor = {"name": "image", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(agent.socket)), base_url="http://agent", timeout=60
    ) as client:
        return client.post("/v2/models/eye/infer", json={"inputs": [tensor], "outputs": [{"name": "label"}]})


@pytest.mark.slow
def test_an_assigned_model_of_images_is_tried_served_and_served_again(field: Field) -> None:
    data = tensored.bundle(tensored.conv_net(), tensored.COLOUR, tensored.colour_arrays())
    version = field.release(1, data, name="eye")
    state = field.enrolled("cam-1").folder.parent
    field.assign("cam-1", version)

    for _ in range(2):
        with RunningAgent(state) as agent:
            agent.wait_for(version.digest)
            answer = ask(agent)
            assert answer.status_code == 200, answer.text
            assert answer.json()["outputs"][0]["data"] == ["red", "blue"] * 3
            assert answer.json()["parameters"]["digest"] == version.digest
            assert agent.status()["running"][0]["requests"] == 6
            assert agent.terminate() == 0
            assert "Traceback" not in agent.log.read_text()


@pytest.mark.slow
def test_a_model_whose_golden_tensors_disagree_here_is_not_served(field: Field) -> None:
    lying = tensored.bundle(tensored.conv_net(), tensored.COLOUR, tensored.colour_arrays(), version=2, shift=0.01)
    good = tensored.bundle(tensored.conv_net(), tensored.COLOUR, tensored.colour_arrays())
    first, second = field.release(1, good, name="eye"), field.release(2, lying, name="eye")
    state = field.enrolled("cam-2").folder.parent
    field.assign("cam-2", first)
    with RunningAgent(state, POLL_SECONDS="1") as agent:
        agent.wait_for(first.digest)

        field.assign("cam-2", second)

        def refused() -> bool:
            return "update.golden" in agent.log.read_text()

        until(refused, 180)
        assert agent.serving() == [first.digest]
        assert ask(agent).json()["parameters"]["digest"] == first.digest
