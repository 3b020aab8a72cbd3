"""The control plane explains a version by the code the device explains it with, on the rows of a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tests.agent.conftest import FEATURES, build, training_rows
from tests.control_plane.things import register

from lightship.cli.root import cli
from lightship.home import Home
from lightship.registry.reasons import explain_version
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import DataError, RegistryError
from lightship_agent.runtime.model import load_model
from lightship_agent.runtime.reasons import explain_rows, plain

ROWS = training_rows(2, seed=4)


@pytest.fixture
def pump(home: Home) -> Home:
    register(home, 1)
    return home


def write(folder: Path, titles: tuple[str, ...] = FEATURES, more: str = "") -> Path:
    order = [FEATURES.index(t) for t in titles]
    lines = [",".join([*titles, *([more] if more else [])])]
    lines += [",".join([*(repr(float(v)) for v in row[order]), *(["9"] if more else [])]) for row in ROWS]
    path = folder / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_reasons_are_those_the_device_gives(pump: Home, tmp_path: Path) -> None:
    shuffled = ("speed", "vibration", "temperature", "current")
    told = explain_version(pump, "pump@1", write(tmp_path, shuffled, "site"), permutations=25, seed=2, top=3)

    model = load_model(read_bundle(build(1)))
    assert told == plain(explain_rows(model, ROWS, permutations=25, seed=2), model, 3)
    assert np.array(told["outputs"][0]["data"]).any()


def test_the_command_says_it_in_words_and_in_json(pump: Home, tmp_path: Path) -> None:
    command = ["--home", str(pump.path), "model", "explain", "pump@1", str(write(tmp_path)), "--top", "2"]

    words = CliRunner().invoke(cli, command, catch_exceptions=False)
    data = json.loads(CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False).stdout)

    assert words.exit_code == 0
    assert "Row 2" in words.output
    assert "temperature" in words.output
    assert data["parameters"]["permutations"] == 100
    assert [len(one["top"]) for one in data["explanations"]] == [2, 2]


def test_a_file_without_a_feature_is_refused(pump: Home, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column for speed") as refused:
        explain_version(pump, "pump@1", write(tmp_path, FEATURES[:3]), permutations=1, seed=0, top=1)
    assert refused.value.code == "data.column-missing"


def test_an_unknown_version_is_refused(pump: Home, tmp_path: Path) -> None:
    with pytest.raises(RegistryError) as refused:
        explain_version(pump, "pump@9", write(tmp_path), permutations=1, seed=0, top=1)
    assert refused.value.code == "registry.unknown-version"
