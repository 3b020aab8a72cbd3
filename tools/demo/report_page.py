"""The demo's report as one HTML file that needs nothing else: no server, no script, no other file.

Rules:
* pure: what the demo measured in, a page out; it draws with the dashboard's own plots, words and styles;
* a key that is missing leaves its section out; nothing is made up in its place;
* every word from outside is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lightship.web import facts, figures, pages, plots

Json = dict[str, Any]

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
#: Up to so many devices have a chart each; more share one.
_OWN_CHARTS: Final = 6

_TEMPLATE: Final = """\
{% import "_parts.html" as parts with context %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
{{ css }}
.verdict { display: flex; gap: 4px 18px; align-items: baseline; flex-wrap: wrap; font-size: 17px; margin: 8px 0 2px; }
.verdict .st { font-weight: 700; }
nav.toc { display: flex; gap: 2px 16px; flex-wrap: wrap; font-size: 13px; color: var(--soft); margin-top: 8px; }
</style>
</head>
<body>
<main id="main">
<h1>{{ title }}</h1>
<p class="verdict">{% if passed is none %}{{ status('no verdict', 'waiting') }}{% elif passed %}\
{{ status('passed', 'passed') }}{% else %}{{ status('failed', 'failed') }}{% endif %}
{% if steps %}<span>{{ steps|selectattr('passed')|list|length }} of {{ steps|length }} steps went as expected</span>\
{% endif %}{% if seconds is not none %} <span class="faint">in {{ seconds|duration }}</span>{% endif %}</p>
<p class="faint">{% if started %}Began {{ when(started) }} UTC. {% endif %}\
{% if model %}Model {{ model }}. {% endif %}{{ broker }}</p>
<nav class="toc" aria-label="Sections">{% for anchor, words in sections %}<a href="#{{ anchor }}">{{ words }}</a>\
{% endfor %}</nav>

{% if steps %}
<section id="steps"><h2>What was expected, and what happened</h2>
<div class="scroll"><table class="stack"><thead><tr><th>Step</th><th>Expected</th><th>Happened</th>\
<th class="n">Took</th><th>Verdict</th></tr></thead><tbody>
{% for s in steps %}
<tr{% if not s.passed %} class="badrow"{% endif %}><td data-label="Step"><b>{{ s.name }}</b></td>
<td data-label="Expected" class="words">{{ s.expected }}</td>
<td data-label="Happened" class="words">{{ s.happened }}</td>
<td data-label="Took" class="n">{% if s.seconds is not none %}{{ s.seconds|duration }}{% else %}–{% endif %}</td>
<td data-label="Verdict">{{ status('passed' if s.passed else 'failed') }}</td></tr>
{% endfor %}
</tbody></table></div></section>
{% endif %}

{% if marks %}
<section id="events"><h2>What happened when</h2>
<p class="faint">The numbers stand for the same instants in every plot below.</p>
<ol class="marks">{% for m in marks %}<li>{{ when(m.at, now) }} {{ m.label }}</li>{% endfor %}</ol></section>
{% endif %}

{% if exposures %}
<section id="served"><h2>Which version each device served when</h2>
{{ served }}
{% for version, spans in exposures %}{% if (spans[0].model, version) in rolled_back %}
<h3>Who was ever served by version {{ version }}, and for how long</h3>
<p>{{ spans|map(attribute='device')|unique|list|length }} of {{ device_count }} devices, \
{{ (spans|sum(attribute='seconds'))|duration }} in sum, \
{{ '{:,}'.format(spans|sum(attribute='requests')) }} predictions. \
{% set still = spans|selectattr('ended_at', 'none')|list %}{% if still %}{{ status('still served', 'failed') }} by \
{{ still|map(attribute='device')|join(', ') }}.\
{% else %}{{ status('Nobody is served by it now', 'ok') }}.{% endif %}</p>
{{ parts.exposure_table(spans, now, rolled_back, false) }}
{% endif %}{% endfor %}
{% for version, spans in exposures if (spans[0].model, version) not in rolled_back %}
<details id="spans-{{ version }}"><summary>Version {{ version }}: \
{{ spans|map(attribute='device')|unique|list|length }} \
devices</summary>{{ parts.exposure_table(spans, now, rolled_back, false) }}</details>
{% endfor %}</section>
{% endif %}

{% if accuracy_plots %}
<section id="accuracy"><h2>Accuracy over time</h2>
<p class="faint">Per window, on the rows that got a label. The background says which version the device served.</p>
<div class="plots">{% for p in accuracy_plots %}{{ p }}{% endfor %}</div>
{% if accuracy %}
<h3>In sum, by device and version</h3>
<div class="scroll"><table><thead><tr><th>Device</th>{% for v in accuracy_versions %}<th class="n">Version {{ v }}</th>\
{% endfor %}</tr></thead><tbody>
{% for device, by_version in accuracy.items() %}<tr><td class="id">{{ device }}</td>{% for v in accuracy_versions %}
{% set a = by_version.get(v) %}<td class="n">{% if a and a.labelled %}<b>{{ (1 - a.errors / a.labelled)|percent }}</b> \
<span class="faint">of {{ a.labelled }}</span>{% else %}–{% endif %}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endif %}</section>
{% endif %}

