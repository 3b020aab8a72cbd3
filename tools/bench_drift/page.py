"""Bench drift: the figures as a page. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from .bars import Bar, bars
from .bench import YEAR
from .figures import Figures
from .reasons import reasons
from .rows import QUIET, SHIFTS
from .streams import INDEPENDENT

COMMAND: Final = "make bench-drift"
Row = tuple[str, ...]


def plain(parts: dict[str, Any], machine: str, *, quick: bool) -> dict[str, Any]:
    """docs/benchmarks/drift.json."""
    kept = {name: {**told, "found": _without_values(told["found"])} for name, told in parts.items()}
    return {
        "command": COMMAND,
        "machine": machine,
        "quick": quick,
        "bars": [bar.plain() for bar in bars(parts)],
        "parts": kept,
    }


def page(parts: dict[str, Any], machine: str, *, quick: bool) -> str:
    """docs/benchmarks/drift.md."""
    f = Figures(parts)
    found = bars(parts)
    missed = reasons(f, [bar for bar in found if not bar.holds])
    sections = [
        _HEAD.format(command=COMMAND, machine=machine),
        _QUICK if quick else "",
        _mixed(parts),
        _table(("Figure", "Found", "Limit", ""), [_bar(bar) for bar in found]),
        "Missed, and why:\n\n" + "\n".join(f"* {reason}" for reason in missed) if missed else "",
        _QUIET,
        _table(_QUIET_HEAD, _quiet(f)),
        _WEEKS,
        _table(_WEEKS_HEAD, _weeks(f)),
        _OTHERS,
        "![Hours of a year with a false alarm, by tool](drift-false-alarms.svg)\n",
        _table(_ALARMS_HEAD, _alarms(f)),
        _agreement(f),
        _COSTS,
        _table(_COSTS_HEAD, _costs(f)),
        _DELAYS,
        "![Hours until a shift is a warning](drift-delays.svg)\n",
        _table(("One feature of 30", "Floor", "w²", "Warning, h", "Critical, h"), _delays(f)),
        _JOINT,
        _table(("Change", "Rows", "Histograms", "D²", "Pairs", "Columns named"), _joint(f)),
        _FLEETS,
        _table(("Rule", "Offsets, sd", "False alarms a month", *_fleet_shifts(f)), _fleets(f)),
        _COMMON.format(looks=(f.part("common_shift") or {}).get("looks", 0)),
        _table(("Common to all devices", "Fleet-years", "False alarms a fleet-year"), _common_quiet(f)),
        "\n",
        _table(("Shift of all devices", "Looks until the alarm", "at floor 0.001"), _common_delays(f)),
        _LABELS.format(false=_labels_false(f)),
        _table(("Error rate, of 0.10", "Labels until critical"), _labels(f)),
        _RESIDUALS,
        _table(("Residuals", "Labels until critical"), _moved(f)),
        _table(("Residuals to which nothing happens", "Device-years", "False alarms", "Without φ"), _still(f)),
        _REAL,
        *_real(f),
        _COST,
        _table(("What", "Found"), _cost(f)),
        _LIMITS,
        _table(("Part", "Measured", "Revision", "CPU, s"), _runs(parts)),
    ]
    return "\n".join(part.strip("\n") + "\n" for part in sections if part)


def _mixed(parts: dict[str, Any]) -> str:
    """That the parts are not of one revision, where they aren't."""
    revisions = {told["revision"] for told in parts.values()}
    if len(revisions) < 2:
        return ""
    return (
        f"The parts of this page are of {len(revisions)} revisions of one development; `-dirty` is not all committed.\n"
    )


def _without_values(found: Any) -> Any:
    """Without the numbers that only served to check the rewritten rule."""
    if not isinstance(found, dict) or "tools" not in found:
        return found
    return {
        **found,
        "tools": {t: {k: v for k, v in told.items() if k != "values"} for t, told in found["tools"].items()},
    }


def _bar(bar: Bar) -> Row:
    return bar.name, bar.shown, bar.shown_limit, "holds" if bar.holds else "**missed**"


_QUIET_HEAD: Final = ("Rows", "Floor", "Device-years", "Bare", "Warnings", "Record", "Critical", "at most")


def _quiet(f: Figures) -> Iterable[Row]:
    for q in f.part("quiet") or ():
        alarms = (f"{q[name]:,.2f}" for name in ("warnings", "records", "criticals", "at_most"))
        yield q["nature"], f"{q['floor']:g}", f"{q['years']:g}", f"{q['bare']:,.1f}", *alarms


_WEEKS_HEAD: Final = (
    "Rows", "`drift_warm_up`", "Devices", "Warnings, weeks 1 to 3", "Critical, 1 to 3", "Warnings, 4 to 6",
    "Critical, 4 to 6",
)  # fmt: skip


