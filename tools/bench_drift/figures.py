"""Bench drift: what was measured, by what it is asked for. Pure.

Rules: a part that was not measured gives None, and whoever asks says so.
"""

from __future__ import annotations

from typing import Any

from .bench import YEAR
from .streams import INDEPENDENT

Found = dict[str, Any]


class Figures:
    """Parts by name, as their files hold them."""

    def __init__(self, parts: dict[str, Any]) -> None:
        """The parts that there are."""
        self.parts = parts

    def part(self, name: str) -> Any:
        """What a part found; None where it was not measured."""
        told = self.parts.get(name)
        return None if told is None else told["found"]

    def quiet(self, nature: str, floor: float) -> Found | None:
        """A nature's alarms."""
        return next((q for q in self.part("quiet") or () if q["nature"] == nature and q["floor"] == floor), None)

    def weeks(self, course: str, warm_up: int) -> Found | None:
        """Alarms of the first weeks."""
        found = self.part("weeks") or ()
        return next((w for w in found if w["course"] == course and w["warm_up"] == warm_up), None)

    def years(self) -> float | None:
        """Device-years of the nature that has the fewest."""
        found = self.part("quiet")
        return min(q["years"] for q in found) if found else None

    def delay(self, shift: str, floor: float) -> Found | None:
        """A shift's delays."""
        return next((d for d in self.part("delays") or () if d["shift"] == shift and d["floor"] == floor), None)

    def joint(self, change: str, rows: int) -> Found | None:
        """In how many windows a change was seen."""
        return next((j for j in self.part("joint") or () if j["change"] == change and j["rows"] == rows), None)

    def fleet(self, rule: str, offset: float) -> Found | None:
        """A rule's alarms and delays."""
        return next((f for f in self.part("fleets") or () if f["rule"] == rule and f["offset"] == offset), None)

    def tools(self) -> Found:
        """Other tools, and ours, by title."""
        found: Found = (self.part("peers") or {"tools": {}})["tools"]
        return found

    def per_year(self, tool: str, nature: str = INDEPENDENT) -> float | None:
        """Hours with an alarm, of a year's."""
        told = self.tools().get(tool, {}).get("alarms", {}).get(nature)
        return None if told is None else YEAR * float(told["alarming_hours"]) / float(told["hours"])

    def fault(self, dataset: str, fault: str) -> Found | None:
        """What became of a fault of a real dataset."""
        for data in (self.part("real") or {"datasets": ()})["datasets"]:
            if data["name"] == dataset:
                return next((f for f in data["faults"] if f["fault"] == fault), None)
        return None
