"""What comes after its window, labels and products, is counted by a real agent, stored, and judged."""

from __future__ import annotations

from itertools import count

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from sqlalchemy import select
from tests.agent.conftest import Kind, answers
from tests.control_plane.ingest.test_ingest import send
from tests.control_plane.things import add_device, envelope, register, reports_running

from lightship.home import Home
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.joint import SETTLED
from lightship.monitoring.policy import PolicySettings
from lightship.monitoring.verdict import Verdict
from lightship.monitoring.watch import Watch, watch_model
from lightship.registry.bundles import BundleCache
from lightship.storage.models import Alarm, Device, WindowRow
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.messages import AnyRecord
from lightship_agent.monitor.labels import PredictionLedger, StreamKey
from lightship_agent.monitor.residuals import ResidualMeter
from lightship_agent.monitor.stream import TOGETHER, StreamMonitor
from lightship_agent.runtime.model import load_model

ROWS = 100
NAME = "pump-1"
Floats = npt.NDArray[np.float32]


class Pump:
    """A device whose rows the agent's own code counts, and whose reports are ingested."""

    def __init__(self, home: Home, kind: Kind) -> None:
        self.home = home
        version = register(home, 1, kind=kind)
        add_device(home, NAME)
        reports_running(home, NAME, version)
        self.bundle = read_bundle(home.artifacts.get(version.digest))
        model = load_model(self.bundle, since_ms=1)
        residuals = model.profile.residuals
        meter = ResidualMeter(residuals) if residuals is not None else None
        self.key = StreamKey(model.name, model.digest, model.schema_digest, self.bundle.manifest.outputs.labels, meter)
        self.monitor = StreamMonitor(model, ROWS)
        self.ledger = PredictionLedger(100_000)
        self.rng = np.random.default_rng(3)
        self._seq = count(1)
        drift = DriftSettings(horizon_windows=1_000)
        self._watch = Watch(bundle_of=BundleCache(home.artifacts), drift=drift, policy=PolicySettings())

    def tell(self, *records: AnyRecord) -> None:
        if not records:
            return
        numbered = [msgspec.structs.replace(r, s=next(self._seq)) for r in records]
        assert send(self.home, envelope(*numbered), now=1_000_000) == ""

    def predict(self, rows: Floats) -> npt.NDArray[np.float32]:
        """One window of rows, told at once; the values of a regressor."""
        said = answers(self.bundle.model, rows, self.bundle.manifest.outputs)
        classes = said.get("label")
        tops = said["variable"].ravel() if classes is None else said["probabilities"].max(axis=1)
        w = self.monitor.window
        labels = np.full(len(rows), -1) if classes is None else classes
        self.tell(*self.monitor.push(rows, labels.astype(np.int64), tops.astype(np.float32), 1_000 * (w + 1)))
        for i, value in enumerate(tops):
            self.ledger.remember(self.key, f"{w}-{i}", [w], [float(value)])
        return np.asarray(tops)

    def judge(self) -> Verdict:
        watch_model(self.home.database, self._watch, "pump")
        with self.home.database.read() as session:
            return msgspec.convert(session.get_one(Device, NAME).verdict["verdict"], Verdict)

    def alarms(self) -> list[Alarm]:
        with self.home.database.read() as session:
            return list(session.scalars(select(Alarm)))


