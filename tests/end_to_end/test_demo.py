"""`make demo` as a newcomer runs it: it does what it says, and whenever it ends nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
PATIENCE = 1_800.0  # seconds; on a quiet machine the whole takes less than 240

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where to play. Whatever still runs there in the end is ended."""
    yield tmp_path / "demo"
    for process in processes_in(tmp_path):
        os.kill(process, signal.SIGKILL)


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "demo", "--folder", str(folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LIGHTSHIP_")} | {"PYTHONPATH": str(TOOLS)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def processes_in(folder: Path) -> list[int]:
    """Those whose command line names `folder`."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            named = os.fsencode(folder) in line.read_bytes()
        except OSError:
            continue  # it has just ended
        if named:
            found.append(int(line.parent.name))
    return found


def until(true: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.1)


def test_every_step_does_what_it_says_and_nothing_is_left_running(folder: Path) -> None:
    demo = start(folder)
    said, complained = demo.communicate(timeout=PATIENCE)

    assert demo.returncode == 0, said + complained
    report = json.loads((folder / "report.json").read_text())
    assert [step["passed"] for step in report["steps"]] == [True] * 9
    assert {span["device"] for span in report["exposures"]["3"]} < {d["id"] for d in report["devices"]}
    assert "Every step did what it says." in said
    assert (folder / "report.html").read_text().count("<svg") > 10
    assert processes_in(folder) == []


@pytest.mark.parametrize("reached", ["home/lightship.db", "ready.json"])
def test_ctrl_c_leaves_no_process(folder: Path, reached: str) -> None:
    demo = start(folder)
    until((folder / reached).exists)

    os.killpg(demo.pid, signal.SIGINT)

    said, _ = demo.communicate(timeout=120)
    assert (demo.returncode, "Interrupted" in said) == (130, True)
    assert processes_in(folder) == []


def test_a_second_demo_leaves_the_first_one_alone(folder: Path) -> None:
    first = start(folder)
    until((folder / "digits.csv").exists)

    second = start(folder)
    _, complained = second.communicate(timeout=120)

    assert second.returncode == 1
    assert "already" in complained
    assert first.poll() is None
    assert (folder / "digits.csv").exists()
    first.terminate()
    first.communicate(timeout=120)
    assert first.returncode == 130
