"""Runtime: may this device try that bundle at all?

Rules:
* pure: the device's facts come in as arguments;
* every refusal is one sentence that names what is needed, what is here, and what to do.
"""

from __future__ import annotations

import re

from lightship_agent.contract import CONTRACT_VERSION
from lightship_agent.contract.codes import BundleError
from lightship_agent.contract.manifest import Manifest


def check_compatible(manifest: Manifest, *, agent_version: str, onnxruntime_version: str, device_class: str) -> None:
    """Refuse a bundle this device can't run.

    Args:
        manifest: of the bundle.
        agent_version: this agent's version, such as "0.1.0".
        onnxruntime_version: the installed runtime's version, such as "1.32.0".
        device_class: what the operator calls this kind of device; empty when it was never set.

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
