"""Bench serving: an environment for each server, and what it takes of disk.

Rules: pinned in environments/*.txt, without a package index of their own; ours is the agent's own lock with its hashes,
and the agent as a wheel, as a device gets it. Made once; an environment that can't be made costs the peer its place,
and the page says why.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
_PINNED: Final = Path(__file__).with_name("environments")
NAMES: Final = ("floor", "ours", "fastapi", "mlserver", "bentoml", "litserve", "kserve", "pytriton")
_MB: Final = 1024 * 1024


@dataclass(frozen=True)
class Environment:
    """A folder with a Python in it; `why_not` where it can't be had."""

    name: str
    folder: Path
    why_not: str = ""

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def size_mb(self) -> float:
        """What is installed takes on disk."""
        packages = next(self.folder.glob("lib/python*/site-packages"))
        return sum(p.lstat().st_blocks * 512 for p in packages.rglob("*")) / _MB

    def distributions(self) -> int:
        """How many packages are installed."""
        return len(list(self.folder.glob("lib/python*/site-packages/*.dist-info")))


def environment(cache: Path, name: str) -> Environment:
    """That environment, made if it is not there."""
    found = Environment(name, cache / name)
    lock = ROOT / "agent" / "requirements.lock" if name == "ours" else _PINNED / f"{name}.txt"
    mark = found.folder / ".made-of"
    made_of = hashlib.sha256(lock.read_bytes()).hexdigest()
    try:
        if not mark.exists() or mark.read_text() != made_of:
            print(f"  environment {name}", flush=True)
            _make(found, lock, hashed=name == "ours")
            mark.write_text(made_of)
        if name == "ours":
            _install_agent(found)
    except (OSError, subprocess.CalledProcessError) as e:
        said = (getattr(e, "stderr", b"") or b"").decode(errors="replace").strip()
        shutil.rmtree(found.folder, ignore_errors=True)
        return Environment(name, found.folder, said.splitlines()[-1][:300] if said else str(e)[:300])
    return found


def _make(found: Environment, lock: Path, *, hashed: bool) -> None:
    shutil.rmtree(found.folder, ignore_errors=True)
    found.folder.parent.mkdir(parents=True, exist_ok=True)
    if found.name == "pytriton":
        # Triton embeds Python, and finds the library of a distribution's only.
        system = shutil.which("python3.11", path="/usr/bin")
        if system is None:
            raise OSError("pytriton needs the distribution's own python3.11, which is not here.")
        _run([system, "-m", "venv", "--without-pip", str(found.folder)])
    else:
        venv.create(found.folder, symlinks=True, with_pip=False)
    _pip(found, "--requirement", str(lock), "--no-deps", *(["--require-hashes"] if hashed else []))


def _install_agent(found: Environment) -> None:
    wheels = found.folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    common = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "pip", "wheel", *common, "--wheel-dir", str(wheels), str(ROOT / "agent")])
    _pip(found, "--no-deps", "--force-reinstall", str(next(wheels.glob("*.whl"))))


def _pip(found: Environment, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(found.python), "--quiet", "--disable-pip-version-check"]
    _run([*pip, "install", *arguments])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
