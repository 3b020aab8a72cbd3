"""Bench update: how many bytes a device is spared by a delta, for each kind of successor."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from lightship_agent.contract.transport import DELTA_WORTH, apply_patch, make_patch, pack_transport
from lightship_agent.contract.wire import sha256_hex

from .bundles import bundle
from .kinds import pairs


@dataclass(frozen=True)
class Delta:
    """One kind of successor: sizes in bytes, CPU in seconds."""

    kind: str
    bundle: int
    full: int
    patch: int
    make_cpu: float
    apply_cpu: float

    @property
    def share(self) -> float:
        """Of the full transport file."""
        return self.patch / self.full

    @property
    def listed(self) -> bool:
        """Whether it is worth releasing."""
        return self.share < DELTA_WORTH

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "share": round(self.share, 4), "listed": self.listed}


def measure() -> list[Delta]:
    """Train, convert, bundle and patch every kind; each patch is applied as a device applies it."""
    found = []
    for pair in pairs():
        old, new = bundle(pair.old, 1), bundle(pair.new, 2)
        full = pack_transport(new)
        began = time.process_time()
        patch = make_patch(old, new)
        made = time.process_time()
        apply_patch(patch, old, patch_sha256=sha256_hex(patch), sha256=sha256_hex(new), length=len(new))
        applied = time.process_time()
        found.append(Delta(pair.kind, len(new), len(full), len(patch), made - began, applied - made))
        print(f"  {pair.kind}: {len(new):,} → full {len(full):,}, delta {len(patch):,}", flush=True)
    return found
