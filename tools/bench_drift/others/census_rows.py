"""NannyML's US census data (Massachusetts, employment) as numbers: `program.py OUT.npz`, in NannyML's environment."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

folder = Path(find_spec("nannyml").origin).parent / "datasets" / "data"
parts = [pd.read_parquet(folder / f"employment_MA_{name}.pq") for name in ("reference", "analysis")]
truth = pd.read_parquet(folder / "employment_MA_analysis_target.pq")
names = [c for c in parts[0].columns if c not in ("id", "employed", "year", "prediction", "predicted_probability")]
both = pd.concat(parts)
codes = {c: both[c].astype("category").cat.codes if c != "AGEP" else both[c] for c in names}
rows = np.stack([codes[c].to_numpy(dtype=np.float32) for c in names], axis=1)
np.savez(
    sys.argv[1],
    names=np.array(names),
    rows=rows,
    reference=len(parts[0]),
    predicted=both["prediction"].to_numpy(dtype=np.int64),
    truth=np.concatenate([parts[0]["employed"].to_numpy(), truth["employed"].to_numpy()]).astype(np.int64),
)
