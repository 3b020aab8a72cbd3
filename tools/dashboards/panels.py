"""Dashboards: the parts of a dashboard in Grafana's JSON.

Rules: two data sources by their uid, so that a dashboard needs no choosing; an SQL target says its query in the fields
of both plugins (PostgreSQL's and SQLite's), and either finds its own; the same lines give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Json = dict[str, Any]

PROMETHEUS: Final[Json] = {"type": "prometheus", "uid": "lightship-prometheus"}
SQL: Final[Json] = {"type": "frser-sqlite-datasource", "uid": "lightship-sql"}
#: Columns of a dashboard.
WIDTH: Final = 24
_LETTERS: Final = "ABCDEFGH"
_GOOD_TO_BAD: Final = ("green", "orange", "red")


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and what a series of it is called."""

    expression: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel; `steps` are the values from which it is orange and red.

    Attributes:
        queries: PromQL; or one SQL text in `sql`.
        kind: Grafana's name of it.
        says: what it tells, shown on the panel's corner.
    """

    title: str
    says: str
    kind: Literal["stat", "timeseries", "bargauge", "table"] = "timeseries"
    queries: Sequence[Query] = ()
    sql: str = ""
    unit: str = "short"
    width: int = 8
    height: int = 8
    steps: tuple[float, ...] = ()
    stacked: bool = False
    least: float | None = 0.0
    most: float | None = None
    instant: bool = False


@dataclass(frozen=True)
class Dashboard:
    """One dashboard: rows of panels."""

    uid: str
    title: str
    says: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    variables: Sequence[tuple[str, str, str]] = field(default=())  # name, label, metric whose label it is

    def to_json(self) -> Json:
        """As Grafana imports it."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.says,
            "tags": ["lightship"],
            "schemaVersion": 39,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-6h", "to": "now"},
            "timezone": "browser",
            "timepicker": {},
            "weekStart": "",
            "fiscalYearStartMonth": 0,
            "annotations": {"list": [_ALERTS]},
            "templating": {"list": [_variable(*v) for v in self.variables]},
            "links": [_LINKS],
            "panels": self._panels(),
        }

    def _panels(self) -> list[Json]:
        made: list[Json] = []
        top = 0
        for title, panels in self.rows:
            made.append(_row(len(made) + 1, title, top))
            top, left, height = top + 1, 0, 0
            for panel in panels:
                if left + panel.width > WIDTH:
                    top, left, height = top + height, 0, 0
                place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
                made.append(_panel(len(made) + 1, panel, place))
                left, height = left + panel.width, max(height, panel.height)
            top += height
        return made


_LINKS: Final[Json] = {
    "title": "Lightship",
    "type": "dashboards",
    "tags": ["lightship"],
    "asDropdown": False,
    "icon": "external link",
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "tooltip": "",
    "url": "",
}
_ALERTS: Final[Json] = {
    "name": "Alerts",
    "enable": True,
    "hide": False,
    "iconColor": "red",
    "datasource": PROMETHEUS,
    "target": {
        "refId": "Alerts",
        "expr": 'ALERTS{alertname=~"Lightship.*", alertstate="firing"}',
        "instant": False,
        "range": True,
    },
}


def _variable(name: str, label: str, metric: str) -> Json:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": PROMETHEUS,
        "query": {"query": f"label_values({metric}, {name})", "refId": "Variable"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "options": [],
        "regex": "",
        "skipUrlSync": False,
    }


def _row(ident: int, title: str, top: int) -> Json:
    place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
    return {"id": ident, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(ident: int, panel: Panel, place: Json) -> Json:
    return {
        "id": ident,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "gridPos": place,
        "datasource": SQL if panel.sql else PROMETHEUS,
        "targets": [_sql(panel.sql)] if panel.sql else [_promql(i, q, panel) for i, q in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": _TIMES if panel.sql else []},
        "options": _OPTIONS[panel.kind],
    }


def _promql(i: int, query: Query, panel: Panel) -> Json:
    return {
        "refId": _LETTERS[i],
        "datasource": PROMETHEUS,
        "editorMode": "code",
        "expr": query.expression,
        "legendFormat": query.legend or "__auto",
        "instant": panel.instant,
        "range": not panel.instant,
    }


def _sql(text: str) -> Json:
    plain = " ".join(text.split())
    sqlite = {"queryText": plain, "rawQueryText": plain, "queryType": "table", "timeColumns": []}
    return {
        "refId": "A",
        "datasource": SQL,
        "format": "table",
        "editorMode": "code",
        "rawQuery": True,
        "rawSql": plain,
        **sqlite,
    }


def _defaults(panel: Panel) -> Json:
    steps = [{"color": color, "value": at} for color, at in zip(_GOOD_TO_BAD, (None, *panel.steps), strict=False)]
    made: Json = {
        "unit": panel.unit,
        "color": {"mode": "thresholds" if panel.steps or panel.kind == "stat" else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": steps},
        "mappings": [],
    }
    if panel.least is not None and not panel.sql:
        made["min"] = panel.least
    if panel.most is not None:
        made["max"] = panel.most
    if panel.kind == "timeseries":
        made["color"] = {"mode": "palette-classic"}
        made["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 5,
            "showPoints": "never",
            "spanNulls": True,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.steps else "off"},
        }
    return made


_TIMES: Final[list[Json]] = [
    {
        "matcher": {"id": "byRegexp", "options": "/_ms$/"},
        "properties": [{"id": "unit", "value": "dateTimeFromNow"}],
    }
]
_REDUCE: Final[Json] = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: Final[dict[str, Json]] = {
    "stat": {
        "reduceOptions": _REDUCE,
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
        "wideLayout": True,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
    },
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "bargauge": {
        "reduceOptions": _REDUCE,
        "displayMode": "gradient",
        "orientation": "horizontal",
        "showUnfilled": True,
        "valueMode": "color",
        "namePlacement": "auto",
        "sizing": "auto",
        "minVizWidth": 8,
        "minVizHeight": 16,
        "maxVizHeight": 300,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
    },
    "table": {"showHeader": True, "cellHeight": "sm", "frameIndex": 0},
}
