"""Web: how states, times and digests read.

Rules: pure. Every state is a word with a shape; the shape says in black and white what the colour says in colour. A
state this file does not know is shown as it is, with the shape of the unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from markupsafe import Markup

from .plots import text
from .scales import DAY, duration, moment, number

SHAPES: Final = {"ok": "●", "busy": "◐", "wait": "○", "warn": "▲", "bad": "■", "hold": "⏸", "off": "◌", "none": "·"}

_TONES: Final = {
    "ok": "ok taken-back online active done committed completed finished passed pass released champion holds",
    "busy": "running pending fetching trying soaking swapped reaching rolling-back registered challenger",
    "wait": "waiting proposed idle",
    "warn": "warning timed-out inconclusive quarantined forced silent dismissed rolled-back local",
    "bad": "critical still-serving failed refused fail revoked aborted exposed fleet broken cloned",
    "hold": "paused",
    "off": "offline muted",
}
TONE: Final = {word: tone for tone, words in _TONES.items() for word in words.split()}

#: What the dashboard tells people to type. It only reads; these act.
COMMANDS: Final = {
    "device": "lightship device show {id}",
    "devices": "lightship device list",
    "token": "lightship device token",
    "sign-in": "lightship token create",
    "rollout": "lightship rollout status {id}",
    "pause": "lightship rollout pause {id}",
    "resume": "lightship rollout resume {id}",
    "abort": "lightship rollout abort {id}",
    "retrain": "lightship retrain run {id}",
    "release": "lightship release {id}",
    "alerts": "lightship alert list",
    "ack": "lightship alert ack {id}",
    "audit": "lightship audit verify",
    "exposure": "lightship model exposure {id}",
}


def tone(word: object) -> str:
    """The tone of a state: ok, busy, wait, warn, bad, hold, off or none."""
    return TONE.get(str(word).replace(" ", "-"), "none")


def status(word: object, as_if: str = "") -> Markup:
    """A state as shape and word; `as_if` gives it the tone of another state."""
    kind = tone(as_if or word)
    said = str(word) if word not in ("", None) else "unknown"
    shape = f'<span class="shape" aria-hidden="true">{SHAPES[kind]}</span>'
    return _markup(f'<span class="st {kind}">{shape}{text(said)}</span>')


def command(name: str, ident: object = "") -> Markup:
    """The command line that acts, to be copied."""
    return _markup(f'<code class="cmd">{text(COMMANDS[name].format(id=ident))}</code>')


def when(at: object, now: int | None = None) -> Markup:
    """A time in UTC, without the date where it is close to `now`; – for none."""
    if not isinstance(at, int) or at <= 0:
        return _markup("–")
    near = now is not None and moment(at, "%Y%m%d") == moment(now, "%Y%m%d")
    shown = moment(at, "%H:%M:%S" if near else "%Y-%m-%d %H:%M")
    return _markup(f'<time datetime="{text(moment(at, "%Y-%m-%dT%H:%M:%SZ"))}">{text(shown)}</time>')


def ago(at: object, now: int) -> str:
    """How long before `now`, in one unit that matters."""
    if not isinstance(at, int) or at <= 0:
        return "never"
    if at > now + 5_000:
        return f"in {duration((at - now) / 1_000)}"
    seconds = max(0, now - at) // 1_000
    size, unit = next((x for x in ((86_400, "d"), (3_600, "h"), (60, "min")) if seconds >= x[0]), (1, "s"))
    return f"{seconds // size} {unit} ago"


def short(digest: object) -> Markup:
    """The beginning of a digest; the whole of it where a pointer rests."""
    full = str(digest or "")
    return _markup(f'<code title="{text(full)}">{text(full[:12])}</code>' if full else "–")


def percent(value: object, digits: int = 1) -> str:
    """A share as per cent; – for none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{digits}f} %"


def plain(value: object) -> str:
    """A value from a JSON column, for people."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and abs(value) >= 1_000 and math.isfinite(value):
        return f"{value:,.0f}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value) or "–"
    return str(value)


def size(length: object) -> str:
    """A length in bytes, for people."""
    if not isinstance(length, int):
        return "–"
    return f"{length / 1e6:.1f} MB" if length >= 1_000_000 else f"{length / 1e3:.1f} kB"


def health(readings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Readings of a device's health with their units, which their names end with."""
    units = {"percent": "%", "mb": "MB", "c": "°C"}
    out = []
    for name, value in sorted(readings.items()):
        stem, _, end = name.rpartition("_")
        if end == "s" and stem and isinstance(value, int | float):
            out.append((stem.replace("_", " "), duration(float(value))))
        elif end in units and stem:
            out.append((stem.replace("_", " "), f"{plain(value)} {units[end]}"))
        else:
            out.append((name.replace("_", " "), plain(value)))
    return out


def soon(at: object, now: int, days: int = 2) -> bool:
    """Whether a time is less than `days` away, or past."""
    return isinstance(at, int) and at > 0 and at - now < days * DAY


def _markup(safe: str) -> Markup:
    # Every part was escaped by `text`, or is a constant of this file.
    return Markup(safe)  # noqa: S704 - see above