def _weeks(f: Figures) -> Iterable[Row]:
    for told in f.part("weeks") or ():
        alarms = (f"{told[name][late]:.2f}" for late in (0, 1) for name in ("warnings", "criticals"))
        yield told["course"], str(told["warm_up"]), str(told["devices"]), *alarms


_ALARMS_HEAD: Final = ("Tool", *QUIET, *SHIFTS)


def _alarms(f: Figures) -> Iterable[Row]:
    for tool, told in f.tools().items():
        if "why_not" in told:
            yield tool, f"not run: {told['why_not'][:80]}", *([""] * (len(QUIET) + len(SHIFTS) - 1))
            continue
        rates = (_rate(told["alarms"][name]) for name in QUIET)
        yield tool, *rates, *(_hours(told["delays"][name], told["delay_hours"]) for name in SHIFTS)


def _rate(told: dict[str, Any]) -> str:
    year = YEAR * told["alarming_hours"] / told["hours"]
    return f"{year:,.0f} ({told['alarming_hours']} of {told['hours']})"


def _hours(value: float | None, most: float) -> str:
    return f"> {most:g}" if value is None else f"{value:g}"


def _agreement(f: Figures) -> str:
    told = (f.part("peers") or {}).get("agreement")
    if not told:
        return ""
    return (
        f"Evidently takes seconds an hour, so most of its hours went through its rule as we wrote it anew. On the "
        f"{told['windows']} windows that the package itself was shown, {told['same']} of {told['verdicts']} verdicts "
        f"are the same, and its distances differ from ours by at most {told['largest_difference']:.1e}.\n"
    )


_COSTS_HEAD: Final = ("Tool", "CPU, ms per 1,000 rows", "Bytes", "of what", "RSS, MB", "after import", "Installed, MB")


def _costs(f: Figures) -> Iterable[Row]:
    cost = f.part("cost") or {}
    for tool, told in f.tools().items():
        if "ms_per_1000_rows" not in told:
            continue
        if tool == "Lightship":
            payload = cost.get("payload", {}).get("200", math.nan)
            rss = tuple(f"{cost.get(name, math.nan):.0f}" for name in ("resident_mb", "after_import_mb"))
            size = f"{cost.get('installed_mb', math.nan):,.0f}"
            yield tool, f"{told['ms_per_1000_rows']:.2f}", f"{payload:,.0f}", "the counts that are sent", *rss, size
        elif "install_mb" in told:
            rss = tuple(f"{told[name]:.0f}" for name in ("resident_mb", "after_import_mb"))
            size = f"{told['install_mb']:,.0f} ({told['packages']} packages)"
            yield tool, f"{told['ms_per_1000_rows']:,.1f}", f"{told['bytes']:,}", told["note"], *rss, size
        else:
            yield tool, f"{told['ms_per_1000_rows']:.2f}", "", "", "", "", ""


def _delays(f: Figures) -> Iterable[Row]:
    for d in f.part("delays") or ():
        times = (_quantiles(d[name], d[f"{name}_90"]) for name in ("warning", "critical"))
        yield d["shift"], f"{d['floor']:g}", f"{d['effect']:.3f}", *times


def _quantiles(median: float | None, late: float | None) -> str:
    return "–" if median is None else f"{median:g} [{'–' if late is None else f'{late:g}'}]"


def _joint(f: Figures) -> Iterable[Row]:
    for j in f.part("joint") or ():
        shares = (f"{j[name]:.2f}" for name in ("histograms", "distance", "pairs"))
        yield j["change"], f"{j['rows']:,}", *shares, "" if j["named"] is None else f"{j['named']:.2f}"


def _fleet_shifts(f: Figures) -> Row:
    found = f.part("fleets")
    return tuple(found[0]["delays"]) if found else ()


def _fleets(f: Figures) -> Iterable[Row]:
    for told in f.part("fleets") or ():
        delays = (_hours(v, 72) for v in told["delays"].values())
        yield told["rule"], f"{told['offset']:g}", f"{told['false_alarms']:,.2f}", *delays


def _common_quiet(f: Figures) -> Iterable[Row]:
    for told in (f.part("common_shift") or {"quiet": ()})["quiet"]:
        yield told["nature"], f"{told['years']:,.0f}", f"{told['alarms']:.2f}"


def _common_delays(f: Figures) -> Iterable[Row]:
    found = f.part("common_shift") or {"delays": {}, "default": {}}
    for shift, looks in found["delays"].items():
        yield shift, _hours(found["default"][shift], 200), _hours(looks, 200)


def _labels(f: Figures) -> Iterable[Row]:
    for d in (f.part("labels") or {"delays": ()})["delays"]:
        yield f"{d['rate']:.2f}", "–" if d["labels"] is None else f"{d['labels']:,.0f}"


