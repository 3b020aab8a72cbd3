"""Web: from what the views say to the plots that show it.

Rules: pure; takes the JSON of `lightship.api.views` and nothing else, so that a page and a report draw the same
picture; a key that is missing is a thing that is not drawn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup

from . import plots
from .scales import moment

Json = Mapping[str, Any]
Windows = Mapping[str, Sequence[Json]]
Bad = Collection[tuple[str, int]]
#: Features that are shown as histograms.
WORST_FEATURES: Final = 6


def accuracy_chart(
    windows: Windows,
    title: str,
    *,
    marks: Sequence[plots.Mark] = (),
    bands: Sequence[plots.Band] = (),
    times: tuple[int, int] | None = None,
    list_marks: bool = True,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """Accuracy on labelled rows per window, one line per device."""
    return trusted(
        plots.line_chart(
            _lines(windows, "accuracy"),
            title=title,
            y_label="share of labelled rows that were right",
            y_range=y_range or accuracy_range(windows),
            marks=marks,
            bands=bands,
            times=times,
            percent=True,
            low_is_worse=True,
            list_marks=list_marks,
        )
    )


def drift_chart(
    windows: Windows,
    title: str,
    *,
    marks: Sequence[plots.Mark] = (),
    bands: Sequence[plots.Band] = (),
    times: tuple[int, int] | None = None,
    list_marks: bool = True,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """The largest shift of a feature per window, one line per device; alarms as dots."""
    dots = [
        plots.Dot(w["at"], float(w["psi"]), w["level"], f"{device}: {w['level']} at {moment(w['at'])}")
        for device, rows in windows.items()
        for w in rows
        if w.get("level") in ("warning", "critical") and w.get("psi") is not None
    ]
    return trusted(
        plots.line_chart(
            _lines(windows, "psi"),
            title=title,
            y_label="largest PSI of a feature, debiased; ▲ warning ■ critical",
            y_range=y_range or drift_range(windows),
            marks=marks,
            bands=bands,
            dots=dots[-400:],
            times=times,
            root=True,
            list_marks=list_marks,
        )
    )


def served_timeline(
    exposures: Iterable[Json],
    title: str,
    *,
    bad: Bad = (),
    marks: Sequence[plots.Mark] = (),
    times: tuple[int, int] | None = None,
    now: int | None = None,
    names: Mapping[str, str] | None = None,
    list_marks: bool = True,
) -> Markup:
    """Which version each device served when.

    Args:
        exposures: spans as the views give them.
        title: what is shown.
        bad: (model, version) pairs that were rolled back; their spans are hatched and say so.
        marks: things that happened.
        times: the ends of the time axis, ms.
        now: where the axis ends when `times` says nothing: a span that lasts is drawn until then.
        names: lanes by device id, in their order; None: every device, by id.
        list_marks: whether the marks are explained below.
    """
    exposures = list(exposures)
    if times is None and now is not None and exposures:
        times = (min(e["began_at"] for e in exposures), now)
    spans: dict[str, list[plots.Span]] = {device: [] for device in names or ()}
    for e in sorted(exposures, key=lambda e: (natural(e["device"]), e["began_at"])):
        model, version = e.get("model", ""), int(e["version"])
        rolled = (model, version) in bad
        label = f"v{version} ✕ rolled back" if rolled else f"v{version}"
        css = f"{plots.version_css(version)} bad" if rolled else plots.version_css(version)
        spans.setdefault(e["device"], []).append(plots.Span(e["began_at"], e.get("ended_at"), label, css))
    lanes = [plots.Lane((names or {}).get(device, device), found) for device, found in spans.items()]
    return trusted(plots.timeline(lanes, title=title, marks=marks, times=times, list_marks=list_marks))


def shift_pair(shift: Json) -> Markup:
    """A feature's reference and what was seen, as in `FeatureShift`."""
    now = list(shift.get("current") or ())
    feature = shift.get("kind") == "feature" and len(now) >= 4
    cells = ["below range", *(f"bin {i}" for i in range(1, len(now) - 2)), "above range", "missing"] if feature else []
    note = f"PSI {shift.get('psi', 0):.2f} ({shift.get('psi_low', 0):.2f} to {shift.get('psi_high', 0):.2f})"
    title = f"{shift.get('name', '')}{' · alarm' if shift.get('alarm') else ''}"
    return trusted(
        plots.histogram_pair(
            list(shift.get("reference") or ()),
            now,
            title,
            cells=cells,
            ends=("below", "above, missing") if feature else ("", ""),
            note=note,
        )
    )


def accuracy_spark(rows: Sequence[Json], device: str) -> Markup:
    """The accuracy of a device's last windows, the size of a word."""
    values = [w.get("accuracy") for w in rows[-40:]]
    known = [v for v in values if v is not None]
    said = f"{device}: accuracy {100 * known[-1]:.0f} % in the last labelled window" if known else "no labels yet"
    low = min([0.8, *known])  # so that a point of accuracy looks the same on every device that is well
    return trusted(plots.sparkline(values, title=said, y_range=(low, 1.0)))


def version_bands(rows: Sequence[Json]) -> list[plots.Band]:
    """The stretches in which a device's windows came from one version."""
    bands: list[plots.Band] = []
    current: int | None = None
    for w in rows:
        version = int(w.get("version") or 0)
        if version == current:
            continue
        if bands:
            last = bands[-1]
            bands[-1] = plots.Band(last.begin, w["at"], last.label, last.css)
        bands.append(plots.Band(w["at"], None, f"v{version}", plots.version_css(version)))
        current = version
    return bands


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key in which meter-2 comes before meter-10."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", name)
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]


def accuracy_range(windows: Windows) -> tuple[float, float]:
    """From a round tenth below the lowest accuracy, and no higher than one half, to 1."""
    seen = [w["accuracy"] for rows in windows.values() for w in rows if w.get("accuracy") is not None]
    return (max(0.0, int(min([0.5, *seen]) * 10) / 10), 1.0)


def _lines(windows: Windows, what: str) -> list[plots.Series]:
    return [
        plots.Series(device, [(w["at"], w.get(what)) for w in rows])
        for device, rows in sorted(windows.items(), key=lambda item: natural(item[0]))
        if any(w.get(what) is not None for w in rows)
    ]


def drift_range(windows: Windows) -> tuple[float, float]:
    """From 0 to the largest shift of all, and at least to 0.1: noise must not look like drift."""
    seen = [w["psi"] for rows in windows.values() for w in rows if w.get("psi") is not None]
    return (0.0, max([0.1, *seen]))


def trusted(markup: str) -> Markup:
    """Markup that the template engine lets through: of our plots, which escape every word, or of our own files."""
    return Markup(markup)  # noqa: S704 - see above
