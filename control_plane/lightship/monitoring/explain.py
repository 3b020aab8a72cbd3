"""Monitoring: in words, why a device did or didn't alarm.

Rules of this room: pure; a stored verdict and the settings in, sentences out; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence

from .drift_settings import DriftSettings
from .verdict import Alarm, FeatureShift, Performance, ResidualShift, Verdict

_KINDS = {
    "missing": "is missing more often than training explains",
    "range": "is beyond the range of training more often than it may be",
    "stuck": "does not move",
}


#: The φ of labels that is worth a sentence.
_ALIKE = 2.0
_SIDES = {
    "up": ("have moved up", "above what", "The model answers too low."),
    "down": ("have moved down", "below what", "The model answers too high."),
    "wider": ("are spread wider", "as far out as", "The model has become less exact."),
}


def explain(device: str, verdict: Verdict, settings: DriftSettings) -> list[str]:
    """Sentences, the most important first."""
    said = [f"{device} is {verdict.level} at window {verdict.window} ({verdict.rows} rows)."]
    if not verdict.tested:
        said.append(f"No test was due: fewer than {settings.min_rows} rows since the last one.")
    names = list(dict.fromkeys(a.name for a in verdict.alarms if a.kind == "shift"))
    shifts = {e.name: e for e in verdict.evidence}
    alarms = [[a for a in verdict.alarms if a.name == name and a.kind == "shift"] for name in names]
    said += [_shift(shifts.get(found[0].name), found, settings.effect_floor) for found in alarms]
    said += _together(verdict)
    said += _quality(verdict)
    said += told_by_labels(verdict.performance, verdict.residuals)
    said += _estimate(verdict)
    said += _quiet(verdict, settings, set(names))
    said += _history(verdict)
    said += _season(verdict)
    share = settings.budget / settings.horizon_windows
    said.append(
        f"The budget is {settings.budget:g} false alarms per {settings.horizon_windows:,} windows ({share:.1e} per "
        f"window), for shifts above {settings.effect_floor:g} on the scale of PSI."
    )
    return said


def _shift(shift: FeatureShift | None, alarms: list[Alarm], floor: float) -> str:
    name = alarms[0].name
    spans = " and ".join(str(a.level_windows) for a in sorted(alarms, key=lambda a: a.level_windows))
    windows = "window" if spans == "1" else "windows"
    if shift is None:
        return f"{name} has shifted, over {spans} {windows}."
    against = " against the same hours of other weeks" if shift.seasonal else ""
    sentence = f"{name} has shifted{against}: PSI {shift.psi:.2f} (95 %: {shift.psi_low:.2f} to {shift.psi_high:.2f})"
    sentence += f" over {spans} {windows}, p = {shift.p_value:.1e}"
    if shift.since is not None:
        sentence += f", since about window {shift.since}"
    if any(a.confirmed for a in alarms):
        return f"{sentence}. It is critical: {_because(shift)}."
    if shift.psi_low <= floor:
        return f"{sentence}. It is a warning: it may still be as small as is tolerated."
    return f"{sentence}. It is a warning: the alarm of record is at {shift.evidence:.1%} of its line."


def _together(verdict: Verdict) -> list[str]:
    """Which features go together otherwise, if that alarmed."""
    j = verdict.joint
    alarms = [a for a in verdict.alarms if a.kind == "joint"]
    if j is None or not alarms:
        return []
    sentence = f"{j.pair[0]} and {j.pair[1]} go together otherwise than in training, whatever each does alone: their "
    sentence += f"correlation is {j.now:.2f} and was {j.before:.2f}, over {alarms[-1].level_windows} windows, p = "
    sentence += f"{j.p_value:.1e}"
    swapped = f" {j.swapped[0]} and {j.swapped[1]} look as if they had changed places." if j.swapped else ""
    again = " It is critical: so it was in the windows before." if alarms[-1].confirmed else " It is a warning."
    return [f"{sentence}.{again}{swapped}"]


def _because(shift: FeatureShift) -> str:
    if shift.evidence >= 1:
        return "the ranks of this device's own windows say so too"
    return "it was seen before, on other rows"


def _quality(verdict: Verdict) -> list[str]:
    confirmed = {a.name for a in verdict.alarms if a.confirmed and a.kind in _KINDS}
    return [
        f"{q.name} {_KINDS[q.kind]}: {q.rate:.1%} against {q.reference_rate:.1%}, over {q.level_windows} windows, "
        f"p = {q.p_value:.1e}" + (", and was before." if q.name in confirmed else ".")
        for q in verdict.quality
    ]


def told_by_labels(p: Performance | None, residuals: Sequence[ResidualShift]) -> list[str]:
    """What labels say of errors, and of a regressor's residuals; nothing where none came."""
    said = []
    if p is not None:
        sentence = (
            f"Of {p.labelled} labelled rows since window {p.since}, {p.rate:.1%} were wrong; {p.expected:.1%} of "
        )
        sentence += f"the held-out rows were, and up to {p.tolerated:.1%} is tolerated. "
        sentence += "The model has become worse." if p.alarm else f"The evidence is at {p.evidence:.1%} of its line."
        said.append(sentence)
    alarmed = [r for r in residuals if r.alarm]
    said += map(_residuals, alarmed or residuals[:1])
    phi = max([r.phi for r in residuals] + ([p.phi] if p is not None else []), default=1.0)
    if phi > _ALIKE:
        said.append(
            f"Windows of labels differ more than chance has it (φ = {phi:.1f}): it takes {phi:.0f} times the labels."
        )
    return said