{% if drift_plots %}
<section id="drift"><h2>Drift over time</h2>
<p class="faint">The most shifted feature of each window against the training data. \
▲ and ■ are alarms within the budget.</p>
<div class="plots">{% for p in drift_plots %}{{ p }}{% endfor %}</div>
{% if pairs %}<h3>Where the rows differed most</h3>
<div class="pairs">{% for p in pairs %}{{ p }}{% endfor %}</div>{% endif %}
</section>
{% endif %}

{% if rollouts %}
<section id="rollouts"><h2>Rollouts</h2>
{% for x in rollouts %}{{ parts.rollout_card(x, now, false) }}{% endfor %}</section>
{% endif %}

{% if versions %}
<section id="versions"><h2>Versions</h2>
<div class="scroll"><table class="stack"><thead><tr><th>Version</th><th>Aliases</th><th>State</th>\
<th class="n">Held-out metric</th><th class="n">Size</th><th>Digest</th><th>Released</th></tr></thead><tbody>
{% for v in versions %}
<tr><td data-label="Version">{{ parts.version_chip(v.model, v.version, false) }}</td>
<td data-label="Aliases">{% for a in v.aliases %}<span class="alias">{{ a }}</span> {% else %}–{% endfor %}</td>
<td data-label="State">{{ status(v.state) }}{% if v.forced_reason %} {{ status('forced') }} \
<span class="faint">{{ v.forced_reason }}</span>{% endif %}{% if (v.model, v.version) in rolled_back %} \
{{ status('rolled back', 'warning') }}{% endif %}</td>
<td data-label="Held-out metric" class="n">{% set m = primary(v.metrics) %}{% if m %}{{ m[0] }} \
<b>{{ m[1]|percent if m[0] == 'accuracy' else m[1]|number }}</b>{% else %}–{% endif %}</td>
<td data-label="Size" class="n">{{ v.length|size }}</td><td data-label="Digest">{{ v.digest|short }}</td>
<td data-label="Released">{{ when(v.released_at, now) }}</td></tr>
{% endfor %}
</tbody></table></div></section>
{% endif %}

{% if devices %}
<section id="devices"><h2>Devices at the end</h2>
<div class="scroll"><table class="stack"><thead><tr><th>Device</th><th>Group</th><th>Seen</th>\
<th>Serves</th><th>Drift</th><th>Update</th></tr></thead><tbody>
{% for d in devices %}
<tr><td data-label="Device"><span class="id">{{ d.id }}</span></td><td data-label="Group">{{ d.group }}</td>
<td data-label="Seen">{{ status('online' if d.online else 'silent') }}</td>
<td data-label="Serves">{{ parts.version_chip(d.model, d.version, false) }}</td>
<td data-label="Drift">{{ status(d.drift) }}{% if d.quarantined %} {{ status('quarantined') }}{% endif %}</td>
<td data-label="Update">{% if d['update'].state %}{{ status(d['update'].state) }} <code>{{ d['update'].code }}</code>\
{% else %}–{% endif %}</td></tr>
{% endfor %}
</tbody></table></div></section>
{% endif %}

