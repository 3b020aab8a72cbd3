"""Bench telemetry: the figures as a page, and what they are held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from . import losses
from .cost import FLEET_RATE, Cost, Stalled, Steady
from .daily import FEATURES, Day
from .flash import Flash
from .proof import Proof
from .storm import DEVICES, Storm

COMMAND: Final = "make bench-telemetry"
DAY_BYTES: Final = 400_000


@dataclass(frozen=True)
class Bar:
    """A figure, and the limit that it must not exceed (`least`: not fall below)."""

    name: str
    value: float
    limit: float
    least: bool = False

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.value >= self.limit if self.least else self.value <= self.limit

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        value = round(self.value, 4)
        return {"name": self.name, "value": value, "limit": self.limit, "least": self.least, "holds": self.holds}


class Told(msgspec.Struct, kw_only=True):
    """When and on what a part was measured."""

    at: str
    load: float  # of the machine, when it began
    seconds: float
    revision: str


class Figures(msgspec.Struct, kw_only=True):
    """Everything that was measured; a part that was not is empty."""

    machine: str = ""
    measured: dict[str, Told] = {}  # by part
    queue: list[Flash] = []
    proof: list[Proof] = []
    cost: list[Cost] = []
    steady: list[Steady] = []
    stalled: list[Stalled] = []
    storm: list[Storm] = []
    daily: list[Day] = []

    def bars(self) -> list[Bar]:
        """What the figures are held to."""
        bars = [bar for flash in self.queue for bar in _queue_bars(flash)]
        bars += [bar for proof in self.proof for bar in _proof_bars(proof)]
        bars += [Bar(_cost_name(c), c.report_micros, _LIMITS[c.history, c.protocol, c.batch > 1]) for c in self.cost]
        for s in self.steady:
            bars += [
                Bar(f"ingest: share of a core at {FLEET_RATE:,} messages a second", s.share, 0.25),
                Bar("ingest: messages a second kept up with", s.rate, 0.99 * FLEET_RATE, least=True),
                Bar('ingest: times "database is locked" under writes of the API', s.locked, 0),
            ]
        for stall in self.stalled:
            bars.append(Bar(f"ingest: MB resident, the database stalled for {stall.seconds:g} s", stall.peak_mb, 200))
            bars.append(Bar("lost reports, the database stalled", stall.lost, 0))
        bars += [
            Bar(f"reconnect: crowd of {DEVICES:,} devices, peak to mean, broker away {s.away:g} s", s.ratio, 2)
            for s in self.storm
        ]
        # The default cadence is the first; the others say what another would cost.
        bars += [
            Bar(f"bytes per device and day, {FEATURES} features, default", d.wire, DAY_BYTES) for d in self.daily[:1]
        ]
        return bars

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "command": COMMAND,
            **msgspec.to_builtins(self),
            "bars": [bar.plain() for bar in self.bars()],
        }


#: µs of CPU per report, by history, protocol, and whether reports come many in a message.
_LIMITS: Final = {
    ("sqlite", "3.1.1", False): 80.0,
    ("sqlite", "5", False): 130.0,
    ("postgres", "3.1.1", False): 80.0,
    ("postgres", "5", False): 130.0,
    ("sqlite", "3.1.1", True): 30.0,
    ("sqlite", "5", True): 30.0,
    ("postgres", "3.1.1", True): 30.0,
    ("postgres", "5", True): 30.0,
}


def _cost_name(c: Cost) -> str:
    many = f"{c.batch} in a message" if c.batch > 1 else "one in a message"
    return f"ingest: µs of CPU per report, {many}, MQTT {c.protocol}, {c.history}"


def _queue_bars(f: Flash) -> list[Bar]:
    return [
        Bar(f"lost records of {f.promised:,} confirmed, {f.kills} kills of the device's writer", f.lost, 0),
        Bar("flash bytes per record, each synced", f.each_bytes, 6_144),
        Bar("flash bytes per record, synced by ten", f.grouped_bytes, 1_536),
        Bar("flash: bytes beyond the queue's limit and a segment", f.over_bytes, 0),
        Bar("queue: ms of CPU to open it at 64 MB", f.open_ms, 50),
        Bar("queue: µs of CPU per append", f.append_micros, 100),
    ]


def _proof_bars(p: Proof) -> list[Bar]:
    return [
        Bar(f"lost reports of {p.reports:,}, {p.broker}", p.lost, 0),
        Bar(f"duplicate rows, {p.broker}", p.duplicate_rows, 0),
        Bar(f"resent reports, share, {p.broker}", p.resent, 0.10),
        Bar(f"kills of ingest while none is lost, {p.broker}", p.ingest_kills, 6, least=True),
        Bar(f"kills of the broker while none is lost, {p.broker}", p.broker_kills, 2, least=True),
    ]


def page(figures: Figures) -> str:
    """docs/benchmarks/telemetry.md."""
    parts = [
        _INTRODUCTION.format(command=COMMAND, machine=figures.machine, when=_when(figures)),
        _table(("Figure", "Found", "Limit", ""), [_bar(b) for b in figures.bars()]),
        _PROOF,
        _table(_PROOF_HEAD, [_proof(p) for p in figures.proof]),
        _QUEUE,
        _table(_QUEUE_HEAD, [_queue(f) for f in figures.queue]),
        _COST,
        _table(_COST_HEAD, [_cost(c) for c in figures.cost]),
        *(_STEADY.format(s=s, share=s.share * 100) for s in figures.steady),
        *(_STALLED.format(s=s) for s in figures.stalled),
        _STORM,
        _table(_STORM_HEAD, [_storm(s) for s in figures.storm]),
        _DAILY,
        _table(_DAILY_HEAD, [_daily(d) for d in figures.daily]),
        _LOSSES,
        "\n".join(f"* {line}" for line in _losses(figures)),
        _PARTS,
        _table(("Part", "At", "Load", "Seconds", "Revision"), [_told(*p) for p in figures.measured.items()]),
    ]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _when(figures: Figures) -> str:
    """One sentence: when, how busy the machine was, and of how many revisions it is."""
    told = sorted(figures.measured.values(), key=lambda t: t.at)
    if not told:
        return "When it was measured was not noted"
    loads, revisions = [t.load for t in told], sorted({t.revision for t in told})
    of = f"revision {revisions[0]}" if len(revisions) == 1 else f"{len(revisions)} revisions (at the end)"
    return f"Measured from {told[0].at} to {told[-1].at} at loads of {min(loads):.1f} to {max(loads):.1f}, of {of}"


def _losses(figures: Figures) -> list[str]:
    """Bars that are missed, or the one that is nearest to its limit, and what the figures say against us."""
    bars = figures.bars()
    said = [f"**Missed**: {b.name}, {_number(b.value)}; the limit is {b.limit:,g}." for b in bars if not b.holds]
    close = [b for b in bars if b.limit and not b.least]
    if close and not said:
        nearest = max(close, key=lambda b: b.value / b.limit)
        said.append(f"No bar is missed; nearest to its limit is *{nearest.name}*: {_number(nearest.value)}.")
    return [
        *said,
        *losses.of_devices(figures.daily, DAY_BYTES),
        *losses.of_costs(figures.cost),
        *losses.of_the_proof(figures.proof),
        *losses.of_writers(figures.steady),
        *losses.of_crowds(figures.storm),
    ]


def _told(part: str, told: Told) -> tuple[str, ...]:
    return (part, told.at, f"{told.load:.1f}", f"{told.seconds:.0f}", told.revision)


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 100 and value % 1 else f"{value:,.0f}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" if n == 0 else "---:" for n in range(len(head))), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _bar(bar: Bar) -> tuple[str, ...]:
    return (
        bar.name,
        _number(bar.value),
        f"{'≥' if bar.least else '≤'} {bar.limit:,g}",
        "holds" if bar.holds else "**missed**",
    )


_PROOF_HEAD: Final = (
    "Broker", "Reports", "Ingest kills", "Broker kills", "Messages while ingest was away", "Broker said it drops",
    "Sent twice on purpose", "Lost", "Duplicate rows", "Sent again", "Took",
)  # fmt: skip


def _proof(p: Proof) -> tuple[str, ...]:
    return (
        p.broker, f"{p.reports:,}", str(p.ingest_kills), str(p.broker_kills), f"{p.outage:,}",
        "yes" if p.overflowed else "no", f"{p.injected:,}", str(p.lost), str(p.duplicate_rows), f"{p.resent:.1%}",
        f"{p.seconds:.0f} s",
    )  # fmt: skip


_QUEUE_HEAD: Final = (
    "Kills", "Disk full", "Records confirmed", "Lost", "Flash, each synced", "Flash, by ten", "Open, CPU", "Open, wall",
    "Append, CPU",
)  # fmt: skip


def _queue(f: Flash) -> tuple[str, ...]:
    return (
        str(f.kills), str(f.refused), f"{f.promised:,}", str(f.lost), f"{f.each_bytes:,.0f} B",
        f"{f.grouped_bytes:,.0f} B", f"{f.open_ms:.1f} ms", f"{f.open_wall_ms:.1f} ms", f"{f.append_micros:.0f} µs",
    )  # fmt: skip


_COST_HEAD: Final = (
    "History", "MQTT", "Reports in a message", "Messages", "µs per message", "µs per report", "Broker, µs per message",
)  # fmt: skip


def _cost(c: Cost) -> tuple[str, ...]:
    return (
        c.history, c.protocol, str(c.batch), f"{c.messages:,}", f"{c.micros:,.0f}", f"{c.report_micros:,.1f}",
        f"{c.broker_micros:,.0f}",
    )  # fmt: skip


_STORM_HEAD: Final = ("Broker away", "95 % are back within", "Mean, a second", "Worst tenth, a second", "Peak to mean")


def _storm(s: Storm) -> tuple[str, ...]:
    return (f"{s.away:g} s", f"{s.window:.1f} s", f"{s.mean:,.0f}", f"{s.peak:,.0f}", f"{s.ratio:.2f}")


_DAILY_HEAD: Final = (
    "A report every", "Sent every", "Reports", "Messages", "Envelopes", "MQTT in TLS, both ways", "TCP and IP",
)  # fmt: skip


def _daily(d: Day) -> tuple[str, ...]:
    return (
        f"{d.report_seconds:g} s", f"{d.send_seconds:g} s", f"{d.reports:,}", f"{d.messages:,}", f"{d.payload:,} B",
        f"{d.wire:,} B", f"{d.tcp:,} B",
    )  # fmt: skip


_INTRODUCTION: Final = """\
# What telemetry costs, and what it takes to lose a report

