"""Dashboards: the files, and how they get to where they are used.

Rules: a file that somebody has changed is not overwritten unasked, and then none is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lightship_agent.contract.codes import StorageError
from lightship_agent.files import storage_error, write_durably

FILES: Final = Path(__file__).parent / "files"


def files() -> dict[str, bytes]:
    """Every file by its place."""
    found = (p for p in sorted(FILES.rglob("*")) if p.is_file())
    return {str(p.relative_to(FILES)): p.read_bytes() for p in found}


def export(folder: Path, *, force: bool = False) -> list[Path]:
    """Write the files below `folder`; those that were written.

    Raises:
        StorageError: storage.exists where a file is there already and is another one; storage.full, storage.unwritable.
    """
    wanted = {folder / name: content for name, content in files().items()}
    changed = [p for p, content in wanted.items() if p.exists() and not (p.is_file() and p.read_bytes() == content)]
    if changed and not force:
        names = ", ".join(str(p.relative_to(folder)) for p in changed[:3])
        raise StorageError(
            "storage.exists",
            f"{folder} has files that differ from ours: {names}{' …' if len(changed) > 3 else ''}.",
            remedy="Choose another folder, or overwrite them with --force.",
        )
    for path, content in wanted.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(e, path.parent) from e
        write_durably(path, content, mode=0o644)
    return list(wanted)
