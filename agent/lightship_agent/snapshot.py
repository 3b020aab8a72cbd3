"""What the agent hands over when the control plane asks how it is: state, settings and its latest log lines.

Rules: pure. No rows, no labels, no secrets; where a setting names a file or a command, only that it is set is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from .logs import redacted
from .settings import Settings

_UNSAID: Final = ("_file", "_command", "bindings")


def snapshot_of(status: dict[str, Any], settings: Settings, lines: Sequence[str]) -> dict[str, Any]:
    """The three of them, ready for JSON.

    Args:
        status: as `/v2/health` says it.
        settings: those of this run.
        lines: of the log, redacted already.
    """
    return {"status": _clean(status), "settings": _told(settings), "log": list(lines)}


def _told(settings: Settings) -> dict[str, Any]:
    said = {}
    for name, value in msgspec.structs.asdict(settings).items():
        hidden = name.endswith(_UNSAID) and value
        said[name] = "set" if hidden else value if isinstance(value, int | float) else redacted(str(value))
    return said


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    return value
