"""The OpenAPI document is true: a real agent is asked what it allows and what it forbids, and every answer conforms."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.agent.app.agents import RunningAgent
from tests.agent.app.test_cli import _port_of, seeded
from tests.agent.link.field import Field, open_field
from tests.clients.environment import ROOT, clients_python

from lightship.home import Home
from lightship_agent.contract.codes import CODES
from lightship_agent.serving.http import STATUS

DOCUMENT: dict[str, Any] = json.loads((ROOT / "docs" / "reference" / "openapi.json").read_text(encoding="utf-8"))
LOCK = Path(__file__).with_name("requirements.lock")
CHECKS = (
    "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "unsupported_method",
)  # fmt: skip
RECORD = {"temperature": 0.5, "vibration": 0.5, "current": 0.5, "speed": 0.5}
EXAMPLES = {
    "infer": {"id": "a", "inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [0.5] * 4}]},
    "predict": RECORD,
    "feedback": {"id": "a", "label": "worn"},
    "index": {"ready": True},
    "metrics": {"name": "parts", "kind": "counter", "value": 1},
}


@pytest.fixture
def field(tmp_path: Path) -> Any:
    Home.create(tmp_path / "empty").close()
    (tmp_path / "site").mkdir()
    with open_field(tmp_path / "site", tmp_path / "empty") as opened:
        yield opened


def document_for_an_agent_that_serves_pump() -> dict[str, Any]:
    """With names that exist, and bodies that are answered."""
    document = json.loads(json.dumps(DOCUMENT))
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for parameter in operation["parameters"]:
                if parameter["in"] == "path":
                    parameter["schema"] = {"enum": ["pump"] if parameter["name"] == "model" else ["1"]}
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            last = path.rpartition("/")[2]
            if body is not None and last in EXAMPLES:
                body["example"] = EXAMPLES[last]
    return document


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False], ids=["names that exist", "any names"])
def test_whatever_is_asked_the_answer_is_as_the_document_says(field: Field, tmp_path: Path, named: bool) -> None:
    python = clients_python(LOCK)
    state, digest = seeded(field)
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document_for_an_agent_that_serves_pump() if named else DOCUMENT))

    with RunningAgent(state, MODEL_CONTROL="explicit") as agent:
        agent.wait_for(digest)
        url = f"http://127.0.0.1:{_port_of(agent)}"
        command = [
            str(python.with_name("schemathesis")), "run", str(path), "--url", url, "--checks", ",".join(CHECKS),
            "--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--seed", "7", "--continue-on-failure",
            "--no-color",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=900)
        assert done.returncode == 0, done.stdout[-6_000:]
        assert f"{len(list(operations()))} selected" in done.stdout
        well = httpx.post(f"{url}/v2/models/pump/predict", json=RECORD)
        assert 'code="serving.runtime"' not in httpx.get(f"{url}/metrics").text
        assert agent.terminate() == 0

    assert well.status_code == 200


def operations() -> Any:
    return (o for of_path in DOCUMENT["paths"].values() for o in of_path.values())


def test_every_answer_is_described_and_every_refusal_has_the_protocols_shape() -> None:
    for operation in operations():
        assert operation["summary"]
        assert "200" in operation["responses"]
        for status, answer in operation["responses"].items():
            if status != "200":
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}
                assert int(status) in STATUS.values()


def test_the_codes_of_the_error_shape_are_those_that_can_be_answered() -> None:
    codes = DOCUMENT["components"]["schemas"]["Error"]["properties"]["code"]["enum"]
    assert set(codes) == set(STATUS) <= set(CODES)


def test_whether_it_lives_and_is_ready_is_told_without_a_token_and_nothing_else_is() -> None:
    open_to_all = {p for p, of in DOCUMENT["paths"].items() for o in of.values() if {"token": []} not in o["security"]}
    assert open_to_all == {"/v2/health/live", "/v2/health/ready"}