def _moved(f: Figures) -> Iterable[Row]:
    for r in (f.part("labels") or {}).get("residuals", ()):
        yield r["change"], "–" if r["labels"] is None else f"{r['labels']:,.0f}"


def _still(f: Figures) -> Iterable[Row]:
    for r in (f.part("labels") or {}).get("residuals_quiet", ()):
        yield r["nature"], f"{r['years']:g}", f"{r['false_alarms']:,.2f}", f"{r['without_phi']:,.2f}"


def _labels_false(f: Figures) -> str:
    told = f.part("labels")
    return "not measured" if told is None else f"{told['false_alarms']:.2f} in {told['years']} device-years"


def _real(f: Figures) -> Iterable[str]:
    found = f.part("real")
    if not found:
        return
    sets = found["datasets"]
    names = list(dict.fromkeys(fault["fault"] for data in sets for fault in data["faults"]))
    head = ("Dataset", "Rows × features", "Hurt", *names)
    rows = []
    for data in sets:
        seen = {fault["fault"]: fault for fault in data["faults"]}
        size = f"{data['rows']:,} × {data['features']}"
        rows.append((f"{data['name']} ({data['source']})", size, data["hurt"], *(_seen(seen.get(n)) for n in names)))
    yield _table(head, rows)
    yield _RIVALS
    rules = list(sets[0]["others"])
    yield _table(
        ("Dataset", "Lightship", *rules),
        [(d["name"], _false(d), *(f"{d['others'][rule]:.2f}" for rule in rules)) for d in sets],
    )
    yield "What was said, the first time that it was seen:\n"
    yield "\n".join(
        f"* {data['name']}, {fault['fault']}: {fault['said']}" for data in sets for fault in data["faults"]
        if fault["said"] and fault["fault"] != "nothing"
    ) + "\n"  # fmt: skip
    for stream in found["streams"]:
        yield _stream(stream)


def _seen(fault: dict[str, Any] | None) -> str:
    if fault is None:
        return ""
    named = "" if fault["named"] is None or fault["fault"] == "nothing" else f", named {fault['named']:.2f}"
    return f"{fault['seen']:.2f}{named}"


def _false(data: dict[str, Any]) -> str:
    return f"{next(fault['seen'] for fault in data['faults'] if fault['fault'] == 'nothing'):.2f}"


def _stream(told: dict[str, Any]) -> str:
    names = f", of {', '.join(told['names'][:6])}" if told["names"] else ""
    errors = (
        f"Labels: {told['error_rate']:.1%} wrong, {told['expected_rate']:.1%} were expected"
        f"{'; the model has become worse' if told['worse'] else '; no alarm'}."
    )
    said = f" The first sentence: {told['said']}" if told["said"] else ""
    return (
        f"{told['name']}, in the order of time, {told['windows']} windows of {told['rows']:,} rows after training: "
        f"{told['warnings']} windows warn and {told['critical']} are critical{names}. {errors}{said}\n"
    )


def _cost(f: Figures) -> Iterable[Row]:
    told = f.part("cost")
    if not told:
        return
    for rows, size in told["payload"].items():
        yield f"bytes sent for a window of {int(rows):,} rows of 30 features", f"{size:,}"
    for name, words, digits in _COST_ROWS:
        yield words, f"{told[name]:,.{digits}f}"


_COST_ROWS: Final = (
    ("ms_per_1000_rows_bins", "ms of CPU per 1,000 rows × 30, bins alone", 2),
    ("ms_per_1000_rows", "ms of CPU per 1,000 rows × 30, everything that is counted", 2),
    ("us_per_row_hot_path", "µs of CPU per row that serving waits for", 2),
    ("device_state_bytes", "bytes of state on the device", 0),
    ("ms_per_evaluation", "ms of CPU per window judged, in the control plane", 2),
    ("counting_adds_own_mb", "MB of memory of its own that counting adds to a process with numpy", 2),
    (
        "counting_adds_resident_mb",
        "MB of resident memory that it adds, numpy's code that it is first to use included",
        2,
    ),
    ("memory_bytes", "bytes remembered per device and bundle there", 0),
    ("ms_to_merge_1000", "ms to merge 1,000 windows, as messages", 1),
    ("ms_to_add_1000_as_arrays", "ms to merge 1,000 windows, as arrays", 2),
)


def _runs(parts: dict[str, Any]) -> Iterable[Row]:
    for name, told in parts.items():
        spent = told["cpu_seconds"]
        yield name, told["at"], told["revision"], "not noted" if spent is None else f"{spent:,.0f}"


