"""Fleet: which companions an assignment names, by the experiments that are running.

Rules: those of the device's group and of its model, released, and not the version itself; oldest first, and never more
than a device bears.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from lightship.registry import versions
from lightship.storage.models import Device, ExperimentRow, ModelVersion
from lightship_agent.contract.assignment import MAX_BESIDE, Beside


def running(session: Session, model: str = "") -> list[ExperimentRow]:
    """Experiments that have not ended, of all models or of one, oldest first."""
    query = select(ExperimentRow).where(ExperimentRow.status == "running")
    if model:
        query = query.where(ExperimentRow.model == model)
    return list(session.scalars(query.order_by(ExperimentRow.created_at, ExperimentRow.id)))


def companions(
    session: Session, device: Device, version: ModelVersion, going_on: Sequence[ExperimentRow] | None = None
) -> tuple[Beside, ...]:
    """What shall run beside `version` on that device; `going_on` are the experiments, where they are known already."""
    found = []
    for row in running(session, version.model) if going_on is None else going_on:
        if (row.group, row.model) != (device.group, version.model) or row.version == version.version:
            continue
        target = versions.get(session, row.model, row.version)
        if target.state == "released":
            found.append(_beside(row, target))
    return tuple(found[:MAX_BESIDE])


def _beside(row: ExperimentRow, target: ModelVersion) -> Beside:
    return Beside(
        experiment=row.id,
        model=target.model,
        version=target.version,
        path=target.path,
        sha256=target.digest,
        length=target.length,
        mode=row.mode,
        share=row.share,
        per_request=row.per_request,
    )


def mark(beside: Iterable[Beside]) -> str:
    """What the row of an assignment says of its companions. An experiment never changes, so its id says all."""
    return ",".join(sorted(b.experiment for b in beside))
