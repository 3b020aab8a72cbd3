"""Run as a program of its own: what counting 30 features adds to the memory of a process that has numpy.

Arguments: a file with a profile. Says, in MB, what 40 windows of 200 rows that were counted, packed and forgotten have
added to a process that has numpy, and the contract with its codec, which an agent has for its reports: of memory of its
own, and of resident memory. The latter has pages of numpy's library in it, read when a function is first used.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import numpy as np


def held_mb() -> tuple[float, float]:
    """What this process holds: of its own, and resident."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    told = {name: int(value.split()[0]) / 1024 for name, value in (line.split(":") for line in lines)}
    return told["Anonymous"], told["Rss"]


def main() -> None:
    """Measure, and say so."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 30)).astype(np.float32)
    rows.T @ rows  # BLAS takes its buffers when it is first used
    with_numpy = held_mb()
    from lightship_agent.contract.messages import Envelope, PackedMoments, Window, packed
    from lightship_agent.contract.profile import ReferenceProfile
    from lightship_agent.contract.wire import decode, pack

    profile = decode(Path(sys.argv[1]).read_bytes(), ReferenceProfile)
    with_contract = held_mb()
    from lightship_agent.monitor.ring import RowRing
    from lightship_agent.monitor.tally import Tally

    ring, tally = RowRing(256, 30), Tally(profile)
    for w in range(40):
        for row in rows:
            ring.push_row(row, 1, 0.75, "0123456789abcdef")
        drained = ring.drain()
        tally.count(drained.rows, drained.labels, drained.top_scores)
        counts, _ = tally.take()
        window = Window(
            s=1, t=1, model="m", version=1, digest="0" * 64, schema="0" * 64, w=w, opened=1, rows=counts.rows,
            counts=packed(counts.counts), predictions=packed(counts.predictions), scores=packed(counts.scores),
            distances=packed(counts.distances), moments=PackedMoments.of(counts.moments),
        )  # fmt: skip
        pack(Envelope(e="0" * 16, b=1, us=1, lo=1, r=(window,)))
    (own, resident), (own_before, resident_before) = held_mb(), with_contract
    print(
        json.dumps(
            {
                "numpy_mb": with_numpy[1],
                "contract_adds_mb": resident_before - with_numpy[1],
                "counting_adds_own_mb": own - own_before,
                "counting_adds_resident_mb": resident - resident_before,
            }
        )
    )


if __name__ == "__main__":
    main()
