"""The command itself: a real process, as a conformance suite starts it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.conformance.conftest import Client
from tests.conformance.simulator import Repository

Make = Callable[[Repository], Client]
COMMAND = Path(__file__).resolve().parents[2] / "tools" / "tuf-client"


@pytest.fixture(autouse=True)
def as_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUF_CLIENT", str(COMMAND))


def test_it_initialises_refreshes_and_downloads(client_of: Make) -> None:
    repository = Repository()
    repository.add("path/to/file", b"content")
    repository.update()
    client = client_of(repository)
    assert client.refresh() == 0
    assert client.download("path/to/file") == 0
    assert client.has == [b"content"]
    assert client.download("path/to/another") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["refresh"],
        ["--metadata-dir", "{d}", "refresh"],
        ["--metadata-dir", "{d}", "--metadata-url", "http://127.0.0.1:1", "refresh"],
        ["--metadata-dir", "{d}", "init", "{d}/absent"],
        ["--metadata-dir", "{d}", "invent"],
        ["--metadata-dir", "{d}", "--metadata-url", "http://127.0.0.1:1", "download"],
        ["--metadata-dir", "{d}", "--metadata-url", "no address", "--target-name", "x", "download"],
    ],
)
def test_whatever_is_wrong_it_says_so_and_exits_with_1(tmp_path: Path, arguments: list[str]) -> None:
    command = [str(COMMAND), *(a.replace("{d}", str(tmp_path)) for a in arguments)]
    done = subprocess.run(command, capture_output=True, check=False, cwd="/")
    assert done.returncode == 1
    assert done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.system
@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
@pytest.mark.parametrize(("days", "status"), [(-400, 0), (0, 0), (29, 0), (31, 1), (4_000, 1)])
def test_it_lives_in_the_time_it_is_told(
    client_of: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, days: int, status: int
) -> None:
    client = client_of(Repository())
    at = datetime.now(UTC) + timedelta(days=days)
    wrapper = tmp_path / "in-another-time"
    wrapper.write_text(f"#!/bin/sh\nTZ=UTC exec faketime '{at:%Y-%m-%d %H:%M:%S}' {COMMAND} \"$@\"\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("TUF_CLIENT", str(wrapper))
    assert client.refresh() == status
