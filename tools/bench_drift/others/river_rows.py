"""River's detectors with their defaults, one per feature, after the reference's rows; the fourth argument names one."""

from __future__ import annotations

import pickle
import sys

import numpy as np
from common import Show
from river import drift

MAKE = {"ADWIN": drift.ADWIN, "KSWIN": lambda: drift.KSWIN(seed=1), "PageHinkley": drift.PageHinkley}[sys.argv[4]]
#: KSWIN takes a fifth of a millisecond a value: it is warmed up with as much as it remembers.
WARM = 200 if sys.argv[4] == "KSWIN" else 10_000
state = []


def fresh(reference):
    detectors = [MAKE() for _ in range(reference.shape[1])]

    def judge(rows):
        said = []
        for detector, column in zip(detectors, rows.T.tolist(), strict=True):
            hit = False
            for value in column:
                detector.update(value)
                hit = hit or detector.drift_detected
            said.append(hit)
        return said

    judge(np.asarray(reference[:WARM], dtype=np.float64))
    state.append(len(pickle.dumps(detectors)))
    return judge


show = Show(fresh)
fresh(show.reference)
few = 4 if sys.argv[4] == "KSWIN" else None
show.run(bytes_of_state=state[0], note="state of 30 detectors, pickled", drift_hours=few)
