"""Monitoring: reports as they come: what is new, and what it says in a line.

Rules:
* pure: whoever waits and prints is in the command line;
* what comes a second time is shown once;
* a record of a later version, or of a kind that nobody described here, is shown by its kind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from lightship_agent.contract.codes import WireError
from lightship_agent.contract.messages import (
    Agreement,
    AnyRecord,
    Envelope,
    Fault,
    Heartbeat,
    LabelledRows,
    Labels,
    Together,
    Update,
    Window,
)
from lightship_agent.contract.vectors import Vector
from lightship_agent.contract.wire import decode, encode, unpack

from .history import Report

REMEMBERED: Final = 20_000
#: A report that came so much later than it was written has its delay told.
LATE_MS: Final = 5_000


class Line(NamedTuple):
    """A report in words. `grave`: something is wrong; `minor`: it says no more than that all goes on."""

    device: str
    at: int  # wall ms
    kind: str
    says: str
    late_ms: int
    grave: bool
    minor: bool


class Once:
    """Lets every report through once, as far as it remembers."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._seen: OrderedDict[tuple[str, str, int], None] = OrderedDict()

    def new(self, reports: Iterable[Report]) -> Iterator[Report]:
        """Those that were not seen before."""
        for report in reports:
            key = (report.device, report.epoch, report.seq)
            if key in self._seen:
                self._seen.move_to_end(key)
                continue
            self._seen[key] = None
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            yield report


def reports_in(device: str, payload: bytes, now: int) -> list[Report]:
    """The reports in a message of that device.

    Raises:
        WireError: whatever is wrong with it.
    """
    said = unpack(payload, Envelope)
    return [Report(device, r.t, said.e, r.s, now, str(r.__struct_config__.tag), False, encode(r)) for r in said.r]


def line(report: Report) -> Line:
    """A report in words."""
    late = max(0, report.recv - report.ts)
    try:
        record: AnyRecord = decode(report.body, AnyRecord)  # type: ignore[arg-type]
    except WireError:  # of a later version
        return Line(report.device, report.ts, report.kind, "of a version that is not known here", late, False, False)
    says = _SAYS.get(type(record), _nothing)(record)
    grave, minor = False, False
    match record:
        case Fault():
            grave = record.raised
        case Update():
            grave = bool(record.code)
        case Heartbeat():
            grave, minor = bool(record.degraded), not record.degraded
        case _:
            pass
    return Line(report.device, report.ts, report.kind, says, late, grave, minor)


def as_json(report: Report) -> bytes:
    """A report as a line of JSON, with the whole record in it. What is not a number is null."""
    return msgspec.json.encode(
        {
            "device": report.device,
            "at": report.ts,
            "received": report.recv,
            "epoch": report.epoch,
            "seq": report.seq,
            "kind": report.kind,
            "clock_trusted": not report.approx,
            "record": _readable(msgspec.msgpack.decode(report.body)),
        }
    )


def _readable(part: Any) -> Any:
    """With the numbers of vectors in the place of their bytes."""
    match part:
        case bytes():
            return Vector(part).array.tolist()
        case dict():
            return {name: _readable(value) for name, value in part.items()}
        case list():
            return [_readable(value) for value in part]
        case _:
            return part


def _heartbeat(r: Heartbeat) -> str:
    runs = "; ".join(
        f"{m.model}@{m.version} {m.requests} rows, {m.failures} failures, p95 {m.latency_ms:.3g} ms" for m in r.running
    )
    words = [runs or "serves no model"]
    if r.update_state != "idle":
        words.append(r.update_state)
    if r.degraded:
        words.append("degraded: " + ", ".join(r.degraded))
    return "; ".join(words)


def _window(r: Window) -> str:
    return f"{r.model}@{r.version} window {r.w}: {r.rows} rows, {r.invalid} refused"


def _together(r: Together) -> str:
    return f"{r.model} windows {r.first} to {r.w}: products of features"


def _labels(r: Labels) -> str:
    return f"{r.model} window {r.w}: {r.labelled} labels, {r.errors} wrong"


def _fault(r: Fault) -> str:
    return f"{r.feature} of {r.model} is {'' if r.raised else 'no longer '}{r.kind}, {r.rate:.0%} of the rows"


def _update(r: Update) -> str:
    return " ".join(filter(None, (r.state, r.digest[:12], f"[{r.code}]" if r.code else "", r.detail)))


def _agreement(r: Agreement) -> str:
    return f"{r.model}@{r.version} beside {r.champion[:12]}: {r.same} of {r.rows} the same, {r.failures} failures"


def _rows(r: LabelledRows) -> str:
    return f"{len(r.x)} rows of {r.model} with labels"


def _nothing(record: Any) -> str:
    numbers = getattr(record, "numbers", None)
    return f"{len(numbers)} numbers" if numbers is not None else ""


_SAYS: Final[dict[type, Callable[[Any], str]]] = {
    Heartbeat: _heartbeat,
    Window: _window,
    Together: _together,
    Labels: _labels,
    Fault: _fault,
    Update: _update,
    Agreement: _agreement,
    LabelledRows: _rows,
}
