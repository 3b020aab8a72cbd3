"""The shell around the drift deciders: each window judged once, and no device in the way of another."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tests.agent.conftest import answers
from tests.control_plane.things import add_device, register, reports_running

from lightship.api import metrics
from lightship.home import Home
from lightship.monitoring import watch as watching
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.policy import PolicySettings
from lightship.monitoring.watch import Watch, watch_model
from lightship.monitoring.watch_common import remembered, watch_common
from lightship.monitoring.window_tallies import MOST_FEATURES, OTHERS, told_apart
from lightship.registry.bundles import BundleCache
from lightship.storage.models import (
    Alarm,
    CommonMemory,
    Device,
    ModelVersion,
    PolicyRow,
    RetrainProposal,
    WindowRow,
)
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.profile import Binner, count_outputs
from lightship_agent.contract.wire import encode

DEVICES = ("pump-1", "pump-2", "pump-3")
ROWS = 100


@pytest.fixture
def fleet(home: Home) -> Home:
    version = register(home, 1)
    for device in DEVICES:
        add_device(home, device)
        reports_running(home, device, version)
    return home


def version_of(home: Home) -> ModelVersion:
    with home.database.read() as session:
        return session.get_one(ModelVersion, ("pump", 1))


def window(home: Home, device: str, w: int, *, shift: float = 0.0, **changes: Any) -> None:
    """What ingest stores of a window of rows like those of training, or shifted ones."""
    version = version_of(home)
    bundle = read_bundle(home.artifacts.get(version.digest))
    rng = np.random.default_rng([w, int(device.removeprefix("pump-"))])
    rows = rng.normal(size=(ROWS, 4)).astype(np.float32)
    rows[:, 2] += np.float32(shift)
    said = answers(bundle.model, rows, bundle.manifest.outputs)
    predictions, scores = count_outputs(said["label"], said["probabilities"], 2)
    facts: dict[str, Any] = {
        "counts": encode(tuple(int(c) for c in Binner(bundle.profile.features).count(rows))),
        "predictions": predictions.tolist(),
        "scores": encode(tuple(int(s) for s in scores)),
        "digest": version.digest,
        **changes,
    }
    row = WindowRow(
        device=device, w=w, model="pump", version=1, opened_at=1_000 * w, closed_at=1_000 * w + 999, rows=ROWS, **facts
    )
    with home.database.write() as session:
        session.add(row)


def judge(home: Home) -> int:
    drift = DriftSettings(levels=4, budget=1.0, horizon_windows=1_000)
    watch = Watch(bundle_of=BundleCache(home.artifacts), drift=drift, policy=PolicySettings())
    return watch_model(home.database, watch, "pump")


def device(home: Home, name: str) -> Device:
    with home.database.read() as session:
        return session.get_one(Device, name)


def unjudged(home: Home) -> set[str]:
    with home.database.read() as session:
        return set(session.scalars(select(WindowRow.device).where(WindowRow.judged.is_(False))))


def test_each_window_is_judged_once_and_the_verdict_is_plain_json(fleet: Home) -> None:
    for w in range(3):
        for name in DEVICES:
            window(fleet, name, w)
    assert (judge(fleet), judge(fleet)) == (9, 0)
    window(fleet, "pump-1", 3)
    assert judge(fleet) == 1
    for name in DEVICES:
        verdict = device(fleet, name).verdict
        assert verdict["digest"] == version_of(fleet).digest
        json.dumps(verdict, allow_nan=False)


def test_a_backlog_is_judged_in_parts_and_each_is_written_before_the_next(
    fleet: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "AT_ONCE", 2)
    for w in range(5):
        for name in DEVICES:
            window(fleet, name, w)
    written: list[int] = []
    judge_some = watching._judge

    def noted(session: Session, watch: Watch, model: str) -> Any:
        written.append(session.scalar(select(func.count()).where(WindowRow.judged)) or 0)
        return judge_some(session, watch, model)

    monkeypatch.setattr(watching, "_judge", noted)

    assert (judge(fleet), judge(fleet)) == (15, 0)
    assert written == [0, 6, 12]
    assert unjudged(fleet) == set()


def test_a_judged_window_is_counted_once_with_the_shift_of_its_features(fleet: Home) -> None:
    window(fleet, "pump-1", 0, shift=3.0, invalid=7)
    window(fleet, "pump-2", 0)
    judge(fleet)
    judge(fleet)

    said = metrics.render(fleet).decode()

    of = 'model="pump",version="1"'
    assert f"lightship_watched_rows_total{{{of}}} {2 * ROWS}.0" in said
    assert f"lightship_refused_rows_total{{{of}}} 7.0" in said
    assert f'lightship_drift_psi_count{{feature="current",{of}}} 2.0' in said
    assert f'lightship_drift_psi_bucket{{feature="current",le="1.0",{of}}} 1.0' in said  # the other is far beyond
    windows = [line for line in said.splitlines() if line.startswith("lightship_judged_windows_total{")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in windows) == 2


def test_of_many_features_the_most_important_ones_are_told_apart() -> None:
    psi = {f"x{i:03}": i / 100 for i in range(100)}

    found = told_apart(psi, {"x099": 1.0, "x050": 0.5})

    assert len(found) == MOST_FEATURES + 1
    assert list(found)[:3] == ["x099", "x050", "x000"]
    assert found[OTHERS] == psi["x098"]


def test_with_nothing_new_nothing_is_written(fleet: Home) -> None:
    assert judge(fleet) == 0
    with fleet.database.read() as session:
        assert session.scalars(select(PolicyRow)).all() == []


def test_one_shifted_device_raises_its_own_alarm_and_no_other(fleet: Home) -> None:
    for w in range(8):
        for name in DEVICES:
            window(fleet, name, w, shift=3.0 if name == "pump-2" else 0.0)
    judge(fleet)
    with fleet.database.read() as session:
        alarms = list(session.scalars(select(Alarm)))
    assert {a.device for a in alarms} == {"pump-2"}
    assert "current" in alarms[0].sentence  # the name of the third feature
    assert device(fleet, "pump-2").drift_level == "critical"
    assert device(fleet, "pump-1").drift_level == "ok"


BROKEN: dict[str, dict[str, Any]] = {
    "too few counts": {"counts": encode((1, 2, 3))},
    "too many predictions": {"predictions": [1, 2, 3, 4]},
    "no scores": {"scores": encode(())},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_device_that_counts_something_else_is_not_judged_by_it_and_stops_nobody(fleet: Home, what: str) -> None:
    window(fleet, "pump-1", 0)
    window(fleet, "pump-2", 0, **BROKEN[what])
    assert judge(fleet) == 2
    assert unjudged(fleet) == set()
    assert device(fleet, "pump-1").drift_level == "ok"


def test_a_device_that_claims_a_bundle_we_never_made_stops_nobody(fleet: Home) -> None:
    with fleet.database.write() as session:
        session.get_one(Device, "pump-2").running_digest = "f" * 64
    window(fleet, "pump-2", 0, digest="f" * 64)
    window(fleet, "pump-1", 0)
    assert judge(fleet) == 1
    assert unjudged(fleet) == {"pump-2"}


def test_window_numbers_as_large_as_they_get_are_no_work(fleet: Home) -> None:
    window(fleet, "pump-1", 0)
    window(fleet, "pump-1", 2**53)
    assert judge(fleet) == 2


def test_devices_with_a_label_that_drift_unlike_the_others_are_one_alarm_that_ends_with_the_drift(home: Home) -> None:
    version, sites = register(home, 1), {f"pump-{i}": "north" if i < 4 else "south" for i in range(9)}
    for name, site in sites.items():
        add_device(home, name, labels={"site": site})
        reports_running(home, name, version)
    drift = DriftSettings(levels=1, budget=1.0, horizon_windows=1_000, segments=("site",))
    watch = Watch(bundle_of=BundleCache(home.artifacts), drift=drift, policy=PolicySettings())

    def look(first: int, shift: float) -> list[Alarm]:
        for w in range(first, first + 10):
            for name, site in sites.items():
                window(home, name, w, shift=shift if site == "north" else 0.0)
        watch_model(home.database, watch, "pump")
        with home.database.read() as session:
            return list(session.scalars(select(Alarm).where(Alarm.kind == "segment")))

    (alarm,) = look(0, 3.0)
    assert "4 devices with site=north drift in" in alarm.sentence
    assert alarm.evidence["segment"] == "site=north"
    assert set(alarm.evidence["devices"]) == {"pump-0", "pump-1", "pump-2", "pump-3"}
    assert alarm.closed_at is None
    (same,) = look(10, 0.0)
    assert same.id == alarm.id
    assert same.closed_at is not None


@pytest.fixture
def many(home: Home) -> Home:
    version = register(home, 1)
    for i in range(12):
        add_device(home, f"pump-{i}")
        reports_running(home, f"pump-{i}", version)
    return home


#: Short windows of a small fleet, so that little is learnt first.
QUICK = DriftSettings(levels=1, budget=10.0, horizon_windows=100, warm_up=8, baseline=20, season_weeks=0)


def goes_on(home: Home, first: int, windows: int, shift: float, devices: int = 12) -> list[Alarm]:
    """So many windows of all devices, judged, looked at together; the alarms of all of them."""
    watch = Watch(bundle_of=BundleCache(home.artifacts), drift=QUICK, policy=PolicySettings(quarantine=False))
    for w in range(first, first + windows):
        for i in range(devices):
            window(home, f"pump-{i}", w, shift=shift)
    watch_model(home.database, watch, "pump")
    watch_common(home.database, watch, "pump")
    with home.database.read() as session:
        return list(session.scalars(select(Alarm).where(Alarm.kind == "common")))


def test_all_devices_that_move_together_are_one_alarm_and_a_proposal_which_ends_with_the_shift(many: Home) -> None:
    assert goes_on(many, 0, 30, 0.0) == []
    with many.database.read() as session:
        known = remembered(session, "pump")
    assert known is not None
    assert known.looks > QUICK.baseline
    assert set(known.windows.values()) == {29}
    assert len(known.devices) == 12

    (alarm,) = goes_on(many, 30, 8, 0.4)
    assert "All 12 devices have moved together in current" in alarm.sentence
    assert (alarm.level, alarm.device, alarm.closed_at) == ("critical", "", None)
    with many.database.read() as session:
        (proposal,) = session.scalars(select(RetrainProposal))
    assert proposal.reason == alarm.sentence

    (same,) = goes_on(many, 38, 8, 0.0)
    assert same.closed_at is not None


def test_a_window_is_in_one_look_only_and_looking_again_takes_none(many: Home) -> None:
    goes_on(many, 0, 5, 0.0)
    watch = Watch(bundle_of=BundleCache(many.artifacts), drift=QUICK, policy=PolicySettings())
    with many.database.read() as session:
        before = session.get_one(CommonMemory, "pump").state
    assert watch_common(many.database, watch, "pump") == 0
    with many.database.read() as session:
        assert session.get_one(CommonMemory, "pump").state == before


def test_what_is_remembered_and_not_readable_is_learnt_again_from_what_is_stored(many: Home) -> None:
    goes_on(many, 0, 5, 0.0)
    with many.database.write() as session:
        session.get_one(CommonMemory, "pump").state = b"nonsense"
    goes_on(many, 5, 1, 0.0)
    with many.database.read() as session:
        known = remembered(session, "pump")
    assert known is not None
    assert known.looks == 6


def test_few_devices_are_not_looked_at_together(many: Home) -> None:
    assert goes_on(many, 0, 5, 0.0, devices=9) == []
    with many.database.read() as session:
        assert remembered(session, "pump") is None
