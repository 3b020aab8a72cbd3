"""Registry: versions and aliases in the database.

Rules: versions count from 1 and are never reused; an alias points to one version; references read `name`, `name@3`
or `name@champion`; every change is audited in the same transaction.
"""

from __future__ import annotations

from typing import cast

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.models import Alias, ModelVersion
from lightship_agent.contract.codes import RegistryError
from lightship_agent.contract.names import check_name

from .rules import State, may_alias


def get(session: Session, model: str, version: int) -> ModelVersion:
    """That version.

    Raises:
        RegistryError: registry.unknown-model, registry.unknown-version.
    """
    row = session.get(ModelVersion, (model, version))
    if row is None:
        raise _unknown(session, model, str(version))
    return row


def resolve(session: Session, reference: str) -> ModelVersion:
    """The version that `name@3`, `name@alias` or `name` (its newest) refers to.

    Raises:
        RegistryError: registry.unknown-model, registry.unknown-version.
    """
    model, _, which = reference.partition("@")
    if which.isdigit():
        return get(session, model, int(which))
    number = aliased(session, model, which) if which else newest(session, model)
    if not number:
        raise _unknown(session, model, which or "newest")
    return get(session, model, number)


def newest(session: Session, model: str) -> int:
    """The highest version number, 0 if there is none."""
    return session.scalar(select(func.max(ModelVersion.version)).where(ModelVersion.model == model)) or 0


def aliased(session: Session, model: str, alias: str) -> int | None:
    """The version an alias points to."""
    row = session.get(Alias, (model, alias))
    return row.version if row else None


def aliases(session: Session, model: str) -> dict[int, list[str]]:
    """Aliases by version."""
    out: dict[int, list[str]] = {}
    for row in session.scalars(select(Alias).where(Alias.model == model).order_by(Alias.alias)):
        out.setdefault(row.version, []).append(row.alias)
    return out


def set_alias(session: Session, model: str, alias: str, version: int, *, actor: str) -> None:
    """Point `alias` to `version`.

    Raises:
        InvalidNameError: name.invalid.
        RegistryError: registry.unknown-version, registry.state.
    """
    check_name("alias", alias)
    may_alias(cast("State", get(session, model, version).state), alias)
    row = session.get(Alias, (model, alias))
    before = row.version if row else None
    if row is None:
        session.add(Alias(model=model, alias=alias, version=version))
    else:
        row.version = version
    session.flush()
    detail = {"alias": alias, "version": version, "before": before}
    audit.append(session, actor=actor, verb="model.alias", subject=model, detail=detail)


def drop_alias(session: Session, model: str, alias: str, version: int, *, actor: str) -> None:
    """Take `alias` away, if it points to `version`."""
    row = session.get(Alias, (model, alias))
    if row is None or row.version != version:
        return
    session.delete(row)
    session.flush()
    detail = {"alias": alias, "version": None, "before": version}
    audit.append(session, actor=actor, verb="model.alias", subject=model, detail=detail)


def listed(session: Session, model: str = "") -> list[ModelVersion]:
    """All versions, of one model or of all."""
    query = select(ModelVersion).order_by(ModelVersion.model, ModelVersion.version)
    return list(session.scalars(query.where(ModelVersion.model == model) if model else query))


def by_digest(session: Session, digest: str) -> ModelVersion | None:
    """The version whose bundle has that digest."""
    return session.scalars(select(ModelVersion).where(ModelVersion.digest == digest)).first()


def _unknown(session: Session, model: str, version: str) -> RegistryError:
    known = [v.version for v in listed(session) if v.model == model]
    if not known:
        models = sorted({v.model for v in listed(session)})
        message = f"No registered model {model!r}; there are: {', '.join(models) or 'none yet'}."
        return RegistryError("registry.unknown-model", message)
    message = f"{model} has no version or alias {version!r}; it has versions {known}."
    return RegistryError("registry.unknown-version", message)
