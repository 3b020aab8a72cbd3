"""From data to a registered version: what passes, what is refused, and that the record says so either way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_wine
from sklearn.ensemble import RandomForestClassifier
from sqlalchemy import select
from tests.control_plane.things import ACTOR, make_champion

from lightship.convert.converter import convert
from lightship.data.dataset import Dataset, from_arrays
from lightship.home import Home
from lightship.registry import pipeline, release, versions
from lightship.registry.datasets import add_dataset
from lightship.registry.pipeline import import_version, train_version
from lightship.storage.models import AuditEvent, ModelVersion, Run
from lightship.training.recipe import parse_recipe
from lightship_agent.contract.bundle import CARD, Bundle, read_bundle
from lightship_agent.contract.codes import ConvertError, DataError, GateError, InvalidNameError, TrainError
from lightship_agent.runtime.golden import check_golden
from lightship_agent.runtime.model import load_model
from lightship_agent.runtime.probe import probe
from lightship_agent.runtime.session import Allowed

FOREST = {"estimator": "random-forest", "params": {"n_estimators": 5, "max_depth": 4}, "seed": 3}
REASON = "the field test of next week needs it"


def wine(names: list[str] | None = None) -> Dataset:
    loaded = load_wine()
    texts = names or [str(loaded.target_names[i]) for i in loaded.target]
    return from_arrays("wine", loaded.data, texts, loaded.feature_names, "cultivar")


def dice() -> Dataset:
    """The same wines with labels drawn by dice: nothing can be learnt."""
    names = np.random.default_rng(1).choice(["class_0", "class_1", "class_2"], 178)
    return wine([str(n) for n in names])


@pytest.fixture(scope="module")
def trained(fresh_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with wine@1 trained, released and champion, and a second run of the same recipe as wine@2; copied."""
    path = tmp_path_factory.mktemp("trained") / "home"
    shutil.copytree(fresh_home, path)
    home = Home.open(path)
    add_dataset(home, wine(), source="wine.csv", parent=None, actor=ACTOR)
    steps: list[str] = []
    recipe = parse_recipe({**FOREST, "gate": {"accuracy": 0.8}})
    train_version(home, dataset="wine", recipe=recipe, model="wine", actor=ACTOR, progress=steps.append)
    assert any("parity" in step for step in steps)
    release.release(home, "wine@1", actor=ACTOR)
    train_version(home, dataset="wine@1", recipe=recipe, model="wine", actor=ACTOR)
    make_champion(home, 1, "wine")
    home.close()
    return path


@pytest.fixture
def cellar(trained: Path, tmp_path: Path) -> Iterator[Home]:
    shutil.copytree(trained, tmp_path / "home")
    home = Home.open(tmp_path / "home")
    yield home
    home.close()


def bundle_of(home: Home, version: int) -> Bundle:
    with home.database.read() as session:
        return read_bundle(home.artifacts.get(versions.get(session, "wine", version).digest))


def last_run(home: Home) -> Run:
    with home.database.read() as session:
        return session.scalars(select(Run).order_by(Run.started_at.desc())).first() or pytest.fail("no run")


def count_of_versions(home: Home) -> int:
    with home.database.read() as session:
        return len(versions.listed(session))


def train(home: Home, dataset: str = "wine", **changes: Any) -> ModelVersion:
    recipe = parse_recipe({**FOREST, **changes.pop("recipe", {})})
    return train_version(home, dataset=dataset, recipe=recipe, model="wine", actor=ACTOR, **changes)


