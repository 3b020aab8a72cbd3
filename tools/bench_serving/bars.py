"""Bench serving: what the figures are held to. Pure.

Rules: each bar is computed from what was measured, and nothing else; one whose part was not measured is not held. CPU
is compared by medians over bursts, since it hardly depends on what else the machine does; latency by best deciles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from .figures import Figures
from .stats import Spread


@dataclass(frozen=True)
class Bar:
    """A figure, and the limit on the one side or the other; no figure where nothing was measured."""

    name: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the figure is on the right side."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        value = None if self.value is None else round(self.value, 4)
        return {
            "name": self.name, "value": value, "limit": self.limit, "at_least": self.at_least, "holds": self.holds,
        }  # fmt: skip


#: MB that the soak may add in all of its ten million requests and still be called flat.
FLAT_MB: Final = 2.0
_SOAKED: Final = 10.0  # million


def bars(figures: Figures) -> list[Bar]:
    """All of them, in the order of the issue."""
    return [
        *_single(figures), *_faces(figures), *_paced(figures), *_throughput(figures), *_watched(figures),
        *_memory(figures), *_starts(figures), *_changes(figures),
    ]  # fmt: skip


def _single(f: Figures) -> Iterator[Bar]:
    one = "HTTP JSON, one row, gradient boosting"
    for who, title, limit in (("fastapi", "fastapi (async, tuned)", 0.35), ("mlserver", "mlserver (workers=0)", 0.12)):
        yield Bar(f"{one}: CPU per request, of {title}", _against(f, who, "cpu", _median), limit)
    for who, title, limit in (
        ("fastapi", "fastapi (async, tuned)", 0.40), ("mlserver", "mlserver (workers=0)", 0.15),
        ("mlserver-default", "mlserver's default", 0.05), ("bentoml", "bentoml", 0.05),
        ("pytriton", "triton through pytriton", 0.05),
    ):  # fmt: skip
        yield Bar(f"{one}: p50, of {title}", _against(f, who, "p50", _best), limit)


def _faces(f: Figures) -> Iterator[Bar]:
    for model, title in (("hgb", "gradient boosting"), ("mlp", "network")):
        name = f"binary extension at 1,000 rows, {title}: times faster than JSON"
        yield Bar(name, _ratio(f.many("json", model), f.many("binary", model)), 5, at_least=True)
        beside = [_less(f.many(how, model, "cpu"), f.many("run", model, "cpu")) for how in ("json", "binary")]
        yield Bar(f"{name}, in CPU beside the model's own", _ratio(*beside), 5, at_least=True)
    frames = _against(f, "ours", "cpu", _median, ours="ours-frames")
    yield Bar("Unix-socket frames: CPU per request, of our HTTP", frames, 0.60)
    yield Bar("in-process, gradient boosting: time, of session.run", f.inside_ratio("face", "hgb"), 0.75)


def _paced(f: Figures) -> Iterator[Bar]:
    for model, title in (("hgb", "gradient boosting"), ("rf", "forest")):
        for who, words, limit in (("fastapi-written", "as written", 0.08), ("fastapi", "async, tuned", 0.40)):
            ratio = _ratio(f.paced("ours", model), f.paced(who, model))
            yield Bar(f"paced 100 requests/s, {title}: CPU, of fastapi ({words})", ratio, limit)
    yield Bar("idle: percent of a core", f.memory("ours", "idle_cpu"), 0.5)


def _throughput(f: Figures) -> Iterator[Bar]:
    for who, title, limit in (("fastapi", "fastapi (async, tuned)", 7), ("mlserver", "mlserver (workers=0)", 15)):
        rate, cpu = (_against(f, who, figure, _median, c=32) for figure in ("rate", "cpu"))
        yield Bar(f"throughput at concurrency 32, times {title}", rate, limit, at_least=True)
        name = f"throughput at concurrency 32 of one whole core, times {title}"
        yield Bar(name, _ratio(1.0, cpu), limit, at_least=True)


def _watched(f: Figures) -> Iterator[Bar]:
    for c in (1, 32):
        name = f"drift, metrics and telemetry on: CPU per request, of off, concurrency {c}"
        yield Bar(name, _ratio(f.watched("on", c), f.watched("off", c)), 1.10)
    for how, title in (("paced", "paced 200 requests/s"), ("closed", "as fast as one client can")):
        ratio = _ratio(f.update("busy", how), f.update("quiet", how))
        yield Bar(f"p99 while an update downloads, verifies, loads and swaps, of quiet, {title}", ratio, 2)
    yield Bar("update: requests that failed meanwhile", f.update_errors(), 0)


def _memory(f: Figures) -> Iterator[Bar]:
    ours, bare = f.memory("ours", "loaded"), f.memory("bare", "hgb")
    yield Bar("memory: MB of PSS above bare python, numpy, onnxruntime and model", _less(ours, bare), 30)
    forest = _less(f.memory("ours", "forest"), f.memory("ours", "empty"))
    untrimmed = _less(f.memory("bare", "rf"), f.memory("bare", "nothing"))
    yield Bar("memory: forest after load, of untrimmed", _ratio(forest, untrimmed), 0.5)
    grown = _less(f.memory("ours", "after"), f.memory("ours", "loaded"))
    yield Bar("memory: MB more after 100,000 requests", grown, 2)
    yield Bar("memory after 20 swaps, of before", f.swapped_memory(), 1.10)
    per_million = f.soak()
    name = "memory: soak of 10 million requests, MB by its slope"
    yield Bar(name, None if per_million is None else per_million * _SOAKED, FLAT_MB)


def _starts(f: Figures) -> Iterator[Bar]:
    for who, title, limit in (
        ("fastapi", "fastapi (async, tuned)", 0.40), ("fastapi-written", "fastapi (as written)", 0.40),
        ("mlserver", "mlserver (workers=0)", 0.25),
    ):  # fmt: skip
        yield Bar(f"start of the process to first prediction, of {title}", _ratio(f.start("ours"), f.start(who)), limit)


def _changes(f: Figures) -> Iterator[Bar]:
    yield Bar("swap under full load: swaps", f.swap("swaps"), 1_000, at_least=True)
    yield Bar("swap under full load: requests that failed", f.swap("failed"), 0)
    yield Bar("swap under full load: stale answers after the switch", f.stale(), 0)
    yield Bar("swap under full load: answers from a mix of versions", f.swap("mixed"), 0)
    yield Bar("swap under full load: answers without the digest that made them", f.swap("unknown"), 0)
    yield Bar("micro-batched answers that differ in a bit from single ones", f.differ(), 0)


def _median(of: Spread) -> float:
    return of.median


def _best(of: Spread) -> float:
    return of.best


def _against(
    f: Figures, who: str, figure: str, by: Callable[[Spread], float], *, c: int = 1, ours: str = "ours"
) -> float | None:
    """A figure of ours for gradient boosting, of theirs."""
    mine, theirs = f.burst(ours, figure, c=c), f.burst(who, figure, c=c)
    return None if mine is None or theirs is None else by(mine) / by(theirs)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _less(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else whole - part
