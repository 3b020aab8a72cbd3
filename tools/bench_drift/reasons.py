"""Bench drift: why a bar is missed, where that can be told from what was measured. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from missed_bars import explained

from .bars import Bar
from .figures import Figures


def reasons(figures: Figures, missed: Sequence[Bar]) -> list[str]:
    """A sentence or two for each kind of bar that is missed."""
    not_measured = [f"{bar.name}: not measured in this run." for bar in missed if bar.shown == "not measured"]
    measured = [bar.name for bar in missed if bar.shown != "not measured"]
    return not_measured + explained(measured, _EXPLANATIONS, figures)


def _category(f: Figures) -> str | None:
    found = f.delay("category, total variation 0.05", 0.005)
    if found is None:
        return None
    alone = "none of the blocks" if found["alone"] is None else f"a block of {found['alone']:g} hours"
    return (
        f"Category, total variation 0.05: this change of one category of ten has w² = {found['effect']:.4f}. By the "
        f"test alone {alone} sees it half of the time; blocks are aligned, so that half of one passes first, and not "
        "knowing a device's own spread better than from two weeks costs the rest. Blocks that overlap were "
        "tried, and are not worth it: decision 30."
    )


def _payload(f: Figures) -> str | None:
    told = f.part("cost")
    if told is None:
        return None
    fits = [int(rows) for rows, size in told["payload"].items() if size <= 1_536]
    return (
        f"Payload: up to {max(fits, default=0):,} rows a window fits. Beyond, all of some 700 counts have more than "
        "one significant byte. They are exact and add up, which coarser ones would not; shorter windows do."
    )


def _merging(f: Figures) -> str | None:
    told = f.part("cost")
    if told is None:
        return None
    return (
        f"Merging: {told['ms_to_merge_1000']:.0f} ms for 1,000 windows as they come in messages, which are whole "
        f"numbers of Python's; the same as arrays takes {told['ms_to_add_1000_as_arrays']:.2f} ms, and the control "
        "plane judges devices one by one."
    )


def _years(f: Figures) -> str | None:
    return f"Device-years: {f.years():g} of the nature that has the fewest; the run was ended before it was done."


_EXPLANATIONS: Final[dict[str, Callable[[Figures], str | None]]] = {
    "device-years simulated": _years,
    "category, total variation 0.05": _category,
    "payload in bytes": _payload,
    "to merge the windows": _merging,
}
