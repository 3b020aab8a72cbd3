"""Monitoring: from a retrain proposal to a rollout of the challenger.

Rules:
* a proposal runs once there are enough labelled rows from devices that are not quarantined, and no rollout of the
  model is under way; it runs in a process of its own, so that serving the fleet does not wait for fitting;
* the challenger learns from the champion's dataset plus the feedback, by the champion's recipe, passes the same
  gates, and is compared with the champion on the same held-out rows;
* whatever happens is written to the proposal, and what it waits for, too.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from typing import Any, Final

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lightship.data.dataset import Dataset, concat
from lightship.home import Home
from lightship.release.metadata import RELEASES
from lightship.settings import SETTINGS, Settings
from lightship.storage import audit
from lightship.storage.models import FeedbackRow, ModelVersion, RetrainProposal, RolloutRow, Run
from lightship_agent.contract.codes import DataError, FleetError, LightshipError, RegistryError
from lightship_agent.contract.schema import FeatureSchema

from . import waiting

log = logging.getLogger(__name__)
ACTOR = "lightship:retrain"
#: So often it is looked why a proposal waits.
SAY_SECONDS: Final = 30.0
LOST_AFTER_MS = 6 * 3_600_000
_ROLLOUT_OVER = ("completed", "rolled-back", "aborted")


class RetrainRunner:
    """Starts the process of a proposal that is ready, and notices when one died."""

    def __init__(self, home: Home, settings: Settings) -> None:
        """Nothing runs yet."""
        self._home = home
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._proposal = ""
        self._said = -SAY_SECONDS  # monotonic

    def tick(self) -> None:
        """Start the oldest proposal that is ready."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._collect()
        with self._home.database.write() as session:
            _give_up_lost(session, audit.now_ms())
            proposal = _ready(session, self._settings.retrain_min_rows)
            if proposal is not None:
                _begin(session, proposal, ACTOR)
                self._proposal = proposal.id
        if proposal is None:
            self._say_why()
            return
        log.info("retrain %s begins", self._proposal)
        command = [sys.executable, "-m", "lightship", "--home", str(self._home.path), "retrain", "run", self._proposal]
        with (self._home.path / "retrain.log").open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_environment()
            )

    def stop(self) -> None:
        """End the process under way; its proposal goes back to be run again."""
        if self._process is None:
            return
        stopped = self._process.poll() is None
        if stopped:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._collect(stopped=stopped)

    def _say_why(self) -> None:
        """Write to each proposal what it waits for, where that has changed."""
        if time.monotonic() - self._said < SAY_SECONDS:
            return
        self._said = time.monotonic()
        with self._home.database.read() as session:
            why = waits_for(session, self._settings.retrain_min_rows, audit.now_ms())
        if not why:
            return
        with self._home.database.write() as session:
            for row in session.scalars(select(RetrainProposal).where(RetrainProposal.id.in_(why))):
                if row.status == "proposed" and row.detail != why[row.id]:
                    row.detail = why[row.id]
                    log.info("retrain %s: %s", row.id, row.detail)

    def _collect(self, *, stopped: bool = False) -> None:
        assert self._process is not None
        status, self._process = self._process.returncode, None
        with self._home.database.write() as session:
            proposal = session.get(RetrainProposal, self._proposal)
            if proposal is None or proposal.status != "running":
                return
            proposal.updated_at = audit.now_ms()
            proposal.status = "proposed" if stopped else "failed"
            if not stopped:
                proposal.detail = f"The retrain process ended with status {status}; see retrain.log."
            verb = "retrain.stopped" if stopped else "retrain.failed"
            audit.append(session, actor=ACTOR, verb=verb, subject=proposal.id, detail={"status": status})


def run_proposal(home: Home, proposal_id: str, *, actor: str = ACTOR) -> RetrainProposal:
    """Train, gate, convert, release and roll out the challenger of a proposal.

    Raises:
        RegistryError: registry.state when the proposal is unknown or over.
        LightshipError: whatever a gate or a step says; the proposal keeps it.
    """
    with home.database.write() as session:
        proposal = session.get(RetrainProposal, proposal_id)
        if proposal is None or proposal.status not in ("proposed", "running"):
            found = proposal.status if proposal is not None else "unknown"
            raise RegistryError("registry.state", f"Proposal {proposal_id!r} is {found}; expected one that is open.")
        # One that runs already was begun by the reconciler, whose child we are.
        actor = ACTOR if proposal.status == "running" else actor
        if proposal.status == "proposed":
            _begin(session, proposal, actor)
    try:
        result = _train_and_roll_out(home, proposal, actor)
    except LightshipError as e:
        refused = e.code.startswith("gate.")
        changes = {"status": "refused" if refused else "failed", "detail": f"{e.code}: {e}"}
        _finish(home, proposal_id, changes, actor)
        raise
    return _finish(home, proposal_id, result, actor)


