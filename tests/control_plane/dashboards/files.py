"""What the files of the dashboards say: their expressions, and the names in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightship.api.metrics import METRICS
from lightship.dashboards.export import FILES

PROMETHEUS, ALERTMANAGER, GRAFANA = (FILES / name for name in ("prometheus", "alertmanager", "grafana"))
RECORDING, ALERTS = PROMETHEUS / "lightship.recording.yml", PROMETHEUS / "lightship.alerts.yml"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
_NAME = re.compile(r"\blightship[a-z0-9_:]*[a-z0-9]")


def dashboard(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def targets(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every query of a dashboard, with the title of its panel."""
    for panel in dashboard(path)["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target


def expressions(path: Path) -> list[tuple[str, str]]:
    return [(title, t["expr"]) for title, t in targets(path) if "expr" in t]


def queries(path: Path) -> list[tuple[str, str]]:
    return [(title, t["rawSql"]) for title, t in targets(path) if "rawSql" in t]


def filled(expression: str) -> str:
    """As Grafana would send it, with everything chosen."""
    return re.sub(r"\$(group|model)\b", ".*", expression).replace("$__rate_interval", "1m")


def metric_names(text: str) -> set[str]:
    """Names of metrics in an expression; what is quoted is none."""
    return set(_NAME.findall(re.sub(r'"[^"]*"', '""', text)))


def recorded() -> set[str]:
    return set(re.findall(r"- record: (\S+)", RECORDING.read_text()))


def known() -> set[str]:
    return {name for m in METRICS for name in m.names} | recorded()


def rule_expressions(path: Path) -> str:
    """All that stands behind `expr:` in a file of rules, with folded lines."""
    found = re.findall(r"^ +expr: (?:>-\n((?: {10,}.*\n)+)|(.*)\n)", path.read_text(), re.MULTILINE)
    return "\n".join(folded or plain for folded, plain in found)
