"""Fleet: what an experiment has shown so far, arm by arm.

Rules:
* both arms are judged over the same devices and the same time: from the experiment's beginning to its end;
* labels are joined to the bundle that made the prediction, by digest, so that an arm's errors are its own;
* it says what was found and how sure that is; what follows is a person's to decide, with a rollout.

Sources: Fisher's exact test; Wilson's and Newcombe's score intervals (see monitoring.canary).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.monitoring.agreement import Z95, agreement_of
from lightship.monitoring.canary import difference_upper, wilson
from lightship.monitoring.tails import fisher_greater
from lightship.monitoring.watch import BundleOf
from lightship.storage.models import AssignmentRow, Device, DeviceEpoch, ExperimentRow, Exposure, UpdateStep, WindowRow
from lightship_agent.contract.messages import BESIDE_STEPS

_FOR_EVER = 2**62


@dataclass
class Arm:
    """What one bundle, or several one after the other, has done on some devices."""

    devices: set[str] = field(default_factory=set)
    rows: int = 0
    labelled: int = 0
    errors: int = 0
    requests: int = 0
    failures: int = 0
    latencies: list[float] = field(default_factory=list)

    def view(self) -> dict[str, Any]:
        """As JSON for people's programs."""
        known = self.labelled > 0
        return {
            "devices": len(self.devices),
            "rows": self.rows,
            "requests": self.requests,
            "failures": self.failures,
            "labelled": self.labelled,
            "errors": self.errors,
            "error_rate": self.errors / self.labelled if known else None,
            "error_interval": list(wilson(self.errors, self.labelled, Z95)) if known else None,
            # Of each device's recent requests; the median and the worst of the devices.
            "latency_p95_ms": median(self.latencies) if self.latencies else None,
            "latency_p95_ms_worst": max(self.latencies, default=None),
        }


def summary(row: ExperimentRow) -> dict[str, Any]:
    """An experiment in a list."""
    names = ("id", "name", "group", "model", "version", "digest", "mode", "share", "per_request", "status", "reason")
    ended = ("ended_because", "created_by", "created_at", "ended_at")
    return {name: getattr(row, name) for name in (*names, *ended)}


def view(session: Session, row: ExperimentRow, bundle_of: BundleOf) -> dict[str, Any]:
    """An experiment and what it has shown, as JSON for people's programs."""
    standing = standings(session, row)
    champion, challenger = arms(session, row, standing)
    seen = {
        **summary(row),
        "devices": standing,
        "champion": champion.view(),
        "challenger": challenger.view() if row.mode == "ab" else None,
        "agreement": None,
        "comparison": None,
    }
    if row.mode == "shadow":
        seen["agreement"] = agreement_of(session, row.id, bundle_of(row.digest).manifest.outputs.labels)
    else:
        seen["comparison"] = compare(champion, challenger)
    return seen


def standings(session: Session, row: ExperimentRow) -> dict[str, dict[str, str]]:
    """Every device that was told of the experiment, or reported about it: where it is, by its own reports."""
    told = session.scalars(select(AssignmentRow).where(AssignmentRow.beside.contains(row.id)))
    found = {a.device: {"state": "told", "code": ""} for a in told}
    same_epoch = (DeviceEpoch.device == UpdateStep.device) & (DeviceEpoch.epoch == UpdateStep.epoch)
    query = select(UpdateStep).outerjoin(DeviceEpoch, same_epoch).where(UpdateStep.rollout == row.id)
    # Order comes from sequence numbers, never from clocks.
    for step in session.scalars(query.order_by(DeviceEpoch.updated_at, UpdateStep.s)):
        found[step.device] = {"state": step.state.removeprefix(BESIDE_STEPS), "code": step.code}
    return dict(sorted(found.items()))


def arms(session: Session, row: ExperimentRow, devices: Collection[str]) -> tuple[Arm, Arm]:
    """What the champion and the challenger have done on those devices while the experiment ran."""
    champion, challenger = Arm(), Arm()
    ends = row.ended_at or _FOR_EVER
    windows = select(WindowRow).where(
        WindowRow.device.in_(devices),
        WindowRow.model == row.model,
        WindowRow.opened_at >= row.created_at,
        WindowRow.opened_at < ends,
    )
    for window in session.scalars(windows):
        arm = challenger if window.digest == row.digest else champion
        arm.devices.add(window.device)
        arm.rows, arm.labelled = arm.rows + window.rows, arm.labelled + window.labelled
        arm.errors += window.errors
    _add_traffic(session, row, devices, (champion, challenger), ends)
    return champion, challenger


def _add_traffic(
    session: Session, row: ExperimentRow, devices: Collection[str], both: tuple[Arm, Arm], ends: int
) -> None:
    champion, challenger = both
    spans = select(Exposure).where(Exposure.device.in_(devices), Exposure.model == row.model, Exposure.began_at < ends)
    for span in session.scalars(spans):
        if span.ended_at is not None and span.ended_at < row.created_at:
            continue
        arm = challenger if span.digest == row.digest else champion
        arm.devices.add(span.device)
        arm.requests, arm.failures = arm.requests + span.requests, arm.failures + span.failures
    if row.status == "running":
        for device in session.scalars(select(Device).where(Device.id.in_(devices))):
            for entry in _of_model(device.running, row.model):
                arm = challenger if entry.get("digest") == row.digest else champion
                arm.latencies.append(float(entry.get("latency_ms", 0.0)))


def _of_model(running: Iterable[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    return [entry for entry in running if entry.get("model") == model]


def compare(champion: Arm, challenger: Arm) -> dict[str, Any]:
    """The two error rates: their difference, its 95 % interval, and how easily chance makes one as large."""
    if not champion.labelled or not challenger.labelled:
        return {"difference": None, "interval": None, "p_worse": None, "p_better": None, "sentence": _TOO_FEW}
    a = (challenger.errors, challenger.labelled)
    b = (champion.errors, champion.labelled)
    difference = a[0] / a[1] - b[0] / b[1]
    low, high = -difference_upper(*b, *a, z=Z95), difference_upper(*a, *b, z=Z95)
    return {
        "difference": difference,
        "interval": [low, high],
        "p_worse": fisher_greater(*a, *b),
        "p_better": fisher_greater(*b, *a),
        "sentence": _sentence(a, b, low, high),
    }


_TOO_FEW = "Both arms need labels before they can be compared."


def _sentence(a: tuple[int, int], b: tuple[int, int], low: float, high: float) -> str:
    rates = (
        f"The challenger errs in {a[0] / a[1]:.1%} of {a[1]} labelled rows, the champion in {b[0] / b[1]:.1%} of {b[1]}"
    )
    bounds = f"the difference is between {low:+.1%} and {high:+.1%}"
    if low > 0:
        return f"{rates}; {bounds}: worse."
    return f"{rates}; {bounds}: better." if high < 0 else f"{rates}; {bounds}: neither is shown to be better."
