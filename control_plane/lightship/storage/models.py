"""Storage: the tables.

Rules:
* times are integers, milliseconds since the Unix epoch, UTC;
* what only travels and is never searched is JSON or MessagePack in one column;
* the same models serve SQLite and PostgreSQL; every change comes with a migration.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, LargeBinary, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import JSON

Json = dict[str, Any]


class Base(DeclarativeBase):
    """All tables."""

    type_annotation_map = {Json: JSON, list[Any]: JSON, int: BigInteger, bytes: LargeBinary}  # noqa: RUF012 - SQLAlchemy's own form


class DatasetVersion(Base):
    """A content-addressed version of a dataset."""

    __tablename__ = "dataset_versions"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    rows: Mapped[int]
    features: Mapped[int]
    target: Mapped[str]
    task: Mapped[str]
    source: Mapped[str]
    parent: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int]


class Run(Base):
    """One execution of a recipe on a dataset, successful or not."""

    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str]  # train | retrain | import
    model: Mapped[str] = mapped_column(String(64), index=True)
    status: Mapped[str]  # running | finished | failed | refused
    dataset_digest: Mapped[str] = mapped_column(String(64))
    recipe: Mapped[Json]
    recipe_digest: Mapped[str]
    environment: Mapped[Json]
    environment_digest: Mapped[str]
    code_revision: Mapped[str]
    seeds: Mapped[list[Any]]
    metrics: Mapped[Json]
    gate: Mapped[Json]
    parity: Mapped[Json]
    estimator_digest: Mapped[str | None] = mapped_column(String(64))
    error_code: Mapped[str] = mapped_column(default="")
    error: Mapped[str] = mapped_column(default="")
    started_at: Mapped[int]
    ended_at: Mapped[int | None]


class ModelVersion(Base):
    """A version of a registered model."""

    __tablename__ = "model_versions"
    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    state: Mapped[str]  # registered | released | revoked
    digest: Mapped[str] = mapped_column(String(64), index=True)  # of the bundle
    length: Mapped[int]
    metrics: Mapped[Json]
    forced_reason: Mapped[str] = mapped_column(default="")
    created_at: Mapped[int]
    released_at: Mapped[int | None]

    @property
    def path(self) -> str:
        """The TUF target of the uncompressed bundle."""
        return f"bundles/{self.model}/{self.version}.tar"


class Alias(Base):
    """A moving name of a version: champion, challenger, or the user's own."""

    __tablename__ = "aliases"
    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    alias: Mapped[str] = mapped_column(String(32), primary_key=True)
    version: Mapped[int]


class AuditEvent(Base):
    """A hash-chained record of a mutating act."""

    __tablename__ = "audit_events"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[int]
    actor: Mapped[str]
    verb: Mapped[str]
    subject: Mapped[str] = mapped_column(index=True)
    detail: Mapped[Json]
    previous: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))
    origin: Mapped[str] = mapped_column(default="")  # from where


class ApiToken(Base):
    """An operator's API token; only the hash is kept, and a name is never used twice."""

    __tablename__ = "api_tokens"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    id: Mapped[str] = mapped_column(String(16), unique=True)
    secret_hash: Mapped[str] = mapped_column(String(64))
    role: Mapped[str]  # viewer | operator | releaser | admin
    environment: Mapped[str]
    created_at: Mapped[int]
    created_by: Mapped[str]
    expires_at: Mapped[int]
    revoked_at: Mapped[int | None]
    last_used_at: Mapped[int] = mapped_column(default=0)
    last_used_from: Mapped[str] = mapped_column(default="")


