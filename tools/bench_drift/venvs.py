"""Bench drift: an environment for each of the other tools, outside of ours.

Rules: what is installed is pinned in environments/*.txt with hashes, without a package index of its own. Made once; an
environment that can't be made costs the tool its place, and the page says why.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

from bench_serving.venvs import Environment

_PINNED: Final = Path(__file__).with_name("environments")
#: Their environments' names.
NAMES: Final = ("river", "evidently", "nannyml", "alibi")


def environment(cache: Path, name: str) -> Environment:
    """That environment, made if it is not there."""
    found = Environment(name, cache / name)
    lock = _PINNED / f"{name}.txt"
    mark = found.folder / ".made-of"
    made_of = hashlib.sha256(lock.read_bytes()).hexdigest()
    if mark.exists() and mark.read_text() == made_of:
        return found
    print(f"  environment {name}", flush=True)
    shutil.rmtree(found.folder, ignore_errors=True)
    found.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        venv.create(found.folder, symlinks=True, with_pip=False)
        pip = [sys.executable, "-m", "pip", "--python", str(found.python), "--quiet", "--disable-pip-version-check"]
        command = [*pip, "install", "--requirement", str(lock), "--no-deps", "--require-hashes"]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as e:
        said = (getattr(e, "stderr", b"") or b"").decode(errors="replace").strip()
        shutil.rmtree(found.folder, ignore_errors=True)
        return Environment(name, found.folder, said.splitlines()[-1][:300] if said else str(e)[:300])
    mark.write_text(made_of)
    return found
