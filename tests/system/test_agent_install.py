"""System: what a device installs is small, and is not the control plane."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

AGENT = Path(__file__).parents[2] / "agent"
NEVER_ON_A_DEVICE = {"scikit-learn", "scipy", "pandas", "joblib", "onnx", "skl2onnx", "sqlalchemy", "lightship"}
NEVER_IMPORTED = ("sklearn", "scipy", "pandas", "joblib", "onnx", "skl2onnx", "sqlalchemy", "lightship")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent as it is packaged, from the working tree, without asking an index for anything."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(AGENT)], check=True, timeout=120, capture_output=True)
    return next(folder.glob("lightship_agent-*.whl"))


def test_the_wheel_asks_for_nothing_that_belongs_to_the_control_plane(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    asked = {r.split(";")[0].split(">")[0].split("[")[0].strip().lower() for r in metadata.get_all("Requires-Dist", [])}
    assert "onnxruntime" in asked
    assert asked & NEVER_ON_A_DEVICE == set()


def test_the_wheel_holds_the_agent_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {n.split("/")[0] for n in archive.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"lightship_agent"}
    assert wheel.suffixes[-1] == ".whl"
    assert wheel.name.endswith("-py3-none-any.whl"), "pure Python: one wheel for every architecture"
    assert wheel.stat().st_size < 1_000_000


def test_the_hashed_lock_holds_nothing_that_belongs_to_the_control_plane() -> None:
    lines = (AGENT / "requirements.lock").read_text().splitlines()
    locked = {line.split("==")[0].split("[")[0].lower() for line in lines if line[:1].isalpha()}
    assert "onnxruntime" in locked
    assert locked & NEVER_ON_A_DEVICE == set()


def test_the_running_agent_imports_nothing_that_belongs_to_the_control_plane() -> None:
    program = (
        "import sys, lightship_agent.app, lightship_agent.cli, lightship_agent.doctor, lightship_agent.link.enrol\n"
        "import lightship_agent.runtime.probe_child\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PYTHONPATH": str(AGENT), "PATH": "", "ORT_DISABLE_TELEMETRY": "1"},
    )
    imported = set(done.stdout.split())
    assert {"lightship_agent", "onnxruntime", "numpy"} <= imported
    assert imported & set(NEVER_IMPORTED) == set()