class Device(Base):
    """A device: identity by enrolment, state by its own reports."""

    __tablename__ = "devices"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str]
    group: Mapped[str] = mapped_column(index=True)
    labels: Mapped[Json]
    state: Mapped[str]  # pending | active | revoked
    spki: Mapped[str] = mapped_column(String(64))
    spki_next: Mapped[str] = mapped_column(String(64), default="")  # renewed, and not yet seen in use
    cert_serial: Mapped[str]
    cert_not_after: Mapped[int]
    enrolled_at: Mapped[int]
    last_seen: Mapped[int] = mapped_column(default=0)
    online: Mapped[bool] = mapped_column(default=False)
    boot: Mapped[int] = mapped_column(default=0)
    running_model: Mapped[str] = mapped_column(default="")
    running_version: Mapped[int] = mapped_column(default=0)
    running_digest: Mapped[str] = mapped_column(default="")
    running: Mapped[list[Any]] = mapped_column(default=list)
    phase: Mapped[str] = mapped_column(default="")  # of the update machine, by heartbeat
    update_state: Mapped[str] = mapped_column(default="")  # the last step it reported
    update_code: Mapped[str] = mapped_column(default="")
    update_detail: Mapped[str] = mapped_column(default="")
    assignment_seq: Mapped[int] = mapped_column(default=0)
    agent: Mapped[str] = mapped_column(default="")
    onnxruntime: Mapped[str] = mapped_column(default="")
    machine: Mapped[str] = mapped_column(default="")
    health: Mapped[Json] = mapped_column(default=dict)
    degraded: Mapped[list[Any]] = mapped_column(default=list)  # codes, by heartbeat
    errors: Mapped[Json] = mapped_column(default=dict)  # requests refused or failed, by code
    app: Mapped[Json] = mapped_column(default=dict)  # the application's own numbers: counters, gauges, histograms
    quarantined: Mapped[bool] = mapped_column(default=False)
    drift_level: Mapped[str] = mapped_column(default="")
    verdict: Mapped[Json] = mapped_column(default=dict)  # the last one
    serial: Mapped[str] = mapped_column(default="")  # of the hardware, as it said at enrolment
    instance: Mapped[str] = mapped_column(String(16), default="")  # the agent process that asked last
    retired_spki: Mapped[str] = mapped_column(String(64), default="")  # the key before this one
    retired_at: Mapped[int] = mapped_column(default=0)
    retired_seen: Mapped[int] = mapped_column(default=0)  # when that key was shown again, long after
    cloned_at: Mapped[int] = mapped_column(default=0)  # 0: no sign of a second device under this identity
    clone: Mapped[Json] = mapped_column(default=dict)  # the evidence


class DeviceAsk(Base):
    """A command that wants an answer: asked, sent, answered, each at a time or not yet (0)."""

    __tablename__ = "device_asks"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    device: Mapped[str] = mapped_column(String(64), index=True)
    verb: Mapped[str] = mapped_column(String(32))
    arguments: Mapped[Json] = mapped_column(default=dict)
    asked_by: Mapped[str]
    asked_at: Mapped[int]
    expires_at: Mapped[int]
    sent_at: Mapped[int] = mapped_column(default=0)
    answered_at: Mapped[int] = mapped_column(default=0)
    code: Mapped[str] = mapped_column(default="")  # why the device would not
    detail: Mapped[str] = mapped_column(default="")
    answer: Mapped[bytes] = mapped_column(default=b"")


class JoinToken(Base):
    """A one-use (or few-use) token; only the hash of its secret is kept."""

    __tablename__ = "join_tokens"
    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    secret_hash: Mapped[str] = mapped_column(String(64))
    group: Mapped[str]
    labels: Mapped[Json]
    device: Mapped[str | None]
    uses_left: Mapped[int]
    expires_at: Mapped[int]
    created_at: Mapped[int]
    created_by: Mapped[str]
    preauthorised: Mapped[bool] = mapped_column(default=False)  # lets in only whom the operator listed before
    approval: Mapped[bool] = mapped_column(default=False)  # whoever enrols with it waits for `device approve`


class Preauthorisation(Base):
    """A device that may enrol once: known by its id, its serial, its key, or several of them."""

    __tablename__ = "preauthorisations"
    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    device: Mapped[str | None] = mapped_column(String(64), index=True)
    serial: Mapped[str | None] = mapped_column(index=True)
    spki: Mapped[str | None] = mapped_column(String(64), index=True)
    group: Mapped[str]
    labels: Mapped[Json]
    created_at: Mapped[int]
    created_by: Mapped[str]
    used_by: Mapped[str] = mapped_column(default="")
    used_at: Mapped[int] = mapped_column(default=0)


