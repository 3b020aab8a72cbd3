"""CLI: a device's recent past as rows of small bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from lightship.settings import Settings

from .console import say, table

_UNITS = {"latency_p50_ms": "ms", "latency_p99_ms": "ms", "temperature_c": "°C", "memory_mb": "MB", "cpu_percent": "%"}
_FIRST = ("requests", "errors", "latency_p50_ms", "latency_p99_ms", "drift", "temperature_c", "memory_mb")


def recent_of(
    home: Path, settings: Settings, device: str, windows: list[dict[str, Any]], hours: float
) -> dict[str, Any]:
    """The columns as plain data; no reports where there is no history."""
    from lightship.monitoring.history import open_history
    from lightship.monitoring.recent import recent
    from lightship.storage.audit import now_ms

    until = now_ms()
    since = until - int(hours * 3_600_000)
    drift = [(w["at"], w["psi"]) for w in windows]
    kept = settings.history != "off" and (settings.history or (home / "telemetry.db").exists())
    if not kept:
        return msgspec.to_builtins(recent((), since, until, drift=drift))  # type: ignore[no-any-return]
    history = open_history(home, settings.history)
    try:
        found = recent(history.read(since, until, device), since, until, drift=drift)
    finally:
        history.close()
    return msgspec.to_builtins(found)  # type: ignore[no-any-return]


def say_recent(found: dict[str, Any]) -> None:
    """The rows as bars, with the last, the least and the greatest."""
    from lightship.monitoring.recent import sparkline

    rows = found["rows"]
    names = [n for n in (*_FIRST, *sorted(set(rows) - set(_FIRST))) if any(v is not None for v in rows.get(n, ()))]
    hours = (found["until"] - found["since"]) / 3_600_000
    if not names:
        say(f"No reports of the last {hours:g} h are kept here.")
        return
    cells = []
    for name in names:
        known = [v for v in rows[name] if v is not None]
        cells.append((name, sparkline(rows[name]), known[-1], min(known), max(known), _UNITS.get(name, "")))
    title = f"The last {hours:g} h, {found['seconds'] / 60:g} min a column"
    table(title, ("", "", "last", "least", "most", "unit"), cells)


def say_numbers(facts: dict[str, Any]) -> None:
    """Errors by code, and the numbers of the application."""
    errors = sorted(facts["errors"].items(), key=lambda item: (-item[1], item[0]))
    if errors:
        table("Errors since the agent began", ("code", "requests"), errors)
    app = facts["app"]
    cells = [(n, "counter", v) for n, v in sorted(app.get("counters", {}).items())]
    cells += [(n, "gauge", v) for n, v in sorted(app.get("gauges", {}).items())]
    for name, h in sorted(app.get("histograms", {}).items()):
        count = sum(h["counts"])
        cells.append((name, "histogram", f"{count} values, mean {h['sum'] / count:.4g}" if count else "0 values"))
    if cells:
        table("Numbers of its application", ("name", "kind", "value"), cells)