def dismiss(session: Session, proposal_id: str, *, actor: str, reason: str) -> None:
    """Close a proposal without training.

    Raises:
        RegistryError: registry.state when the proposal is unknown or over.
    """
    row = session.get(RetrainProposal, proposal_id)
    if row is None or row.status != "proposed":
        message = f"No open proposal {proposal_id!r}."
        raise RegistryError("registry.state", message, remedy="See `lightship retrain list`.")
    row.status, row.detail, row.updated_at = "dismissed", reason, audit.now_ms()
    audit.append(session, actor=actor, verb="retrain.dismiss", subject=proposal_id, detail={"reason": reason})


def feedback_dataset(home: Home, model: str, excluded: list[str], since: int) -> tuple[Dataset, Dataset, int]:
    """The champion's dataset, the same with the feedback that came since it was made, and where the new world begins.

    Args:
        home: an open home.
        model: the registered model's name.
        excluded: devices not to learn from.
        since: milliseconds; rows that came later show the world as it is now.

    Raises:
        DataError: data.empty when there is no feedback.
        RegistryError: registry.unknown-version.
    """
    with home.database.read() as session:
        run, champion = _champion(session, model)
        query = select(FeedbackRow).where(FeedbackRow.model == model, FeedbackRow.at > champion.created_at)
        rows = [r for r in session.scalars(query.order_by(FeedbackRow.id)) if r.device not in excluded]
    old = home.datasets.get(run.dataset_digest)
    index = {label: i for i, label in enumerate(old.labels)}
    known = [r for r in rows if r.y in index and _fits(old.schema, r.x)]
    if not known:
        raise DataError("data.empty", f"No labelled feedback for {model} since version {champion.version}.")
    x = np.stack([np.frombuffer(r.x, dtype="<f4") for r in known]).astype(np.float32)
    y = np.array([index[r.y] for r in known], dtype=np.int64)
    fresh = Dataset(
        name=old.name,
        schema=old.schema,
        task=old.task,
        target=old.target,
        labels=old.labels,
        x=x,
        y=y,
        titles=old.titles,
    )
    merged = concat(old, fresh, old.name)
    return old, merged, merged.rows - sum(r.at > since for r in known)


def _fits(schema: FeatureSchema, row: bytes) -> bool:
    """Whether a shared row is one the schema takes: one that is not must not spoil the others."""
    if len(row) != 4 * schema.width:
        return False
    try:
        schema.check_rows(np.frombuffer(row, dtype="<f4").reshape(1, -1))
    except DataError:
        return False
    return True


def _train_and_roll_out(home: Home, proposal: RetrainProposal, actor: str) -> dict[str, Any]:
    from lightship.fleet import rollout, rollouts
    from lightship.registry import release
    from lightship.registry.datasets import add_dataset
    from lightship.registry.pipeline import train_version
    from lightship.training.recipe import parse_recipe

    model = proposal.model
    with home.database.read() as session:
        run, _ = _champion(session, model)
    old, merged, now_begins = feedback_dataset(home, model, list(proposal.excluded), proposal.since)
    version_of_data = add_dataset(home, merged, source=f"feedback:{proposal.id}", parent=old.digest, actor=actor)
    trained = train_version(
        home,
        dataset=version_of_data.digest,
        recipe=parse_recipe(run.recipe),
        model=model,
        actor=actor,
        kind="retrain",
        reference_from=now_begins,
    )
    if home.releases.lacking(RELEASES):
        # Whose keys are with people releases by hand; the version is there for them.
        name = f"{model}@{trained.version}"
        detail = f"{name} is registered, and its release must be signed elsewhere: `lightship release {name}`."
        return {"status": "failed", "run_id": trained.run_id, "version": trained.version, "detail": detail}
    released = release.release(home, f"{model}@{trained.version}", actor=actor)
    with home.database.write() as session:
        last = session.scalars(
            select(RolloutRow)
            .where(RolloutRow.model == model, RolloutRow.status == "completed")
            .order_by(RolloutRow.updated_at.desc())
        ).first()
        if last is None:
            raise FleetError("fleet.rollout-spec", f"No completed rollout of {model} whose waves could be repeated.")
        plan, new_id = rollouts.plan_of(last), rollouts.new_id()
        selector = rollouts.selector_of(last)
        specs = plan.wave_specs or (rollout.WaveSpec(name="all"),)
        again = rollouts.make_plan(
            session,
            model=model,
            version=released.version,
            selector=selector,
            waves=specs,
            rules=plan.rules,
        )
        rollouts.create(session, again, selector=selector, rollout=new_id, actor=actor, reason=f"retrain {proposal.id}")
    return {"status": "released", "run_id": trained.run_id, "version": released.version, "rollout": new_id}


