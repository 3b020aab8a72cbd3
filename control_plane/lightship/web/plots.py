"""Web: small plots, drawn on the server as SVG.

Rules of this file:
* pure: values in, a string of well-formed XML out; every word from outside is escaped;
* no style attribute, no script, no id: a strict content policy holds, and a page may show a plot twice. Colours come
  from classes in lightship.css, `s0` … `s7` for series, so light and dark are one drawing;
* positions along the time axis are per cent and heights are pixels: a plot fills the width it is given, and its
  words keep their size on a phone;
* colour is never alone: lines have names at their end, dots have shapes, spans have words, and every plot has a title
  and a description for those who listen.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from .scales import Tick, TimeScale, ValueScale, moment, number

#: Up to so many lines have a colour and a name each; beyond, all but the worst are grey.
MAX_COLOURED: Final = 12
WORST: Final = 4
COLOURS: Final = 8
#: Lines longer than this are thinned: every stretch keeps its lowest and its highest point.
MAX_POINTS: Final = 600
_LABEL_GAP: Final = 13
_NAME_LENGTH: Final = 15
_NOT_XML: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SHAPES: Final = {"ok": "●", "warning": "▲", "critical": "■"}


@dataclass(frozen=True)
class Series:
    """A line: (milliseconds, value) in order of time; None is a gap. Without `css` it gets the next colour."""

    name: str
    points: Sequence[tuple[int, float | None]]
    css: str = ""


@dataclass(frozen=True)
class Mark:
    """Something that happened at an instant."""

    at: int
    label: str


@dataclass(frozen=True)
class Band:
    """A stretch of time in the background; `end` None: it lasts."""

    begin: int
    end: int | None
    label: str
    css: str = ""


@dataclass(frozen=True)
class Dot:
    """A point of note on a line: `level` is ok, warning or critical and chooses the shape."""

    at: int
    y: float
    level: str
    label: str


@dataclass(frozen=True)
class Span:
    """A bar on a lane; `end` None: it lasts."""

    begin: int
    end: int | None
    label: str
    css: str = ""


@dataclass(frozen=True)
class Lane:
    """A row of a timeline."""

    name: str
    spans: Sequence[Span]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
    bands: Sequence[Band] = (),
    dots: Sequence[Dot] = (),
    times: tuple[int, int] | None = None,
    percent: bool = False,
    root: bool = False,
    low_is_worse: bool = False,
    list_marks: bool = True,
    height: int = 150,
) -> str:
    """Lines over time.

    Args:
        series: the lines; more than `MAX_COLOURED` are drawn grey, but for the `WORST`.
        title: what is shown.
        y_label: what the vertical axis measures.
        y_range: its ends; None fits the values.
        marks: numbered vertical lines, explained in a list below.
        bands: stretches in the background, e.g. which version served.
        dots: points of note.
        times: the ends of the time axis, ms; what lies outside is left out. None fits what is drawn.
        percent: values are shares, written as per cent.
        root: a square-root axis, for squared effects.
        low_is_worse: which end of the axis `WORST` speaks of.
        list_marks: False where a page explains its marks once.
        height: of the plotting area, in pixels.
    """
    cut = times if times and times[1] > times[0] else None
    lines = [replace(s, points=_thin(_finite(p for p in s.points if _within(p[0], cut)))) for s in series]
    dots, marks = [d for d in dots if _within(d.at, cut)], [m for m in marks if _within(m.at, cut)]
    values = [y for s in lines for _, y in s.points if y is not None]
    if not values:
        return _empty(title, "No data yet.")
    if y_range is None:
        y = ValueScale.over([*values, *(d.y for d in dots)], floor=0.0 if root else None, root=root)
    else:
        y = ValueScale(*y_range, root=root)
    x = TimeScale(*cut) if cut else TimeScale.over(_instants(lines, bands, marks))
    lines = _coloured(lines, low_is_worse=low_is_worse)
    area = _Area(x, y, height)
    body = [
        *(_band(area, b, height - 6 if low_is_worse else 11) for b in bands),
        *(_y_tick(area, t) for t in y.ticks(percent)),
        *(_x_tick(t, i, area.height) for i, t in enumerate(x.ticks())),
        *(_mark(x, m, i + 1, height) for i, m in enumerate(marks)),
        f'<svg class="lines" viewBox="0 0 1000 {height}" preserveAspectRatio="none" width="100%" height="{height}">',
        *(_polylines(area, s) for s in lines),
        "</svg>",
        *(_singles(area, s) for s in lines),
        *(_dot(area, d) for d in dots),
        *(_end_labels(area, lines) if len(lines) > 1 else ()),
    ]
    svg = _svg(title, _describe(lines, x, percent=percent), body, height=height + 20, top=14)
    several = len(lines) > 1
    legend = _legend(lines) if several else ""
    frame = "frame" if several else "frame alone"
    listed = _mark_list(marks) if list_marks else ""
    inner = f'{_caption(title, y_label)}<div class="{frame}">{svg}</div>{legend}{listed}'
    return f'<figure class="plot chart">{inner}</figure>'


def timeline(
    lanes: Sequence[Lane],
    *,
    title: str,
    marks: Sequence[Mark] = (),
    times: tuple[int, int] | None = None,
    list_marks: bool = True,
) -> str:
    """Bars on lanes over time, e.g. which version each device served when.

    Args:
        lanes: the rows, in the order of the picture.
        title: what is shown.
        marks: numbered vertical lines, explained in a list below.
        times: the ends of the time axis, ms; the second is also where a lasting span ends in the picture.
        list_marks: False where a page explains its marks once.
    """
    if not any(lane.spans for lane in lanes):
        return _empty(title, "Nothing yet.")
    cut = times if times and times[1] > times[0] else None
    marks = [m for m in marks if _within(m.at, cut)]
    instants = [t for lane in lanes for s in lane.spans for t in (s.begin, s.end) if t is not None]
    x = TimeScale(*cut) if cut else TimeScale.over([*instants, *(m.at for m in marks)])
    flags = [_mark(x, m, i + 1, 14, top=13) for i, m in enumerate(marks)]
    rows = [f'<span class="lane-name"></span>{_bare("flags", flags, 14)}'] if marks else []
    for lane in lanes:
        shown = [s for s in lane.spans if not cut or (s.begin <= cut[1] and (s.end is None or s.end >= cut[0]))]
        body = [_rule(x, m.at, 24) for m in marks] + [_bar(x, s) for s in shown]
        said = "; ".join(_span_words(s) for s in shown)
        svg = _svg(f"{lane.name}", said, body, height=24, css="lane")
        rows.append(f'<span class="lane-name" title="{text(lane.name)}">{text(lane.name)}</span>{svg}')
    axis = [_x_tick(t, i, 0) for i, t in enumerate(x.ticks())]
    rows.append(f'<span class="lane-name"></span>{_bare("axis", axis, 20)}')
    listed = _mark_list(marks) if list_marks else ""
    inner = "".join(rows)
    return f'<figure class="plot timeline">{_caption(title)}<div class="lanes">{inner}</div>{listed}</figure>'


def histogram_pair(
    reference: Sequence[float],
    current: Sequence[float],
    title: str,
    *,
    cells: Sequence[str] = (),
    ends: tuple[str, str] = ("", ""),
    note: str = "",
) -> str:
    """Two samples of counts side by side, each as shares of its own sum.

    Args:
        reference: counts per cell.
        current: counts per cell; the shorter of the two is taken to end with empty cells.
        title: what is shown.
        cells: names of the cells, for those who point at one.
        ends: what is written below the first and the last cells.
        note: one more fact for the caption.
    """
    n = max(len(reference), len(current))
    then, now = _shares(reference, n), _shares(current, n)
    if not n or not (any(then) or any(now)):
        return _empty(title, "No rows counted yet.")
    top, height = max(*then, *now), 72
    slot = 100 / n
    body = [f'<line class="base" x1="0" x2="100%" y1="{height}" y2="{height}"/>']
    for i, (a, b) in enumerate(zip(then, now, strict=True)):
        name = cells[i] if i < len(cells) and cells[i] else f"cell {i + 1}"
        said = f"<title>{text(name)}: reference {100 * a:.1f} %, now {100 * b:.1f} %</title>"
        bars = _column("then", i * slot + slot * 0.1, slot * 0.4, a / top * height, height)
        bars += _column("now", i * slot + slot * 0.5, slot * 0.4, b / top * height, height)
        body.append(f'<g>{said}<rect class="hit" x="{i * slot:.2f}%" y="0" width="{slot:.2f}%" height="72"/>{bars}</g>')
    for edge, x, words in (("first", "0", ends[0]), ("last", "100%", ends[1])):
        if words:
            body.append(f'<text class="tick x {edge}" x="{x}" y="{height + 14}">{text(words)}</text>')
    far = max(range(n), key=lambda i: abs(then[i] - now[i]))
    described = (
        f"{n} cells; the largest change is in cell {far + 1}: {100 * then[far]:.0f} % to {100 * now[far]:.0f} %."
    )
    svg = _svg(title, described, body, height=height + (18 if any(ends) else 2), top=2)
    keys = '<span class="key then">reference</span><span class="key now">now</span>'
    return (
        f'<figure class="plot pair">{_caption(title, note)}<div class="frame">{svg}</div>'
        f'<p class="legend always">{keys}</p></figure>'
    )


def sparkline(
    values: Sequence[float | None], *, title: str, y_range: tuple[float, float] | None = None, css: str = "s0"
) -> str:
    """A line the size of a word; None is a gap. The last value has a dot."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return f'<span class="spark none" title="{text(title)}">–</span>'
    y = ValueScale(*y_range) if y_range else ValueScale.over(known)
    width, height = 88, 18
    last = max(1, len(values) - 1)
    points = [(i * 1_000 // last, v) for i, v in enumerate(values)]
    x = TimeScale(0, 1_000)
    lines = []
    for run in _runs(_finite(points)):
        path = " ".join(f"{2 + (width - 6) * x.share(t):.1f},{2 + (height - 4) * (1 - y.share(v)):.1f}" for t, v in run)
        lines.append(f'<polyline class="line {_css(css)}" points="{path}"/>')
    at, value = next((t, v) for t, v in reversed(_finite(points)) if v is not None)
    cx, cy = 2 + (width - 6) * x.share(at), 2 + (height - 4) * (1 - y.share(value))
    dot = f'<circle class="dot {_css(css)}" cx="{cx:.1f}" cy="{cy:.1f}" r="2"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="spark" role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><title>{text(title)}</title>{"".join(lines)}{dot}</svg>'
    )


def text(words: object) -> str:
    """Any words as XML text or attribute value; what XML can't hold becomes U+FFFD."""
    return html.escape(_NOT_XML.sub("\ufffd", str(words)), quote=True)


def version_css(version: int) -> str:
    """The colour of a version, the same in every plot and table."""
    return f"s{(version - 1) % COLOURS}"


# Pieces of a chart ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Area:
    """Where a chart's lines are drawn."""

    x: TimeScale
    y: ValueScale
    height: int

    def down(self, value: float) -> float:
        """Pixels from the top."""
        return self.height * (1 - self.y.share(value))


def _within(at: int, times: tuple[int, int] | None) -> bool:
    return times is None or times[0] <= at <= times[1]


def _finite(points: Iterable[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    return [(t, y if y is not None and math.isfinite(y) else None) for t, y in points]


def _thin(points: list[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    if len(points) <= MAX_POINTS:
        return points
    size = -(-len(points) // (MAX_POINTS // 2))
    kept: list[tuple[int, float | None]] = []
    for i in range(0, len(points), size):
        known = [(t, y) for t, y in points[i : i + size] if y is not None]
        if known:
            ends = {min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])}
            kept.extend(sorted(ends))
        else:
            kept.append((points[i][0], None))
    return kept


def _runs(points: Iterable[tuple[int, float | None]]) -> list[list[tuple[int, float]]]:
    """The stretches between gaps."""
    runs: list[list[tuple[int, float]]] = [[]]
    for t, y in points:
        if y is not None:
            runs[-1].append((t, y))
        elif runs[-1]:
            runs.append([])
    return [r for r in runs if r]


def _instants(lines: Sequence[Series], bands: Sequence[Band], marks: Sequence[Mark]) -> list[int]:
    ends = [t for b in bands for t in (b.begin, b.end) if t is not None]
    return [*(t for s in lines for t, _ in s.points), *ends, *(m.at for m in marks)]


def _coloured(lines: Sequence[Series], *, low_is_worse: bool) -> list[Series]:
    """Every line with a class; the worst of many last, so that they lie on top."""
    if len(lines) <= MAX_COLOURED:
        return [s if s.css else replace(s, css=_nth_css(i)) for i, s in enumerate(lines)]

    def badness(s: Series) -> float:
        last = next((y for _, y in reversed(s.points) if y is not None), None)
        if last is None:
            return -math.inf
        return -last if low_is_worse else last

    ranked = sorted(lines, key=badness, reverse=True)
    worst = [replace(s, css=_nth_css(i)) for i, s in enumerate(ranked[:WORST])]
    return [*(replace(s, css="rest") for s in reversed(ranked[WORST:])), *reversed(worst)]


def _nth_css(i: int) -> str:
    return f"s{i % COLOURS}" + (" dashed" if i >= COLOURS else "")


def _polylines(area: _Area, s: Series) -> str:
    out = []
    for run in _runs(s.points):
        if len(run) > 1:
            path = " ".join(f"{1_000 * area.x.share(t):.1f},{area.down(y):.1f}" for t, y in run)
            out.append(f'<polyline class="line {_css(s.css)}" points="{path}"><title>{text(s.name)}</title></polyline>')
    return "".join(out)


def _singles(area: _Area, s: Series) -> str:
    """A dot for every point without a neighbour, and one at the end of the line."""
    runs = _runs(s.points)
    points = [r[0] for r in runs if len(r) == 1]
    if runs and len(runs[-1]) > 1 and s.css != "rest":
        points.append(runs[-1][-1])
    return "".join(
        f'<circle class="dot {_css(s.css)}" cx="{_pc(area.x.share(t))}" cy="{area.down(y):.1f}" r="2.5"/>'
        for t, y in points
    )


def _dot(area: _Area, d: Dot) -> str:
    shape = _SHAPES.get(d.level, "●")
    place = f'x="{_pc(area.x.share(d.at))}" y="{area.down(d.y) + 3.5:.1f}"'
    return f'<text class="note {_css(d.level)}" {place}>{shape}<title>{text(d.label)}</title></text>'


def _end_labels(area: _Area, lines: Sequence[Series]) -> list[str]:
    """Names at the ends of the lines, pushed apart until none covers another."""
    named = []
    for s in lines:
        last = next((y for _, y in reversed(s.points) if y is not None), None)
        if s.css != "rest" and last is not None and s.name:
            named.append((area.down(last), s))
    named.sort(key=lambda n: n[0])
    places: list[float] = []
    for wanted, _ in named:
        places.append(max(wanted, places[-1] + _LABEL_GAP) if places else wanted)
    limit = float(area.height)
    for i in range(len(places) - 1, -1, -1):
        places[i] = limit = min(places[i], limit)
        limit -= _LABEL_GAP
    return [
        f'<text class="end-label {_css(s.css)}" x="100%" dx="8" y="{y + 4:.1f}">{text(_short(s.name))}</text>'
        for y, (_, s) in zip(places, named, strict=True)
    ]


def _band(area: _Area, b: Band, label_y: int) -> str:
    begin = area.x.share(b.begin)
    end = area.x.share(b.end) if b.end is not None else 1.0
    inner = f'<rect class="fill" width="100%" height="{area.height}"/><text x="5" y="{label_y}">{text(b.label)}</text>'
    return (
        f'<svg class="band {_css(b.css)}" x="{_pc(begin)}" y="0" width="{_pc(max(0.0, end - begin))}" '
        f'height="{area.height}"><title>{text(b.label)}</title>{inner}</svg>'
    )


def _y_tick(area: _Area, t: Tick) -> str:
    y = area.height * (1 - t.at)
    line = f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="tick y" x="0" dx="-7" y="{y + 4:.1f}">{text(t.text)}</text>'


def _x_tick(t: Tick, i: int, y: int) -> str:
    # Every second one is left out where the page is narrow.
    css = "tick x opt" if i % 2 else "tick x"
    edge = " first" if t.at < 0.02 else " last" if t.at > 0.98 else ""
    line = f'<line class="{css}" x1="{_pc(t.at)}" x2="{_pc(t.at)}" y1="{y}" y2="{y + 4}"/>'
    return f'{line}<text class="{css}{edge}" x="{_pc(t.at)}" y="{y + 16}">{text(t.text)}</text>'


def _rule(x: TimeScale, at: int, height: int) -> str:
    where = _pc(x.share(at))
    return f'<line class="mark" x1="{where}" x2="{where}" y1="0" y2="{height}"/>'


def _mark(x: TimeScale, m: Mark, n: int, height: int, top: int = 0) -> str:
    where = _pc(x.share(m.at))
    flag = f'<text class="flag" x="{where}" y="{top - 3}">{n}<title>{text(m.label)}</title></text>'
    return f'<line class="mark" x1="{where}" x2="{where}" y1="{top}" y2="{height}"/>{flag}'


def _mark_list(marks: Sequence[Mark]) -> str:
    items = [f"<li><time>{text(moment(m.at, '%H:%M:%S'))}</time> {text(m.label)}</li>" for m in marks]
    return f'<ol class="marks">{"".join(items)}</ol>' if items else ""


def _legend(lines: Sequence[Series]) -> str:
    """Names beside their colours; shown where there is no room for names at the ends of lines."""
    crowded = any(s.css == "rest" for s in lines)
    ordered = list(reversed(lines)) if crowded else lines  # of many, the worst was drawn last
    keys = [f'<span class="key {_css(s.css)}">{text(s.name)}</span>' for s in ordered if s.css != "rest" and s.name]
    rest = sum(s.css == "rest" for s in lines)
    always = " always" if rest else ""
    if rest:
        keys.append(f'<span class="key rest">{rest} others</span>')
    return f'<p class="legend{always}">{"".join(keys)}</p>' if keys else ""


def _describe(lines: Sequence[Series], x: TimeScale, *, percent: bool) -> str:
    ends = []
    for s in lines[-MAX_COLOURED:]:
        last = next((y for _, y in reversed(s.points) if y is not None), None)
        if last is not None:
            ends.append(f"{s.name} ends at {number(last, 0.01 if percent else 0.0, percent=percent)}")
    said = "; ".join(ends)
    return f"{len(lines)} lines from {moment(x.begin)} to {moment(x.end)} UTC. {said}."


# Pieces of the others -------------------------------------------------------------------------------------------------


def _bar(x: TimeScale, s: Span) -> str:
    begin = x.share(s.begin)
    end = x.share(s.end) if s.end is not None else 1.0
    lasting = " lasting" if s.end is None else ""
    return (
        f'<svg class="span {_css(s.css)}{lasting}" x="{_pc(begin)}" y="3" width="{_pc(max(0.0, end - begin))}" '
        f'height="18"><title>{text(_span_words(s))}</title><rect class="fill" width="100%" height="18"/>'
        f'<line class="edge" x1="0" x2="0" y1="0" y2="18"/><text x="6" y="13">{text(s.label)}</text></svg>'
    )


def _span_words(s: Span) -> str:
    until = moment(s.end, "%H:%M:%S") if s.end is not None else "now"
    return f"{s.label}, {moment(s.begin)} to {until}"


def _column(css: str, x: float, width: float, tall: float, base: int) -> str:
    if tall <= 0:
        return ""
    tall = max(tall, 1.0)  # a cell that has a row must be seen
    return f'<rect class="{css}" x="{x:.2f}%" y="{base - tall:.1f}" width="{width:.2f}%" height="{tall:.1f}"/>'


def _shares(counts: Sequence[float], n: int) -> list[float]:
    known = [c if math.isfinite(c) and c > 0 else 0.0 for c in counts]
    known += [0.0] * (n - len(known))
    largest = max(known, default=0.0)
    if largest <= 0:
        return known
    scaled = [c / largest for c in known]  # the sum of huge counts could overflow
    total = sum(scaled)
    return [c / total for c in scaled]


def _svg(title: str, desc: str, body: Iterable[str], *, height: int, top: int = 0, css: str = "") -> str:
    inner = "".join(body)
    held = f'<svg class="shift" y="{top}" width="100%" height="{height}">{inner}</svg>' if top else inner
    named = f' class="{css}"' if css else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg"{named} role="img" width="100%" height="{height + top}">'
        f"<title>{text(title)}</title><desc>{text(desc)}</desc>{held}</svg>"
    )


def _bare(css: str, body: Iterable[str], height: int) -> str:
    inner = "".join(body)
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="{css}" width="100%" height="{height}">{inner}</svg>'


def _caption(title: str, unit: str = "") -> str:
    beside = f' <span class="unit">{text(unit)}</span>' if unit else ""
    return f"<figcaption>{text(title)}{beside}</figcaption>"


def _empty(title: str, words: str) -> str:
    return f'<figure class="plot">{_caption(title)}<p class="nothing">{text(words)}</p></figure>'


def _css(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9 -]", "", name)


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"


def _pc(share: float) -> str:
    return f"{100 * share:.2f}%"