def test_a_version_knows_its_run_its_data_its_recipe_and_its_gate(cellar: Home) -> None:
    with cellar.database.read() as session:
        row = versions.get(session, "wine", 1)
        run = session.get(Run, row.run_id)
        assert run is not None
        events = session.scalars(select(AuditEvent.verb).where(AuditEvent.subject == "wine@1")).all()
        of_run = session.execute(select(AuditEvent.verb, AuditEvent.actor).where(AuditEvent.subject == run.id)).all()
    manifest = bundle_of(cellar, 1).manifest
    assert (run.status, run.kind, run.error_code) == ("finished", "train", "")
    assert run.dataset_digest == manifest.provenance.dataset_digest == wine().digest
    assert run.recipe_digest == manifest.provenance.recipe_digest
    assert run.environment_digest == manifest.provenance.environment_digest
    assert (manifest.model, manifest.version, manifest.provenance.run) == ("wine", 1, run.id)
    assert run.gate["passed"]
    assert run.parity["passed"]
    assert run.parity["label_flips"] == 0
    assert row.metrics["accuracy"] >= 0.8
    assert run.ended_at is not None
    assert run.ended_at >= run.started_at
    assert list(events) == ["data.add", "model.register", "model.release"]  # dataset and model share their name
    assert of_run == [("run.begin", ACTOR), ("run.finished", ACTOR)]


def test_the_bundle_holds_the_card_the_background_and_a_profile_of_all_rows(cellar: Home) -> None:
    bundle = bundle_of(cellar, 1)
    assert "wine" in bundle.card
    assert bundle.background is not None
    assert bundle.background.shape[1] == 13
    assert bundle.profile.rows == 178
    assert bundle.profile.labelled == sum(bundle.profile.predictions) < 178  # held-out rows only
    assert bundle.golden.inputs.rows > 0


def test_the_profile_knows_how_features_move_together_and_what_scores_were_worth(cellar: Home) -> None:
    profile = bundle_of(cellar, 1).profile
    assert profile.moments is not None
    assert profile.moments.distance is not None
    assert profile.moments.moments.rows == sum(profile.moments.distance.counts) == 178
    assert sum(profile.hits) == profile.labelled - profile.errors
    assert all(hit <= seen for hit, seen in zip(profile.hits, profile.scores, strict=True))


def test_the_profile_of_a_regressor_knows_its_values_and_how_far_they_were_off(cellar: Home) -> None:
    loaded = load_diabetes()
    sugar = from_arrays("sugar", loaded.data, [str(v) for v in loaded.target], loaded.feature_names, "progress")
    assert sugar.task == "regression"
    add_dataset(cellar, sugar, source="sugar.csv", parent=None, actor=ACTOR)
    recipe = parse_recipe({"estimator": "ridge", "seed": 3})

    train_version(cellar, dataset="sugar", recipe=recipe, model="sugar", actor=ACTOR)

    with cellar.database.read() as session:
        profile = read_bundle(cellar.artifacts.get(versions.get(session, "sugar", 1).digest)).profile
    assert profile.values is not None
    assert profile.residuals is not None
    assert sum(profile.values.counts) == sum(profile.residuals.bins.counts) == profile.labelled
    assert profile.errors == pytest.approx(0.1 * profile.labelled, abs=2)
    assert (profile.labels, profile.predictions, profile.hits) == ((), (), ())


def test_the_same_recipe_on_the_same_data_gives_the_same_bytes_in_every_member_but_the_card(cellar: Home) -> None:
    one, two = bundle_of(cellar, 1), bundle_of(cellar, 2)
    differs = {n for n in one.manifest.members if one.manifest.members[n] != two.manifest.members[n]}
    assert differs <= {CARD}
    assert one.manifest.metrics == two.manifest.metrics
    assert one.manifest.importances == two.manifest.importances


def test_a_gate_that_refuses_leaves_a_refused_run_and_nothing_else(cellar: Home) -> None:
    artifacts = sorted((cellar.path / "artifacts").rglob("*"))
    with pytest.raises(GateError, match="accuracy") as e:
        train(cellar, recipe={"gate": {"accuracy": 0.9999}})
    assert e.value.code == "gate.metric"
    run = last_run(cellar)
    assert (run.status, run.error_code) == ("refused", "gate.metric")
    assert not run.gate["passed"]
    assert run.metrics["values"]["accuracy"] < 0.9999
    assert count_of_versions(cellar) == 2
    assert sorted((cellar.path / "artifacts").rglob("*")) == artifacts


