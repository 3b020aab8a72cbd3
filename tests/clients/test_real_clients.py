"""The clients that people have, from PyPI and unchanged, talk to a real agent: Triton's, MLServer's and KServe's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.agent.app.agents import RunningAgent
from tests.agent.conftest import build
from tests.agent.link.field import open_field
from tests.agent.worded import MATERIALS, worded_bundle
from tests.clients.environment import HERE, clients_python

from lightship.fleet.broker import free_port
from lightship.home import Home
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.runtime.model import LoadedModel, load_model
from lightship_agent.serving.oip import DTYPES
from lightship_agent.update import machine as m
from lightship_agent.update.store import BundleStore, StateFile

pytestmark = pytest.mark.slow

ROWS = np.array([[0.5, 1, 2.0, 0], [-1.5, 2, 0.25, 1]], dtype=np.float32)
BUNDLES = {"pump": build(kind="three-classes"), "words": worded_bundle(2)}
MODELS = {name: load_model(read_bundle(data)) for name, data in BUNDLES.items()}
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def python() -> Path:
    return clients_python()


@pytest.fixture(scope="module")
def agents(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Two agents' addresses: one serves numbers, one serves words."""
    folder = tmp_path_factory.mktemp("clients")
    Home.create(folder / "empty").close()
    with open_field(folder, folder / "empty") as field, ExitStack() as running:
        addresses = {}
        for name, data in BUNDLES.items():
            version = field.release(MODELS[name].version, data, name="pump")
            state = field.enrolled(name).folder.parent
            current = m.Target.of(field.assignment(name, version, seq=0))
            BundleStore(state).put(version.digest, data)
            StateFile(state).save(m.UpdateState(current=current))
            port = free_port("127.0.0.1")
            agent = running.enter_context(RunningAgent(state, HTTP_PORT=str(port)))
            agent.wait_for(version.digest)
            addresses[name] = f"127.0.0.1:{port}"
        yield addresses


