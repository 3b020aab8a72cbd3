"""Evidently's DataDriftPreset with its defaults: a report per window, as its documentation has it."""

from __future__ import annotations

import pandas as pd
from common import ROWS, Show
from evidently import Report
from evidently.presets import DataDriftPreset

NAMES = [f"f{i}" for i in range(30)]
values = []


def fresh(reference):
    known = pd.DataFrame(reference, columns=NAMES)

    def judge(rows):
        found = Report([DataDriftPreset()]).run(pd.DataFrame(rows, columns=NAMES), known).dict()
        drift = {m["config"]["column"]: m for m in found["metrics"] if "column" in m.get("config", {})}
        values.append([float(drift[n]["value"]) for n in NAMES])
        return [value >= 0.1 for value in values[-1]]

    return judge


show = Show(fresh)
show.run(
    bytes_of_state=ROWS * 30 * 4,
    note="the window's rows, which have to be sent or kept",
    drift_hours=show.hours,
    values=values,
)
