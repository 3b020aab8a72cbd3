"""Bench update: the figures as a page, and what they are held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from lightship_agent.contract.device_api import MAX_RELEASE_LIST

from .agents import COUNTS, Act, Agent, median
from .deltas import Delta
from .dying import Crossing
from .looks import Shape

COMMAND: Final = "make bench-update"


@dataclass(frozen=True)
class Bar:
    """A figure, and the limit that it must stay below."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.value <= self.limit

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "value": round(self.value, 4), "limit": self.limit, "holds": self.holds}


@dataclass(frozen=True)
class Figures:
    """Everything that was measured."""

    shapes: list[Shape]
    agents: list[Agent]
    deltas: list[Delta]
    crossing: Crossing
    machine: str
    runs: int

    def bars(self) -> list[Bar]:
        """What the figures are held to."""
        product = [s for s in self.shapes if s.product]
        small, large = min(product, key=lambda s: s.bundles), max(product, key=lambda s: s.bundles)
        # What is listed is under the limit by definition; this is what has to be.
        trained_on = [d.share for d in self.deltas if any(word in d.kind for word in ("warm start", "swapped", "head"))]
        return [
            Bar("120 MB over a link that dies every 5 MB: bytes on the wire, of the size", self.crossing.share, 1.05),
            Bar("requests for a file that is answered with 404", self.crossing.asked_for_absent, 1),
            Bar("bytes to ask for an assignment over a new connection, nothing new", _most(product, "ask"), 6_000),
            Bar("bytes to look at the release list, nothing new, without TLS", _most(product, "warm"), 2_000),
            Bar(f"CPU of a look, nothing new, {small.bundles:,} bundles, of the stock client's", _ratio(small), 2.0),
            Bar(f"CPU of a look, nothing new, {large.bundles:,} bundles, of the stock client's", _ratio(large), 1.25),
            Bar("worst delta to a model trained on from the old one, of the full file", max(trained_on), 0.6),
            Bar("MB of PSS that a check does not give back", max(median(self.agents, n).kept for n in COUNTS), 1.0),
        ]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "command": COMMAND,
            "machine": self.machine,
            "runs": self.runs,
            "looks": [s.plain() for s in self.shapes],
            "agents": [asdict(median(self.agents, n)) for n in COUNTS],
            "agents_runs": [asdict(agent) for agent in self.agents],
            "deltas": [d.plain() for d in self.deltas],
            "download_120_mb": self.crossing.plain(),
            "bars": [bar.plain() for bar in self.bars()],
        }


def _most(shapes: list[Shape], look: str) -> float:
    return float(max(getattr(s, look).wire["ours"] for s in shapes))


def _ratio(shape: Shape) -> float:
    return shape.warm.cpu["ours"] / shape.warm.cpu["stock"]


def page(figures: Figures) -> str:
    """docs/benchmarks/update.md."""
    parts = [
        _INTRODUCTION.format(
            command=COMMAND, machine=figures.machine, runs=figures.runs, agents=len(figures.agents) // len(COUNTS)
        ),
        _table(("Figure", "Found", "Limit", ""), [_bar(b) for b in figures.bars()]),
        _LOOKS,
        _table(_LOOK_HEAD, [_look(s, "ask") for s in figures.shapes[:1]] + _rows(figures.shapes)),
        _READING_LOOKS,
        _table(("List", "Bytes of the list", "Roles", "Server CPU of one release"), [_list(s) for s in figures.shapes]),
        _CHOICE.format(limit=MAX_RELEASE_LIST),
        _AGENTS,
        _table(_AGENT_HEAD, [row for n in COUNTS for row in _agent(median(figures.agents, n))]),
        _READING_AGENTS,
        _DELTAS,
        _table(_DELTA_HEAD, [_delta(d) for d in figures.deltas]),
        _READING_DELTAS,
        _crossing(figures.crossing),
    ]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" if n == 0 else "---:" for n in range(len(head))), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _bar(bar: Bar) -> tuple[str, ...]:
    return (
        bar.name,
        f"{bar.value:,.2f}" if bar.value < 100 else f"{bar.value:,.0f}",
        f"{bar.limit:,g}",
        "holds" if bar.holds else "**missed**",
    )


_LOOK_HEAD: Final = (
    "",
    "Ours, CPU",
    "Stock, CPU",
    "Ratio",
    "Ours, bytes",
    "Stock, bytes",
    "Child, CPU",
    "Child, bytes",
)
_LOOK_NAMES: Final = {
    "ask": "Anything for us? (any list)",
    "warm": "Look, nothing new",
    "news": "Look and download of a new release",
    "cold": "First look of all",
}


def _rows(shapes: list[Shape]) -> list[tuple[str, ...]]:
    return [_look(s, kind) for kind in ("warm", "news", "cold") for s in shapes]


