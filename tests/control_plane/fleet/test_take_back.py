"""What monitoring finds ends a real rollout: reports in, the reconciler's ticks, assignments of the old version out."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pytest
from sqlalchemy import select
from tests.agent.conftest import answers, build, pack_bundle, training_rows
from tests.control_plane import things
from tests.control_plane.things import ACTOR, MODEL, add_device, envelope, make_champion, register, settings_for

from lightship.fleet import director, rollouts
from lightship.fleet.reconciler import Reconciler
from lightship.fleet.rollout import Rules, WaveSpec
from lightship.fleet.rollouts import Selector
from lightship.home import Home
from lightship.monitoring import ingest
from lightship.registry import versions
from lightship.storage.models import Alarm, AssignmentRow, AuditEvent, ModelVersion, RolloutRow
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.messages import AnyRecord, Labels, Window
from lightship_agent.contract.profile import Binner, count_outputs
from lightship_agent.contract.wire import pack

DEVICES = ("pump-1", "pump-2", "pump-3")
ROWS, WINDOWS = 200, 6
Fault = Literal["errors", "missing", "shift", "nothing"]


class Fleet(NamedTuple):
    """Devices by row, and the one who looks after them."""

    home: Home
    reconciler: Reconciler


@cache
def measured(version: int, **options: Any) -> bytes:
    """A bundle that knows its error rate on held-out rows."""
    bundle = read_bundle(build(version, **options))
    profile = msgspec.structs.replace(bundle.profile, labelled=2_000, errors=100)
    return pack_bundle(bundle.model, bundle.manifest.outputs, bundle.golden, profile, version=version)


@pytest.fixture
def fleet(home: Home, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Three devices that ran pump@1 and run pump@2, whose rollout waits for a fourth one."""
    monkeypatch.setattr(things, "build", measured)
    one, two = register(home, 1), register(home, 2)
    make_champion(home, 1)
    for device in (*DEVICES, "pump-4"):
        add_device(home, device)
        with home.database.write() as session:
            director.assign(session, home.keys, device=device, version=one, rollout="first", actor=ACTOR)
        things.reports_running(home, device, one)
    with home.database.write() as session:
        waves = (WaveSpec(name="all", gate=False),)
        plan = rollouts.make_plan(
            session, model=MODEL, version=2, selector=Selector(group="pumps"), waves=waves, rules=Rules()
        )
        rollouts.create(session, plan, selector=Selector(group="pumps"), rollout="rollout-2", actor=ACTOR)
    made = Fleet(home, Reconciler(home, settings_for(home.path), lambda _devices: None))
    tick(made)
    for device in DEVICES:
        things.reports_running(home, device, two)
    return made


def tick(fleet: Fleet) -> None:
    assert fleet.reconciler.tick()


def reports(home: Home, devices: tuple[str, ...], fault: Fault) -> None:
    """What devices with pump@2 tell of six windows, through ingest."""
    with home.database.read() as session:
        version = session.get_one(ModelVersion, (MODEL, 2))
    bundle = read_bundle(home.artifacts.get(version.digest))
    same = {"model": MODEL, "digest": version.digest, "schema": "b" * 64}
    for n, device in enumerate(devices):
        rng = np.random.default_rng(n)
        records: list[AnyRecord] = []
        for w in range(WINDOWS):
            rows = training_rows()[rng.integers(0, len(training_rows()), ROWS)]
            said = answers(bundle.model, rows, bundle.manifest.outputs)
            predictions, scores = count_outputs(said["label"], said["probabilities"], 2)
            counted = rows.copy()
            if fault == "missing":
                counted[: ROWS // 2, 1] = np.nan
            if fault == "shift":
                counted[:, 1] += 0.8 * rows[:, 1].std()
            records.append(
                Window(
                    s=2 * w + 1, t=3_600_000 * (w + 1), version=2, w=w, opened=3_600_000 * w, rows=ROWS,
                    counts=tuple(Binner(bundle.profile.features).count(counted).tolist()),
                    predictions=tuple(predictions.tolist()), scores=tuple(scores.tolist()), **same,
                )
            )  # fmt: skip
            wrong = ROWS // 2 if fault == "errors" else ROWS // 20
            records.append(Labels(s=2 * w + 2, t=3_600_000 * (w + 1), w=w, labelled=ROWS, errors=wrong, **same))
        with home.database.write() as session:
            assert not ingest.receive(session, device, "tele", pack(envelope(*records)), 10**13).code


def state(home: Home) -> tuple[str, dict[str, int]]:
    """The rollout's status, and which version each device is told to run."""
    with home.database.read() as session:
        told = {row.device: row.version for row in session.scalars(select(AssignmentRow))}
        return session.get_one(RolloutRow, "rollout-2").status, told


@pytest.mark.parametrize(("fault", "words"), [("errors", "err more"), ("missing", "data that is broken")])
def test_a_version_with_which_most_devices_are_worse_is_taken_back_from_all(
    fleet: Fleet, fault: Fault, words: str
) -> None:
    reports(fleet.home, DEVICES, fault)
    tick(fleet)
    tick(fleet)
    status, told = state(fleet.home)
    assert status == "rolling-back"
    assert set(told.values()) == {1}
    with fleet.home.database.read() as session:
        one = versions.get(session, MODEL, 1)
        abort = session.scalars(select(AuditEvent).where(AuditEvent.verb == "rollout.abort")).one()
        alarms = session.scalars(select(Alarm).where(Alarm.kind == "local", Alarm.closed_at.is_(None))).all()
    assert abort.subject == "rollout-2"
    assert words in str(abort.detail["reason"])
    assert {a.device for a in alarms} == set(DEVICES)
    for device in DEVICES:
        things.reports_running(fleet.home, device, one)
    tick(fleet)
    assert state(fleet.home)[0] == "rolled-back"
    with fleet.home.database.read() as session:
        assert versions.aliased(session, MODEL, "champion") == 1


@pytest.mark.parametrize(("devices", "fault"), [(DEVICES[:1], "errors"), (DEVICES, "shift"), (DEVICES, "nothing")])
def test_one_sick_device_and_shifts_of_inputs_end_no_rollout(
    fleet: Fleet, devices: tuple[str, ...], fault: Fault
) -> None:
    well = tuple(d for d in DEVICES if d not in devices)
    reports(fleet.home, devices, fault)
    reports(fleet.home, well, "nothing")
    tick(fleet)
    status, told = state(fleet.home)
    assert status == "running"
    assert set(told.values()) == {2}


def test_a_version_whose_rollout_is_over_is_not_taken_back(fleet: Fleet) -> None:
    with fleet.home.database.read() as session:
        two = versions.get(session, MODEL, 2)
    things.reports_running(fleet.home, "pump-4", two)
    tick(fleet)
    assert state(fleet.home)[0] == "completed"
    reports(fleet.home, DEVICES, "errors")
    tick(fleet)
    status, told = state(fleet.home)
    assert status == "completed"
    assert set(told.values()) == {2}
    with fleet.home.database.read() as session:
        assert session.scalars(select(Alarm).where(Alarm.level == "critical")).all()
