"""Bench serving: what was measured, part by part, and what it comes to. Pure.

Rules: a part that was not measured gives None wherever it is asked for; nothing here is filled in from elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from .stats import Spread, slope, spread

#: What the process beside us takes of the first requests: its caches, buffers and threads; the line is drawn after it.
_SETTLED: Final = 0.1


@dataclass(frozen=True)
class Figures:
    """Parts as they were saved."""

    parts: dict[str, dict[str, Any]]
    machine: str = ""
    quick: bool = False
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def part(self, name: str) -> dict[str, Any] | None:
        """What that part found."""
        return self.parts[name]["found"] if name in self.parts else None

    # One prediction -------------------------------------------------------------------------------------------------

    def burst(self, who: str, figure: str, model: str = "hgb", c: int = 1) -> Spread | None:
        """A figure of a server's bursts: p50, p90, p99, cpu in µs, rate in requests a second."""
        found = self.part("speed") or {"bursts": []}
        chosen = [b[figure] for b in found["bursts"] if (b["who"], b["model"], b["c"]) == (who, model, c)]
        return spread(chosen) if chosen else None

    def paced(self, who: str, model: str) -> float | None:
        """CPU in µs of a request, at the pace."""
        found = self.part("speed") or {"paced": []}
        return _median(b["cpu"] for b in found["paced"] if (b["who"], b["model"]) == (who, model))

    def inside(self, what: str, model: str) -> Spread | None:
        """µs of a call within a process: run, bound or face; best of the best deciles of bursts."""
        found = self.part("speed") or {"inside": []}
        seen = [c[what] for c in found["inside"] if c["model"] == model]
        return Spread(_must(s["median"] for s in seen), spread([s["best"] for s in seen]).best) if seen else None

    def inside_ratio(self, what: str, model: str) -> float | None:
        """Of `session.run`: the median over rounds of what was measured in the same seconds."""
        found = self.part("speed") or {"inside": []}
        return _median(c[what]["best"] / c["run"]["best"] for c in found["inside"] if c["model"] == model)

    def servers(self) -> list[str]:
        """Who was measured."""
        found = self.part("speed") or {"bursts": []}
        return sorted({b["who"] for b in found["bursts"]})

    # Everything on, and many rows -----------------------------------------------------------------------------------

    def watched(self, who: str, c: int, figure: str = "cpu") -> float | None:
        """A figure with drift, metrics and telemetry `on` or `off`; `beside` is CPU in threads that do not answer."""
        found = self.part("watched") or {"watched": []}
        return _median(b[figure] for b in found["watched"] if (b["who"], b["c"]) == (who, c) and figure in b)

    def many(self, how: str, model: str, figure: str = "p50") -> float | None:
        """A figure of a request of many rows: json, binary, or the bare `run`."""
        found = self.part("watched") or {"many": []}
        return _median(b[figure] for b in found["many"] if (b["how"], b["model"]) == (how, model))

    # Memory and starts ----------------------------------------------------------------------------------------------

    def memory(self, who: str, what: str) -> float | None:
        """MB of PSS: idle, loaded, after; `idle_cpu` in percent of a core; of `bare`: nothing, hgb, rf."""
        found = self.part("memory")
        if found is None:
            return None
        of: dict[str, float] = found[who] if who in {"ours", "bare"} else found["peers"].get(who, {})
        return of.get(what)

    def start(self, who: str, figure: str = "seconds") -> float | None:
        """Seconds, or seconds of `cpu`, from the start of the process to the first prediction."""
        found = self.part("starts") or {figure: {}}
        return _median(found.get(figure, {}).get(who, []))

    def steps(self) -> dict[str, float]:
        """Seconds of each step of our start: python, numpy, onnxruntime, modules; empty where they were not told."""
        reached: dict[str, float] = (self.part("starts") or {}).get("steps", {})
        return {
            name: at - before for (name, at), before in zip(reached.items(), (0.0, *reached.values()), strict=False)
        }

    # Changes --------------------------------------------------------------------------------------------------------

    def update(self, when: str, how: str, figure: str = "p99") -> float | None:
        """A figure of the windows in which an update came (`busy`), or none (`quiet`); how: paced or closed."""
        found = self.part("updates") or {"windows": []}
        return _median(w[when][figure] for w in found["windows"] if w["how"] == how)

    def swapped_memory(self) -> float | None:
        """PSS after all updates, of PSS before them."""
        found = self.part("updates")
        return None if found is None else found["after"] / found["before"]

    def update_errors(self) -> int | None:
        """Requests that failed while updates came."""
        found = self.part("updates")
        return None if found is None else sum(w["busy"]["errors"] for w in found["windows"])

    def swap(self, what: str) -> float | None:
        """Of the swaps: swaps, failed, mixed, unknown, switches."""
        found = self.part("swaps")
        return None if found is None else found[what]

    def stale(self) -> float | None:
        """Answers from a version that had been replaced: each is seen as one switch more than was ordered."""
        found = self.part("swaps")
        return None if found is None else max(0, found["switches"] - found["swaps"])

    def differ(self) -> int | None:
        """Answers that were not to the bit the same when others were asked with them."""
        found = self.part("together")
        return None if found is None else sum(m["differ"] for m in found.values())

    def soak(self) -> float | None:
        """MB of PSS that a million requests add, by the line of least squares after the first tenth."""
        found = self.part("soak")
        if found is None:
            return None
        points = [(x, y) for x, y in found["points"] if x >= _SETTLED * found["requests"] / 1e6]
        return slope(points)


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _must(values: Iterable[float]) -> float:
    return statistics.median(list(values))
