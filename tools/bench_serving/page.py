"""Bench serving: the figures as docs/benchmarks/serving.md and serving.json. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from . import models
from .bars import Bar, bars
from .figures import Figures
from .kept import about, kept
from .reasons import reasons
from .speed import CONCURRENCIES, TITLES
from .stats import Spread

COMMAND: Final = "make bench-serving"
_KEPT: Final = ("sizes", "speed", "watched", "memory", "starts", "updates", "swaps", "together", "soak")
Row = tuple[str, ...]


def plain(figures: Figures) -> dict[str, Any]:
    """For serving.json."""
    parts = figures.parts
    return {
        "command": COMMAND,
        "machine": figures.machine,
        "quick": figures.quick,
        "measured": {name: about(parts[name]) for name in parts},
        "predictions": _predictions(figures),
        "paced": [
            {"who": who, "model": model, "cpu_us": figures.paced(who, model)}
            for who in figures.servers() for model in ("hgb", "rf") if figures.paced(who, model) is not None
        ],
        "in_process": {
            name: {what: _two(figures.inside(what, name)) for what in ("run", "bound", "face")} for name in models.NAMES
        },
        "many_rows": {
            name: {how: figures.many(how, name) for how in ("json", "binary", "run")} for name in models.NAMES
        },
        "absent": (figures.part("speed") or {}).get("absent", {}),
        "versions": (figures.part("speed") or {}).get("versions", {}),
        "bars": [bar.plain() for bar in bars(figures)],
        **{name: kept(name, parts[name]["found"]) if name in parts else None for name in _KEPT},
    }  # fmt: skip


def _predictions(figures: Figures) -> list[dict[str, Any]]:
    asked = [("hgb", c) for c in CONCURRENCIES] + [(name, 1) for name in models.NAMES if name != "hgb"]
    found = []
    for who in figures.servers():
        for model, c in asked:
            of = {figure: figures.burst(who, figure, model, c) for figure in ("p50", "p90", "p99", "cpu", "rate")}
            if of["cpu"] is not None:
                found.append({"who": who, "model": model, "c": c, **{k: _two(v) for k, v in of.items()}})
    return found


def _two(of: Spread | None) -> dict[str, float] | None:
    return None if of is None else {"median": round(of.median, 3), "best": round(of.best, 3)}


def page(figures: Figures) -> str:
    """docs/benchmarks/serving.md."""
    found = bars(figures)
    missed = [bar for bar in found if not bar.holds]
    pieces = [
        _INTRODUCTION.format(command=COMMAND, machine=figures.machine),
        _when(figures),
        f"{len(found) - len(missed)} of {len(found)} bars hold.\n",
        _table(("Figure", "Found", "Limit", ""), [_bar(bar) for bar in found]),
        _ONE,
        _PICTURE,
        _table(_ONE_HEAD, _ranked(figures, lambda who: _one(figures, who))),
        _absent(figures),
        _READING_ONE,
        _table(_LOAD_HEAD, _ranked(figures, lambda who: _load(figures, who))),
        _OTHERS,
        _table(_OTHER_HEAD, _ranked(figures, lambda who: _other(figures, who))),
        _INSIDE,
        _table(("Model", "session.run", "bound memory", "in-process face", "of session.run"), _inside(figures)),
        _PACED,
        _table(("Server", "gradient boosting", "forest"), _ranked(figures, lambda who: _paced(figures, who))),
        _MANY,
        _table(("Model", "JSON", "binary", "session.run alone", "JSON, CPU", "binary, CPU"), _many(figures)),
        _WATCHED,
        _table(("Concurrency", "on, CPU", "off, CPU", "of off"), _watched(figures)),
        _MEMORY,
        _table(("Server", "idle", "after 1,000 requests", "after more", "more", "idle CPU"), _memory(figures)),
        _floors(figures),
        _soak(figures),
        _STARTS,
        _table(("Server", "seconds", "CPU, seconds"), _starts(figures)),
        _table(("Environment", "MB", "distributions"), _sizes(figures)),
        _CHANGES,
        _table(("Load", "p99, quiet", "p99, update", "of quiet", "most, quiet", "most, update"), _updates(figures)),
        _swaps(figures),
        _LOSSES,
        "\n".join(f"* {reason}" for reason in reasons(figures, missed)),
        _LIMITS,
    ]
    return "\n".join(piece.strip("\n") + "\n" for piece in pieces if piece)


def _table(head: Row, rows: Iterable[Row]) -> str:
    lines = [head, tuple("---" if n == 0 else "---:" for n in range(len(head))), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _bar(bar: Bar) -> Row:
    limit = f"{'≥' if bar.at_least else '≤'} {bar.limit:,g}"
    verdict = "holds" if bar.holds else "**not measured**" if bar.value is None else "**missed**"
    return bar.name, _number(bar.value), limit, verdict


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _when(figures: Figures) -> str:
    when = [f"{name} {part['at']} (load {part['load']:.1f})" for name, part in figures.parts.items()]
    quick = " **A quick run: it shows that everything runs, and no more.**" if figures.quick else ""
    return f"Measured, with the machine's load average at the end of each part: {', '.join(when)}.{quick}\n"


def _ranked(figures: Figures, row: Callable[[str], Row | None]) -> list[Row]:
    """A row for everybody who has one, the cheapest in CPU first."""

    def cost(who: str) -> float:
        of = figures.burst(who, "cpu")
        return of.median if of else 0.0

    rows = (row(who) for who in sorted(figures.servers(), key=cost))
    return [r for r in rows if r is not None]


_ONE_HEAD: Final = ("Server", "CPU", "p50", "p90", "p99", "p50, median", "p90, median", "p99, median")


def _one(figures: Figures, who: str) -> Row | None:
    of = {name: figures.burst(who, name) for name in ("cpu", "p50", "p90", "p99")}
    if of["cpu"] is None:
        return None
    best = [_number(s.best) if s else "–" for s in (of["p50"], of["p90"], of["p99"])]
    medians = [_number(s.median) if s else "–" for s in (of["p50"], of["p90"], of["p99"])]
    return (TITLES[who], _number(of["cpu"].median), *best, *medians)


_LOAD_HEAD: Final = (
    "Server", "requests/s, 1", "8", "32", "CPU, 1", "8", "32", "requests per second of CPU, 32",
)  # fmt: skip


def _load(figures: Figures, who: str) -> Row | None:
    rates = [figures.burst(who, "rate", c=c) for c in CONCURRENCIES]
    cpus = [figures.burst(who, "cpu", c=c) for c in CONCURRENCIES]
    if not all(rates) or not all(cpus):
        return None
    last = cpus[-1]
    per_core = 1e6 / last.median if last and last.median else 0.0
    return (TITLES[who], *(_number(s.median if s else None) for s in (*rates, *cpus)), _number(per_core))


_OTHER_HEAD: Final = ("Server", "forest: CPU", "p50", "p99", "network: CPU", "p50", "p99")


def _other(figures: Figures, who: str) -> Row | None:
    cells: list[str] = []
    for model in ("rf", "mlp"):
        cpu, p50, p99 = (figures.burst(who, name, model) for name in ("cpu", "p50", "p99"))
        if cpu is None or p50 is None or p99 is None:
            return None
        cells += [_number(cpu.median), _number(p50.best), _number(p99.best)]
    return (TITLES[who], *cells)


def _absent(figures: Figures) -> str:
    absent = (figures.part("speed") or {}).get("absent", {})
    lines = [f"* {TITLES[who]} is not in this table: {' '.join(why.split())[:300]}" for who, why in absent.items()]
    versions = (figures.part("speed") or {}).get("versions", {})
    told = ", ".join(f"{who} {version}" for who, version in sorted(versions.items()) if version)
    return "\n".join([*lines, f"\nVersions: {told}." if told else ""]).strip() + "\n" if lines or told else ""


def _inside(figures: Figures) -> list[Row]:
    rows: list[Row] = []
    for name in models.NAMES:
        run, bound, face = (figures.inside(what, name) for what in ("run", "bound", "face"))
        if run and bound and face:
            best = (_number(s.best) for s in (run, bound, face))
            rows.append((models.TITLES[name], *best, _number(figures.inside_ratio("face", name))))
    return rows


def _paced(figures: Figures, who: str) -> Row | None:
    cells = [figures.paced(who, model) for model in ("hgb", "rf")]
    # µs a request, a hundred times a second: so many percent of a core.
    return None if None in cells else (TITLES[who], *(f"{(c or 0) / 100:.2f} %" for c in cells))


def _many(figures: Figures) -> list[Row]:
    rows: list[Row] = []
    for name in models.NAMES:
        p50 = [figures.many(how, name) for how in ("json", "binary", "run")]
        cpu = [figures.many(how, name, "cpu") for how in ("json", "binary")]
        if None not in p50:
            rows.append((models.TITLES[name], *map(_number, p50), *map(_number, cpu)))
    return rows


def _watched(figures: Figures) -> list[Row]:
    rows: list[Row] = []
    for c in (1, 32):
        on, off = figures.watched("on", c), figures.watched("off", c)
        if on and off:
            rows.append((str(c), f"{on:.1f}", f"{off:.1f}", f"{on / off:.2f}"))
    return rows


def _memory(figures: Figures) -> list[Row]:
    found = figures.part("memory")
    if found is None:
        return []
    rows: list[Row] = []
    for who, of in [("ours", found["ours"]), *found["peers"].items()]:
        after = f"{of['after']:.1f} MB ({of['requests']:,})"
        grown = f"{of['after'] - of['loaded']:+.1f} MB"
        title = "Lightship, everything on" if who == "ours" else TITLES[who]
        rows.append((title, f"{of['idle']:.1f} MB", f"{of['loaded']:.1f} MB", after, grown, f"{of['idle_cpu']:.2f} %"))
    return rows


def _floors(figures: Figures) -> str:
    found = figures.part("memory")
    if found is None:
        return ""
    return _FLOORS.format(**found["bare"], empty=found["ours"]["empty"], forest=found["ours"]["forest"])


def _soak(figures: Figures) -> str:
    found, line = figures.part("soak"), figures.soak()
    if found is None or line is None:
        return ""
    points = found["points"]
    picked = [points[round(i * (len(points) - 1) / 10)] for i in range(11)]
    return _SOAK.format(
        requests=found["requests"], seconds=found["seconds"], rate=found["requests"] / found["seconds"], line=line,
        first=points[0][1], last=points[-1][1], dropped=found["ring_dropped"],
        points=", ".join(f"{mb:.1f}" for _, mb in picked),
    )  # fmt: skip


def _starts(figures: Figures) -> list[Row]:
    found = figures.part("starts") or {"seconds": {}}
    titles = TITLES | {"ours": "Lightship", "bare": "python, numpy, onnxruntime and the model, and nothing else"}
    rows: list[Row] = []
    for who in sorted(found["seconds"], key=lambda who: figures.start(who) or 0.0):
        took, cpu = figures.start(who), figures.start(who, "cpu")
        rows.append((titles[who], f"{took:.2f}", "–" if cpu is None else f"{cpu:.2f}"))
    return rows


def _sizes(figures: Figures) -> list[Row]:
    found = figures.part("sizes") or {}
    titles = {"floor": "onnxruntime and numpy", "ours": "Lightship's agent"}
    rows = sorted(found.items(), key=lambda item: float(item[1]["mb"]))
    return [
        (titles.get(name, f"{name} and onnxruntime"), f"{of['mb']:.0f}", f"{of['distributions']}") for name, of in rows
    ]


def _updates(figures: Figures) -> list[Row]:
    rows: list[Row] = []
    for how, title in (("paced", "paced, 200 requests/s"), ("closed", "as fast as one client can")):
        quiet, busy = figures.update("quiet", how), figures.update("busy", how)
        if quiet and busy:
            most = [_number(figures.update(when, how, "most")) for when in ("quiet", "busy")]
            rows.append((title, _number(quiet), _number(busy), f"{busy / quiet:.2f}", *most))
    return rows


def _swaps(figures: Figures) -> str:
    swaps, updates = figures.part("swaps"), figures.part("updates")
    said = ""
    if updates is not None:
        said += _UPDATES.format(
            count=len(updates["windows"]), before=updates["before"], one=updates["after_one"], after=updates["after"],
            errors=figures.update_errors(),
        )  # fmt: skip
    if swaps is not None:
        said += _SWAPS.format(
            **swaps, answers=swaps["burst"]["requests"], rate=swaps["swaps"] / swaps["seconds"],
            stale=figures.stale(), p99=swaps["burst"]["p99"],
        )  # fmt: skip
    return said


_INTRODUCTION: Final = """\
# What a prediction costs

