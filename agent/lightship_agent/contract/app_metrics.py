"""Contract: the application's own numbers: counters, gauges and histograms that travel in the device's reports.

Rules:
* pure; the same checks in the application's program and in the agent;
* names are lower-case words with underscores, at most 64 characters; what Prometheus appends by itself is no ending;
* a name keeps its kind, and a histogram its edges, for as long as the agent runs; at most 256 names;
* what is told together is taken whole, or not at all.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Final, Literal

import msgspec

from .codes import ServingError

MAX_METRICS: Final = 256
MAX_NAME: Final = 64
MAX_EDGES: Final = 64
#: Most values of a histogram, and most samples, in one call.
MAX_TOLD: Final = 1_000
#: Upper edges of a histogram that names none: 1, 2, 5 from 0.001 to 1000.
EDGES: Final = (*(float(f"{n}e{e}") for e in range(-3, 3) for n in (1, 2, 5)), 1_000.0)

_PATTERN: Final = "^[a-z][a-z0-9_]{0,63}$"
_NAME: Final = re.compile(_PATTERN)
_TAKEN: Final = ("_total", "_bucket", "_sum", "_count")
_LARGEST: Final = 2**53

Kind = Literal["counter", "gauge", "histogram"]
MetricName = Annotated[str, msgspec.Meta(pattern=_PATTERN)]
Cells = Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=_LARGEST)], ...], msgspec.Meta(max_length=MAX_EDGES + 1)]
Edges = Annotated[tuple[float, ...], msgspec.Meta(max_length=MAX_EDGES)]


class AppHistogram(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of values: a cell holds what is at most its upper edge, the last one what is above all edges."""

    edges: Edges
    counts: Cells
    sum: float = 0.0


class AppSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an application tells of one of its numbers.

    Of a counter `value` is what it grew by, of a gauge what it is. A histogram takes `values`, or what was counted of
    them already: `counts` by `edges`, and their `sum`.
    """

    name: str
    kind: Kind
    value: float | None = None
    values: Annotated[tuple[float, ...], msgspec.Meta(max_length=MAX_TOLD)] = ()
    edges: Edges = ()
    counts: Cells = ()
    sum: float = 0.0


class AppNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """All of an application's numbers, since the agent began."""

    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    histograms: dict[str, AppHistogram] = {}

    def __len__(self) -> int:
        return len(self.counters) + len(self.gauges) + len(self.histograms)


class Registry:
    """The numbers as they are. Its owner sees to it that one thread at a time asks it."""

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self._numbers = AppNumbers()

    @property
    def numbers(self) -> AppNumbers:
        """What was told so far; it does not change any more."""
        return self._numbers

    def take(self, told: Sequence[AppSample]) -> None:
        """Count what was told, all of it.

        Raises:
            ServingError: serving.metric-name, serving.metric-kind, serving.metric-value, serving.metric-full; then
                nothing has changed.
        """
        kinds = dict(self._kinds)
        counters, gauges = dict(self._numbers.counters), dict(self._numbers.gauges)
        histograms = dict(self._numbers.histograms)
        for sample in told:
            check_name(sample.name)
            kind = kinds.setdefault(sample.name, sample.kind)
            if kind != sample.kind:
                message = f"{sample.name} is a {kind}; found a {sample.kind} of that name."
                raise ServingError("serving.metric-kind", message, remedy="Give it another name.")
            if len(kinds) > MAX_METRICS:
                message = f"Expected at most {MAX_METRICS} names, found {sample.name!r} beyond them."
                raise ServingError("serving.metric-full", message, remedy="A name is a series, not a value: use fewer.")
            if kind == "histogram":
                histograms[sample.name] = _observed(histograms.get(sample.name), sample)
            elif kind == "counter":
                counters[sample.name] = _counted(counters.get(sample.name, 0.0), sample)
            else:
                gauges[sample.name] = _value(sample)
        self._kinds = kinds
        self._numbers = AppNumbers(counters=counters, gauges=gauges, histograms=histograms)


def check_name(name: str) -> None:
    """Refuse what is no name.

    Raises:
        ServingError: serving.metric-name.
    """
    if not _NAME.fullmatch(name) or name.endswith(_TAKEN):
        message = f"Expected a name like parts_made, at most {MAX_NAME} of a-z, 0-9 and _, found {name[:80]!r}."
        raise ServingError("serving.metric-name", message, remedy=f"It may not end in {', '.join(_TAKEN)}.")


def check_finite(numbers: AppNumbers) -> bool:
    """Whether all of them are numbers that JSON can say, and cells fit their edges."""
    plain = [*numbers.counters.values(), *numbers.gauges.values()]
    for h in numbers.histograms.values():
        plain += [*h.edges, h.sum]
    fits = all(len(h.counts) <= len(h.edges) + 1 for h in numbers.histograms.values())
    names: list[Mapping[str, object]] = [numbers.counters, numbers.gauges, numbers.histograms]
    return fits and all(map(math.isfinite, plain)) and all(_NAME.fullmatch(n) for kind in names for n in kind)


def _value(sample: AppSample) -> float:
    if sample.value is None or not math.isfinite(sample.value) or sample.values or sample.edges or sample.counts:
        message = f"{sample.name}: expected one finite value, found {_shown(sample)}."
        raise ServingError("serving.metric-value", message)
    return sample.value


def _counted(before: float, sample: AppSample) -> float:
    grown = _value(sample)
    if grown < 0 or not math.isfinite(before + grown):
        raise ServingError("serving.metric-value", f"{sample.name}: a counter grows; found {grown:g} to add.")
    return before + grown


def _observed(before: AppHistogram | None, sample: AppSample) -> AppHistogram:
    edges = _edges(before, sample)
    counts = list(before.counts) if before else [0] * (len(edges) + 1)
    fits = sample.value is None and len(sample.counts) in (0, len(counts))
    if not fits or not all(map(math.isfinite, sample.values)):
        message = f"{sample.name}: expected finite values, or counts of {len(counts)} cells, found {_shown(sample)}."
        raise ServingError("serving.metric-value", message)
    for value in sample.values:
        counts[bisect_left(edges, value)] += 1
    for i, n in enumerate(sample.counts):
        counts[i] += n
    total = math.fsum((before.sum if before else 0.0, sample.sum, *sample.values))
    if not math.isfinite(total) or max(counts) > _LARGEST:
        raise ServingError("serving.metric-value", f"{sample.name}: the sum would be no number any more.")
    return AppHistogram(edges=edges, counts=tuple(counts), sum=total)


def _edges(before: AppHistogram | None, sample: AppSample) -> tuple[float, ...]:
    edges = sample.edges or (before.edges if before else EDGES)
    if before is not None and edges != before.edges:
        message = f"{sample.name}: its edges are {list(before.edges)}, found others."
        raise ServingError("serving.metric-kind", message, remedy="Give it another name.")
    if not all(map(math.isfinite, edges)) or any(a >= b for a, b in pairwise(edges)):
        raise ServingError("serving.metric-value", f"{sample.name}: expected edges that are finite and rise.")
    return edges


def _shown(sample: AppSample) -> str:
    told = msgspec.structs.asdict(sample)
    return str({k: told[k] for k in ("value", "values", "edges", "counts") if told[k] not in (None, ())})[:120]
