"""Benchmarks: why bars are missed, as far as what was measured says. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Figures = TypeVar("Figures")


def explained(
    names: Sequence[str], explanations: Mapping[str, Callable[[Figures], str | None]], figures: Figures
) -> list[str]:
    """A sentence or two for each kind of bar that is missed.

    Args:
        names: of the bars that were missed.
        explanations: by words of a bar's name, what explains it; None where too little was measured.
        figures: what was measured.
    """
    said, left = [], list(names)
    for words, explain in explanations.items():
        reason = explain(figures) if any(words in name for name in left) else None
        if reason is not None:
            said.append(reason)
            left = [name for name in left if words not in name]
    return said + [f"{name}: no reason found yet." for name in left]
