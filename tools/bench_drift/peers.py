"""Bench drift: the same rows through other tools, in environments of their own, and through ours.

Rules: a tool sees hour after hour of 200 rows of 30 features, with its defaults; an alarm of an hour is one of any
feature. A shift is seen when its own feature alarms, also by mistake: who alarms all the time sees everything at once.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from lightship.data.profile import reference_profile
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.replay import Replayed, replay
from lightship_agent.monitor.tally import Tally

from .bench import FEATURES, Bench
from .quiet import events
from .rows import HEALTHY, HOURS, QUIET, SHIFTS, write
from .rules import REWRITTEN, counts, wasserstein
from .venvs import environment

_OTHERS: Final = Path(__file__).with_name("others")
#: Title, environment, program, hours of quiet streams, arguments.
TOOLS: Final = (
    ("river ADWIN", "river", "river_rows", 72, ("ADWIN",)),
    ("river PageHinkley", "river", "river_rows", 72, ("PageHinkley",)),
    ("river KSWIN", "river", "river_rows", 4, ("KSWIN",)),
    ("Alibi Detect KSDrift", "alibi", "alibi_rows", 72, ()),
    ("NannyML univariate", "nannyml", "nannyml_rows", 72, ()),
    ("Evidently DataDriftPreset", "evidently", "evidently_rows", 1, ()),
)
_OURS: Final = "Lightship"


def measure(bench: Bench) -> dict[str, Any]:
    """Per tool: alarms, delays, cost."""
    rows = bench.folder / f"rows-{bench.sizes.quiet_hours}"
    write(bench, rows)
    found: dict[str, Any] = {_OURS: _ours(rows)}
    for title, judge in REWRITTEN.items():
        found[title] = _rewritten(rows, judge)
    for title, name, program, hours, arguments in TOOLS:
        print(f"  {title}", flush=True)
        found[title] = _other(bench, rows, name, program, min(hours, bench.sizes.quiet_hours), arguments)
    return {"tools": found, "agreement": _agreement(rows, found)}


def _other(bench: Bench, rows: Path, name: str, program: str, hours: int, arguments: tuple[str, ...]) -> dict[str, Any]:
    there = environment(bench.folder / "environments", name)
    if there.why_not:
        return {"why_not": there.why_not}
    out = rows / f"{program}-{hours}-{'-'.join(arguments)}.json"
    command = [str(there.python), "-W", "ignore", str(_OTHERS / f"{program}.py"), str(rows), str(hours), str(out)]
    if bench.again or not out.exists():
        done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True, timeout=3_600)
        if done.returncode:
            return {"why_not": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]}
    told: dict[str, Any] = json.loads(out.read_text())
    return {**told, "install_mb": round(there.size_mb(), 1), "packages": there.distributions()}


def _agreement(rows: Path, found: dict[str, Any]) -> dict[str, Any] | None:
    """How near the rewritten Evidently comes to the package's numbers, on the windows that it was given."""
    told = found["Evidently DataDriftPreset"]
    values = np.array(told.get("values") or [])
    if not len(values):
        return None
    hours = told["alarms"][QUIET[0]]["hours"]
    reference = np.load(rows / "reference.npy")
    names = [*QUIET, *(f"drift {name}" for name in sorted(SHIFTS, key=lambda n: f"drift {n}.npy"))]
    ours = np.concatenate([wasserstein(np.load(rows / f"{name}.npy")[:hours], reference) for name in names])
    return {
        "windows": len(values),
        "largest_difference": float(np.abs(ours - values).max()),
        "verdicts": int(values.size),
        "same": int(((ours >= 0.1) == (values >= 0.1)).sum()),
    }


def _rewritten(rows: Path, judge: Any) -> dict[str, Any]:
    reference = np.load(rows / "reference.npy")
    alarms, spent, shown = {}, 0.0, 0
    for name in QUIET:
        hours = np.load(rows / f"{name}.npy")
        began = time.process_time()
        said = judge(hours, reference)
        spent, shown = spent + time.process_time() - began, shown + hours.shape[0] * hours.shape[1]
        alarms[name] = {
            "hours": len(hours), "alarming_hours": int(said.any(axis=1).sum()), "alarms": int(said.sum()),
            "half": int((said.mean(axis=1) >= 0.5).sum()),
        }  # fmt: skip
    delays = {}
    for name in SHIFTS:
        said = judge(np.load(rows / f"drift {name}.npy"), reference)
        first = np.where(said.any(axis=0), said.argmax(axis=0) + 1.0, np.inf)
        delays[name] = _median(first)
    return {"alarms": alarms, "delays": delays, "delay_hours": HOURS, "ms_per_1000_rows": 1e6 * spent / shown}


def _ours(rows: Path) -> dict[str, Any]:
    reference = np.load(rows / "reference.npy")
    settings = DriftSettings()
    alarms = {}
    for name in QUIET:
        now, past = counts(np.load(rows / f"{name}.npy"), reference)
        run = replay(now, past, settings, per_device=FEATURES, key=name, recalibrate=4)
        alarms[name] = {"hours": len(now), **_called(run)}
    healthy, past = counts(np.load(rows / "healthy.npy"), reference)
    delays, critical = {}, {}
    onset = HEALTHY + np.arange(FEATURES)  # so that a shift begins anywhere within a block
    for name in SHIFTS:
        after, _ = counts(np.load(rows / f"drift {name}.npy"), reference)
        streams = [np.concatenate([healthy[: onset[j], j], after[:, j]])[: HEALTHY + HOURS] for j in range(FEATURES)]
        run = replay(np.stack(streams, axis=1), past, settings, per_device=1, budget_streams=FEATURES, recalibrate=8)
        delays[name], critical[name] = (_first(hits, onset) for hits in (run.warnings, run.criticals))
    return {"alarms": alarms, "delays": delays, "critical": critical, "delay_hours": HOURS, **_device(reference)}


def _called(run: Replayed) -> dict[str, int]:
    return {
        "alarming_hours": len({hit.window for hit in run.warnings}),
        "alarms": len(run.warnings),
        "events": events(run.warnings, FEATURES),
        "critical": events(run.criticals, FEATURES),
    }


def _first(hits: list[Any], onset: Any) -> float | None:
    first = np.full(FEATURES, np.inf)
    for hit in hits:
        if hit.window >= onset[hit.stream]:
            first[hit.stream] = min(first[hit.stream], hit.window - onset[hit.stream] + 1)
    return _median(first)


def _median(first: Any) -> float | None:
    found = float(np.quantile(first, 0.5, method="higher"))
    return found if np.isfinite(found) else None


def _device(reference: Any) -> dict[str, Any]:
    """What counting costs the device; installed size, memory and bytes are those of the part `cost`."""
    tally = Tally(reference_profile(reference, [f"f{i}" for i in range(FEATURES)]))
    labels, tops = np.full(1_000, -1), np.full(1_000, np.nan, dtype=np.float32)
    spent = []
    for _ in range(20):
        began = time.process_time()
        tally.count(reference[:1_000], labels, tops)
        spent.append(1e3 * (time.process_time() - began))
    return {"ms_per_1000_rows": float(np.median(spent)), "state_bytes": tally.state_bytes}