def _residuals(r: ResidualShift) -> str:
    """One side of the residuals: how many are there, how far off that is, and what follows."""
    moved, where, meaning = _SIDES[r.side]
    size = "" if r.bias is None else f"bias about {r.bias:+.2f} sd of held-out residuals"
    size += "" if r.spread is None else f", spread about {r.spread:.2f} times theirs"
    if not r.alarm:
        of = f": {size}" if size else ""
        return (
            f"Residuals since window {r.since}{of}. The evidence that they {moved} is at {r.evidence:.1%} of its line."
        )
    sentence = f"The residuals {moved}: {r.share:.1%} of {r.labelled} labelled rows since window {r.since} are {where} "
    sentence += f"{r.expected:.1%} of the held-out rows were, and up to {r.tolerated:.1%} is tolerated"
    return f"{sentence}{f'; {size}' if size else ''}. {meaning}"


def _estimate(verdict: Verdict) -> list[str]:
    e = verdict.estimate
    if e is None:
        return []
    sentence = f"From its scores the accuracy should be {e.accuracy:.1%} ({e.low:.1%} to {e.high:.1%}); it was "
    return [f"{sentence}{e.expected:.1%} on held-out rows. {e.blind_spot}"]


def _quiet(verdict: Verdict, settings: DriftSettings, alarmed: set[str]) -> list[str]:
    """What stands out and does not alarm at this window, or that nothing does."""
    rest = [e for e in verdict.evidence if e.name not in alarmed][:3]
    said = []
    for e in rest:
        if e.alarm:
            said.append(f"{e.name} stands beyond its line over {e.level_windows} windows; it alarmed when they ended.")
        else:
            said.append(
                f"{e.name} stands out (PSI {e.psi:.2f}, p = {e.p_value:.1e}) and does not alarm: the budget asks for "
                f"less than {settings.alpha(e.level_windows, _streams(verdict)):.1e}."
            )
    if not rest and not verdict.alarms and not verdict.quality:
        said.append("Nothing stands out.")
    return said


def _streams(verdict: Verdict) -> int:
    return verdict.calibrated.streams if verdict.calibrated and verdict.calibrated.streams else 1


def _history(verdict: Verdict) -> list[str]:
    c = verdict.calibrated
    if c is None:
        return []
    said = []
    if c.windows < c.needed:
        said.append(
            f"Its own history is too short to be its measure: {c.windows} of {c.needed} windows. Until then the budget "
            f"holds for rows that are independent, and critical takes the same shift twice."
        )
    else:
        said.append(f"It is judged by {c.windows} windows of its own, in {c.ready} of {c.streams} streams.")
    if c.phi > 1.3:
        said.append(
            f"φ is {c.phi:.1f} in {c.phi_name}: rows are correlated, or windows have effects of their own. Small "
            f"shifts take longer; if you can, keep fewer rows that are further apart."
        )
    if c.every > 1:
        said.append(
            f"Rows of {c.lag_name} repeat: lag-1 {c.lag:.2f}. One row in {c.every} carries nearly the same information."
        )
    if c.away:
        said.append(f"Different from the training data since it was first looked at: {', '.join(c.away[:5])}.")
    return said


def _season(verdict: Verdict) -> list[str]:
    """What is compared with the same hour of the week, or why nothing is."""
    s = verdict.season
    if s is None:
        return []
    if s.streams:
        named = ", ".join(s.streams[:5]) + (f" and {len(s.streams) - 5} more" if len(s.streams) > 5 else "")
        verb = "has a season and is" if len(s.streams) == 1 else "have seasons and are"
        return [f"{named} {verb} compared with the same hour of up to {s.weeks} other weeks (UTC), not with training."]
    if s.over:
        return ["No stream has a season: its weeks were learnt, and no hour of the week is like itself."]
    sentence = (
        f"Seasons: {s.hours} of 168 hours of the week were seen, in up to {s.weeks} of {s.needed} weeks; a stream "
    )
    return [f"{sentence}is compared with its own hour once a season is evident, at the earliest after two weeks."]
