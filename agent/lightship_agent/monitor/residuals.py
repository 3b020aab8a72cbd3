"""Monitor: a regressor's labels, as counts of how far it was off.

Rules: truth less prediction, in float32 and in the cells of the profile, as they were counted in training.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final

import numpy as np

from lightship_agent.contract.moments import LIMIT, STEPS
from lightship_agent.contract.profile import ResidualReference

_MISSING_AND_OVER: Final = 2


class ResidualMeter:
    """Measures single residuals; a numpy call for each would cost more than all of this."""

    def __init__(self, reference: ResidualReference) -> None:
        """Take the constants of the profile."""
        bins = reference.bins
        self._low, self._high, self._edges = bins.low, bins.high, bins.edges
        self.cells = bins.cells
        self._bound = reference.bound
        self._factor = STEPS / reference.scale

    def measure(self, truth: float, predicted: float) -> tuple[int, int, bool]:
        """The cell of a residual, its steps, and whether it is an error."""
        residual = float(np.float32(truth - predicted))
        if math.isnan(residual):  # of a model that answered so
            return self.cells - 1, 0, True
        if residual > self._high:
            cell = self.cells - _MISSING_AND_OVER
        elif residual < self._low:
            cell = 0
        else:
            cell = 1 + bisect_right(self._edges, residual)
        steps = max(-LIMIT, min(LIMIT, round(max(-1e6, min(1e6, residual * self._factor)))))
        return cell, steps, abs(residual) > self._bound


class Residuals:
    """The residuals of one window so far."""

    def __init__(self, cells: int) -> None:
        """Nothing yet."""
        self.cells = [0] * cells
        self.total = self.squares = 0

    def add(self, cell: int, steps: int) -> None:
        """Count one."""
        self.cells[cell] += 1
        self.total += steps
        self.squares += steps * steps