Written by `{command}`; do not edit. {machine}.
{when}.
Figures are of CPU, which other work on the machine makes larger, and counts. Programs, brokers and databases are real,
and configured as they ship unless the section says otherwise. Figures are also in [telemetry.json](telemetry.json).
"""
_PROOF: Final = """\
## Nothing is lost

A small fleet of devices, each the agent's own outbox, sender and MQTT session under its own certificate, reports while
`lightship ingest` is killed (SIGKILL), the broker is killed, and ingest stays away until the broker's queue is full;
one message in twenty is sent twice on purpose. mosquitto runs with *its own* queue limits here, a thousand messages,
after which it drops in silence, having acknowledged each; its queue does not survive its kill either. The embedded
broker keeps all of it in memory. A report counts as lost where the history has no row of it, or where one of labelled
rows was not taken into account; as a duplicate row where either has it twice.
"""
_QUEUE: Final = """\
## The device's queue

Writers are processes that are killed; behind most of them noise is left where a write was cut off, and every fifth
meets a disk that takes half of a write and is full from then on. *Flash* is blocks of 4 KiB that the syncs of our
writes touch; what the file system writes for itself is not in it. In life reports are synced together, up to 64 of them
or ten seconds; only events are synced one by one.
"""
_COST: Final = """\
## Ingest

