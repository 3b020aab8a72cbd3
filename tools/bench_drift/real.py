"""Bench drift: real rows, with faults of their own or injected, and what is said about them.

Rules: a window is 200 rows that the reference has not seen; one feature is hurt; no history, so what is measured is the
first window alone. Seen: a test beyond its line at the default budget and floor, or a hard fault told on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from lightship.data.profile import reference_profile
from lightship.monitoring.drift import judge_stream, watch_stream
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.explain import explain
from lightship.monitoring.memory import Memory
from lightship.monitoring.performance import Labelled, judge_errors
from lightship.monitoring.verdict import Verdict
from lightship_agent.contract.profile import ReferenceProfile, WindowCounts
from lightship_agent.monitor.faults import FaultFinder
from lightship_agent.monitor.tally import Tally

from .bench import Bench
from .datasets import Dataset, Rows, datasets
from .rules import REWRITTEN
from .streams import REFERENCE, ROWS

_STREAM: Final = 1_000  # rows of a window of a long stream
Hurt = Callable[[Rows, int, int, float], Rows]


def _copy(change: Callable[[Rows, int, int, float], None]) -> Hurt:
    def hurt(rows: Rows, j: int, k: int, sd: float) -> Rows:
        out = rows.copy()
        change(out, j, k, sd)
        return out

    return hurt


def _set(out: Rows, j: int | list[int], values: Any) -> None:
    out[:, j] = values


def _outlier(out: Rows, j: int, _k: int, sd: float) -> None:
    out[:, j] += sd
    out[0, j] = 1e6


def _gone(out: Rows, j: int, _k: int, _sd: float) -> None:
    out[:: len(out) // (len(out) // 20), j] = np.nan


FAULTS: Final[dict[str, Hurt]] = {
    "nothing": _copy(lambda _out, _j, _k, _sd: None),
    "unit error × 1000": _copy(lambda out, j, _k, _sd: _set(out, j, out[:, j] * 1_000)),
    "stuck sensor": _copy(lambda out, j, _k, _sd: _set(out, j, np.median(out[:, j]))),
    "two columns swapped": _copy(lambda out, j, k, _sd: _set(out, [j, k], out[:, [k, j]])),
    "5 % missing": _copy(_gone),
    "+1 sd": _copy(lambda out, j, _k, sd: _set(out, j, out[:, j] + sd)),
    "+1 sd, and one value of 1e6": _copy(_outlier),
    "+0.25 sd": _copy(lambda out, j, _k, sd: _set(out, j, out[:, j] + sd / 4)),
}


def measure(bench: Bench) -> dict[str, Any]:
    """Per dataset and fault: how often it is seen in the first window, and what is said; then streams in time."""
    found, streams = [], []
    for number, data in enumerate(datasets(bench)):
        rng = np.random.default_rng([31, number])
        found.append(_dataset(data, rng, bench.sizes.trials))
        print(f"  {data.name}: {[(f['fault'], f['seen']) for f in found[-1]['faults']]}", flush=True)
        if data.later is not None:
            streams.append(_stream(data, bench.sizes.trials * 5))
            print(f"  {streams[-1]}", flush=True)
    return {"datasets": found, "streams": streams}


def _dataset(data: Dataset, rng: np.random.Generator, trials: int) -> dict[str, Any]:
    distinct = np.array([len(np.unique(column)) for column in data.rows.T])
    j, k = (int(i) for i in np.argsort(-distinct, kind="stable")[:2])
    others = dict.fromkeys(("PSI > 0.1", "Evidently's default, rewritten"), 0)
    told: dict[str, dict[str, Any]] = {}
    natural = {data.what_changed: None} if data.changed is not None else {}
    for _ in range(trials):
        order = rng.permutation(len(data.rows))
        held = min(REFERENCE, (len(order) - ROWS) // ROWS * ROWS)
        reference, window = data.rows[order[:held]], data.rows[order[held : held + ROWS]]
        profile = reference_profile(reference, list(data.columns))
        sd = float(reference[:, j].std())
        for rule in others:
            others[rule] += bool(REWRITTEN[rule](window[None], reference).any())
        for fault in (*FAULTS, *natural):
            hurt = FAULTS[fault](window, j, k, sd) if fault in FAULTS else _natural(data, window, rng)
            seen, named, said = _judged(profile, hurt, (data.columns[j], data.columns[k]))
            entry = told.setdefault(fault, {"fault": fault, "seen": 0, "named": 0, "said": ""})
            entry["seen"] += seen
            entry["named"] += named
            entry["said"] = entry["said"] or (said if seen else "")
    faults = [
        {
            **entry,
            "seen": entry["seen"] / trials,
            "named": entry["named"] / trials if entry["fault"] in FAULTS else None,
        }
        for entry in told.values()
    ]
    return {
        "name": data.name, "source": data.source, "rows": len(data.rows), "features": len(data.columns),
        "hurt": data.columns[j], "swapped_with": data.columns[k], "windows": trials, "faults": faults,
        "others": {rule: hits / trials for rule, hits in others.items()},
    }  # fmt: skip


def _natural(data: Dataset, window: Rows, rng: np.random.Generator) -> Rows:
    """Rows after the set's own change; where it is one of single rows, as many as the whole set has."""
    assert data.changed is not None
    few = len(data.changed) < len(data.rows) / 5
    n = max(1, round(ROWS * len(data.changed) / (len(data.changed) + len(data.rows)))) if few else ROWS
    changed = data.changed[rng.choice(len(data.changed), n, replace=False)]
    return np.concatenate([window[: ROWS - n], changed])


