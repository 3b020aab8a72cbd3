"""Monitor: what is to be taken out of rows that are shared, as the setting says it.

Rules: pure; the settings check it with this.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from lightship_agent.contract.codes import SettingsError

_MAX_DIGITS: Final = 9


class Rule(NamedTuple):
    """What becomes of a field; `digits` after the point where it is rounded."""

    how: str
    digits: int = 0


def parse_redaction(text: str) -> dict[str, Rule]:
    """The rules by field.

    Raises:
        SettingsError: settings.invalid.
    """
    rules: dict[str, Rule] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        field, equals, how = (p.strip() for p in part.partition("="))
        kind, _, digits = how.partition(":")
        fits = kind in {"drop", "hash"} and not digits
        fits = fits or (kind == "round" and digits.isdecimal() and len(digits) == 1)
        if not (field and equals and fits) or field in rules:
            message = "LIGHTSHIP_AGENT_SHARE_REDACT: expected field=drop, field=hash or field=round:DIGITS (0 to "
            raise SettingsError("settings.invalid", f"{message}{_MAX_DIGITS}), each field once; found {part[:80]!r}.")
        rules[field] = Rule(kind, int(digits or 0))
    return rules
