"""Media files as the tests need them: of a repository in memory, whole or spoilt in one place."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from tests.agent.update.ground import DEVICE, NEW, Ground

from lightship_agent.contract.media import MediaWriter, assignment_name, member_order, target_name
from lightship_agent.contract.transport import TRANSPORT_SUFFIX


def members(
    ground: Ground, *, path: str = NEW, device: str = DEVICE, envelope: bytes | None = None
) -> dict[str, bytes]:
    """What an export of the repository, as it is now, would hold for one device."""
    found: dict[str, bytes] = {}
    for role, versions in ground.repository.published.items():
        for version, data in versions:
            if role == "root" or version == ground.repository.version(role):
                name = "timestamp" if role == "timestamp" else f"{version}.{role}"
                found[f"metadata/{name}.json"] = data
    found[assignment_name(device)] = ground.sign(ground.assignment()) if envelope is None else envelope
    packed = ground.repository.files[path + TRANSPORT_SUFFIX]
    found[target_name(hashlib.sha256(packed).hexdigest())] = packed
    return found


def archive(parts: dict[str, bytes]) -> bytes:
    """A well-formed file of such members."""
    out = io.BytesIO()
    writer = MediaWriter(out)
    for name in sorted(parts, key=member_order):
        writer.add(name, len(parts[name]), [parts[name]])
    writer.finish()
    return out.getvalue()


def carry(path: Path, parts: dict[str, bytes]) -> Path:
    """That file on a stick."""
    path.write_bytes(archive(parts))
    return path
