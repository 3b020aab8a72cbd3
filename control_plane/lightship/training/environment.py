"""Training: the environment of a run - which versions made this model, from which revision of the code.

Rules:
* facts only, no host or user names: the same image gives the same digest on every machine;
* a missing git, or a folder outside of one, is "unknown", never an error.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Final

from lightship_agent.contract.wire import canonical_json, sha256_hex

PACKAGES: Final = ("numpy", "scikit-learn", "skl2onnx", "onnx", "onnxruntime", "protobuf")
UNKNOWN: Final = "unknown"
_GIT_SECONDS: Final = 10
#: Of our environment, all that git gets.
_PASSED_ON: Final = ("PATH", "HOME", "LANG")


def capture() -> dict[str, str]:
    """Python, platform and the versions of what shapes a model; "absent" where not installed."""
    facts = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "machine": platform.machine(),
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "absent"
    return facts


def environment_digest(environment: dict[str, str]) -> str:
    """sha256 of the canonical JSON."""
    return sha256_hex(canonical_json(environment))


def code_revision(path: Path) -> str:
    """The git revision that `path` is at, with `-dirty` when files differ from it; else "unknown"."""
    head = _git(path, "rev-parse", "--verify", "HEAD")
    if not head:
        return UNKNOWN
    return f"{head}-dirty" if _git(path, "status", "--porcelain", "--untracked-files=no") else head


def _git(path: Path, *arguments: str) -> str:
    command = ["git", "-C", str(path), *arguments]
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
