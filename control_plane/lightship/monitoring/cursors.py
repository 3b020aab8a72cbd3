"""Monitoring: how far a device's reports have come, and which of them are missing. Pure.

A device numbers its records from 1 within an epoch. What was stored is all below `next_seq`, and the spans in `ahead`,
which came before those they follow: a broker that was killed, a queue that overflowed, or a device that sends what is
new before what is old.

Rules:
* a record is taken once: what is below `next_seq`, or in a span, is a duplicate;
* what is ahead is bounded in spans and in records; beyond the bounds it is left for the device to send again;
* what the device no longer holds (`lo`) and was never stored is lost, counted, and not waited for;
* what is asked for again is exactly what is missing, never what we have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from lightship_agent.contract.messages import MAX_RANGES

MAX_SPANS: Final = MAX_RANGES
MAX_AHEAD: Final = 2_000  # records
Span = tuple[int, int]  # first and last, both included


@dataclass
class Cursor:
    """One epoch of one device."""

    next_seq: int = 1
    lost: int = 0
    ahead: list[Span] = field(default_factory=list)  # sorted, apart from each other, above next_seq

    def drop_below(self, lo: int) -> None:
        """The device holds nothing below `lo` any more."""
        if lo <= self.next_seq:
            return
        stored = sum(min(last, lo - 1) - first + 1 for first, last in self.ahead if first < lo)
        self.lost += lo - self.next_seq - stored
        self.next_seq = lo
        self.ahead = [(max(first, lo), last) for first, last in self.ahead if last >= lo]
        self._advance()

    def take(self, seq: int) -> bool:
        """Whether record `seq` is news that is to be stored now; it then counts as stored."""
        if seq < self.next_seq or any(first <= seq <= last for first, last in self.ahead):
            return False
        if seq == self.next_seq:
            self.next_seq += 1
            self._advance()
            return True
        if self.waiting >= MAX_AHEAD:
            return False
        joined = _joined(self.ahead, seq)
        if len(joined) > MAX_SPANS:
            return False
        self.ahead = joined
        return True

    @property
    def waiting(self) -> int:
        """Records that were stored ahead of a gap."""
        return sum(last - first + 1 for first, last in self.ahead)

    def missing(self) -> list[Span]:
        """The spans between what is stored."""
        gaps, expected = [], self.next_seq
        for first, last in self.ahead:
            gaps.append((expected, first - 1))
            expected = last + 1
        return gaps

    def _advance(self) -> None:
        while self.ahead and self.ahead[0][0] <= self.next_seq:
            self.next_seq = max(self.next_seq, self.ahead.pop(0)[1] + 1)


def _joined(spans: list[Span], seq: int) -> list[Span]:
    """The spans with `seq` in them; it is in none yet."""
    out: list[Span] = []
    new = (seq, seq)
    for span in spans:
        if span[1] == new[0] - 1:
            new = (span[0], new[1])
        elif new[1] == span[0] - 1:
            new = (new[0], span[1])
        else:
            out.append(span)
    return sorted([*out, new])