Written by `{command}`; do not edit. {machine}. Figures are also in [serving.json](serving.json).

Lightship is the agent itself, as `pip` installs it from its lock, with a certificate and a released model, watching
for drift, keeping metrics, and reporting to a real control plane through a real broker. Peers are what PyPI has,
pinned, each in an environment of its own, written as their own documentation tells one to, without their log of
requests; *tuned* is a session that was told to take one thread. Everybody serves the same ONNX files, and has given the
same scores before anything is measured. The client is a C program that keeps its connections. All servers are alive at
once and are asked in short bursts that take turns, shuffled anew each round.

Over **one connection** client and server share one CPU. With two, each request is handed over by an interrupt between
virtual CPUs, and a CPU that fell asleep has to wake up: together some 40 µs for everybody, counted as the server's CPU,
in some bursts and not in others. A run with two CPUs on 2026-11-25 found 0.39 of fastapi's (async, tuned) CPU and 0.17
of mlserver's by the medians, 0.19 and 0.09 by the cheapest bursts. While bursts are measured a process of the idle
class keeps each CPU awake. A hundred requests a second are measured on two CPUs that may sleep, as they would.

**CPU** is what the kernel counted for the whole tree of the server's processes, per request: the figure that a busy
machine hardly changes. Of latency the best decile over bursts is compared, and medians stand beside it. Times are µs
unless said.
"""
_ONE: Final = """\
## One row, one connection

