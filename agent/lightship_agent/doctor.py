"""`lightship-agent doctor`: what could keep this device from serving, updating or reporting, and what to do.

Rules: it reads and asks, and changes nothing; every finding says what was found.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .contract.codes import LightshipError
from .settings import Settings


@dataclass(frozen=True)
class Finding:
    """One check and its outcome."""

    check: str
    ok: bool
    said: str
    code: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Every check, in the order in which things depend on each other."""
    checks: tuple[tuple[str, Callable[[Settings], str]], ...] = (
        ("runtime", _runtime),
        ("disk", _disk),
        ("identity", _identity),
        ("bundle", _bundle),
        ("server", _server),
        ("trust", _trust),
    )
    return [_try(name, check, settings) for name, check in checks]


def _try(name: str, check: Callable[[Settings], str], settings: Settings) -> Finding:
    try:
        return Finding(name, ok=True, said=check(settings))
    except LightshipError as e:
        return Finding(name, ok=False, said=str(e), code=e.code)


def _runtime(_settings: Settings) -> str:
    import numpy as np

    from .runtime.ort import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}"


def _disk(settings: Settings) -> str:
    from .contract.codes import StorageError
    from .files import write_durably
    from .monitor.health import read_health

    probe = settings.state_dir / ".doctor"
    if not settings.state_dir.is_dir():
        raise StorageError("storage.unwritable", f"{settings.state_dir} does not exist.", remedy="Create it, or enrol.")
    write_durably(probe, b"doctor")
    probe.unlink()
    return f"{read_health(settings.state_dir).get('disk_free_mb', 0):.0f} MB free in {settings.state_dir}"


def _identity(settings: Settings) -> str:
    from .contract.codes import EnrolError
    from .link.identity import load_identity

    identity = load_identity(settings.state_dir)
    left = identity.certificate().not_valid_after_utc.timestamp() - time.time()
    if left < 0:
        raise EnrolError("enrol.certificate", "The certificate has expired.", remedy="Enrol this device anew.")
    return f"{identity.device}, certificate valid for {left / 3600:.0f} h"


def _bundle(settings: Settings) -> str:
    from .contract.codes import BundleError
    from .update.store import BundleStore, StateFile

    current = StateFile(settings.state_dir).load().current
    if current is None:
        return "none committed yet"
    if not BundleStore(settings.state_dir).holds(current.sha256):
        raise BundleError("bundle.digest", f"{current.model}@{current.version} was altered on disk.")
    return f"{current.model}@{current.version} ({current.sha256[:12]}) is whole"


def _server(settings: Settings) -> str:
    from .link.client import ControlPlane
    from .link.identity import load_identity

    control = ControlPlane(load_identity(settings.state_dir))
    try:
        control.desired()
    finally:
        control.close()
    return f"{control.server} answers"


def _trust(settings: Settings) -> str:
    from .contract.device_api import Paths
    from .link.client import ControlPlane
    from .link.identity import load_identity
    from .update.releases import Releases

    identity = load_identity(settings.state_dir)
    control = ControlPlane(identity)
    try:
        Releases(settings.state_dir / "tuf", control.http, f"{control.server}{Paths.METADATA}", identity.tuf_root)
    finally:
        control.close()
    return "release metadata verifies and is fresh"
