"""NannyML's univariate calculator with its defaults, in chunks of 200: Jensen-Shannon, mean ± 3 sd of its."""

from __future__ import annotations

import os

os.environ["NML_DISABLE_USAGE_LOGGING"] = "1"

import numpy as np
import pandas as pd
from common import ROWS, Show
from nannyml import UnivariateDriftCalculator

NAMES = [f"f{i}" for i in range(30)]
fitted = []


def fresh(reference):
    if not fitted:
        calculator = UnivariateDriftCalculator(column_names=NAMES, chunk_size=ROWS)
        fitted.append(calculator.fit(pd.DataFrame(reference, columns=NAMES)))

    def judge(hours):
        found = fitted[0].calculate(pd.DataFrame(hours.reshape(-1, 30), columns=NAMES))
        found = found.filter(period="analysis").to_df()
        return np.stack([found[n, "jensen_shannon", "alert"].to_numpy(dtype=bool) for n in NAMES], axis=1)

    return judge


show = Show(fresh, whole=True)
show.run(bytes_of_state=ROWS * 30 * 4, note="the window's rows, which have to be sent or kept", drift_hours=24)