Gradient boosting with 100 iterations on 30 features. Latencies are best deciles over bursts, then medians.
"""
_PICTURE: Final = "![CPU of one request, by server](serving.svg)\n"
_READING_ONE: Final = """\
## Under load

The same at 1, 8 and 32 connections; medians. A server with several processes may use both cores; the last column
divides by the CPU that was used, and so says what one whole core would answer.
"""
_OTHERS: Final = "## Other models\n\nOne row, one connection.\n"
_INSIDE: Final = """\
## In process

One row; best deciles, in the same rounds as the servers. *Bound memory* is the runtime's own call with nothing around
it.
"""
_PACED: Final = """\
## A hundred requests a second

CPU of the server, in percent of a core. Sessions as they come spin their threads between requests.
"""
_MANY: Final = """\
## A thousand rows in a request

p50 and CPU. What the model itself takes for them stands beside it: no format makes a request faster than that.
"""
_WATCHED: Final = """\
## Watching and reporting

*On*: drift is watched, metrics are scraped every second, reports go over MQTT every five. *Off*: the same faces in a
process that does none of it.
"""
_MEMORY: Final = """\
## Memory

PSS of the whole tree of processes, one server at a time, one model (gradient boosting). The agent reports every two
seconds here, and is asked no faster than it counts, so that whatever it remembers is full.
"""
_FLOORS: Final = """\
Bare python, numpy and onnxruntime: {nothing:.1f} MB; with gradient boosting {hgb:.1f}, with the forest {rf:.1f}. The
agent without a model: {empty:.1f} MB; with the forest {forest:.1f}.
"""
_SOAK: Final = """\
Soak: {requests:,} requests over 32 connections in {seconds:,.0f} s ({rate:,.0f} a second): {first:.1f} MB before,
{last:.1f} after; at every tenth {points}. The line after the first tenth rises by {line:.3f} MB per million requests.
Rows that were answered and not counted for drift, because so many came between two reports: {dropped:,.0f}.
"""
_STARTS: Final = """\
## Starting, and installing