class Certificate(Base):
    """A device certificate that was issued and has not run out: what a revocation must name."""

    __tablename__ = "certificates"
    serial: Mapped[str] = mapped_column(String(40), primary_key=True)
    device: Mapped[str] = mapped_column(String(64), index=True)
    spki: Mapped[str] = mapped_column(String(64))
    issued_at: Mapped[int]
    not_after: Mapped[int]
    revoked_at: Mapped[int] = mapped_column(default=0)
    reason: Mapped[str] = mapped_column(default="")  # revoked | superseded


class Cut(Base):
    """An MQTT session that is to be ended, until it was."""

    __tablename__ = "cuts"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    asked_at: Mapped[int]


class UsedNonce(Base):
    """A nonce that recovered a certificate: it never does so again."""

    __tablename__ = "used_nonces"
    nonce: Mapped[str] = mapped_column(String(64), primary_key=True)  # its digest
    device: Mapped[str] = mapped_column(String(64))
    expires_at: Mapped[int]


class DeviceInstance(Base):
    """An agent process under a device's identity: of one device there is one at a time."""

    __tablename__ = "device_instances"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    instance: Mapped[str] = mapped_column(String(16), primary_key=True)
    boot: Mapped[int]
    address: Mapped[str]
    first_seen: Mapped[int]
    last_seen: Mapped[int]
    returns: Mapped[int] = mapped_column(default=0)  # how often it was heard again after another had been


class AssignmentRow(Base):
    """What a device was last told to run."""

    __tablename__ = "assignments"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    seq: Mapped[int]
    model: Mapped[str]
    version: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64))
    rollout: Mapped[str]
    issued_at: Mapped[int]
    expires_at: Mapped[int]
    envelope: Mapped[bytes]
    beside: Mapped[str] = mapped_column(default="")  # ids of the experiments it names, with commas between


class RolloutRow(Base):
    """A rollout: its plan, and the state of its decider."""

    __tablename__ = "rollouts"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    model: Mapped[str] = mapped_column(index=True)
    version: Mapped[int]
    status: Mapped[str] = mapped_column(index=True)
    reason: Mapped[str] = mapped_column(default="")
    selector: Mapped[Json]
    plan: Mapped[Json]
    state: Mapped[Json]
    gate: Mapped[Json]  # looks taken, and the last verdict
    created_by: Mapped[str]
    created_at: Mapped[int]
    updated_at: Mapped[int]


class ExperimentRow(Base):
    """A version that runs beside the champion on the devices of a group. Nothing of it changes but its end."""

    __tablename__ = "experiments"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str]
    group: Mapped[str] = mapped_column(index=True)
    model: Mapped[str] = mapped_column(String(64), index=True)
    version: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64))
    mode: Mapped[str]  # shadow | ab
    share: Mapped[float]
    per_request: Mapped[bool]
    status: Mapped[str] = mapped_column(index=True)  # running | stopped
    reason: Mapped[str] = mapped_column(default="")  # why it began
    ended_because: Mapped[str] = mapped_column(default="")
    created_by: Mapped[str]
    created_at: Mapped[int]
    ended_at: Mapped[int | None]


class AgreementRow(Base):
    """How far a challenger in the shadow has agreed with a champion on a device, added up."""

    __tablename__ = "agreements"
    experiment: Mapped[str] = mapped_column(String(32), primary_key=True)
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    champion: Mapped[str] = mapped_column(String(64), primary_key=True)
    began_at: Mapped[int]
    updated_at: Mapped[int]
    rows: Mapped[int] = mapped_column(default=0)
    same: Mapped[int] = mapped_column(default=0)
    confusion: Mapped[list[Any]] = mapped_column(default=list)
    differences: Mapped[list[Any]] = mapped_column(default=list)
    difference_sum: Mapped[float] = mapped_column(default=0.0)
    difference_max: Mapped[float] = mapped_column(default=0.0)
    latency: Mapped[list[Any]] = mapped_column(default=list)
    failures: Mapped[int] = mapped_column(default=0)
    dropped: Mapped[int] = mapped_column(default=0)