def _judged(profile: ReferenceProfile, rows: Rows, hurt: tuple[str, str]) -> tuple[bool, bool, str]:
    """Whether it is seen, whether the hurt feature is the one that is named first, and the sentence."""
    tally = Tally(profile)
    tally.count(rows, np.full(len(rows), -1), np.full(len(rows), np.nan, dtype=np.float32))
    window, extremes = tally.take()
    hard = FaultFinder(profile).find(window, extremes)
    if hard:
        names = [profile.features[f.feature].name for f in hard]
        said = "; ".join(f"{profile.features[f.feature].name}: {f.kind} ({f.rate:.0%} of rows)" for f in hard[:2])
        return True, names[0] in hurt, f"On the device: {said}."
    settings = DriftSettings()
    verdict = judge_stream(profile, [window], 0, settings)
    sentences = [s for s in explain("pump-7", verdict, settings)[1:] if not s.startswith(("The budget", "Nothing"))]
    first = verdict.evidence[0].name if verdict.evidence else ""
    first = verdict.quality[0].name if verdict.quality else first
    return bool(verdict.alarms), bool(verdict.alarms) and first in hurt, sentences[0] if sentences else ""


def _stream(data: Dataset, most: int) -> dict[str, Any]:
    """A stream in time: the alarms of its windows, what they name, and what labels say."""
    assert data.later is not None
    start = len(data.rows)
    wrong = data.predicted != data.truth
    profile = reference_profile(data.rows[:REFERENCE], list(data.columns))
    settings = DriftSettings()
    memory: Memory | None = None
    windows: list[WindowCounts] = []
    labels: list[Labelled] = []
    verdicts: list[Verdict] = []
    tally = Tally(profile)
    for w in range(min(most, len(data.later) // _STREAM)):
        rows = data.later[w * _STREAM : (w + 1) * _STREAM]
        tally.count(rows, np.full(len(rows), -1), np.full(len(rows), np.nan, dtype=np.float32))
        windows.append(tally.take()[0])
        kept = windows[-settings.history :]
        at = start + w * _STREAM
        labels.append(Labelled(w, _STREAM, int(wrong[at : at + _STREAM].sum())))
        verdict, memory = watch_stream(profile, kept, w + 1 - len(kept), settings, memory, data.name)
        verdicts.append(verdict)
    errors, known = int(wrong[:start].sum()), start
    performance = judge_errors(labels, errors, known, settings)
    alarmed = [v for v in verdicts if v.alarms]
    critical = [v for v in verdicts if v.level == "critical"]
    names = sorted({a.name for v in alarmed for a in v.alarms})
    return {
        "name": data.name, "windows": len(verdicts), "rows": _STREAM, "warnings": len(alarmed),
        "critical": len(critical), "names": names,
        "said": explain("census", critical[0] if critical else alarmed[0], settings)[1] if alarmed else "",
        "error_rate": None if performance is None else performance.rate,
        "expected_rate": None if performance is None else performance.expected,
        "worse": performance is not None and performance.alarm,
    }  # fmt: skip