From the start of the process to its first prediction, files in the page cache, everybody in turn. Most of our start is
that of numpy and onnxruntime, and part of everybody else's too: no server in Python that loads both can be faster than
the first line.
"""
_CHANGES: Final = """\
## While models change

Latency while an update is looked for, verified, downloaded, unpacked, probed, swapped and soaked, against as many
seconds of quiet before it; medians over updates.
"""
_UPDATES: Final = """\
{count} updates in a row, from the director's signature to the device's commit: {before:.1f} MB of PSS before them,
{one:.1f} after the first, {after:.1f} after the last; the version that came before stays resident. Requests that failed
meanwhile: {errors}.

"""
_SWAPS: Final = """\
{swaps:,} swaps between two versions in {seconds:.0f} s ({rate:.0f} a second, {median_ms:.1f} ms each to load, prove and
install) under 8 connections that ask as fast as they can: {answers:,} answers, p99 {p99:,.0f} µs, {failed} failed,
{stale} stale, {mixed} from a mix, {unknown} without a known digest. These are made in a process with the agent's own
faces, data plane, monitor and loader; an update through the control plane brings its own waiting; see above.
"""
_LOSSES: Final = """\
## Where we lose

* Nothing is as fast as nothing: the floor of sockets and of the runtime's own call stand in the tables.
* Triton answers many connections for little CPU each, since its C++ front gathers them; ours does so in Python.
"""
_LIMITS: Final = """## What this does not say

* Two cores of a shared machine, and a client that takes one of them: absolute figures of latency are of this machine.
* x86 only. On a gateway with ARM cores ratios will be others.
* In front of a graphics card, or with large models, what a server adds hardly matters, and others batch better.
* Peers do things that we do not: gRPC, streams, several workers, pipelines of models.
"""
