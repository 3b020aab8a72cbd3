"""Runtime: try a bundle in a process of its own before it may come near the one that serves.

Rules:
* the child gets a path, two limits and a bare environment: no secret, no setting that could steer onnxruntime;
* address space, CPU and wall time are bounded; whatever the child leaves behind is killed as a group;
* a child that dies by any means is an answer, never an exception of another family than update.*.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from lightship_agent.contract.codes import CODES, UpdateError
from lightship_agent.contract.manifest import Requires
from lightship_agent.files import scratch

from .session import Allowed

_PASSED_ON: Final = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
_MAX_REPORT: Final = 64 * 1024  # bytes of the child's output that are read
_PACKAGE_ROOT: Final = Path(__file__).resolve().parents[2]


class ProbeReport(msgspec.Struct, frozen=True):
    """What the trial measured on this device."""

    max_difference: float  # of golden scores or values
    latency_ms_p95: float  # of one row
    memory_mb: float  # peak resident memory above the child's start


class ChildReport(msgspec.Struct, frozen=True, kw_only=True):
    """The line the child prints: measurements, or a code with its message."""

    code: str = ""
    message: str = ""
    max_difference: float = 0.0
    latency_ms_p95: float = 0.0
    memory_mb: float = 0.0


def probe(
    path: Path, requires: Requires, *, timeout: float | None = None, allowed: Allowed | None = None
) -> ProbeReport:
    """Load the bundle at `path` in a child, check its golden rows, and measure it.

    Args:
        path: the uncompressed bundle.
        requires: limits and budgets from its manifest.
        timeout: wall seconds; `requires.probe_seconds` when None.
        allowed: what this device allows of the manifest's wishes.

    Raises:
        UpdateError: update.probe-failed, update.probe-timeout, update.golden, update.budget.
    """
    seconds = float(requires.probe_seconds if timeout is None else timeout)
    status, output, errors = _run_child(path, requires.memory_mb, seconds, allowed or Allowed())
    if status != 0:
        raise _death(status, errors, seconds)
    report = _read_report(output)
    if report.code:
        raise UpdateError(report.code, report.message)
    if report.latency_ms_p95 > requires.latency_ms:
        message = f"Expected a p95 of at most {requires.latency_ms:g} ms a row, found {report.latency_ms_p95:.3f} ms."
        raise UpdateError("update.budget", message, remedy="Choose a smaller model or raise the budget.")
    return ProbeReport(report.max_difference, report.latency_ms_p95, report.memory_mb)


def child_environment() -> dict[str, str]:
    """The child's whole environment.

    The package's own folder is on the path, so an editable install, a wheel and a user install all work.
    """
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # Each malloc arena reserves 64 MB of address space, which is what the limit counts.
    return {**environment, "PYTHONPATH": str(_PACKAGE_ROOT), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def _run_child(path: Path, memory_mb: int, seconds: float, allowed: Allowed) -> tuple[int, bytes, bytes]:
    """Exit status (negative for a signal), and what the child wrote. Files, not pipes: nothing can fill or block."""
    command = [sys.executable, "-P", "-m", "lightship_agent.runtime.probe_child"]
    arguments = [str(path.resolve()), str(memory_mb), str(max(1, round(seconds))), str(allowed), str(allowed.threads)]
    with scratch("probe-output") as output, scratch("probe-errors") as errors:
        try:
            child = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=child_environment(),
                cwd="/",
                start_new_session=True,
            )
        except OSError as e:
            raise UpdateError("update.probe-failed", f"The probe process can't be started: {e}.") from e
        try:
            status = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired as e:
            message = f"The probe did not finish within {seconds:g} s and was stopped."
            raise UpdateError("update.probe-timeout", message) from e
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        output.seek(0)
        errors.seek(0)
        return status, output.read(_MAX_REPORT), errors.read(_MAX_REPORT)


def _death(status: int, errors: bytes, seconds: float) -> UpdateError:
    lines = errors.decode(errors="replace").strip().splitlines()
    words = lines[-1][:300] if lines else "it said nothing"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        spent = f"{seconds:g} s of CPU" if status == -signal.SIGXCPU else "the memory this device has"
        return UpdateError("update.probe-timeout", f"The probe used more than {spent} and was stopped.")
    cause = f"died of {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
    return UpdateError("update.probe-failed", f"The probe process {cause}: {words}.")


def _read_report(output: bytes) -> ChildReport:
    """The last line; a native library may have printed before it."""
    lines = output.strip().splitlines()
    try:
        report = msgspec.json.decode(lines[-1] if lines else b"", type=ChildReport)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise UpdateError("update.probe-failed", f"The probe process gave no report: {e}.") from e
    if report.code and not (report.code in CODES and report.code.startswith("update.")):
        raise UpdateError("update.probe-failed", f"The probe process gave an unknown code {report.code[:60]!r}.")
    return report
