"""Monitor: why rows were refused, as counts per kind and feature.

Rules: pure, and never raises: it looks at what somebody sent, and that may be anything.
"""

from __future__ import annotations

import numpy as np

from lightship_agent.contract.quality import WHOLE, QualityCount
from lightship_agent.contract.schema import FeatureSchema


def why_refused(data: object, rows: int, schema: FeatureSchema) -> tuple[QualityCount, ...]:
    """What was wrong with `rows` rows that `schema` refused, given the data of the input if there was one.

    A row counts for each thing that is wrong with it, and a request whose data can't be looked at counts as "type".
    """
    if not isinstance(data, np.ndarray) or data.dtype.kind not in "fiub":
        return (QualityCount("type", WHOLE, rows),)
    if not data.size or data.size % schema.width or data.size // schema.width != rows:
        return (QualityCount("shape", WHOLE, rows),)
    with np.errstate(over="ignore"):
        matrix = data.reshape(rows, schema.width).astype(np.float32)
    found: list[QualityCount] = []
    for j, feature in enumerate(schema.features):
        column = matrix[:, j]
        gaps = np.isnan(column)
        wrong = {"missing": gaps & (not feature.nullable), "infinite": np.isinf(column)}
        if feature.is_categorical:
            last = len(feature.levels) - (feature.unknown_code is None)
            with np.errstate(invalid="ignore"):
                wrong["category"] = ~gaps & ((column < 0) | (column > last) | (column != np.floor(column)))
        found += [QualityCount(kind, j, int(bad.sum())) for kind, bad in wrong.items() if bad.any()]
    return tuple(sorted(found)) or (QualityCount("type", WHOLE, rows),)
