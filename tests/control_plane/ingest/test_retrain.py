"""From a proposal to a challenger: when it may run, what it learns from, and how it ends."""

from __future__ import annotations

import json
import secrets
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sqlalchemy import select
from tests.agent.conftest import FEATURES, training_rows
from tests.control_plane.things import add_device, make_champion, register, settings_for, until

from lightship.cli import cli
from lightship.data.dataset import Dataset, from_arrays
from lightship.home import Home
from lightship.monitoring import retrain
from lightship.monitoring.retrain import LOST_AFTER_MS, RetrainRunner, feedback_dataset, run_proposal
from lightship.registry import pipeline
from lightship.storage.audit import now_ms
from lightship.storage.models import AuditEvent, FeedbackRow, ModelVersion, RetrainProposal, RolloutRow, Run
from lightship_agent.contract.codes import DataError, LightshipError, RegistryError


def reference() -> Dataset:
    rows = training_rows()
    worn = ["worn" if r[0] + 0.5 * r[1] > 0 else "healthy" for r in rows]
    return from_arrays("pumps", rows, worn, FEATURES, "state")


@pytest.fixture
def champion(home: Home) -> Home:
    """pump@1 is champion, and came from a dataset that is in the store."""
    version = register(home, 1)
    digest = home.datasets.put(reference())
    with home.database.write() as session:
        session.get_one(Run, version.run_id).dataset_digest = digest
        session.get_one(ModelVersion, ("pump", 1)).created_at = 1_000
    make_champion(home, 1)
    return home


def feedback(home: Home, n: int, *, device: str = "pump-1", at: int = 5_000, y: str = "worn", **changes: Any) -> None:
    x = changes.get("x", np.arange(4, dtype="<f4").tobytes())
    with home.database.write() as session:
        for _ in range(n):
            session.add(FeedbackRow(device=device, model="pump", digest="a" * 64, at=at, x=x, y=y))


def propose(home: Home, *, model: str = "pump", status: str = "proposed", age: int = 0, **changes: Any) -> str:
    row = RetrainProposal(
        id=secrets.token_hex(4), model=model, status=status, reason="drift", created_at=now_ms() - age,
        updated_at=now_ms() - age, **{"excluded": [], "since": 2_000, **changes},
    )  # fmt: skip
    with home.database.write() as session:
        session.add(row)
    return row.id


def proposal(home: Home, which: str) -> RetrainProposal:
    with home.database.read() as session:
        return session.get_one(RetrainProposal, which)


def ready(home: Home, rows: int = 10) -> str:
    with home.database.read() as session:
        found = retrain._ready(session, rows)
        return found.id if found else ""


# What it waits for ----------------------------------------------------------------------------------------------------


def serves(home: Home, device: str, *, left: float | None = None, seen_ago: float = 0.0, **changes: Any) -> None:
    """A device that serves the model and, with `left`, may still share so many rows today."""
    shares = {} if left is None else {"shared_rows_today": 5.0, "shared_rows_left": left}
    health = {"cpu_percent": 1.0, **shares}
    add_device(home, device, seen_ago=seen_ago, **{"running_model": "pump", "health": health, **changes})


def said(home: Home) -> list[str]:
    """As the command line says it, with ten rows needed."""
    words = ["--home", str(home.path), "retrain", "list", "--json"]
    done = CliRunner().invoke(cli, words, env={"LIGHTSHIP_RETRAIN_MIN_ROWS": "10"})
    return [p["detail"] for p in json.loads(done.stdout)]


def test_a_proposal_says_that_devices_have_shared_what_they_may_today(champion: Home) -> None:
    which = propose(champion, excluded=["sick"])
    feedback(champion, 4)
    for n, left in enumerate((0.0, 0.0, 0.0, 7.0, 1_000.0)):
        serves(champion, f"pump-{n}", left=left)
    serves(champion, "sick", left=0.0)
    serves(champion, "fan-1", left=0.0, running_model="fan")
    serves(champion, "gone", left=0.0, state="revoked")
    serves(champion, "closed")

    today = "3 of 5 devices have shared what they may today (share_rows_a_day)"
    words = f"Waits for rows: 4 of 10; {today}, and go on at 00:00 UTC."
    assert said(champion) == [words]
    assert proposal(champion, which).detail == ""  # to look changes nothing

    working = runner(champion)
    working.tick()
    assert (proposal(champion, which).status, proposal(champion, which).detail) == ("proposed", words)
    feedback(champion, 1)
    working.tick()  # too soon to look again
    assert proposal(champion, which).detail == words