{% if alarms %}
<section id="alarms"><h2>Alarms</h2>
<ul class="plainlist">{% for a in alarms %}<li>{{ status(a.level) }} <span class="faint">{{ when(a.opened_at, now) }}\
{% if a.closed_at %} to {{ when(a.closed_at, now) }}{% else %}, open{% endif %} · {{ a.kind }}</span><br>\
{{ a.sentence }}</li>
{% endfor %}</ul></section>
{% endif %}
</main>
</body>
</html>
"""


def render_report(report: Mapping[str, Any]) -> str:
    """One self-contained HTML page.

    Args:
        report: what the demo measured. `title`, `started` (ms), `seconds`, `passed`, `model`, `broker` (a sentence),
            `steps` [{name, expected, happened, seconds, passed}], `windows` (`views.window_series`), `rollouts`
            (`rollouts.view`), `versions` (`views.models`), `alarms`, `exposures` by version (`views.exposure`),
            `events` [{at, label}], `devices` (`views.devices`), `drift_examples` [{name, reference, current}] and
            `accuracy` {device: {version: {labelled, errors}}}. Any of them may be missing.
    """
    windows: dict[str, Sequence[Json]] = report.get("windows") or {}
    exposures = _exposures(report)
    marks = [plots.Mark(int(e["at"]), str(e.get("label", ""))) for e in report.get("events") or [] if "at" in e]
    marks.sort(key=lambda m: m.at)
    times = _times(report, windows, exposures, marks)
    bad = _rolled_back(report)
    accuracy = {d: {str(v): a for v, a in found.items()} for d, found in (report.get("accuracy") or {}).items()}
    spans = [e for _, found in exposures for e in found]
    found: Json = {
        "title": report.get("title") or "Lightship demo",
        "started": report.get("started"),
        "seconds": report.get("seconds"),
        "passed": report.get("passed"),
        "model": report.get("model") or "",
        "broker": report.get("broker") or "",
        "steps": [_defaults(s, _STEP) for s in report.get("steps") or []],
        "marks": marks,
        "exposures": exposures,
        "served": figures.served_timeline(
            spans, "Version served, by device", bad=bad, marks=marks, times=times, list_marks=False
        ),
        "device_count": len(report.get("devices") or {e["device"] for e in spans}),
        "rolled_back": bad,
        "accuracy": accuracy,
        "accuracy_versions": sorted({v for a in accuracy.values() for v in a}, key=lambda v: (len(v), v)),
        "accuracy_plots": _charts(windows, marks, times, "accuracy"),
        "drift_plots": _charts(windows, marks, times, "psi"),
        "pairs": [_pair(x) for x in report.get("drift_examples") or []],
        "rollouts": [_rollout(x) for x in report.get("rollouts") or []],
        "versions": [_defaults(v, _VERSION) for v in report.get("versions") or []],
        "devices": [_defaults(d, _DEVICE) for d in report.get("devices") or []],
        "alarms": [_defaults(a, _ALARM) for a in report.get("alarms") or []],
    }
    template = pages.environment().from_string(_TEMPLATE)
    css = (pages.HERE / "static" / "lightship.css").read_text(encoding="utf-8")
    sections = [(anchor, words) for anchor, words, key in _SECTIONS if found[key]]
    now = times[1] if times else report.get("started") or 0
    return template.render(policy=_POLICY, css=figures.trusted(css), now=now, sections=sections, **found)


_SECTIONS: Final = (
    ("steps", "Steps", "steps"),
    ("events", "Events", "marks"),
    ("served", "Who served what", "exposures"),
    ("accuracy", "Accuracy", "accuracy_plots"),
    ("drift", "Drift", "drift_plots"),
    ("rollouts", "Rollouts", "rollouts"),
    ("versions", "Versions", "versions"),
    ("devices", "Devices", "devices"),
    ("alarms", "Alarms", "alarms"),
)
# What a row has when its key is missing.
_STEP: Final[Json] = {"name": "", "expected": "", "happened": "", "seconds": None, "passed": False}
_VERSION: Final[Json] = {
    "model": "",
    "version": 0,
    "aliases": [],
    "state": "",
    "forced_reason": "",
    "metrics": {},
    "length": None,
    "digest": "",
    "released_at": None,
}
_DEVICE: Final[Json] = {
    "id": "",
    "group": "",
    "online": False,
    "model": "",
    "version": 0,
    "drift": "unknown",
    "quarantined": False,
    "update": {"state": "", "code": ""},
}
_ALARM: Final[Json] = {"level": "", "opened_at": None, "closed_at": None, "kind": "", "sentence": ""}
_ROLLOUT: Final[Json] = {
    "id": "",
    "model": "",
    "version": 0,
    "previous_version": 0,
    "status": "",
    "reason": "",
    "wave": 0,
    "waves": [],
    "devices": {},
    "gate": None,
    "created_at": None,
    "created_by": "",
}
_EXPOSURE: Final[Json] = {"model": "", "version": 0, "ended_at": None, "seconds": 0.0, "requests": 0, "failures": 0}


def _defaults(row: Mapping[str, Any], empty: Json) -> Json:
    return {**empty, **row}


def _exposures(report: Mapping[str, Any]) -> list[tuple[int, list[Json]]]:
    """By version, ascending; versions nobody served are left out."""
    found = []
    for version, spans in (report.get("exposures") or {}).items():
        whole = [_defaults(e, {**_EXPOSURE, "version": int(version)}) for e in spans]
        if kept := [e for e in whole if "device" in e and "began_at" in e]:
            found.append((int(version), kept))
    return sorted(found, key=lambda f: f[0])


def _times(
    report: Mapping[str, Any],
    windows: Mapping[str, Sequence[Json]],
    exposures: list[tuple[int, list[Json]]],
    marks: list[plots.Mark],
) -> tuple[int, int] | None:
    """One time axis for every plot, so that they can be read one below the other."""
    instants = [w["at"] for rows in windows.values() for w in rows] + [m.at for m in marks]
    instants += [t for _, spans in exposures for e in spans for t in (e["began_at"], e["ended_at"]) if t is not None]
    if (started := report.get("started")) and (seconds := report.get("seconds")):
        instants.append(int(started + seconds * 1_000))
    return (min(instants), max(instants)) if instants and min(instants) < max(instants) else None


def _rolled_back(report: Mapping[str, Any]) -> set[tuple[str, int]]:
    over = ("rolled-back", "rolling-back")
    taken = (x for x in report.get("rollouts") or [] if x.get("status") in over)
    return {(x.get("model", ""), int(x.get("version", 0))) for x in taken}


def _charts(
    windows: Mapping[str, Sequence[Json]], marks: list[plots.Mark], times: tuple[int, int] | None, what: str
) -> list[Any]:
    """A chart per device on one scale, or one for all of them where they are many."""
    ordered = sorted(windows.items(), key=lambda item: figures.natural(item[0]))
    known = {d: rows for d, rows in ordered if any(w.get(what) is not None for w in rows)}
    if not known:
        return []
    if len(known) > _OWN_CHARTS:
        groups = {f"{len(known)} devices": known}
    else:
        groups = {device: {device: rows} for device, rows in known.items()}
    scale = figures.accuracy_range(known) if what == "accuracy" else figures.drift_range(known)
    draw = figures.accuracy_chart if what == "accuracy" else figures.drift_chart
    return [
        draw(
            group,
            name,
            marks=marks,
            times=times,
            list_marks=False,
            y_range=scale,
            bands=figures.version_bands(next(iter(group.values()))) if len(group) == 1 else (),
        )
        for name, group in groups.items()
    ]


def _pair(example: Mapping[str, Any]) -> Any:
    then, now = list(example.get("reference") or ()), list(example.get("current") or ())
    return figures.trusted(plots.histogram_pair(then, now, str(example.get("name", ""))))


def _rollout(view: Mapping[str, Any]) -> Json:
    """A rollout's view in the shape of its card."""
    x = _defaults(view, _ROLLOUT)
    waves = []
    for i, members in enumerate(x["waves"]):
        states = {d: facts.device_state(x["status"], x["devices"].get(d, ""), done=False) for d in members}
        if x["status"] == "completed":
            # The view tells how devices are now, and they may have gone on to another version since.
            states = {d: "done" if s in ("done", "failed", "not done") else s for d, s in states.items()}
        done = sum(s == "done" for s in states.values())
        current = i + 1 == x["wave"] and x["status"] in ("running", "paused")
        wave = {"number": i + 1, "name": f"wave {i + 1}", "gated": i + 1 < len(x["waves"]), "devices": states}
        waves.append({**wave, "done": done, "total": len(members), "current": current})
    said = facts.gate_sentence(x["gate"])
    sentence = "" if said and said in x["reason"] else said
    return {**x, "waves": waves, "gate_sentence": sentence, "checks": facts.gate_checks(x["gate"])}