def _table(head: Row, rows: Iterable[Sequence[str]]) -> str:
    lines = [head, tuple("---" if n == 0 else "---:" for n in range(len(head))), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


_HEAD: Final = """
# Drift alarms: how often false, how soon true

Written by `{command}` on {machine}; nobody edits it. A window is an hour of 200 rows, the reference 10,000 rows, a
device has 30 features, the budget is one false alarm per device-year. The product's own code decides; seeds are fixed.
Parts are kept in `build/bench-drift`, each with its time and revision (at the end): `ONLY=part` measures one again,
`AGAIN=1` all, `QUICK=1` a little of everything.
"""
_QUICK: Final = "**A quick run: it shows that everything works, and no more.**\n"
_QUIET: Final = """
## False alarms

Nothing happens in these streams. Per device-year: tests of single windows beyond the uncalibrated line (bare);
warnings of the calibrated ladder; alarms of record; and critical ones, for which ladder, record and floor must agree.
It is the whole rule from a device's first hour on, warm-up and the comparison by hour of the week included. Tests that
follow each other closely are one alarm, as they are one event for the operator. At most: what the criticals seen are
compatible with, at 99 %.
"""
_WEEKS: Final = """
### First weeks of a strong cycle

Days and weeks may have a course that nobody has told anyone; the training data are of whole weeks, nothing happens, and
devices are switched on at some hour of the week. Alarms per device, not per year: while its season can't be known (two
weeks at the least), and after. Until a device's own windows are enough (`drift_warm_up`), a shift that is only seen
again stays a warning where windows are of different hours. Where weekends are another world, 336 it should be.
"""
_OTHERS: Final = f"""
## The same rows, through other tools

Hour after hour of 200 rows of 30 features, with each tool's defaults: hours with an alarm of any feature, of a year's
{YEAR:,} (in brackets: seen, of how many shown). Then the median hours until one shifted feature alarms; who alarms all
the time sees everything at once. Packages run in environments of their own; the rules without a size in the next table
are written anew. Lightship's are warnings at its default floor, 0.02: a shift of 0.14 sd is tolerated for ever.
"""
_COSTS: Final = """
What that costs: CPU for 1,000 rows of 30 features; what must be sent or kept for one hour; memory of the process after
the run and after the import; and what is installed. Lightship's is the agent's own environment, which serves as well;
its memory after the run has the making of the reference's profile in it, which is no work of a device.
"""
_DELAYS: Final = """
## Delays

Hours until a warning, and until critical: median [90 %], after two weeks of healthy windows of the device's own. A
dash: not within 200 hours (512 for missing rates); at or below the floor that is by design.
"""
_JOINT: Final = """
## Joint drift

Shares of single windows in which a change is seen, at p < 1e-6, that no feature shows alone: by the histograms of the
features, by that of D², and by the correlations of all pairs. In columns exchanged: how often both are named.
"""
_FLEETS: Final = """
## Fleets

A hundred devices, with offsets of their own or none; levels are shared out over 30 features and a year's hours. Pooled
counts against training, devices paired with their own past (Hotelling's T²), and the count of devices with small
p-values, which sees what few share. Hours until seen.
"""
_COMMON: Final = """
### All devices together, as an alarm

The paired test as the product uses it: measured by the {looks} looks before, with the alarm of record and a floor of
its own (0.005 by default, a shift of 0.07 sd). A hundred devices, thirty features, a look an hour. What moves all
devices at once and is no drift: nights, a mean that every hour draws anew, and one that lasts.
"""
_LABELS: Final = """
## Errors, by labels

A hundred labels an hour; 10 % of 10,000 held-out rows were wrong, and one point more is tolerated. False alarms per
device-year: {false}.
"""
_RESIDUALS: Final = """
A regressor's, 50 labels an hour, 2,000 held-out rows of their own law. Errors beyond what nine in ten held-out rows
were off, residuals moved up or down, and spread wider share labels' tenth of the budget. Below, false alarms per
device-year of all four; φ is how much more windows differ than chance has it, by which evidence is divided.
"""
_REAL: Final = """
## Real rows

What packages carry with them. Windows of 200 rows that the reference has not seen; one feature is hurt (the one with
the most distinct values; exchanged with the next). Shares of first windows in which it is seen, and in which the
feature that is named first is the one that was hurt. A single window, without a history, at the default floor.
"""
_RIVALS: Final = """
Shares of windows in which nothing happened that alarm all the same:
"""
_COST: Final = """
## Cost
"""
_LIMITS: Final = f"""
## What this does not show

Simulated natures are normal, and one at a time; {INDEPENDENT} rows with a persistent effect too weak for two weeks to
show are tolerated by the floor, and cost some warnings a year where the floor is 0. Nothing was measured on ARM. CPU is
that of a shared machine, and good for comparisons only. In the table of rules the paired test is bare: on
fleets with a season it needs what the alarm has.
"""
