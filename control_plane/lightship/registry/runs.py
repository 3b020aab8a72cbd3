"""Registry: the record of a run, begun before anything is tried and ended whatever happens."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from lightship.convert.parity import ParityReport
from lightship.data.dataset import Dataset
from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import Run
from lightship.training.environment import capture, code_revision, environment_digest
from lightship.training.explain import Explained
from lightship.training.gate import GateDecision
from lightship.training.metrics import Metrics
from lightship_agent.contract.codes import LightshipError
from lightship_agent.contract.manifest import Runtime

Kind = Literal["train", "retrain", "import"]


@dataclass
class Making:
    """What a run has made so far; it becomes columns of the run, and members of the bundle."""

    dataset: Dataset
    model: str
    run_id: str
    kind: Kind
    estimator_name: str
    started: int
    environment: dict[str, str]
    revision: str
    recipe: dict[str, Any]
    recipe_digest: str
    seeds: list[int]
    metrics: Metrics | None = None
    gate: GateDecision | None = None
    parity: ParityReport | None = None
    explained: Explained = field(default_factory=lambda: Explained(shares={}, method=""))
    warnings: tuple[str, ...] = ()
    parent: str = ""
    actor: str = ""
    runtime: Runtime = field(default_factory=Runtime)


def begin(
    home: Home,
    data: Dataset,
    model: str,
    kind: Kind,
    estimator: str,
    recipe: dict[str, Any],
    seeds: list[int],
    actor: str,
) -> Making:
    """Write a run that is under way, with all that is needed to repeat it."""
    environment = capture()
    made = Making(
        dataset=data,
        model=model,
        run_id=secrets.token_hex(6),
        kind=kind,
        estimator_name=estimator,
        started=audit.now_ms(),
        environment=environment,
        revision=code_revision(Path()),
        recipe=recipe,
        recipe_digest="",
        seeds=seeds,
        actor=actor,
    )
    with home.database.write() as session:
        session.add(
            Run(
                id=made.run_id,
                kind=kind,
                model=model,
                status="running",
                dataset_digest=data.digest,
                recipe=recipe,
                recipe_digest="",
                environment=environment,
                environment_digest=environment_digest(environment),
                code_revision=made.revision,
                seeds=seeds,
                metrics={},
                gate={},
                parity={},
                started_at=made.started,
            )
        )
        detail = {"kind": kind, "model": model, "dataset": data.digest}
        audit.append(session, actor=actor, verb="run.begin", subject=made.run_id, detail=detail)
    return made


class recorded:  # noqa: N801 - reads as a word in a with statement
    """Writes the end of the run, whatever it is."""

    def __init__(self, home: Home, made: Making) -> None:
        self._home, self._made = home, made

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Kind, error: BaseException | None, _trace: Any) -> None:
        made = self._made
        with self._home.database.write() as session:
            run = session.get(Run, made.run_id)
            assert run is not None
            run.ended_at, run.recipe_digest = audit.now_ms(), made.recipe_digest
            run.metrics = msgspec.to_builtins(made.metrics) if made.metrics else {}
            run.gate = msgspec.to_builtins(made.gate) if made.gate else {}
            run.parity = msgspec.to_builtins(made.parity) if made.parity else {}
            run.status = "finished"
            if error is not None:
                run.status = "failed"
                run.error = str(error)[:2_000]
            if isinstance(error, LightshipError):
                run.error_code = error.code
                run.status = "refused" if error.code.startswith(("gate.", "convert.")) else "failed"
            detail = {"model": made.model, "code": run.error_code}
            audit.append(session, actor=made.actor, verb=f"run.{run.status}", subject=made.run_id, detail=detail)