def _look(shape: Shape, kind: str) -> tuple[str, ...]:
    look = getattr(shape, kind)
    name = _LOOK_NAMES[kind] if kind == "ask" else f"{_LOOK_NAMES[kind]}: {shape.name}"
    ours, stock = look.cpu["ours"], look.cpu.get("stock")
    ratio = f"{ours / stock:.2f}" if stock else "–"
    return (
        name, _ms(ours), _ms(stock), ratio, _bytes(look.wire["ours"]), _bytes(look.wire.get("stock")),
        _ms(look.cpu.get("child")), _bytes(look.wire.get("child")),
    )  # fmt: skip


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1_000:.0f} ms"


def _bytes(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def _list(shape: Shape) -> tuple[str, ...]:
    return (shape.name, _bytes(shape.list_bytes), f"{max(1, shape.bins)}", _ms(shape.publish_cpu))


_AGENT_HEAD: Final = (
    "",
    "PSS at its peak",
    "With its children",
    "PSS afterwards",
    "CPU, all of it",
    "Bytes on the wire",
)


def _agent(agent: Agent) -> list[tuple[str, ...]]:
    released = f"{agent.bundles:,} bundles"
    return [
        (f"Serving, {released}", "–", "–", f"{agent.before:.1f} MB", "–", "–"),
        (f"A check that brings nothing new, {released}", *_act(agent.check)),
        (f"An update to a new model, {released}", *_act(agent.update)),
    ]


def _act(act: Act) -> tuple[str, ...]:
    memory = (f"{act.peak:.1f} MB", f"{act.peak_all:.1f} MB", f"{act.after:.1f} MB")
    return (*memory, f"{act.cpu:.2f} s", _bytes(int(act.wire)))


_DELTA_HEAD: Final = ("Successor", "Bundle", "Full (zstd 19)", "Delta", "Of full", "Listed", "Made in", "Applied in")


def _delta(d: Delta) -> tuple[str, ...]:
    return (
        d.kind, _bytes(d.bundle), _bytes(d.full), _bytes(d.patch), f"{d.share:.0%}", "yes" if d.listed else "no",
        f"{d.make_cpu:.1f} s", _ms(d.apply_cpu),
    )  # fmt: skip


def _crossing(c: Crossing) -> str:
    return _CROSSING.format(
        size=c.size // 1_000_000, share=f"{c.share:.2%}", connections=c.connections, cpu=c.cpu,
        asked=c.asked_for_absent,
    )  # fmt: skip


_INTRODUCTION: Final = """\
# What an update costs

Written by `{command}`; do not edit. {machine}.
Medians of {runs} runs; of whole agents, of {agents}. Everything is the real thing: the agent's own client, a home of
the control plane with its signed release list, its device API over mutual TLS. The peer is python-tuf's own `Updater`
with its own fetcher, in a process of its own, taking turns with ours over the same plain HTTP. Figures are also in
[update.json](update.json).
"""
_LOOKS: Final = """\
## Looking for news

Most looks are one conditional GET for the assignment, answered 304; no signed metadata is read. Only when the
assignment changes, and once a day, does the agent check the release list, in a child process. *Ours* and *stock* are
the same work in a process that has everything imported already; *child* is the whole child, from its start to its end,
over mutual TLS. Bytes are those on the wire, both ways, HTTP heads and TLS handshakes included.
"""
_READING_LOOKS: Final = """
Where we lose: a look of ours takes some milliseconds more than the stock client's, for the lock, the version floors,
the fsyncs that make the cache survive a power cut, and httpx. The child costs a third of a second of CPU for its
imports alone; it buys that the agent keeps none of their memory, and that foreign bytes meet a process that can be
thrown away.
"""
_CHOICE: Final = """
One list is what the control plane writes today. Each device reads, parses and verifies it whole at every check, and
fetches it whole after every release; devices read up to {limit:,} bytes of it, and the control plane signs no longer
one. In bins (TAP 15, succinct roles) a device reads the one bin that its bundle falls into. The agent reads both; the
rows with bins show what writing them would be worth.
"""
_AGENTS: Final = """\
## A whole agent

A real agent serves a forest of 60 trees over its socket and is updated to the successor: looked for, verified,
downloaded, unpacked, probed in a child, swapped, soaked, committed. The CPU is that of the agent and all its children;
the bytes hold the TLS handshakes, the polls and the reports of that time.
"""
_READING_AGENTS: Final = """
What the agent holds more of after an update than before is the model it came from, which stays loaded so that a bad
successor can be left at once.
"""
_DELTAS: Final = """\
## Deltas

Trained with scikit-learn, converted with skl2onnx; sizes of whole bundles, in bytes. A delta is listed only where it is
under 60 % of the full file; otherwise devices take the full one.
"""
_READING_DELTAS: Final = """
A model that was trained from scratch shares next to nothing with the one before it, and float weights that all moved a
little share nothing either: those devices take the full file. Deltas pay where training goes on from the old model.
"""
_CROSSING: Final = """\
## A link that dies

{size} MB over a link that dies every 5 MB: {share} of its size on the wire, {connections} connections, {cpu:.1f} s of
CPU (the server's included). A file that is answered with 404 was asked for {asked} time.
"""
