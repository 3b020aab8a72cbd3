"""Runtime: may this device try that bundle at all?

Rules:
* pure: the device's facts come in as arguments;
* every refusal is one sentence that names what is needed, what is here, and what to do.
"""

from __future__ import annotations

import math
import re
from typing import Final

from lightship_agent.contract import CONTRACT_VERSION
from lightship_agent.contract.codes import BundleError
from lightship_agent.contract.manifest import Manifest, Requires

#: The longest trial a manifest may ask for, in seconds: a device that tries is not one that looks for updates.
MAX_PROBE_SECONDS: Final = 600
#: The address space that any bundle may ask for, in MB, however small the device: much of it is never touched.
MEMORY_ALWAYS_MB: Final = 512


def check_compatible(
    manifest: Manifest,
    *,
    agent_version: str,
    onnxruntime_version: str,
    device_class: str,
    device_memory_mb: float = math.inf,
) -> None:
    """Refuse a bundle this device can't run.

    Args:
        manifest: of the bundle.
        agent_version: this agent's version, such as "0.1.0".
        onnxruntime_version: the installed runtime's version, such as "1.32.0".
        device_class: what the operator calls this kind of device; empty when it was never set.
        device_memory_mb: all the memory this device has; infinite when nobody knows.

    Raises:
        BundleError: bundle.incompatible.
    """
    name, requires = f"{manifest.model}@{manifest.version}", manifest.requires
    if manifest.contract > CONTRACT_VERSION:
        message = f"{name} speaks contract {manifest.contract}; this agent understands up to {CONTRACT_VERSION}."
        raise BundleError("bundle.incompatible", message, remedy="Upgrade the agent.")
    if release_numbers(agent_version) < release_numbers(requires.min_agent):
        message = f"{name} needs agent {requires.min_agent} or newer; this device has {agent_version}."
        raise BundleError("bundle.incompatible", message, remedy="Upgrade the agent.")
    if release_numbers(onnxruntime_version) < release_numbers(requires.min_onnxruntime):
        message = (
            f"{name} needs onnxruntime {requires.min_onnxruntime} or newer; this device has {onnxruntime_version}."
        )
        raise BundleError("bundle.incompatible", message, remedy="Upgrade onnxruntime on the device.")
    if requires.device_classes and device_class not in requires.device_classes:
        message = (
            f"{name} is made for devices of class {', '.join(requires.device_classes)}; "
            f"this device is {f'of class {device_class}' if device_class else 'of no class'}."
        )
        raise BundleError("bundle.incompatible", message, remedy="Release it for this class, or assign another model.")
    _check_trial(name, requires, device_memory_mb)


def _check_trial(name: str, requires: Requires, device_memory_mb: float) -> None:
    """The limits of the trial are the bundle's own words; these are the limits of its words."""
    if not 1 <= requires.probe_seconds <= MAX_PROBE_SECONDS:
        message = f"{name} asks for a trial of {requires.probe_seconds} s; expected 1 to {MAX_PROBE_SECONDS} s."
        raise BundleError("bundle.incompatible", message, remedy="Release it with a shorter trial.")
    most = max(device_memory_mb, MEMORY_ALWAYS_MB)
    if not 1 <= requires.memory_mb <= most:
        message = f"{name} asks for {requires.memory_mb} MB of memory; this device gives a trial 1 to {most:.0f} MB."
        raise BundleError("bundle.incompatible", message, remedy="Choose a smaller model or a smaller budget.")


def release_numbers(version: str) -> tuple[int, int, int]:
    """The first three numbers of a version, absent ones as 0: "1.27" and "1.27.0+cpu" are equal.

    Raises:
        BundleError: bundle.incompatible for text that is not a version.
    """
    found = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    if not found:
        raise BundleError("bundle.incompatible", f"Expected a version such as 1.27.0, found {version[:40]!r}.")
    major, minor, patch = (int(part or 0) for part in found.groups())
    return major, minor, patch
