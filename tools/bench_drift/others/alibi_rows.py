"""Alibi Detect's KSDrift with its defaults: p < 0.05, corrected for the features of one window (Bonferroni)."""

from __future__ import annotations

from alibi_detect.cd import KSDrift
from common import ROWS, Show


def fresh(reference):
    detector = KSDrift(reference, p_val=0.05)

    def judge(rows):
        found = detector.predict(rows, drift_type="batch", return_p_val=True)["data"]
        return found["p_val"] < found["threshold"]

    return judge


show = Show(fresh)
show.run(bytes_of_state=ROWS * 30 * 4, note="the window's rows, which have to be sent or kept", drift_hours=24)
