"""Experiments: what an operator asks for, what devices are told of it, and what came back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner
from securesystemslib.dsse import Envelope as Dsse
from sqlalchemy import select
from tests.control_plane.things import (
    ACTOR,
    MODEL,
    add_device,
    envelope,
    make_champion,
    register,
    reports_running,
)

from lightship.cli import cli
from lightship.fleet import comparison, director, experiments
from lightship.fleet.experiments import Wish
from lightship.home import Home
from lightship.monitoring import ingest
from lightship.registry import release
from lightship.registry.bundles import BundleCache
from lightship.storage.audit import now_ms
from lightship.storage.models import AgreementRow, AssignmentRow, Device, Exposure, ModelVersion, UpdateStep, WindowRow
from lightship_agent.contract.assignment import Assignment, parse_assignment
from lightship_agent.contract.codes import FleetError, LightshipError, RegistryError
from lightship_agent.contract.experiment import DIFFERENCE_EDGES, LATENCY_EDGES
from lightship_agent.contract.messages import Agreement, Update
from lightship_agent.contract.wire import encode, pack

DEVICES = ("pump-1", "pump-2")


@pytest.fixture
def fleet(home: Home) -> Home:
    """Two devices of the group `pumps` and one of `fans` were told to run pump@1; pump@2 is released."""
    one = register(home, 1)
    register(home, 2)
    make_champion(home, 1)
    for device, group in ((DEVICES[0], "pumps"), (DEVICES[1], "pumps"), ("fan-1", "fans")):
        add_device(home, device, group=group)
        with home.database.write() as session:
            director.assign(session, home.keys, device=device, version=one, rollout="ro", actor=ACTOR)
        reports_running(home, device, one)
    return home


def start(home: Home, version: int = 2, mode: str = "shadow", **how: Any) -> str:
    wish = Wish(**{"group": "pumps", "reference": f"{MODEL}@{version}", "mode": mode, **how})
    with home.database.write() as session:
        return experiments.start(session, wish, BundleCache(home.artifacts), actor=ACTOR).id


def stop(home: Home, experiment: str) -> None:
    with home.database.write() as session:
        experiments.stop(session, experiment, actor=ACTOR, reason="enough")


def tick(home: Home) -> set[str]:
    """One step of the reconciler; the devices that are poked."""
    with home.database.write() as session:
        return set(experiments.reconcile(session, home.keys))


def told(home: Home, device: str) -> Assignment:
    with home.database.read() as session:
        row = session.get_one(AssignmentRow, device)
        return parse_assignment(Dsse.from_dict(json.loads(row.envelope)).payload)


def view(home: Home, experiment: str) -> dict[str, Any]:
    with home.database.read() as session:
        seen = comparison.view(session, experiments.get(session, experiment), BundleCache(home.artifacts))
    json.dumps(seen, allow_nan=False)
    return seen


def report(home: Home, device: str, *records: Any) -> str:
    with home.database.write() as session:
        return ingest.receive(session, device, "tele", pack(envelope(*records)), now_ms()).code


def agreement(experiment: str, digest: str, s: int = 1, **changes: Any) -> Agreement:
    facts: dict[str, Any] = {
        "s": s, "t": now_ms(), "experiment": experiment, "model": MODEL, "version": 2, "digest": digest,
        "champion": "a" * 64, "opened": now_ms(), "rows": 100, "same": 90, "confusion": (40, 7, 3, 50),
        "differences": (90, *(0 for _ in DIFFERENCE_EDGES)), "latency": (0, 95, 5, *(0 for _ in LATENCY_EDGES[2:])),
        "failures": 1, "dropped": 2,
    }  # fmt: skip
    return Agreement(**{**facts, **changes})


def released(home: Home, version: int) -> ModelVersion:
    with home.database.read() as session:
        return session.get_one(ModelVersion, (MODEL, version))


# What devices are told ------------------------------------------------------------------------------------------------


def test_the_devices_of_the_group_are_told_once_and_the_others_nothing(fleet: Home) -> None:
    before = {d: told(fleet, d).seq for d in (*DEVICES, "fan-1")}
    experiment = start(fleet, share=0.5)

    assert tick(fleet) == set(DEVICES)
    assert tick(fleet) == set()

    for device in DEVICES:
        assignment = told(fleet, device)
        (beside,) = assignment.beside
        two = released(fleet, 2)
        assert (assignment.version, assignment.seq) == (1, before[device] + 1)
        assert (beside.experiment, beside.mode, beside.share) == (experiment, "shadow", 0.5)
        assert (beside.path, beside.sha256, beside.length) == (two.path, two.digest, two.length)
    assert (told(fleet, "fan-1").seq, told(fleet, "fan-1").beside) == (before["fan-1"], ())


def test_when_it_is_stopped_they_are_told_to_forget_it(fleet: Home) -> None:
    experiment = start(fleet)
    tick(fleet)
    stop(fleet, experiment)

    assert tick(fleet) == set(DEVICES)

    assert {told(fleet, d).beside for d in DEVICES} == {()}
    assert tick(fleet) == set()


def test_a_device_that_joins_the_group_later_is_told_with_its_first_assignment(fleet: Home) -> None:
    start(fleet)
    add_device(fleet, "pump-9")
    with fleet.database.write() as session:
        director.assign(session, fleet.keys, device="pump-9", version=released(fleet, 1), rollout="ro", actor=ACTOR)

    assert len(told(fleet, "pump-9").beside) == 1


def test_a_device_that_is_told_to_run_the_challenger_itself_needs_no_companion(fleet: Home) -> None:
    start(fleet)
    tick(fleet)
    with fleet.database.write() as session:
        director.assign(session, fleet.keys, device="pump-1", version=released(fleet, 2), rollout="r2", actor=ACTOR)

    assert told(fleet, "pump-1").beside == ()
    assert tick(fleet) == set()
    assert len(told(fleet, "pump-2").beside) == 1


def test_a_challenger_that_becomes_champion_ends_its_experiment(fleet: Home) -> None:
    experiment = start(fleet)
    tick(fleet)
    make_champion(fleet, 2)

    assert tick(fleet) == set(DEVICES)

    seen = view(fleet, experiment)
    assert (seen["status"], seen["ended_because"]) == ("stopped", "pump@2 became the champion.")
    assert {told(fleet, d).beside for d in DEVICES} == {()}


def test_a_version_that_is_revoked_goes_out(fleet: Home) -> None:
    experiment = start(fleet)
    tick(fleet)
    release.revoke(fleet, f"{MODEL}@2", actor=ACTOR, reason="leaks")

    assert tick(fleet) == set(DEVICES)

    assert "revoked" in view(fleet, experiment)["ended_because"]
    assert {told(fleet, d).beside for d in DEVICES} == {()}


def test_a_renewed_assignment_names_the_same_companions(fleet: Home) -> None:
    start(fleet)
    tick(fleet)
    with fleet.database.write() as session:
        director.retry(session, fleet.keys, device="pump-1", actor=ACTOR)

    assert len(told(fleet, "pump-1").beside) == 1
    assert tick(fleet) == set()


# What can't be --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        ({"share": 0.0}, "fleet.experiment-spec"),
        ({"share": 1.01}, "fleet.experiment-spec"),
        ({"share": float("nan")}, "fleet.experiment-spec"),
        ({"mode": "canary"}, "fleet.experiment-spec"),
        ({"per_request": True}, "fleet.experiment-spec"),
        ({"group": "nobody"}, "fleet.experiment-spec"),
        ({"reference": f"{MODEL}@1"}, "fleet.experiment-spec"),
        ({"reference": f"{MODEL}@7"}, "registry.unknown-version"),
        ({"reference": "fan@1"}, "registry.unknown-model"),
        ({"name": "../x"}, "name.invalid"),
    ],
    ids=str,
)
def test_what_can_not_be_is_refused_with_a_code_and_nobody_is_told(
    fleet: Home, wish: dict[str, Any], code: str
) -> None:
    with pytest.raises(LightshipError) as refused:
        start(fleet, **wish)

    assert refused.value.code == code
    assert tick(fleet) == set()
    with fleet.database.read() as session:
        assert experiments.newest(session) == []


def test_what_is_not_released_does_not_run_anywhere(fleet: Home) -> None:
    register(fleet, 3, released=False)

    with pytest.raises(RegistryError) as refused:
        start(fleet, 3)

    assert refused.value.code == "registry.state"


def test_on_a_group_there_is_one_ab_of_a_model_and_a_version_stands_there_once(fleet: Home) -> None:
    register(fleet, 3)
    start(fleet, 2, "ab", share=0.1)
    for version, mode in ((3, "ab"), (2, "shadow")):
        with pytest.raises(FleetError) as refused:
            start(fleet, version, mode, share=0.1)
        assert refused.value.code == "fleet.group-busy"

    start(fleet, 3, "shadow")
    tick(fleet)

    assert [b.mode for b in told(fleet, "pump-1").beside] == ["ab", "shadow"]


def test_no_device_bears_more_than_four(fleet: Home) -> None:
    for version in (3, 4, 5, 6):
        register(fleet, version)
    for version in (2, 3, 4, 5):
        start(fleet, version)

    with pytest.raises(FleetError) as refused:
        start(fleet, 6)

    assert refused.value.code == "fleet.group-busy"


def test_what_has_ended_does_not_end_again(fleet: Home) -> None:
    experiment = start(fleet, name="winter")
    stop(fleet, experiment)

    with pytest.raises(FleetError) as refused:
        stop(fleet, experiment)

    assert refused.value.code == "fleet.experiment-state"
    assert view(fleet, "winter")["id"] == experiment
    with pytest.raises(FleetError) as unknown:
        view(fleet, "summer")
    assert unknown.value.code == "fleet.unknown-experiment"


# What came back -------------------------------------------------------------------------------------------------------


def test_agreement_of_devices_and_reports_adds_up_and_each_report_counts_once(fleet: Home) -> None:
    experiment, digest = start(fleet), released(fleet, 2).digest
    first, second = agreement(experiment, digest, 1), agreement(experiment, digest, 2, rows=10, same=10,
        confusion=(5, 0, 0, 5), differences=(10, *(0 for _ in DIFFERENCE_EDGES)))  # fmt: skip
    for device in DEVICES:
        report(fleet, device, first, second)
        report(fleet, device, first, second)

    seen = view(fleet, experiment)["agreement"]

    assert (seen["devices"], seen["rows"], seen["same"], seen["failures"], seen["dropped"]) == (2, 220, 200, 4, 8)
    assert seen["agreement"] == pytest.approx(200 / 220)
    low, high = seen["interval"]
    assert low < 200 / 220 < high
    assert seen["confusion"] == [
        {"champion": "healthy", "challenger": "worn", "rows": 14},
        {"champion": "worn", "challenger": "healthy", "rows": 6},
    ]
    assert seen["latency_ms"] == {"p50": LATENCY_EDGES[1], "p95": LATENCY_EDGES[1]}


def test_agreement_with_what_there_is_not_counts_for_nothing_and_costs_nothing(fleet: Home) -> None:
    experiment, digest = start(fleet), released(fleet, 2).digest

    assert report(fleet, "pump-1", agreement("ffffffff", digest), agreement(experiment, "c" * 64, 2)) == ""

    assert view(fleet, experiment)["agreement"] is None
    with fleet.database.read() as session:
        assert list(session.scalars(select(AgreementRow))) == []


def test_steps_of_a_companion_are_shown_with_the_experiment_and_are_not_the_devices_own(fleet: Home) -> None:
    experiment, digest = start(fleet), released(fleet, 2).digest
    tick(fleet)
    own = Update(s=1, t=1, rollout="ro", seq=2, digest="a" * 64, state="committed")
    beside = Update(s=2, t=2, rollout=experiment, seq=2, digest=digest, state="beside-failed", code="update.golden")
    report(fleet, "pump-1", own, beside)

    assert view(fleet, experiment)["devices"] == {
        "pump-1": {"state": "failed", "code": "update.golden"},
        "pump-2": {"state": "told", "code": ""},
    }
    with fleet.database.read() as session:
        device = session.get_one(Device, "pump-1")
        assert (device.update_state, device.update_code) == ("committed", "")
        assert len(list(session.scalars(select(UpdateStep).where(UpdateStep.rollout == experiment)))) == 1


def served(home: Home, device: str, version: ModelVersion, *, rows: int, errors: int, w: int = 0) -> None:
    """A window with labels, and the span it is in."""
    now = now_ms()
    with home.database.write() as session:
        session.add(
            WindowRow(
                device=device, digest=version.digest, w=w, model=MODEL, version=version.version, opened_at=now,
                closed_at=now + 1, rows=rows, counts=encode(()), predictions=[rows, 0], scores=encode(()),
                labelled=rows, errors=errors,
            )
        )  # fmt: skip
        session.add(
            Exposure(
                device=device, digest=version.digest, began_at=now, ended_at=None, model=MODEL,
                version=version.version, requests=rows, failures=1,
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    ("errors", "word"), [((40, 160), "worse"), ((160, 40), "better."), ((80, 82), "neither")], ids=str
)
def test_two_arms_are_compared_by_their_own_labels(fleet: Home, errors: tuple[int, int], word: str) -> None:
    one, two = released(fleet, 1), released(fleet, 2)
    served(fleet, "pump-1", one, rows=5_000, errors=4_000, w=7)  # before the experiment
    with fleet.database.write() as session:
        for row in session.scalars(select(WindowRow)):
            row.opened_at = 1
    experiment = start(fleet, mode="ab", share=0.3)
    tick(fleet)
    served(fleet, "pump-1", one, rows=500, errors=errors[0])
    served(fleet, "pump-2", two, rows=500, errors=errors[1])
    served(fleet, "fan-1", two, rows=900, errors=900)  # not of the group

    seen = view(fleet, experiment)

    assert (seen["champion"]["labelled"], seen["champion"]["errors"]) == (500, errors[0])
    assert (seen["challenger"]["labelled"], seen["challenger"]["errors"]) == (500, errors[1])
    assert word in seen["comparison"]["sentence"]
    low, high = seen["comparison"]["interval"]
    assert low < (errors[1] - errors[0]) / 500 < high
    assert (seen["comparison"]["p_worse"] < 0.001) == (word == "worse")


def test_without_labels_it_says_so(fleet: Home) -> None:
    experiment = start(fleet, mode="ab", share=0.3)

    assert "labels" in view(fleet, experiment)["comparison"]["sentence"]


def test_an_operator_starts_looks_and_stops_from_the_command_line(fleet: Home) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(cli, ["--home", str(fleet.path), "experiment", *words])

    assert run("start", "pumps", f"{MODEL}@2").exit_code != 0, "neither a shadow nor a share"
    made = json.loads(run("start", "pumps", f"{MODEL}@2", "--shadow", "--name", "winter", "--json").stdout)
    report(fleet, "pump-1", agreement(made["id"], made["digest"]))

    shown = run("show", "winter")
    assert "90.0%" in shown.output
    assert "in the shadow" in run("list").output
    assert json.loads(run("show", "winter", "--json").stdout)["agreement"]["rows"] == 100
    assert json.loads(run("stop", "winter", "--json").stdout)["status"] == "stopped"
