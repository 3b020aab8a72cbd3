"""The page on privacy lists what can leave a device: every message and every field of the contract, and no other."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import msgspec

from lightship_agent.contract import messages
from lightship_agent.contract.messages import Envelope, LabelledRows, Reply, State
from lightship_agent.settings import SETTINGS

PAGE = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")


def told(kind: object, found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Every struct and named tuple that a message can hold, with its fields."""
    for part in typing.get_args(kind):
        told(part, found)
    if isinstance(kind, type) and kind.__name__ not in found:
        if issubclass(kind, msgspec.Struct):
            found[kind.__name__] = list(kind.__struct_fields__)
            for field in msgspec.structs.fields(kind):
                told(field.type, found)
        elif hasattr(kind, "_fields"):
            found[kind.__name__] = list(kind._fields)
            for inner in typing.get_type_hints(kind).values():
                told(inner, found)
    return found


def test_every_field_that_can_leave_a_device_is_on_the_page() -> None:
    upward: dict[str, list[str]] = {}
    for kind in (Envelope, State, Reply):
        told(kind, upward)
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE, re.MULTILINE)

    assert {name: re.findall(r"`(\w+)`", fields) for name, fields in rows} == upward
    assert set(upward) >= {k.__name__ for k in typing.get_args(messages.AnyRecord)}


def test_rows_are_in_one_message_alone_and_it_is_off_by_default() -> None:
    (row,) = re.findall(r"^\| `LabelledRows` .*$", PAGE, re.MULTILINE)
    defaults = {s.env: s.default for s in SETTINGS}

    assert "unless switched on" in row
    assert set(LabelledRows.__struct_fields__) >= {"x", "y"}
    assert defaults["LIGHTSHIP_AGENT_SHARE_LABELLED_ROWS"] == "0"
    assert set(re.findall(r"^(LIGHTSHIP_AGENT_SHARE_\w+)=", PAGE, re.MULTILINE)) == {
        env for env in defaults if env.startswith("LIGHTSHIP_AGENT_SHARE_")
    }
