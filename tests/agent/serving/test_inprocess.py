"""The in-process face: a model out of a bundle file or a state folder, asked in the caller's own threads."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.agent.conftest import training_rows

import lightship_agent
from lightship_agent import load
from lightship_agent.contract.codes import LightshipError, ServingError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.runtime.model import LoadedModel, Prediction
from lightship_agent.update.machine import Target, UpdateState

Bundles = Callable[..., bytes]
Models = Callable[..., LoadedModel]


def written(folder: Path, data: bytes) -> Path:
    path = folder / "pump.tar"
    path.write_bytes(data)
    return path


def committed(folder: Path, data: bytes) -> Path:
    """A state folder as the agent leaves it."""
    digest = sha256_hex(data)
    (folder / "bundles").mkdir(parents=True, exist_ok=True)
    (folder / "bundles" / f"{digest}.tar").write_bytes(data)
    target = Target(model="pump", version=1, path="p", sha256=digest, length=len(data), seq=1, rollout="")
    (folder / "update.json").write_bytes(msgspec.json.encode(UpdateState(current=target)))
    return folder


def inventory(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def code(action: Callable[[], object]) -> str:
    with pytest.raises(LightshipError) as found:
        action()
    return found.value.code


def same(found: Prediction, expected: Prediction) -> bool:
    pairs = zip(msgspec.structs.astuple(found), msgspec.structs.astuple(expected), strict=True)
    return all((a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("kind", ["classifier", "three-classes", "regressor"])
def test_one_row_and_many_are_answered_as_the_data_plane_answers_them(
    tmp_path: Path, make_bundle: Bundles, make_model: Models, kind: str
) -> None:
    rows = training_rows(20)
    model, served = load(written(tmp_path, make_bundle(kind=kind))), make_model(kind=kind)

    assert same(model.predict(rows), served.predict(rows))
    for row in rows:
        expected = served.predict(row.reshape(1, 4))
        assert same(model.predict(row), expected)
        assert same(model.predict(row.reshape(1, 4)), expected)
    assert (model.name, model.version, model.digest) == ("pump", 1, served.digest)
    assert model.features == served.schema.names
    assert model.labels == served.outputs.labels


def test_an_answer_is_not_changed_by_the_next_one(tmp_path: Path, make_bundle: Bundles) -> None:
    model, rows = load(written(tmp_path, make_bundle())), training_rows(2)
    first = model.predict(rows[0])
    assert first.scores is not None
    kept = first.scores.copy()

    model.predict(rows[1])

    assert np.array_equal(first.scores, kept)


def test_whatever_is_not_plain_float32_is_converted_and_answered_the_same(tmp_path: Path, make_bundle: Bundles) -> None:
    model, rows = load(written(tmp_path, make_bundle())), np.round(training_rows(3) * 4)
    expected = model.predict(rows)

    strided = np.repeat(rows, 2, axis=1)[:, ::2]
    for same_rows in (rows.tolist(), rows.astype(np.float64), rows.astype(np.int8), np.asfortranarray(rows), strided):
        assert same(model.predict(same_rows), expected)
    assert same(model.predict(strided[0]), model.predict(rows[0]))


@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 2.0, 3.0]],
        [1.0, 2.0, 3.0],
        5.0,
        [],
        [[]],
        np.zeros((0, 4), np.float32),
        np.zeros((4, 1), np.float32),
        np.zeros((1, 1, 4), np.float32),
        np.zeros(1, np.float32),
        np.array([np.nan, 0, 0, 0], np.float32),
        np.array([[0, 0, 0, np.nan]], np.float32),
        np.array([0, np.inf, 0, 0], np.float32),
        [0, 0, 0, 1e300],
        [0, 0, 0, 2**60 + 1],
        [1.0, None, 3.0, 4.0],
        ["1", "2", "3", "4"],
        [[1.0], [1.0, 2.0]],
        None,
    ],
    ids=repr,
)
def test_rows_that_do_not_fit_the_schema_are_refused_and_the_next_ones_answered(
    tmp_path: Path, make_bundle: Bundles, rows: Any
) -> None:
    model = load(written(tmp_path, make_bundle()))
    before = model.predict(training_rows(1))

    assert code(lambda: model.predict(rows)) == "serving.input"

    assert same(model.predict(training_rows(1)), before)


def test_a_missing_value_is_answered_where_the_schema_allows_one(tmp_path: Path, make_bundle: Bundles) -> None:
    model = load(written(tmp_path, make_bundle(nullable=("vibration",))))

    assert len(model.predict(np.array([0, np.nan, 0, 0], np.float32))) == 1
    assert code(lambda: model.predict(np.array([np.nan, 0, 0, 0], np.float32))) == "serving.input"


def test_many_threads_ask_one_model_and_each_gets_its_own_answer(tmp_path: Path, make_bundle: Bundles) -> None:
    model, rows = load(written(tmp_path, make_bundle())), training_rows(400)
    expected = [model.predict(row) for row in rows]

    def ask(offset: int) -> bool:
        return all(same(model.predict(rows[i]), expected[i]) for i in range(offset, len(rows), 4) for _ in range(5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, [0, 1, 2, 3] * 2))


def test_a_row_is_answered_while_another_thread_holds_the_bound_memory(tmp_path: Path, make_bundle: Bundles) -> None:
    model, row = load(written(tmp_path, make_bundle())), training_rows(1)
    expected = model.predict(row)
    bound = model._loaded.bound
    assert bound is not None

    with bound.lock:
        assert same(model.predict(row), expected)
    assert not bound.lock.locked()


def test_the_committed_bundle_of_a_state_folder_is_read_and_the_folder_stays_as_it_is(
    tmp_path: Path, make_bundle: Bundles
) -> None:
    folder = committed(tmp_path / "agent", make_bundle())
    before = inventory(folder)
    (tmp_path / "agent").chmod(0o500)

    model = load(str(folder))

    assert model.digest == sha256_hex(make_bundle())
    assert inventory(folder) == before


def test_a_reload_takes_what_was_committed_since_and_a_failed_one_leaves_the_old_model(
    tmp_path: Path, make_bundle: Bundles
) -> None:
    folder = committed(tmp_path / "agent", make_bundle())
    model = load(folder)
    assert not model.reload()

    committed(folder, make_bundle(2, flip=True))
    assert model.version == 1
    assert model.reload()
    assert model.version == 2
    answer = model.predict(training_rows(1))

    committed(folder, b"no bundle at all")
    assert code(model.reload) == "bundle.malformed"
    assert model.version == 2
    assert same(model.predict(training_rows(1)), answer)


def test_a_state_file_that_was_lost_is_read_from_its_copy_and_set_aside_by_nobody(
    tmp_path: Path, make_bundle: Bundles
) -> None:
    folder = committed(tmp_path / "agent", make_bundle())
    (folder / "committed.json").write_bytes((folder / "update.json").read_bytes())
    (folder / "update.json").write_bytes(b"{")

    assert load(folder).version == 1
    assert (folder / "update.json").read_bytes() == b"{"


def test_what_can_not_be_loaded_is_said_with_a_code(tmp_path: Path, make_bundle: Bundles) -> None:
    good = make_bundle()
    path = written(tmp_path, good)
    (tmp_path / "empty").mkdir()
    rotten = committed(tmp_path / "rotten", good)
    (rotten / "bundles" / f"{sha256_hex(good)}.tar").write_bytes(good[:-1])

    assert code(lambda: load(tmp_path / "nothing.tar")) == "storage.unreadable"
    assert code(lambda: load(tmp_path / "empty")) == "serving.no-model"
    assert code(lambda: load(rotten)) == "storage.corrupt"
    assert code(lambda: load(written(tmp_path / "empty", b"x" * 2_000))) == "bundle.malformed"
    assert code(lambda: load(written(tmp_path / "empty", make_bundle(golden_shift=0.5)))) == "update.golden"
    assert code(lambda: load(path, digest="0" * 64)) == "bundle.digest"
    assert load(path, digest=sha256_hex(good).upper()).version == 1


def test_a_failure_of_the_runtime_has_its_code_and_frees_the_memory(
    tmp_path: Path, make_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, row = load(written(tmp_path, make_bundle())), training_rows(1)
    loaded = model._loaded
    assert loaded.bound is not None

    def fail() -> None:
        raise RuntimeError("the graph is on fire")

    monkeypatch.setattr(loaded.bound, "run", fail)
    model._take(loaded)
    with pytest.raises(ServingError, match="on fire") as found:
        model.predict(row)
    assert found.value.code == "serving.runtime"
    assert not loaded.bound.lock.locked()


def test_importing_the_package_loads_no_runtime() -> None:
    program = (
        "import sys, lightship_agent; lightship_agent.__version__;"
        "print(sorted({'numpy', 'onnxruntime', 'httpx', 'tuf', 'msgspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        lightship_agent.lode  # noqa: B018 - looking it up is the test


def test_a_row_costs_less_than_the_runtimes_own_call(tmp_path: Path, make_bundle: Bundles) -> None:
    """Interleaved, and the best of many rounds, since the machine is never quiet; docs/serving.md gives the figures."""
    model, row = load(written(tmp_path, make_bundle())), training_rows(1)
    session, name = model._loaded._session, model._loaded.schema.input_name

    def best(ask: Callable[[], object]) -> float:
        begun = time.perf_counter()
        for _ in range(200):
            ask()
        return time.perf_counter() - begun

    rounds = [(best(lambda: model.predict(row)), best(lambda: session.run(None, {name: row}))) for _ in range(50)]

    assert min(r[0] for r in rounds) < 1.2 * min(r[1] for r in rounds)