class DeviceEpoch(Base):
    """How far the reports of a device's outbox epoch have been stored."""

    __tablename__ = "device_epochs"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    epoch: Mapped[str] = mapped_column(String(16), primary_key=True)
    next_seq: Mapped[int]
    lost: Mapped[int] = mapped_column(default=0)
    ahead: Mapped[list[Any]] = mapped_column(default=list)  # spans stored beyond a gap: [first, last]
    beat: Mapped[int] = mapped_column(default=0)  # the heartbeat that was believed last
    updated_at: Mapped[int]


class HeldRecord(Base):
    """A record that came ahead of a gap, until the gap is filled or given up."""

    __tablename__ = "held_records"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    epoch: Mapped[str] = mapped_column(String(16), primary_key=True)
    s: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    body: Mapped[bytes]


class WindowRow(Base):
    """A closed window of one stream, with the labels that have come for it since."""

    __tablename__ = "windows"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    w: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    model: Mapped[str]
    version: Mapped[int]
    opened_at: Mapped[int]
    closed_at: Mapped[int]
    rows: Mapped[int]
    invalid: Mapped[int] = mapped_column(default=0)
    counts: Mapped[bytes]
    predictions: Mapped[list[Any]]
    scores: Mapped[bytes]
    labelled: Mapped[int] = mapped_column(default=0)
    errors: Mapped[int] = mapped_column(default=0)
    more: Mapped[bytes] = mapped_column(default=b"")  # MessagePack of the other counts
    together: Mapped[bytes] = mapped_column(default=b"")  # of the products, where they came with this window
    judged: Mapped[bool] = mapped_column(default=False)
    level: Mapped[str] = mapped_column(default="")
    shift: Mapped[float] = mapped_column(default=0.0)  # the largest debiased PSI of a feature, for display
    __table_args__ = (Index("windows_by_time", "model", "closed_at"),)


class StreamMemory(Base):
    """What monitoring remembers of a device's stream: its baseline and its detectors."""

    __tablename__ = "stream_memories"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    w: Mapped[int]  # the last window in it
    state: Mapped[bytes]  # by `lightship.monitoring.memory`


class CommonMemory(Base):
    """What monitoring remembers of a model's devices, taken together."""

    __tablename__ = "common_memories"
    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    looks: Mapped[int]
    state: Mapped[bytes]  # by `lightship.monitoring.common_shift`


class PendingLabels(Base):
    """Labels that arrived before the window they belong to."""

    __tablename__ = "pending_labels"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    w: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    labelled: Mapped[int]
    errors: Mapped[int]
    more: Mapped[bytes] = mapped_column(default=b"")


class FeedbackRow(Base):
    """Rows with labels that a device shared, for retraining."""

    __tablename__ = "feedback_rows"
    # SQLite numbers rows by itself only for a plain INTEGER key.
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    device: Mapped[str] = mapped_column(index=True)
    model: Mapped[str]
    digest: Mapped[str]
    at: Mapped[int]
    x: Mapped[bytes]  # float32, little-endian
    y: Mapped[str]
    __table_args__ = (Index("feedback_by_model", "model", "at"),)


class Exposure(Base):
    """A span in which a device served a bundle: who was ever served by it, and for how long."""

    __tablename__ = "exposures"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    began_at: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    ended_at: Mapped[int | None]
    model: Mapped[str]
    version: Mapped[int]
    requests: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    busy_us: Mapped[int] = mapped_column(default=0)  # spent in them
    latencies: Mapped[list[Any]] = mapped_column(default=list)  # of them, by cell; contract.latency


class UpdateStep(Base):
    """A step of a device's update, as it reported it."""

    __tablename__ = "update_steps"
    device: Mapped[str] = mapped_column(String(64), primary_key=True)
    epoch: Mapped[str] = mapped_column(String(16), primary_key=True)
    s: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[int]
    rollout: Mapped[str] = mapped_column(index=True)
    seq: Mapped[int]
    digest: Mapped[str]
    state: Mapped[str]
    code: Mapped[str]
    detail: Mapped[str]


