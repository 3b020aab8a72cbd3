"""The probe is a process of its own: whatever the bundle does there, this process only hears about it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightship_agent.contract.codes import UpdateError
from lightship_agent.contract.manifest import Requires
from lightship_agent.runtime.probe import child_environment, probe

from .graphs import grinding, hungry, looping, regressor_bundle

Bytes = Callable[..., bytes]


def written(folder: Path, data: bytes) -> Path:
    path = folder / "a.bundle"
    path.write_bytes(data)
    return path


def refused(path: Path, requires: Requires, timeout: float | None = None) -> UpdateError:
    before = path.read_bytes(), sorted(path.parent.iterdir())
    with pytest.raises(UpdateError) as refusal:
        probe(path, requires, timeout=timeout)
    assert (path.read_bytes(), sorted(path.parent.iterdir())) == before
    return refusal.value


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_a_good_bundle_is_measured(make_bundle: Bytes, tmp_path: Path, kind: str) -> None:
    report = probe(written(tmp_path, make_bundle(kind=kind)), Requires())
    assert report.max_difference < 1e-5
    assert 0 < report.latency_ms_p95 < 250
    assert 0 < report.memory_mb < 512


def test_a_graph_with_a_loop_is_refused_before_it_runs(tmp_path: Path) -> None:
    error = refused(written(tmp_path, regressor_bundle(looping(), Requires())), Requires())
    assert error.code == "update.probe-failed"
    assert "bundle.graph" in error.message


def test_a_probe_that_computes_for_ever_is_stopped_and_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, regressor_bundle(grinding(), Requires()))
    begun = time.monotonic()
    error = refused(path, Requires(), timeout=3)
    assert error.code == "update.probe-timeout"
    assert time.monotonic() - begun < 15


def test_a_model_that_eats_memory_stops_at_its_budget(tmp_path: Path) -> None:
    requires = Requires(memory_mb=128)
    error = refused(written(tmp_path, regressor_bundle(hungry(512), requires)), requires)
    assert error.code == "update.budget"
    assert "128 MB" in error.message


def test_golden_rows_that_lie_are_found_in_the_probe(make_bundle: Bytes, tmp_path: Path) -> None:
    error = refused(written(tmp_path, make_bundle(golden_shift=0.25)), Requires())
    assert error.code == "update.golden"
    assert "Golden row 0" in error.message


def test_a_model_slower_than_its_budget_is_refused(make_bundle: Bytes, tmp_path: Path) -> None:
    error = refused(written(tmp_path, make_bundle()), Requires(latency_ms=1e-6))
    assert error.code == "update.budget"


@pytest.mark.parametrize(("data", "said"), [(b"", "bundle.malformed"), (b"\0" * 4096, "bundle.malformed")])
def test_a_file_that_is_no_bundle_fails_with_the_reason(tmp_path: Path, data: bytes, said: str) -> None:
    error = refused(written(tmp_path, data), Requires())
    assert error.code == "update.probe-failed"
    assert said in error.message


def test_a_flipped_byte_in_the_model_is_noticed_before_it_is_loaded(make_bundle: Bytes, tmp_path: Path) -> None:
    data = bytearray(make_bundle())
    at = data.index(b"LinearClassifier")
    data[at] ^= 1
    error = refused(written(tmp_path, bytes(data)), Requires())
    assert "bundle.digest" in error.message


def test_a_missing_file_is_a_failed_probe(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match="can't be read") as refusal:
        probe(tmp_path / "absent", Requires())
    assert refusal.value.code == "update.probe-failed"


def test_the_child_sees_no_secret_and_no_switch_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_TOKEN", "secret")
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    environment = child_environment()
    assert "secret" not in environment.values()
    assert "ORT_LOAD_CONFIG_FROM_MODEL" not in environment


def test_a_child_that_is_killed_from_outside_is_an_answer(
    make_bundle: Bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suicidal = tmp_path / "python"
    suicidal.write_text("#!/bin/sh\nkill -SEGV $$\n")
    suicidal.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(suicidal))
    folder = tmp_path / "bundles"
    folder.mkdir()
    error = refused(written(folder, make_bundle()), Requires())
    assert error.code == "update.probe-failed"
    assert "SIGSEGV" in error.message


def test_the_child_can_be_started_from_any_folder_without_the_repository(make_bundle: Bytes, tmp_path: Path) -> None:
    """As a wheel would be: only the package's own folder is on the path."""
    path = written(tmp_path, make_bundle())
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lightship_agent.runtime.probe_child", str(path), "512", "30", "any", "0"],
        env=child_environment(),
        cwd=os.sep,
        capture_output=True,
        check=True,
    )
    assert b'"latency_ms_p95"' in done.stdout
    assert not done.stderr
