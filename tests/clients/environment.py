"""The environment with the public clients: made once from its hashed lock, in build/, and used by every later run."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LOCK = HERE / "requirements.lock"


def clients_python(from_lock: Path = LOCK) -> Path:
    """The interpreter that has what a lock names; skips the test, with pip's reason, where it can't be installed."""
    name = f"{sys.version_info[0]}.{sys.version_info[1]}-{hashlib.sha256(from_lock.read_bytes()).hexdigest()[:12]}"
    folder = ROOT / "build" / "clients" / name
    ready, python = folder / ".ready", folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if ready.exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
        done = subprocess.run([*pip, "-r", str(from_lock)], capture_output=True, text=True, check=False, timeout=1_800)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["nothing"]
            pytest.skip(
                f"{from_lock.parent.name}: its requirements can't be installed here; pip says: {said[-1][:300]}"
            )
        ready.touch()
    return python
