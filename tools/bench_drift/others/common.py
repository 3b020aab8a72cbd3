"""Bench drift, in another tool's environment: the streams that all are shown, and what is noted of each.

Needs numpy and the standard library only. Every program here is run as `python program.py FOLDER HOURS OUT`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

QUIET = ("independent", "AR(1) 0.9", "daily cycle 0.3 sd")
ROWS = 200


def resident_mb() -> float:
    """What this process holds of memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Show:
    """Shows the streams to a rule: `judge(rows[200, features]) -> bool per feature`, fresh for every stream.

    With `whole`, the rule is shown all hours at once, and says `[hours, features]`.
    """

    def __init__(self, fresh, *, hours=None, whole=False):
        self.after_import = resident_mb()
        self.folder, most, self.out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
        self.hours = min(most, hours or most)
        self.reference = np.load(self.folder / "reference.npy")
        self.fresh, self.whole = fresh, whole
        self.spent = 0.0
        self.shown = 0

    def _judge(self, hours):
        rule = self.fresh(self.reference)
        began = time.process_time()
        said = rule(hours) if self.whole else [rule(hour) for hour in hours]
        self.spent += time.process_time() - began
        self.shown += hours.size
        return np.array(said, dtype=bool)

    def run(self, *, bytes_of_state, note="", drift_hours=None, values=()):
        """Alarms of the quiet streams, delays of the others; written to the file that was named."""
        alarms = {}
        for name in QUIET:
            rows = np.load(self.folder / f"{name}.npy")[: self.hours]
            said = self._judge(rows)
            alarms[name] = {
                "hours": len(rows),
                "alarming_hours": int(said.any(axis=1).sum()),
                "half": int((said.mean(axis=1) >= 0.5).sum()),
                "alarms": int(said.sum()),
            }
        delays = {}
        for path in sorted(self.folder.glob("drift *.npy")):
            rows = np.load(path)[: drift_hours or None]
            said = self._judge(rows)
            first = np.where(said.any(axis=0), said.argmax(axis=0) + 1.0, np.inf)
            median = float(np.quantile(first, 0.5, method="higher"))
            delays[path.stem.removeprefix("drift ")] = median if np.isfinite(median) else None
        cells = self.reference.shape[1]
        told = {
            "alarms": alarms,
            "delays": delays,
            "delay_hours": int(drift_hours or len(rows)),
            "ms_per_1000_rows": 1e6 * self.spent / max(self.shown / cells, 1),
            "after_import_mb": self.after_import,
            "resident_mb": resident_mb(),
            "bytes": bytes_of_state,
            "note": note,
            "values": list(values),
        }
        self.out.write_text(json.dumps(told))