def speak(python: Path, client: str, address: str, model: str, **more: Any) -> Facts:
    asked = {"model": model, "rows": ROWS.tolist(), "materials": ["iron", "stål"], **more}
    done = subprocess.run(
        [str(python), str(HERE / f"speak_{client}.py"), address],
        input=json.dumps(asked), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said: Facts = json.loads(done.stdout)
    return said


def expected(model: LoadedModel, rows: Any = ROWS) -> Facts:
    found = model.predict(np.asarray(rows, dtype=np.float32))
    assert found.labels is not None
    assert found.scores is not None
    labels = found.labels.tolist()
    return {"label": [model.outputs.labels[i] for i in labels], "class": labels, "scores": found.scores.tolist()}


def close(found: Facts, model: str, rows: Any = ROWS) -> bool:
    """Whether the client understood what the model itself says; JSON's decimals are not float32's bits."""
    want = expected(MODELS[model], rows)
    same = (found["label"], found["class"]) == (want["label"], want["class"])
    return same and np.allclose(found["scores"], want["scores"], rtol=0, atol=1e-6)


# Triton ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triton(python: Path, agents: dict[str, str]) -> Facts:
    return speak(python, "triton", agents["pump"], "pump", datatypes=DTYPES)


def test_tritons_client_finds_the_server_and_the_model(triton: Facts) -> None:
    assert (triton["live"], triton["ready"], triton["model ready"]) == (True, True, [True, True])
    assert triton["other ready"] == [False, False]
    assert triton["server"]["name"] == "lightship-agent"
    assert {"binary_tensor_data", "model_repository", "statistics"} <= set(triton["server"]["extensions"])
    assert (triton["model"]["name"], triton["model"]["versions"]) == ("pump", ["1"])
    assert triton["model"]["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 4]}]
    assert [o["name"] for o in triton["model"]["outputs"]] == ["label", "class", "scores"]
    assert [(r["name"], r["version"], r["state"]) for r in triton["index"]] == [("pump", "1", "READY")]


@pytest.mark.parametrize("way", ["binary", "json in", "by version", "async"])
def test_tritons_client_is_answered_by_the_models_own_numbers(triton: Facts, way: str) -> None:
    assert close(triton[way], "pump")


def test_tritons_client_gets_the_outputs_it_chose_and_its_id_back(triton: Facts) -> None:
    assert triton["chosen"] == ["wish-7", ["scores", "label"]]
    want = expected(MODELS["pump"])
    assert triton["chosen label"] == want["label"]
    assert np.allclose(triton["chosen scores"], want["scores"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_tritons_client_may_compress_both_ways(triton: Facts, algorithm: str) -> None:
    assert triton[algorithm] == [True, True]


@pytest.mark.parametrize("datatype", DTYPES)
def test_tritons_client_may_send_any_datatype(triton: Facts, datatype: str) -> None:
    ways = triton["datatypes"][datatype]

    assert len(ways) == (1 if datatype == "FP16" else 2)
    assert all(close(found, "pump", [[0, 1, 1, 0], [1, 0, 1, 1]]) for found in ways)


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("shape", "400", "Expected shape"),
        ("name", "400", "Expected one input 'features'"),
        ("words", "400", "Expected numbers"),
        ("gap", "400", "has no value"),
        ("model", "404", "No model 'fan'"),
        ("version", "404", "Version '9'"),
        ("output", "400", "No output 'odds'"),
    ],
)
def test_tritons_client_is_told_what_is_wrong(triton: Facts, what: str, status: str, said: str) -> None:
    assert triton["refused"][what][0] == status
    assert said in triton["refused"][what][1]


def test_tritons_client_reads_the_statistics(triton: Facts) -> None:
    for told in triton["statistics"]:
        (row,) = told["model_stats"]
        assert (row["name"], row["version"]) == ("pump", "1")
        assert row["inference_count"] > row["execution_count"] > 0
        assert row["inference_stats"]["success"]["count"] == row["execution_count"]


def test_tritons_client_sends_words_by_feature(python: Path, agents: dict[str, str]) -> None:
    said = speak(python, "triton", agents["words"], "words")

    assert [i["datatype"] for i in said["inputs"]] == ["FP32", "BYTES", "FP32", "BYTES"]
    assert close(said["binary"], "words")
    assert close(said["json"], "words")


# MLServer -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["without nulls", "with nulls"])
def mlserver(request: pytest.FixtureRequest, python: Path, agents: dict[str, str]) -> Facts:
    return speak(python, "mlserver", agents["pump"], "pump", exclude_none=request.param)


def test_mlservers_types_read_what_an_agent_says_of_itself(mlserver: Facts) -> None:
    assert mlserver["server"] == mlserver["slash"]
    assert (mlserver["model"]["name"], mlserver["model"]["inputs"][0]["shape"]) == ("pump", [-1, 4])
    assert [(r["name"], r["state"]) for r in mlserver["index"]] == [("pump", "READY")]


def test_mlservers_codecs_read_the_answers_to_what_they_wrote(mlserver: Facts) -> None:
    assert mlserver["from"] == ["pump", "1"]
    assert mlserver["id"] == "from-mlserver"
    assert close({**mlserver["codec"], "scores": np.reshape(mlserver["codec"]["scores"], (2, 3))}, "pump")
    assert mlserver["chosen"] == ["scores"]


def test_mlservers_error_type_reads_a_refusal(mlserver: Facts) -> None:
    status, error = mlserver["error"]
    assert (status, error.startswith("Expected one input 'features'")) == (400, True)


def test_a_pandas_frame_goes_through_mlservers_codec_column_by_column(python: Path, agents: dict[str, str]) -> None:
    said = speak(python, "mlserver", agents["words"], "words", exclude_none=True)

    assert close({**said["pandas"], "scores": np.reshape(said["pandas"]["scores"], (2, 2))}, "words")


# KServe ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kserve(python: Path, agents: dict[str, str]) -> Facts:
    return speak(python, "kserve", agents["pump"], "pump")


def test_kserves_client_finds_server_and_model(kserve: Facts) -> None:
    assert (kserve["live"], kserve["ready"], kserve["other ready"]) == (True, [True, True], False)


@pytest.mark.parametrize("way", ["json", "binary"])
def test_kserves_client_is_answered_by_the_models_own_numbers(kserve: Facts, way: str) -> None:
    assert close(kserve[way], "pump")


def test_kserves_client_gets_the_output_it_chose_and_its_id_back(kserve: Facts) -> None:
    identity, outputs = kserve["chosen"]
    assert (identity, list(outputs)) == ("k-1", ["scores"])
    assert np.allclose(outputs["scores"], expected(MODELS["pump"])["scores"], rtol=0, atol=1e-6)


def test_kserves_client_is_told_what_is_wrong(kserve: Facts) -> None:
    shape, model = kserve["refused"]
    assert (shape[0], "Expected shape" in shape[1]) == (400, True)
    assert (model[0], "No model 'fan'" in model[1]) == (404, True)


@pytest.mark.parametrize("way", ["json", "binary"])
def test_kserves_client_sends_words_by_feature(python: Path, agents: dict[str, str], way: str) -> None:
    assert close(speak(python, "kserve", agents["words"], "words")[way], "words")
    assert MATERIALS[1:] == ("iron", "stål")