def _give_up_lost(session: Session, now: int) -> None:
    """A proposal whose process went down with its machine would stand in the way of every later one."""
    lost = select(RetrainProposal).where(
        RetrainProposal.status == "running", RetrainProposal.updated_at < now - LOST_AFTER_MS
    )
    for proposal in session.scalars(lost):
        proposal.status, proposal.updated_at = "failed", now
        proposal.detail = "Nothing was heard of the retrain process."
        audit.append(session, actor=ACTOR, verb="retrain.failed", subject=proposal.id, detail={"lost": True})


def _ready(session: Session, min_rows: int) -> RetrainProposal | None:
    query = select(RetrainProposal).where(RetrainProposal.status == "proposed").order_by(RetrainProposal.created_at)
    for proposal in session.scalars(query):
        under_way = select(RolloutRow).where(
            RolloutRow.model == proposal.model, RolloutRow.status.not_in(_ROLLOUT_OVER)
        )
        if session.scalars(under_way).first() is not None:
            continue
        try:
            _, champion = _champion(session, proposal.model)
        except RegistryError:
            continue  # nothing to learn from; another model's proposal may be ready
        if _rows(session, proposal, champion) >= min_rows:
            return proposal
    return None


def waits_for(session: Session, min_rows: int, now: int) -> dict[str, str]:
    """What proposals wait for, by id, in words: of those that wait for rows.

    Args:
        session: a read session.
        min_rows: how many are needed.
        now: wall-clock milliseconds.
    """
    found = {}
    for proposal in session.scalars(select(RetrainProposal).where(RetrainProposal.status == "proposed")):
        try:
            _, champion = _champion(session, proposal.model)
        except RegistryError:
            continue
        sharers = waiting.sharers(session, proposal.model, list(proposal.excluded), now)
        if why := waiting.words(_rows(session, proposal, champion), min_rows, sharers):
            found[proposal.id] = why
    return found


def _rows(session: Session, proposal: RetrainProposal, champion: ModelVersion) -> int:
    """Labelled rows that a proposal may learn the new world from."""
    have = session.scalar(
        select(func.count(FeedbackRow.id)).where(
            FeedbackRow.model == proposal.model,
            FeedbackRow.at > champion.created_at,
            FeedbackRow.at > proposal.since,
            FeedbackRow.device.not_in(list(proposal.excluded)),
        )
    )
    return have or 0


def _champion(session: Session, model: str) -> tuple[Run, ModelVersion]:
    from lightship.registry import versions

    champion = versions.resolve(session, f"{model}@champion")
    run = session.get(Run, champion.run_id)
    assert run is not None
    return run, champion


def _begin(session: Session, proposal: RetrainProposal, actor: str) -> None:
    proposal.status, proposal.detail, proposal.updated_at = "running", "", audit.now_ms()
    audit.append(session, actor=actor, verb="retrain.begin", subject=proposal.id, detail={"model": proposal.model})


def _finish(home: Home, proposal_id: str, changes: dict[str, Any], actor: str) -> RetrainProposal:
    with home.database.write() as session:
        proposal = session.get(RetrainProposal, proposal_id)
        assert proposal is not None
        for name, value in changes.items():
            setattr(proposal, name, value)
        proposal.updated_at = audit.now_ms()
        audit.append(session, actor=actor, verb=f"retrain.{proposal.status}", subject=proposal_id, detail=changes)
    return proposal


def _environment() -> dict[str, str]:
    """What the child needs and no secret: its interpreter's paths and the settings."""
    kept = {"PATH", "HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR", *(setting.env for setting in SETTINGS)}
    return {k: v for k, v in os.environ.items() if k in kept}
