"""Monitoring: two tables of rows, compared by the same statistics that watch devices.

Rules of this room: pure; arrays in, a comparison out. The chance of a false alarm over all columns together is `alpha`.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from lightship.data.profile import reference_profile
from lightship_agent.contract.moments import Distance, Standardiser, products_of
from lightship_agent.contract.profile import Binner, ReferenceProfile, WindowCounts
from lightship_agent.contract.schema import FeatureSchema

from .drift import judge_stream, shift_table
from .drift_settings import DriftSettings
from .joint import JointShift, judge_products
from .verdict import FeatureShift, QualityFault

Rows = npt.NDArray[np.float32]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What two tables have in common, and what not."""

    drift: bool
    reference_rows: int
    current_rows: int
    alpha: float
    floor: float
    drifted: tuple[str, ...]  # columns, the most shifted first
    columns: tuple[FeatureShift, ...]  # all, the most shifted first
    quality: tuple[QualityFault, ...]
    joint: JointShift | None
    joint_drift: bool


def compare(reference: Rows, current: Rows, schema: FeatureSchema, *, alpha: float, floor: float) -> Comparison:
    """Compare two tables whose columns are the schema's.

    Args:
        reference: float32 `[n, columns]`.
        current: float32 `[m, columns]`.
        schema: names, and the words of columns that are categories.
        alpha: chance of a false alarm over everything that is compared.
        floor: the effect that is tolerated, on the scale of PSI.

    Raises:
        DataError: data.empty, data.profile-mismatch.
        SettingsError: settings.invalid.
    """
    words = {f.name: f.levels for f in schema.features if f.is_categorical}
    profile = reference_profile(reference, schema.names, categories=words)
    settings = DriftSettings(
        budget=alpha, horizon_windows=1, levels=1, effect_floor=floor, min_rows=1, quality_floor=min(floor, 0.005)
    )
    counts, joint = _counted(profile, reference, current, schema.names)
    verdict = judge_stream(profile, [counts], 0, settings)
    shifted = {a.name for a in verdict.alarms if a.kind == "shift"}
    table = tuple(
        msgspec.structs.replace(row, alarm=row.name in shifted) for row in shift_table(profile, counts, settings)
    )
    faulty = {q.name for q in verdict.quality}
    drifted = tuple(row.name for row in table if row.alarm or row.name in faulty)
    joint_drift = joint is not None and joint.p_value < alpha * settings.performance_share
    return Comparison(
        drift=bool(drifted) or joint_drift,
        reference_rows=len(reference),
        current_rows=len(current),
        alpha=alpha,
        floor=floor,
        drifted=drifted,
        columns=table,
        quality=verdict.quality,
        joint=joint,
        joint_drift=joint_drift,
    )


def _counted(
    profile: ReferenceProfile, reference: Rows, current: Rows, names: tuple[str, ...]
) -> tuple[WindowCounts, JointShift | None]:
    counts = tuple(int(c) for c in Binner(profile.features).count(current))
    window = WindowCounts(rows=len(current), counts=counts)
    if profile.moments is None:
        return window, None
    steps = Standardiser(profile.moments.scales)
    now = steps.steps(current)
    if profile.moments.distance is not None:
        far = Distance(profile.moments.inverse, len(names)).of(now)
        cells = Binner([profile.moments.distance]).count(far)
        window = msgspec.structs.replace(window, distances=tuple(int(c) for c in cells))
    then = steps.steps(reference)
    # About the middle of each sample: a shifted mean is no correlation.
    joint = judge_products(_centred(now), len(now), _centred(then), len(then), names)
    return window, joint


def _centred(steps: Rows) -> npt.NDArray[np.float64]:
    width = steps.shape[1]
    matrix = np.zeros((width, width))
    matrix[np.triu_indices(width)] = products_of(steps)
    matrix = np.triu(matrix) + np.triu(matrix, 1).T
    total = steps.astype(np.float64).sum(axis=0)
    return matrix - np.outer(total, total) / max(len(steps), 1)
