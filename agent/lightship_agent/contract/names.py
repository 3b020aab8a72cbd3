"""Contract: the alphabets of identifiers.

Rules: one alphabet keeps a device id harmless as a certificate name, an MQTT topic level, a file name and a
Prometheus label at once, so `+`, `#`, `/`, `..` can't occur by construction.
"""

from __future__ import annotations

import re
from typing import Final

from .codes import InvalidNameError

_PATTERNS: Final[dict[str, re.Pattern[str]]] = {
    "device id": re.compile(r"[a-z0-9][a-z0-9-]{1,62}"),
    "model name": re.compile(r"[a-z0-9][a-z0-9-]{1,62}"),
    "dataset name": re.compile(r"[a-z0-9][a-z0-9-]{1,62}"),
    "group": re.compile(r"[a-z0-9][a-z0-9-]{0,62}"),
    "tenant": re.compile(r"[a-z0-9][a-z0-9-]{0,62}"),
    "token name": re.compile(r"[a-z0-9][a-z0-9-]{0,62}"),
    "environment": re.compile(r"[a-z0-9][a-z0-9-]{0,62}"),
    "experiment name": re.compile(r"[a-z][a-z0-9-]{0,62}"),
    "alias": re.compile(r"[a-z][a-z0-9-]{0,31}"),
    "feature name": re.compile(r"[a-z][a-z0-9_]{0,62}"),
}


def check_name(kind: str, value: str) -> str:
    """Return `value` if it is a valid identifier of `kind`.

    Raises:
        InvalidNameError: name.invalid, with the alphabet in the message.
    """
    pattern = _PATTERNS[kind]
    if not pattern.fullmatch(value):
        message = f"{value[:80]!r} is not a valid {kind}: expected {pattern.pattern}."
        raise InvalidNameError("name.invalid", message)
    return value


def feature_name(raw: str, taken: set[str]) -> str:
    """The feature name nearest to a column title, unique among `taken`: lower case, `_` for all else.

    ONNX converters rewrite odd input names silently; naming them once, here, keeps schema and graph alike.
    """
    base = re.sub(r"[^a-z0-9]+", "_", raw.strip().lower()).strip("_")[:56] or "feature"
    if not base[0].isalpha():
        base = f"f_{base}"
    name, n = base, 2
    while name in taken:
        name, n = f"{base}_{n}", n + 1
    return name
