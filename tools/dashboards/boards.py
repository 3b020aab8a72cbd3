"""Dashboards: the four of them, in the order in which somebody who is called at night looks at them."""

from __future__ import annotations

from typing import Final

from .fleet_boards import FLEET, ROLLOUT
from .report_boards import DRIFT, INGEST

BOARDS: Final = {"fleet": FLEET, "rollout": ROLLOUT, "model-and-drift": DRIFT, "ingest-health": INGEST}
