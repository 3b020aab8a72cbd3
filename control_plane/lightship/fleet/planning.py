"""Fleet: from what an operator asks for to a plan: the same for the command line and the operator API.

Rules: a canary wave, the waves asked for, then the rest, which has no gate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from lightship.registry import versions
from lightship.storage.models import RolloutRow

from . import rollouts
from .rollout import Plan, Rules, WaveSpec


@dataclass(frozen=True)
class Wish:
    """A rollout as an operator asks for it."""

    reference: str
    group: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    canary: int = 1
    waves: tuple[float, ...] = ()
    rules: Rules = field(default_factory=Rules)

    @property
    def selector(self) -> rollouts.Selector:
        """Which devices."""
        return rollouts.Selector(group=self.group, labels=self.labels)


def plan(session: Session, wish: Wish) -> Plan:
    """The plan that the wish would have now.

    Raises:
        RegistryError: registry.unknown-model, registry.unknown-version, registry.state.
        FleetError: fleet.rollout-spec.
    """
    version = versions.resolve(session, wish.reference)
    waves = [WaveSpec(name="canary", count=wish.canary)]
    waves += [WaveSpec(name=f"{share:.0%}", share=share) for share in wish.waves]
    waves.append(WaveSpec(name="rest", gate=False))
    return rollouts.make_plan(
        session,
        model=version.model,
        version=version.version,
        selector=wish.selector,
        waves=tuple(waves),
        rules=wish.rules,
    )


def start(session: Session, wish: Wish, *, actor: str, reason: str) -> RolloutRow:
    """Store a rollout of the wish; the reconciler begins it.

    Raises:
        RegistryError: as `plan`.
        FleetError: fleet.rollout-spec, fleet.group-busy.
    """
    made = plan(session, wish)
    return rollouts.create(session, made, selector=wish.selector, rollout=rollouts.new_id(), actor=actor, reason=reason)
