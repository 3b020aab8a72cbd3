"""Makes references and windows of a small classifier's stream, by drawing real rows and binning them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.profile import (
    Binner,
    ReferenceProfile,
    WindowCounts,
    count_outputs,
    profile_features,
)

Rows = npt.NDArray[np.float32]


class Stream:
    """A device with `features` standard normal features and a model that looks at the first two."""

    def __init__(self, seed: int, features: int = 6, reference_rows: int = 5_000, rows: int = 200) -> None:
        self.rng = np.random.default_rng(seed)
        self.features, self.rows = features, rows
        reference = self.draw(reference_rows)
        predictions, scores = self._outputs(reference)
        self.profile = ReferenceProfile(
            rows=reference_rows,
            features=profile_features(reference, [f"f{i}" for i in range(features)]),
            labels=("low", "high"),
            predictions=predictions,
            scores=scores,
            labelled=2_000,
            errors=200,
        )
        self._binner = Binner(self.profile.features)

    def draw(self, rows: int | None = None) -> Rows:
        return self.rng.standard_normal((rows or self.rows, self.features)).astype(np.float32)

    def count(self, rows: Rows) -> WindowCounts:
        predictions, scores = self._outputs(rows)
        counts = tuple(int(c) for c in self._binner.count(rows))
        return WindowCounts(rows=len(rows), counts=counts, predictions=predictions, scores=scores)

    def window(self, shift: float = 0.0, feature: int = -1, rows: int | None = None) -> WindowCounts:
        drawn = self.draw(rows)
        drawn[:, feature] += np.float32(shift)
        return self.count(drawn)

    def windows(self, n: int, shift: float = 0.0, feature: int = -1) -> list[WindowCounts]:
        return [self.window(shift, feature) for _ in range(n)]

    def _outputs(self, rows: Rows) -> tuple[tuple[int, ...], tuple[int, ...]]:
        signal = np.nan_to_num(rows[:, 0] + rows[:, 1])
        high = 1 / (1 + np.exp(-signal))
        labels = (high > 0.5).astype(np.int64)
        predictions, scores = count_outputs(labels, np.stack([1 - high, high], axis=1).astype(np.float32), 2)
        return tuple(int(c) for c in predictions), tuple(int(c) for c in scores)
