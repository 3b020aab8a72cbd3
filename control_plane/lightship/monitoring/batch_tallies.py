"""Monitoring: what a batch of messages adds to the counters.

Rules: counting is on the hot path of ingest: plain numbers while the batch is stored, series only when it is over.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final, NamedTuple

from sqlalchemy.orm import Session

from lightship_agent.contract.latency import CELLS, OCTAVES
from lightship_agent.contract.messages import AnyRecord, Running

from .tallies import count


class Served(NamedTuple):
    """What a bundle has served on a device since it began to: rows, failures, µs of work, latencies by cell."""

    rows: int = 0
    failures: int = 0
    busy_us: int = 0
    latencies: tuple[int, ...] = ()

    @classmethod
    def of(cls, running: Running) -> Served:
        """As a heartbeat says it."""
        return cls(running.requests, running.failures, running.busy_us, running.latencies)


#: Two cells to an octave on the device; a series for each octave.
_EDGES: Final = [str(OCTAVES[(k + 1) // 2]) if (k + 1) // 2 < len(OCTAVES) else "+Inf" for k in range(CELLS)]


class BatchTally:
    """One batch's counts."""

    def __init__(self) -> None:
        """Nothing happened yet."""
        self.messages: dict[str, int] = defaultdict(int)  # by kind
        self.records: dict[type[AnyRecord], int] = defaultdict(int)
        self.duplicates = 0
        self.gaps = 0
        self._served: dict[tuple[str, str, int], list[int]] = {}  # rows, failures, µs, cells …

    def served(self, group: str, now: Running, before: Served) -> None:
        """Count what was served since the heartbeat before; counts that went back began anew."""
        grown = self._served.get((group, now.model, now.version))
        if grown is None:
            grown = self._served[group, now.model, now.version] = [0] * (3 + CELLS)
        old, known = before.latencies, len(before.latencies)
        for i, n in enumerate(now.latencies):
            if n != (m := old[i] if i < known else 0):
                grown[3 + i] += n - m if n > m else n
        three = (now.requests, before.rows), (now.failures, before.failures), (now.busy_us, before.busy_us)
        for i, (n, m) in enumerate(three):
            grown[i] += n - m if n >= m else n

    def write(self, session: Session) -> None:
        """Hand it to what the transaction counts."""
        for kind, n in self.messages.items():
            count(session, n, "lightship_ingest_messages_total", kind=kind)
        for record, n in self.records.items():
            count(session, n, "lightship_ingest_records_total", kind=record.__struct_config__.tag)
        count(session, self.duplicates, "lightship_ingest_duplicates_total")
        count(session, self.gaps, "lightship_ingest_gaps_total")
        for (group, model, version), (rows, failures, busy_us, *cells) in self._served.items():
            of = {"group": group, "model": model, "version": version}
            count(session, rows, "lightship_inference_rows_total", **of)
            count(session, failures, "lightship_inference_failures_total", **of)
            count(session, busy_us / 1e6, "lightship_inference_latency_seconds_sum", **of)
            for edge, n in zip(_EDGES, cells, strict=True):
                count(session, n, "lightship_inference_latency_seconds_bucket", **of, le=edge)