def test_what_a_device_shared_yesterday_is_over(champion: Home) -> None:
    propose(champion)
    serves(champion, "pump-1", left=0.0, seen_ago=86_400)
    assert said(champion) == ["Waits for rows: 0 of 10; 1 of 1 devices share theirs as labels come."]


def test_where_no_device_shares_rows_the_proposal_says_so(champion: Home) -> None:
    propose(champion)
    serves(champion, "pump-1")
    assert said(champion) == ["Waits for rows: 0 of 10; none of 1 devices shares any (share_labelled_rows)."]


def test_one_that_waits_for_nothing_or_is_over_says_what_it_said(champion: Home) -> None:
    feedback(champion, 10)
    propose(champion, detail="Before.")
    propose(champion, status="dismissed", detail="No.", age=1_000)
    propose(champion, model="orphan", detail="None.", age=2_000)
    assert said(champion) == ["Before.", "No.", "None."]


def test_what_it_waited_for_is_forgotten_when_it_begins(champion: Home) -> None:
    which = propose(champion, detail="Waits for rows: 9 of 10.")
    feedback(champion, 10)
    with champion.database.write() as session:
        retrain._begin(session, session.get_one(RetrainProposal, which), "user:ann")
    assert proposal(champion, which).detail == ""


# When -----------------------------------------------------------------------------------------------------------------


def test_a_proposal_waits_for_enough_labels_of_the_new_world_from_sound_devices(champion: Home) -> None:
    which = propose(champion, excluded=["sick"])
    feedback(champion, 9)
    feedback(champion, 50, device="sick")
    feedback(champion, 50, at=1_500)  # before the drift
    assert ready(champion) == ""
    feedback(champion, 1)
    assert ready(champion) == which


def test_a_proposal_waits_while_the_model_is_being_rolled_out(champion: Home) -> None:
    which = propose(champion)
    feedback(champion, 20)
    with champion.database.write() as session:
        session.add(
            RolloutRow(
                id="r", model="pump", version=1, status="paused", selector={}, plan={}, state={}, gate={},
                created_by="", created_at=1, updated_at=1,
            )
        )  # fmt: skip
    assert ready(champion) == ""
    with champion.database.write() as session:
        session.get_one(RolloutRow, "r").status = "aborted"
    assert ready(champion) == which


def test_a_proposal_without_a_champion_does_not_stand_in_the_way_of_others(champion: Home) -> None:
    propose(champion, model="orphan", age=1_000)
    which = propose(champion)
    feedback(champion, 20)
    assert ready(champion) == which


# From what ------------------------------------------------------------------------------------------------------------


def test_the_challenger_learns_from_the_old_rows_and_from_what_came_since(champion: Home) -> None:
    feedback(champion, 5, at=1_500)
    feedback(champion, 7, at=3_000, y="healthy")
    feedback(champion, 9, device="sick", at=3_000)
    old, merged, now_begins = feedback_dataset(champion, "pump", ["sick"], since=2_000)
    assert (old.digest, merged.rows) == (reference().digest, old.rows + 12)
    assert now_begins == old.rows + 5
    assert merged.labels == old.labels


@pytest.mark.parametrize(
    "row", [b"", b"\0" * 15, np.array([1, np.inf, 0, 0], "<f4").tobytes(), np.array([np.nan] * 4, "<f4").tobytes()]
)
def test_a_row_that_the_schema_does_not_take_spoils_no_other(champion: Home, row: bytes) -> None:
    feedback(champion, 3)
    feedback(champion, 1, x=row)
    feedback(champion, 1, y="a label nobody knows")
    old, merged, _ = feedback_dataset(champion, "pump", [], since=0)
    assert merged.rows == old.rows + 3


