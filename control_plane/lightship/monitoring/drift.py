"""Monitoring: is what this device sees still what the model was trained on?

Rules of this room:
* pure: profile, windows, memory and settings in, a verdict and the next memory out; no I/O, clock, thread or chance;
* the test is T = min(X², G) on two samples of counts, against a noncentral χ² whose noncentrality is the effect
  floor: a shift smaller than the floor is tolerated at any sample size, and the reference's own noise counts;
* windows are tested alone and in aligned blocks (`ladder`), at levels whose sum is the budget, whatever the dependence
  between tests; once a device has a history of its own, it is also the measure (`calibration`);
* a warning is the ladder's. Critical takes more: the conformal detector's evidence, or, before there is a history, the
  same alarm on other rows; and a shift whose lower end is above the floor;
* a window without rows is still a window: a gap is passed as `empty_counts`, so that blocks stay aligned;
* nothing depends on the order in which windows came over the network; sorting and removing duplicates is the
  caller's part.

Until a device has a history the guarantee is for rows that are exchangeable with the reference. A device with a lasting
offset of its own above the floor does alarm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import msgspec
import numpy as np

from lightship_agent.contract.codes import DriftError
from lightship_agent.contract.profile import SCORE_BINS, ReferenceProfile, WindowCounts

from . import conformal
from .calibration import Calibration
from .cbpe import estimate
from .drift_settings import DriftSettings
from .hourly import Now, learn_hours, ranked_by_hour, season_facts, season_of
from .joint import Together, judge_together
from .ladder import Hours, Ladder
from .lag import repeats
from .layout import Block, Layout
from .memory import NEVER, Memory
from .performance import Labelled, judge_errors
from .residuals import judge_residuals, label_streams
from .season import Hour, are_spread
from .two_sample import psi_debiased, psi_exceeds
from .verdict import Alarm, Calibrated, Estimate, FeatureShift, QualityFault, Verdict

#: The name of the stream of labelled errors.
ERRORS: Final = "errors"
#: That of a regressor's residuals.
RESIDUALS: Final = "residuals"
#: The p-value of a latest block below which a shift may be under way: who shows more of it is not alone.
LEANING: Final = 0.05


class Step(NamedTuple):
    """What one window led to."""

    verdict: Verdict
    memory: Memory


def judge_stream(
    profile: ReferenceProfile,
    windows: Sequence[WindowCounts],
    first_window: int,
    settings: DriftSettings,
    importances: Mapping[str, float] | None = None,
) -> Verdict:
    """Judge the last of `windows`, and the blocks that end with it, without a memory: see `watch_stream`.

    Raises:
        DriftError: drift.unknown when there is no window.
        DataError: data.profile-mismatch when counts and profile have different layouts.
    """
    layout = Layout(profile, settings, importances or {})
    return _judge(layout, windows, first_window, settings, None, None)[0]


def watch_stream(
    profile: ReferenceProfile,
    windows: Sequence[WindowCounts],
    first_window: int,
    settings: DriftSettings,
    memory: Memory | None,
    key: str,
    importances: Mapping[str, float] | None = None,
    labels: Sequence[Labelled] = (),
    hours: Sequence[Hour] = (),
    together: Sequence[Together] = (),
) -> Step:
    """Judge the last of `windows`, and the blocks that end with it, in the light of what is remembered.

    Warning: a test that is due now crosses its line. Critical, for a stream with a history of its own: the conformal
    alarm of record stands too, and the lower end of its debiased PSI is above the floor. For one without: the same
    stream did so before, at the evaluated window before or in the block of the same length before, on rows the two
    tests don't share (one bad window makes the longer blocks around it alarm too), with the same floor; but not where
    windows are of different hours, until there are enough of them. For a data-quality fault the repetition is enough.

    Args:
        profile: the reference of the bundle that counted the windows.
        windows: consecutive windows of one device and one bundle; `settings.history` of them are enough.
        first_window: the number of the first one within the stream, from 0.
        settings: budget, floors, exclusions.
        memory: what the call for the window before gave; None at first. One of other streams starts afresh.
        key: of the stream; ties of ranks are broken by it.
        importances: mean |attribution| per feature, from the manifest; ranks the evidence.
        labels: what labels have said so far of the windows up to this one.
        hours: when each of `windows` was; without them no season is looked for.
        together: stretches of windows whose products have come; each is judged once.

    Raises:
        DriftError: drift.unknown when there is no window.
        DataError: data.profile-mismatch when counts and profile have different layouts.
    """
    layout = Layout(profile, settings, importances or {})
    if memory is None or not memory.fits(layout, settings):
        memory = Memory.fresh(layout, settings)
    verdict, memory = _judge(layout, windows, first_window, settings, memory, key, hours)
    verdict, memory = _judge_pairs(verdict, memory, profile, settings, together)
    verdict = msgspec.structs.replace(
        verdict,
        estimate=_estimate(profile, windows, settings.history),
        calibrated=_with_lag(verdict.calibrated, profile, windows, settings),
    )
    return Step(_judge_labels(verdict, profile, labels, settings), memory)


def _judge_labels(
    verdict: Verdict, profile: ReferenceProfile, labels: Sequence[Labelled], settings: DriftSettings
) -> Verdict:
    """Labels that say the model has become worse are critical at once: their evidence is sequential already."""
    streams = label_streams(profile, settings)
    errors = judge_errors(labels, profile.errors, profile.labelled, settings, streams=streams)
    residuals = judge_residuals(labels, profile, settings)
    verdict = msgspec.structs.replace(verdict, performance=errors, residuals=residuals)
    found = [(ERRORS, errors.since)] if errors and errors.alarm else []
    if residuals and residuals[0].alarm:
        found.append((RESIDUALS, residuals[0].since))
    if not found:
        return verdict
    alarms = [
        Alarm(
            name=name,
            kind="performance",
            level_windows=max(verdict.window + 1 - since, 1),
            first_window=since,
            confirmed=True,
        )
        for name, since in found
    ]
    return msgspec.structs.replace(verdict, level="critical", alarms=(*alarms, *verdict.alarms))


def _judge_pairs(
    verdict: Verdict, memory: Memory, profile: ReferenceProfile, settings: DriftSettings, together: Sequence[Together]
) -> Step:
    """Judge the stretches that are new; a pair that goes together otherwise is critical when it does so again."""
    kept = {f.name for f in profile.features} - set(settings.exclude)
    names = tuple(f.name for f in profile.features)
    for stretch in sorted(together):
        if profile.moments is None or stretch.last <= memory.joint.window:
            continue
        found = judge_together(stretch, profile.moments, names, memory.joint, settings)
        memory = replace(memory, joint=found.history)
        verdict = msgspec.structs.replace(verdict, joint=found.shift)
        if found.shift is None or not found.alarm or not kept.issuperset(found.shift.pair):
            continue
        size = stretch.last + 1 - stretch.first
        name = " with ".join(found.shift.pair)
        alarm = Alarm(
            name=name, kind="joint", level_windows=size, first_window=stretch.first, confirmed=found.confirmed
        )
        level = "critical" if found.confirmed or verdict.level == "critical" else "warning"
        tested = tuple(dict.fromkeys([*verdict.tested, size]))
        verdict = msgspec.structs.replace(verdict, alarms=(*verdict.alarms, alarm), level=level, tested=tested)
    return Step(verdict, memory)


def _estimate(profile: ReferenceProfile, windows: Sequence[WindowCounts], most: int) -> Estimate | None:
    """What the scores of the latest windows let expect."""
    classes = len(profile.predictions)
    if not (classes and profile.hits and profile.scores):
        return None
    recent = np.sum([w.scores for w in windows[-most:] if len(w.scores) == len(profile.scores)], axis=0)
    if not np.any(recent):
        return None
    shape = (classes, SCORE_BINS)
    return estimate(np.reshape(recent, shape), np.reshape(profile.hits, shape), np.reshape(profile.scores, shape))


def _judge(
    layout: Layout,
    windows: Sequence[WindowCounts],
    first_window: int,
    settings: DriftSettings,
    memory: Memory | None,
    key: str | None,
    hours: Sequence[Hour] = (),
) -> tuple[Verdict, Memory]:
    if not windows:
        raise DriftError("drift.unknown", "Expected at least one window, found none.")
    remembered = memory or Memory.fresh(layout, settings)
    last = first_window + len(windows) - 1
    new = last > remembered.window
    calibration = remembered.calibration(layout, settings)
    season = season_of(remembered, layout, settings, hours) if memory and len(hours) == len(windows) else None
    ladder = Ladder(layout, windows, first_window, settings, calibration if memory else None, season)
    if season is not None:
        calibration = calibration.mixed(season.calibration, season.table.chosen)
    due = ladder.ending_at(last)
    before = next((found for e in range(last - 1, first_window - 1, -1) if (found := ladder.ending_at(e))), [])
    standing = [b for size in settings.sizes if (b := ladder.latest(size))]
    repeated = [b for block in due if (b := ladder.preceding(block))]
    ladder.test({*due, *before, *standing, *repeated})
    base = Block(last, 1)
    if new and key is not None and base in ladder.statistics:
        line = settings.record_line(layout.streams)
        remembered = remembered.ranked(last, ladder.statistics[base], ladder.enough[base], key, line)
        remembered = ranked_by_hour(remembered, last, ladder.by_hour.get(base), key, line)
    facts = _Facts(layout, ladder, calibration, remembered.deciding(), are_spread(hours))
    alarms = _alarms(facts, due, before)
    quality = _quality(ladder, standing)
    verdict = Verdict(
        level="critical" if any(a.confirmed for a in alarms) else "warning" if alarms else "ok",
        window=last,
        rows=windows[-1].rows,
        tested=tuple(b.size for b in due),
        alarms=alarms,
        evidence=_evidence(facts, standing),
        quality=quality,
        p_value=_device_p(ladder, standing),
        calibrated=_calibrated(facts) if memory is not None else None,
        season=season_facts(remembered, settings),
        leaning=_leaning(facts, standing),
        record={layout.names[s]: int(facts.memory.since[s]) for s in np.flatnonzero(facts.memory.active)},
    )
    if new:
        remembered = _learn(facts, remembered, due, standing, season)
    return verdict, remembered


class _Facts(NamedTuple):
    layout: Layout
    ladder: Ladder
    calibration: Calibration  # of each stream, what it is judged by
    memory: Memory
    spread: bool = False  # windows are of different times of the day


def _learn(facts: _Facts, memory: Memory, due: list[Block], standing: list[Block], season: Hours | None) -> Memory:
    layout, ladder, settings, last = facts.layout, facts.ladder, facts.ladder.settings, facts.ladder.end - 1
    faulty = {f.name for b in due for f in ladder.faults[b]}
    healthy = np.array([n not in faulty for n in layout.names], dtype=np.bool_)
    quiet = np.ones(layout.streams, dtype=np.bool_)
    for block in standing:
        quiet &= ~ladder.over[block]
    counts = layout.cells(ladder.counts(Block(last, 1))[None, :])[0]
    statistics = {b: ladder.statistics[b] for b in due}
    # Who has a history doesn't learn from what stands out of it; who has none yet must see all there is.
    smallest = min(due, key=lambda b: b.size, default=None)
    if smallest:
        healthy &= ladder.enough[smallest]
    sound = healthy.copy()
    healthy &= quiet | ~facts.calibration.ready
    learnt = memory.learn(statistics, counts, last, healthy=healthy, quiet=quiet, settings=settings)
    if season is None:
        return learnt
    lagging = Block(last + 1 - settings.sizes[-1], 1)
    late = layout.cells(ladder.counts(lagging)[None, :])[0] if lagging.start >= ladder.first else None
    now = Now(last, season.of[-1], counts, {b: ladder.by_hour[b] for b in due})
    then = None if late is None else Now(lagging.start, season.of[-settings.sizes[-1]], late, {})
    return learn_hours(learnt, layout, settings, season, now, then, sound=sound, quiet=quiet)


def _calibrated(facts: _Facts) -> Calibrated:
    names, memory, calibration = facts.layout.names, facts.memory, facts.calibration
    worst = int(np.argmax(calibration.phi)) if names else 0
    return Calibrated(
        windows=int(memory.learnt.min()) if names else 0,
        needed=facts.ladder.settings.warm_up,
        ready=int(calibration.ready.sum()),
        streams=len(names),
        phi=float(calibration.phi[worst]) if names else 1.0,
        phi_name=names[worst] if names else "",
        away=tuple(names[s] for s in np.flatnonzero(calibration.away)),
    )


def _with_lag(
    calibrated: Calibrated | None, profile: ReferenceProfile, windows: Sequence[WindowCounts], settings: DriftSettings
) -> Calibrated | None:
    names = tuple(f.name for f in profile.features)
    found = repeats((w.moments for w in windows), names, settings.exclude)
    if calibrated is None or found is None:
        return calibrated
    return msgspec.structs.replace(calibrated, lag=found.lag, lag_name=found.name, every=found.every)


def shift_table(
    profile: ReferenceProfile,
    counts: WindowCounts,
    settings: DriftSettings,
    importances: Mapping[str, float] | None = None,
) -> tuple[FeatureShift, ...]:
    """Every stream's shift in `counts`, the largest importance × shift first; for display, it raises no alarm.

    Raises:
        DataError: data.profile-mismatch.
    """
    layout = Layout(profile, settings, importances or {})
    ladder = Ladder(layout, [counts], 0, settings)
    block = Block(0, 1)
    ladder.test({block})
    everything = [(s, block) for s in range(layout.streams)]
    return _shifts(layout, ladder, everything, None)


def _alarms(facts: _Facts, due: list[Block], before: list[Block]) -> tuple[Alarm, ...]:
    """The tests that cross their line now, and whether there is more than one reason to believe them."""
    found: list[Alarm] = []
    ladder = facts.ladder
    for block in due:
        disjoint = [b for b in before if b.end <= block.start]
        previous = ladder.preceding(block)
        earlier = {key for b in [*disjoint, *([previous] if previous else [])] for key in ladder.crossed(b)}
        for kind, name in ladder.crossed(block):
            repeated = (kind, name) in earlier
            confirmed = repeated if kind != "shift" else _confirmed(facts, block, name, repeated=repeated)
            found.append(
                Alarm(name=name, kind=kind, level_windows=block.size, first_window=block.start, confirmed=confirmed)
            )
    return tuple(found)


def _confirmed(facts: _Facts, block: Block, name: str, *, repeated: bool) -> bool:
    """Whether a shift is beyond doubt, and its lower end above the floor."""
    s = facts.layout.names.index(name)
    calibration = facts.calibration
    if calibration.ready[s]:
        believed = bool(facts.memory.active[s])
    else:
        # A day or a week has a course: until its own windows are enough, that is seen again is no reason to believe it.
        believed = repeated and (not facts.spread or bool(calibration.away[s]))
    if not believed:
        return False
    cells = facts.layout.cells(facts.ladder.counts(block)[None, :])[0, s]
    return bool(psi_exceeds(cells, facts.ladder.reference(block, s), facts.ladder.settings.effect_floor))


def _evidence(facts: _Facts, standing: list[Block]) -> tuple[FeatureShift, ...]:
    """The streams that stand out in their most telling block."""
    layout, ladder = facts.layout, facts.ladder
    tests = max(1, len(standing) * layout.streams)
    chosen: list[tuple[int, Block]] = []
    for s in range(layout.streams):
        # Every length has its own line: compare p-values relative to it.
        block = min(standing, key=lambda b: (ladder.p_values[b][s] / b.size, b.size), default=None)
        if block and (ladder.over[block][s] or ladder.p_values[block][s] * tests < ladder.settings.device_alpha):
            chosen.append((s, block))
    return _shifts(layout, ladder, chosen, facts.memory)


def _shifts(
    layout: Layout, ladder: Ladder, chosen: list[tuple[int, Block]], memory: Memory | None
) -> tuple[FeatureShift, ...]:
    if not chosen:
        return ()
    vectors = [ladder.counts(b) for _, b in chosen]
    cells = layout.cells(np.stack(vectors))[np.arange(len(chosen)), [s for s, _ in chosen]]
    psi, low, high = psi_debiased(cells, np.stack([ladder.reference(block, s) for s, block in chosen]))
    line = ladder.settings.record_line(layout.streams)
    evidence = conformal.evidence(memory.sums) / line if memory else np.zeros(layout.streams)
    shifts = [
        FeatureShift(
            name=layout.names[s],
            kind=layout.kinds[s],
            psi=float(psi[i]),
            psi_low=float(low[i]),
            psi_high=float(high[i]),
            p_value=float(ladder.p_values[block][s]),
            level_windows=block.size,
            first_window=block.start,
            rows=int(cells[i].sum()),
            score=layout.weights[s] * float(psi[i]),
            alarm=memory is not None and bool(ladder.over[block][s]),
            current=tuple(int(c) for c in vectors[i][layout.raw[s]]),
            reference=tuple(int(c) for c in layout.raw_reference[layout.raw[s]]),
            since=_since(memory, s),
            evidence=float(min(evidence[s], 1e9)),
            seasonal=ladder.seasonal(block, s),
        )
        for i, (s, block) in enumerate(chosen)
    ]
    return tuple(sorted(shifts, key=lambda e: (-e.score, -e.psi, e.name)))


def _since(memory: Memory | None, s: int) -> int | None:
    """When the change began, as far as ranks can tell; None where there are none."""
    if memory is None or memory.window == NEVER or not memory.history[s].any():
        return None
    return int(memory.began[s])


def _quality(ladder: Ladder, standing: list[Block]) -> tuple[QualityFault, ...]:
    """The faults of the latest blocks, one per feature and kind: that of the shortest block."""
    faults: dict[tuple[str, str], QualityFault] = {}
    for block in standing:
        for fault in ladder.faults[block]:
            faults.setdefault((fault.name, fault.kind), fault)
    return tuple(faults.values())


def _leaning(facts: _Facts, standing: list[Block]) -> tuple[str, ...]:
    """The streams that may have shifted: by far less than makes an alarm, or by the ranks of the device's windows."""
    names = facts.layout.names
    leans = facts.memory.active
    if standing:
        leans = leans | (np.min([facts.ladder.p_values[b] for b in standing], axis=0) < LEANING)
    return tuple(names[s] for s in np.flatnonzero(leans))


def _device_p(ladder: Ladder, standing: list[Block]) -> float | None:
    """The smallest p-value of the latest blocks times their number (Bonferroni)."""
    if not standing or not ladder.layout.streams:
        return None
    values = np.concatenate([ladder.p_values[b] for b in standing])
    return min(1.0, float(values.min()) * len(values))
