"""Registry: dataset versions by name, digest or `name@version`."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lightship.data.dataset import Dataset
from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import DatasetVersion
from lightship_agent.contract.codes import DataError
from lightship_agent.contract.names import check_name


def add_dataset(home: Home, dataset: Dataset, *, source: str, parent: str | None, actor: str) -> DatasetVersion:
    """Store `dataset` as the next version of its name; the same content again is the same version.

    Raises:
        InvalidNameError: name.invalid.
        StorageError: storage.full, storage.unwritable; nothing is registered then.
    """
    check_name("dataset name", dataset.name)
    digest = home.datasets.put(dataset)
    with home.database.write() as session:
        query = select(DatasetVersion).where(DatasetVersion.name == dataset.name, DatasetVersion.digest == digest)
        found = session.scalars(query).first()
        if found is not None:
            return found
        newest = session.scalar(select(func.max(DatasetVersion.version)).where(DatasetVersion.name == dataset.name))
        row = DatasetVersion(
            name=dataset.name,
            version=(newest or 0) + 1,
            digest=digest,
            rows=dataset.rows,
            features=dataset.schema.width,
            target=dataset.target,
            task=dataset.task,
            source=source,
            parent=parent,
            created_at=audit.now_ms(),
        )
        session.add(row)
        detail = {"digest": digest, "rows": dataset.rows, "source": source}
        audit.append(session, actor=actor, verb="data.add", subject=f"{row.name}@{row.version}", detail=detail)
    return row


def resolve_dataset(session: Session, reference: str) -> DatasetVersion:
    """The dataset version that `name`, `name@2` or a digest (or its beginning) refers to.

    Raises:
        DataError: data.unknown.
    """
    name, _, version = reference.partition("@")
    query = select(DatasetVersion).where(DatasetVersion.name == name).order_by(DatasetVersion.version.desc())
    if version.isdigit():
        query = query.where(DatasetVersion.version == int(version))
    found = session.scalars(query).first()
    if found is None and len(reference) >= 8:
        found = session.scalars(select(DatasetVersion).where(DatasetVersion.digest.startswith(reference))).first()
    if found is None:
        names = sorted(set(session.scalars(select(DatasetVersion.name))))
        message = f"No dataset {reference!r}; there are: {', '.join(names) or 'none yet'}."
        raise DataError("data.unknown", message, remedy="Add one with `lightship data add`.")
    return found


def listed(session: Session) -> list[DatasetVersion]:
    """Every dataset version."""
    return list(session.scalars(select(DatasetVersion).order_by(DatasetVersion.name, DatasetVersion.version)))
