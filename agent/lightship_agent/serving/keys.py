"""Serving: JSON in which a key occurs twice is refused; the fast decoder would quietly take the last.

Rules:
* exact: what is refused holds a key twice, what is let through does not;
* cheap first: text without room for another key is let through by counting its quotes;
* numbers in bulk hold no keys, and are not read a second time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from lightship_agent.contract.codes import ServingError

_BULK: Final = 64  # bytes


def check_keys(text: bytes, bulk: Iterable[bytes] = ()) -> None:
    """Refuse JSON that says something twice.

    Args:
        text: what another decoder has taken for JSON.
        bulk: parts of it that may be stepped over where they are long and hold no quotes, and so no keys.

    Raises:
        ServingError: serving.malformed.
    """
    for part in bulk:
        if len(part) > _BULK and b'"' not in part:
            text = text.replace(part, b"0")
    try:
        json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, or text that is not UTF-8
        raise ServingError("serving.malformed", f"Expected JSON: {e}.") from e


def check_value_keys(text: bytes, value: Any) -> None:
    """As `check_keys`, for text whose decoded `value` is at hand: mostly a count is enough.

    Raises:
        ServingError: serving.malformed.
    """
    if text.count(b'"') != _quotes(value):
        check_keys(text)


def _quotes(value: Any) -> int:
    """The quotes that `value` has in JSON, if none of its strings holds one."""
    if isinstance(value, str):
        return 2
    if isinstance(value, dict):
        return 2 * len(value) + sum(_quotes(v) for v in value.values() if isinstance(v, str | dict | list))
    if isinstance(value, list):
        return sum(_quotes(v) for v in value if isinstance(v, str | dict | list))
    return 0


def _once(pairs: list[tuple[str, Any]]) -> None:
    names = {name for name, _ in pairs}
    if len(names) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ServingError("serving.malformed", f"The key {twice[:64]!r} occurs twice.")