def test_a_challenger_is_judged_against_the_champion_on_the_same_rows(cellar: Home) -> None:
    with pytest.raises(GateError, match="champion") as e:
        train(cellar, "wine@1", recipe={"params": {"n_estimators": 1, "max_depth": 1}})
    assert e.value.code == "gate.champion"
    checks = last_run(cellar).gate["checks"]
    assert [c["holds"] for c in checks] == [False]
    assert count_of_versions(cellar) == 2


@pytest.mark.parametrize("reason", ["", "because", "   short    "])
def test_a_force_without_a_reason_worth_reading_is_refused(cellar: Home, reason: str) -> None:
    with pytest.raises(GateError) as e:
        train(cellar, recipe={"gate": {"accuracy": 0.9999}}, force_reason=reason)
    assert e.value.code == "gate.reason-required"
    assert last_run(cellar).status == "refused"
    with cellar.database.read() as session:
        event = session.scalars(select(AuditEvent).order_by(AuditEvent.seq.desc())).first()
    assert event is not None
    assert (event.verb, event.detail["code"], event.actor) == ("run.refused", "gate.reason-required", ACTOR)
    assert count_of_versions(cellar) == 2


def test_a_force_with_a_reason_registers_and_says_so_in_the_log(cellar: Home) -> None:
    made = train(cellar, recipe={"gate": {"accuracy": 0.9999}}, force_reason=REASON)
    assert (made.version, made.state, made.forced_reason) == (3, "registered", REASON)
    with cellar.database.read() as session:
        event = session.scalars(select(AuditEvent).where(AuditEvent.subject == "wine@3")).one()
    assert (event.verb, event.detail["forced"]) == ("model.register-forced", REASON)
    assert any("accuracy" in sentence for sentence in event.detail["failed_checks"])