User and system time of one real `lightship ingest`, over TLS, while it catches up with what a broker holds. The fleet's
own database is SQLite in all rows; the history of reports is in SQLite beside it, or on a PostgreSQL 15 with its own
defaults (its server's CPU is not in the figure).
"""
_STEADY: Final = """
At the rate of a hundred thousand devices, each once a minute ({s.rate:,.0f} messages a second for {s.seconds:.0f} s):
{share:.1f} % of a core. Beside it somebody wrote to the fleet's database {s.writes:,} times, as the API does:
{s.locked} times "database is locked", the slowest write {s.slowest_ms:.0f} ms.
"""
_STALLED: Final = """
With the fleet's database locked by somebody else for {s.seconds:.0f} s at that rate, ingest took {s.peak_mb:.0f} MB at
most, and {s.lost} reports were lost: it does not read what it can't store, and the broker keeps it.
"""
_STORM: Final = """\
## They all come back at once

Ten thousand devices lose their broker at one moment. The pauses are those that the agent's link draws; no network is
in it. After a broker that was only restarted they come faster than a broker with mutual TLS takes them: those that it
makes wait try again later, spread as below.
"""
_DAILY: Final = """\
## A day of a device

Thirty features, five predictions a minute, through the agent's own monitor, health, outbox and sender: heartbeats,
an hourly window, and products of features now and then. Pings are in the figure.
"""
_LOSSES: Final = """\
## Where we lose
"""
_PARTS: Final = """\
## When it was measured
"""
