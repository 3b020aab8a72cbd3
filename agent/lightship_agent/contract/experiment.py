"""Contract: what an experiment on devices means: who is asked, what is alike, how differences are counted.

Rules:
* pure and the same on both sides and in every release: a key falls to the same arm on every device and after every
  restart, and a rising share only ever adds keys to an arm;
* bins are fixed, so that counts of many devices add up;
* two bundles can be compared only where the same rows go in and the same kind of answer comes out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from .schema import FeatureSchema, Outputs
from .tensors import TensorSpec

#: Upper edges of the bins of differences; what is above the last has a bin of its own.
DIFFERENCE_EDGES: Final = (0.0, 1e-6, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
#: The same for milliseconds that a row took.
LATENCY_EDGES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0)
#: Up to so many classes, who took which for which is counted.
MAX_CONFUSED: Final = 32
#: Two numbers agree when they differ by at most this part of the larger one.
SAME_VALUE: Final = 0.01
MAX_KEY: Final = 256  # characters


def point_of(experiment: str, key: str) -> float:
    """Where `key` falls in [0, 1) in that experiment: 53 bits of sha256 of both."""
    digest = hashlib.sha256(f"{experiment}\0{key}".encode(errors="surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


class Shape(NamedTuple):
    """What goes into a model, and what comes out."""

    model: str
    schema: FeatureSchema
    outputs: Outputs
    tensors: TensorSpec | None = None  # of a model that takes tensors instead of rows


def unlike(champion: Shape, challenger: Shape) -> str:
    """Why the two can't be asked the same rows and compared; "" when they can."""
    ours, theirs = champion.schema, challenger.schema
    if champion.model != challenger.model:
        return f"Expected a version of {champion.model}, found {challenger.model}."
    if champion.tensors != challenger.tensors:
        return "Expected the same tensors, in and out."
    if ours.input_name != theirs.input_name:
        return f"Expected an input {ours.input_name!r}, found {theirs.input_name!r}."
    if ours.names != theirs.names:
        return f"Expected the features {_listed(ours.names)}, found {_listed(theirs.names)}."
    for a, b in zip(ours.features, theirs.features, strict=True):
        if (a.kind, a.levels, a.unknown_code) != (b.kind, b.levels, b.unknown_code):
            return f"Expected the same kind of feature {a.name!r}, and the same categories."
    if champion.outputs.task != challenger.outputs.task:
        return f"Expected {champion.outputs.task}, found {challenger.outputs.task}."
    if champion.outputs.labels != challenger.outputs.labels:
        wanted, found = champion.outputs.labels, challenger.outputs.labels
        return f"Expected the labels {_listed(wanted)}, found {_listed(found)}."
    return ""


def quantile(counts: Sequence[int], edges: Sequence[float], share: float) -> float:
    """The upper edge of the bin in which that share of the counts is reached; the last edge for the open bin."""
    wanted, seen = share * sum(counts), 0
    for edge, count in zip(edges, counts, strict=False):
        seen += count
        if seen >= wanted and seen:
            return edge
    return edges[-1]


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "none"