def test_without_feedback_there_is_nothing_to_learn(champion: Home) -> None:
    feedback(champion, 3, at=500)  # older than the champion
    with pytest.raises(DataError) as e:
        feedback_dataset(champion, "pump", [], since=0)
    assert e.value.code == "data.empty"


def events(home: Home, which: str) -> list[tuple[str, str]]:
    with home.database.read() as session:
        query = select(AuditEvent).where(AuditEvent.subject == which).order_by(AuditEvent.seq)
        return [(e.verb, e.actor) for e in session.scalars(query)]


# How it ends ----------------------------------------------------------------------------------------------------------


def test_a_step_that_fails_is_written_to_the_proposal(champion: Home) -> None:
    which = propose(champion)
    with pytest.raises(LightshipError):
        run_proposal(champion, which, actor="user:ann")
    assert proposal(champion, which).status == "failed"
    assert proposal(champion, which).detail.startswith("data.empty")
    assert events(champion, which) == [("retrain.begin", "user:ann"), ("retrain.failed", "user:ann")]


def test_a_challenger_whose_release_people_sign_is_registered_and_named(
    champion: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = propose(champion)
    feedback(champion, 20)
    trained = register(champion, 2, released=False)
    with champion.database.write() as session:
        run = session.get_one(Run, session.get_one(ModelVersion, ("pump", 1)).run_id)
        run.recipe = {"estimator": "logistic-regression"}
    monkeypatch.setattr(pipeline, "train_version", lambda *_, **__: trained)
    (champion.keys.folder / "releases.pem").unlink()

    done = run_proposal(champion, which)

    assert (done.status, done.version) == ("failed", 2)
    assert "`lightship release pump@2`" in done.detail
    assert [r.path for r in champion.releases.released()] == ["bundles/pump/1.tar"]


@pytest.mark.parametrize("status", ["released", "failed", "refused", "dismissed"])
def test_what_is_over_is_not_run_again(champion: Home, status: str) -> None:
    which = propose(champion, status=status)
    for one in (which, "nosuch"):
        with pytest.raises(RegistryError) as e:
            run_proposal(champion, one)
        assert e.value.code == "registry.state"
    assert proposal(champion, which).status == status


def runner(home: Home) -> RetrainRunner:
    return RetrainRunner(home, settings_for(home.path, retrain="auto", retrain_min_rows=10))


def test_the_runner_starts_a_process_and_notices_how_it_ended(champion: Home) -> None:
    which = propose(champion)
    feedback(champion, 20)
    working = runner(champion)
    working.tick()
    assert proposal(champion, which).status == "running"
    until(lambda: working._process is None or working._process.poll() is not None, 180)
    working.tick()
    # The run of this champion has no recipe that could be repeated.
    assert proposal(champion, which).status in ("failed", "refused")
    assert proposal(champion, which).detail
    assert (champion.path / "retrain.log").exists()
    # Its child is a command, and the act is the runner's all the same.
    assert [actor for _, actor in events(champion, which)] == ["lightship:retrain"] * 2


def test_stopping_in_the_middle_gives_the_proposal_back(champion: Home) -> None:
    which = propose(champion)
    feedback(champion, 20)
    working = runner(champion)
    working.tick()
    process = working._process
    assert process is not None
    working.stop()
    assert process.returncode is not None
    assert proposal(champion, which).status == "proposed"
    assert [verb for verb, _ in events(champion, which)] == ["retrain.begin", "retrain.stopped"]
    runner(champion).stop()  # with nothing under way there is nothing to stop


def test_a_proposal_whose_process_was_lost_with_its_machine_is_given_up_in_the_end(champion: Home) -> None:
    lost = propose(champion, status="running", age=LOST_AFTER_MS + 1_000)
    fresh = propose(champion, status="running", age=LOST_AFTER_MS - 60_000)
    runner(champion).tick()
    assert (proposal(champion, lost).status, proposal(champion, fresh).status) == ("failed", "running")
    with champion.database.read() as session:
        assert session.scalars(select(RetrainProposal.detail).where(RetrainProposal.id == lost)).one()