def test_residuals_whose_labels_come_late_in_pieces_and_out_of_order_are_one_critical_alarm(home: Home) -> None:
    pump = Pump(home, "regressor")
    said = []
    for _ in range(12):
        said.append(pump.predict(pump.rng.normal(size=(ROWS, 4)).astype(np.float32)))
        assert pump.judge().residuals == ()
    late = [(w, i) for w in range(12) for i in range(ROWS)]
    for at, n in enumerate(pump.rng.permutation(len(late))):
        w, i = late[n]
        bias = 0.0 if w < 4 else 0.5
        truth = said[w][i] + np.float32(pump.rng.normal(bias, 0.6))
        assert pump.ledger.resolve(f"{w}-{i}", repr(float(truth)))
        assert not pump.ledger.resolve(f"{w}-{i}", "0.0")
        if at % 300 == 299:
            pump.tell(*pump.ledger.collect(50_000, lambda _key, _w: True))
    pump.predict(pump.rng.normal(size=(ROWS, 4)).astype(np.float32))

    verdict = pump.judge()

    assert verdict.level == "critical"
    assert ("residuals", "performance") in [(a.name, a.kind) for a in verdict.alarms]
    up = next(r for r in verdict.residuals if r.side == "up")
    assert up.alarm
    assert up.since in range(2, 7)
    assert up.bias == pytest.approx(0.5 / 0.6, abs=0.2)
    (alarm,) = pump.alarms()
    assert alarm.level == "critical"
    assert "residuals" in alarm.sentence
    pump.predict(pump.rng.normal(size=(ROWS, 4)).astype(np.float32))
    pump.judge()
    assert [a.id for a in pump.alarms()] == [alarm.id]


def test_windows_of_a_regressor_that_count_no_residuals_are_judged_by_their_errors_alone(home: Home) -> None:
    pump = Pump(home, "regressor")
    for _ in range(6):
        pump.predict(pump.rng.normal(size=(ROWS, 4)).astype(np.float32))
    with home.database.write() as session:
        for row in session.scalars(select(WindowRow)):  # as an agent stored them that counts no residuals
            row.labelled, row.errors = 100, 50
    verdict = pump.judge()
    assert verdict.residuals == ()
    assert [a.name for a in verdict.alarms if a.kind == "performance"] == ["errors"]


def goes_with(rng: np.random.Generator, together: float) -> Floats:
    """Rows whose last feature goes with the one before."""
    rows = rng.normal(size=(ROWS, 4)).astype(np.float32)
    rows[:, 3] = together * rows[:, 2] + np.sqrt(1 - together**2) * rows[:, 3]
    return rows


def test_products_that_come_after_their_windows_were_judged_alarm_with_the_next_window(home: Home) -> None:
    pump = Pump(home, "classifier")

    def stretch(together: float) -> list[tuple[int, bool]]:
        """The windows whose verdicts alarmed, and whether they were critical."""
        found = []
        for i in range(TOGETHER):
            pump.predict(goes_with(pump.rng, together))
            if 0 < i < TOGETHER - 1:
                continue
            verdict = pump.judge()
            joint = [a for a in verdict.alarms if a.kind == "joint"]
            assert {a.name for a in joint} <= {"current with speed"}
            found += [(verdict.window, a.confirmed) for a in joint]
            # What travels aside comes a report later: its last window is judged already.
            pump.tell(*pump.monitor.take_aside())
        return found

    healthy = SETTLED + 1
    assert [stretch(0.0) for _ in range(healthy)] == [[]] * healthy
    assert stretch(0.9) == []
    assert stretch(0.9) == [((healthy + 1) * TOGETHER, False)]
    assert stretch(0.0) == [((healthy + 2) * TOGETHER, True)]
    assert stretch(0.0) == []


def test_products_of_a_stretch_that_lost_a_window_say_nothing(home: Home) -> None:
    pump = Pump(home, "classifier")
    for n in range((SETTLED + 2) * TOGETHER):
        shape = 0.9 if n >= SETTLED * TOGETHER else 0.0
        pump.predict(goes_with(pump.rng, shape))
        pump.tell(*pump.monitor.take_aside())
    with home.database.write() as session:
        for w in range(3, (SETTLED + 2) * TOGETHER, TOGETHER):
            session.delete(session.get_one(WindowRow, (NAME, pump.key.digest, w)))
    verdict = pump.judge()
    assert verdict.joint is None
    assert [a for a in verdict.alarms if a.kind == "joint"] == []