def test_a_model_that_computes_something_else_on_the_device_can_not_be_forced(
    cellar: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = wine()
    liar = RandomForestClassifier(n_estimators=5, random_state=0).fit(data.x.copy(), (data.y + 1) % 3)
    monkeypatch.setattr(pipeline, "convert", lambda _fitted, *rest: convert(liar, *rest))
    with pytest.raises(ConvertError) as e:
        train(cellar, force_reason=REASON)
    assert e.value.code == "convert.parity"
    run = last_run(cellar)
    assert (run.status, run.error_code) == ("refused", "convert.parity")
    assert run.parity["label_flips"] > 0
    assert count_of_versions(cellar) == 2


def test_an_unknown_dataset_leaves_no_run_at_all(cellar: Home) -> None:
    before = last_run(cellar).id
    with pytest.raises(DataError, match="wine") as e:
        train(cellar, "vine")
    assert e.value.code == "data.unknown"
    assert last_run(cellar).id == before


def test_an_estimator_that_is_not_allowed_is_a_failed_run_with_its_code(cellar: Home) -> None:
    with pytest.raises(TrainError) as e:
        train(cellar, recipe={"estimator": "subprocess.Popen"})
    assert e.value.code == "train.unknown-estimator"
    assert (last_run(cellar).status, last_run(cellar).error_code) == ("failed", "train.unknown-estimator")


@pytest.mark.parametrize("name", ["Wine", "../wine", "w", "wine model"])
def test_a_model_name_outside_its_alphabet_is_refused_before_anything_is_written(home: Home, name: str) -> None:
    add_dataset(home, wine(), source="wine.csv", parent=None, actor=ACTOR)
    with pytest.raises(InvalidNameError):
        train_version(home, dataset="wine", recipe=parse_recipe(FOREST), model=name, actor=ACTOR)
    with home.database.read() as session:
        assert session.scalars(select(Run)).all() == []


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_recipe_in_fewer_bits_becomes_a_bundle_whose_golden_rows_agree_on_the_device(
    cellar: Home, precision: str, tmp_path: Path
) -> None:
    recipe = parse_recipe(
        {
            "estimator": "mlp",
            "scale": True,
            "params": {"hidden_layer_sizes": [64, 64], "max_iter": 300},
            "precision": precision,
            "providers": ["cuda", "xnnpack"],
            "intra_op_threads": 2,
        }
    )
    made = train_version(cellar, dataset="wine", recipe=recipe, model="glass", actor=ACTOR)

    path = tmp_path / "glass.tar"
    path.write_bytes(cellar.artifacts.get(made.digest))
    bundle = read_bundle(path.read_bytes())
    runtime = bundle.manifest.runtime
    assert (runtime.precision, runtime.providers, runtime.intra_op_threads) == (precision, ("cuda", "xnnpack"), 2)
    assert last_run(cellar).parity["rule"] == precision
    model = load_model(bundle, allowed=Allowed(threads=1))
    assert (model.provider, model.precision) == ("cpu", precision)
    assert model.notes == (
        "cuda: not in this onnxruntime",
        "xnnpack: not in this onnxruntime",
        "2 threads: 1 here",
    )
    assert model.batches_exactly
    assert check_golden(model, bundle.golden, bundle.manifest.golden_tolerance) < 1e-6  # on the CPU that made them
    assert probe(path, bundle.manifest.requires).max_difference < 1e-6


def test_a_precision_without_gain_leaves_no_version(cellar: Home) -> None:
    before = count_of_versions(cellar)
    recipe = parse_recipe({**FOREST, "precision": "int8"})
    with pytest.raises(ConvertError) as refused:
        train_version(cellar, dataset="wine", recipe=recipe, model="wine", actor=ACTOR)
    assert refused.value.code == "convert.precision"
    assert count_of_versions(cellar) == before
    assert last_run(cellar).status in ("refused", "failed")


def test_the_same_rows_again_are_the_same_dataset_version(cellar: Home) -> None:
    again = add_dataset(cellar, wine(), source="copy.csv", parent=None, actor=ACTOR)
    other = add_dataset(cellar, dice(), source="dice.csv", parent=None, actor=ACTOR)
    assert (again.version, again.source, other.version) == (1, "wine.csv", 2)


def test_a_model_made_elsewhere_passes_the_same_gates(cellar: Home, tmp_path: Path) -> None:
    onnx = tmp_path / "bought.onnx"
    onnx.write_bytes(bundle_of(cellar, 1).model)
    made = import_version(cellar, onnx=onnx, reference=wine(), model="bought", gate={"accuracy": 0.8}, actor=ACTOR)
    assert (made.model, made.version, made.state) == ("bought", 1, "registered")
    assert made.metrics["accuracy"] > 0.8
    assert (last_run(cellar).kind, last_run(cellar).status) == ("import", "finished")


def test_a_model_made_elsewhere_that_is_bad_is_refused_by_the_gate(cellar: Home, tmp_path: Path) -> None:
    onnx = tmp_path / "bought.onnx"
    onnx.write_bytes(bundle_of(cellar, 1).model)
    with pytest.raises(GateError):
        import_version(cellar, onnx=onnx, reference=dice(), model="bought", gate={"accuracy": 0.8}, actor=ACTOR)
    assert last_run(cellar).status == "refused"
    assert count_of_versions(cellar) == 2


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x08\x12\x04junk" * 50])
def test_a_file_that_is_no_model_is_refused_and_the_run_says_so(cellar: Home, tmp_path: Path, content: bytes) -> None:
    onnx = tmp_path / "broken.onnx"
    onnx.write_bytes(content)
    with pytest.raises(ConvertError) as e:
        import_version(cellar, onnx=onnx, reference=wine(), model="bought", gate={}, actor=ACTOR)
    assert e.value.code == "convert.invalid-onnx"
    assert (last_run(cellar).status, last_run(cellar).error_code) == ("refused", "convert.invalid-onnx")
    assert count_of_versions(cellar) == 2


def test_a_model_for_other_features_is_refused(cellar: Home, tmp_path: Path) -> None:
    onnx = tmp_path / "wide.onnx"
    onnx.write_bytes(bundle_of(cellar, 1).model)
    loaded = load_wine()
    narrow = from_arrays("narrow", loaded.data[:, :4], [str(i) for i in loaded.target], loaded.feature_names[:4], "y")
    with pytest.raises(ConvertError):
        import_version(cellar, onnx=onnx, reference=narrow, model="bought", gate={}, actor=ACTOR)
    assert count_of_versions(cellar) == 2