class Alarm(Base):
    """An alarm event: opened once, closed once."""

    __tablename__ = "alarms"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str]  # local | fleet | common | segment | data
    model: Mapped[str] = mapped_column(index=True)
    digest: Mapped[str]
    device: Mapped[str] = mapped_column(default="")
    level: Mapped[str]
    sentence: Mapped[str]
    evidence: Mapped[Json]
    opened_at: Mapped[int]
    closed_at: Mapped[int | None]


class PolicyRow(Base):
    """The state of the monitoring policy, per model."""

    __tablename__ = "policy_states"
    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[bytes]


class RetrainProposal(Base):
    """A proposal to retrain, and what became of it."""

    __tablename__ = "retrain_proposals"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    model: Mapped[str] = mapped_column(index=True)
    status: Mapped[str]  # proposed | running | released | refused | failed | dismissed
    reason: Mapped[str]
    excluded: Mapped[list[Any]]
    since: Mapped[int]
    run_id: Mapped[str] = mapped_column(default="")
    version: Mapped[int] = mapped_column(default=0)
    rollout: Mapped[str] = mapped_column(default="")
    detail: Mapped[str] = mapped_column(default="")
    created_at: Mapped[int]
    updated_at: Mapped[int]


class DeadLetter(Base):
    """A message that could not be understood, kept for inspection."""

    __tablename__ = "dead_letters"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    at: Mapped[int]
    topic: Mapped[str]
    code: Mapped[str]
    detail: Mapped[str]
    payload: Mapped[bytes]
    __table_args__ = (Index("dead_letters_by_topic", "topic", "code"),)


class AlertRow(Base):
    """What people are told of, or would be: a finding that waits, an alert that is open, or one that is over."""

    __tablename__ = "alerts"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str]
    status: Mapped[str] = mapped_column(index=True)  # pending | open | resolved
    severity: Mapped[str]
    sentence: Mapped[str]
    count: Mapped[int]
    began: Mapped[int]
    resolved_at: Mapped[int]
    state: Mapped[bytes]  # all of it, by `lightship.alerting.decide`


class AlertMute(Base):
    """What nobody wants to hear of, until when, and why."""

    __tablename__ = "alert_mutes"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    what: Mapped[str]
    until: Mapped[int]
    reason: Mapped[str]
    created_by: Mapped[str]
    created_at: Mapped[int]


class AlertMessage(Base):
    """A message to a channel, until it was taken, and for a while after."""

    __tablename__ = "alert_messages"
    channel: Mapped[str] = mapped_column(String(32), primary_key=True)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)  # of the notice
    alert: Mapped[str] = mapped_column(String(32), index=True)
    number: Mapped[int]
    event: Mapped[str]
    body: Mapped[bytes]  # JSON
    state: Mapped[str]  # queued | sent | given-up
    created_at: Mapped[int]
    due_at: Mapped[int]
    attempts: Mapped[int] = mapped_column(default=0)
    code: Mapped[str] = mapped_column(default="")  # of the last failure
    detail: Mapped[str] = mapped_column(default="")
    sent_at: Mapped[int] = mapped_column(default=0)
    __table_args__ = (Index("alert_messages_due", "state", "channel", "due_at"),)


class AlertCounter(Base):
    """A counter of a device that only grows, and when alerting saw it grow."""

    __tablename__ = "alert_counters"
    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    value: Mapped[int]
    grew_at: Mapped[int]


class Lease(Base):
    """Who does the reconciler's work, until when, under which fencing epoch."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    holder: Mapped[str]
    epoch: Mapped[int]
    expires_at: Mapped[int]


class Tally(Base):
    """A number that only grows, under its metric's name and labels, whoever of several processes counted."""

    __tablename__ = "tallies"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    labels: Mapped[str] = mapped_column(primary_key=True)  # canonical JSON
    value: Mapped[float]
    first_at: Mapped[int]
    updated_at: Mapped[int]


class IngestBeat(Base):
    """That an ingest worker is connected and at work."""

    __tablename__ = "ingest_beats"
    worker: Mapped[str] = mapped_column(String(64), primary_key=True)
    at: Mapped[int]
