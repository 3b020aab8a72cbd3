"""Registry: the pipeline from data to a registered version.

    fit → gate (minima, champion) → convert → parity → profile, golden rows, card → bundle → version

Rules:
* every execution is a run in the database, whatever its end; a run that was refused or failed says why;
* the champion is judged on the same held-out rows, as the ONNX model that devices run;
* a version is registered in one transaction, with its bundle already stored; nothing half-made is visible.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from lightship.convert.converter import Converted, convert, import_onnx
from lightship.convert.parity import ParityReport, check_import, check_parity, golden_rows, parity_rows, require
from lightship.convert.session import OnnxModel
from lightship.data.dataset import Dataset
from lightship.data.profile import reference_profile
from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import ModelVersion, Run
from lightship.training.card import CardFacts, render_card
from lightship.training.environment import capture, code_revision, environment_digest
from lightship.training.explain import importances
from lightship.training.gate import GateDecision, decide_gate
from lightship.training.metrics import Metrics, evaluate
from lightship.training.recipe import Recipe, recipe_digest
from lightship.training.train import fit
from lightship_agent.contract.bundle import BACKGROUND, CARD, GOLDEN, MODEL, PROFILE, Rows, build_bundle, encode_golden
from lightship_agent.contract.codes import LightshipError, RegistryError
from lightship_agent.contract.manifest import Manifest, Provenance
from lightship_agent.contract.names import check_name
from lightship_agent.contract.profile import ReferenceProfile, count_outputs
from lightship_agent.contract.wire import encode, sha256_hex
from lightship_agent.runtime.model import LoadedModel, load_model

from . import versions
from .bundles import BundleCache
from .datasets import resolve_dataset
from .rules import may_register

Progress = Callable[[str], None]
BACKGROUND_ROWS = 32
GOLDEN_ROWS = 32


@dataclass
class _Made:
    """What a run has made so far; it becomes columns of the run, and members of the bundle."""

    dataset: Dataset
    model: str
    run_id: str
    kind: Literal["train", "retrain", "import"]
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
    importances: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    parent: str = ""


def train_version(
    home: Home,
    *,
    dataset: str,
    recipe: Recipe,
    model: str,
    actor: str,
    kind: Literal["train", "retrain"] = "train",
    force_reason: str | None = None,
    progress: Progress | None = None,
    allow_modules: tuple[str, ...] = (),
    reference_from: int = 0,
) -> ModelVersion:
    """Execute `recipe` on `dataset` and register the result as the next version of `model`.

    Args:
        home: an open home.
        dataset: a reference, `name`, `name@2` or a digest.
        recipe: what to fit, and the gate.
        model: the registered model's name; made if it is new.
        actor: for the audit log.
        kind: train, or retrain when monitoring asked for it.
        force_reason: overrides a failed metric gate; audited.
        progress: is told each step in a few words.
        allow_modules: packages besides scikit-learn that the recipe may name.
        reference_from: rows before this one are learnt from, and are no part of the reference profile: after a change
            of the world, the profile is that of the world as it is now.

    Raises:
        LightshipError: data.*, train.*, gate.*, convert.*, storage.*; the run says the same.
    """
    check_name("model name", model)
    data = _load_dataset(home, dataset)
    made = _begin(home, data, model, kind, recipe.estimator, msgspec.to_builtins(recipe), [recipe.seed])
    made.recipe_digest = recipe_digest(recipe)
    with _recorded(home, made):
        tell = progress or (lambda _: None)
        fitted = fit(data, recipe, progress=tell, allow_modules=allow_modules)
        made.metrics, made.warnings = fitted.metrics, fitted.warnings
        heldout = data.take(fitted.heldout)
        made.gate = _gate(home, made, heldout, recipe)
        failed = " ".join(c.sentence for c in made.gate.checks if not c.holds)
        may_register(gate_passed=made.gate.passed, parity_passed=True, force_reason=force_reason, failed=failed)
        tell("converting to ONNX in a process of its own")
        converted = convert(fitted.estimator, data.schema, data.labels, data.task)
        tell("proving parity with the original")
        rows = parity_rows(fitted.heldout_rows, data.schema, fitted.estimator)
        made.parity = check_parity(fitted.estimator, converted, rows)
        require(made.parity)
        tell("measuring what matters to the model")
        made.importances = importances(
            fitted.estimator, fitted.heldout_rows, fitted.heldout_y, data.schema.names, seed=recipe.seed
        )
        seen = data.take(np.arange(reference_from, data.rows, dtype=np.int64))
        unlearnt = data.take(fitted.heldout[fitted.heldout >= reference_from])
        return _register(home, made, converted, seen, unlearnt, actor, force_reason)


def import_version(
    home: Home,
    *,
    onnx: Path,
    reference: Dataset,
    model: str,
    gate: dict[str, float],
    actor: str,
    force_reason: str | None = None,
    progress: Progress | None = None,
) -> ModelVersion:
    """Take a model made elsewhere through the same gates, judged on `reference` rows with their truth.

    Raises:
        LightshipError: data.*, gate.*, convert.*, storage.*; the run says the same.
    """
    check_name("model name", model)
    home.datasets.put(reference)
    recipe = {"source": onnx.name, "gate": gate}
    made = _begin(home, reference, model, "import", f"onnx:{onnx.name}", recipe, [])
    with _recorded(home, made):
        tell = progress or (lambda _: None)
        tell("reading the model in a process of its own")
        converted = import_onnx(_read(onnx), reference.schema, reference.labels)
        made.recipe_digest = sha256_hex(converted.onnx)
        tell("asking it one row at a time and in batches")
        made.parity = check_import(converted, parity_rows(reference.x, reference.schema), None)
        require(made.parity)
        predict = _onnx_predict(converted)
        made.metrics = evaluate(predict, reference)
        made.gate = decide_gate(made.metrics, gate, _champion_metrics(home, made, reference))
        failed = " ".join(c.sentence for c in made.gate.checks if not c.holds)
        may_register(gate_passed=made.gate.passed, parity_passed=True, force_reason=force_reason, failed=failed)
        made.importances = importances(predict, reference.x, reference.y, reference.schema.names)
        return _register(home, made, converted, reference, reference, actor, force_reason)


def _read(path: Path) -> bytes:
    from lightship_agent.contract.codes import ConvertError

    try:
        return path.read_bytes()
    except OSError as e:
        raise ConvertError("convert.invalid-onnx", f"Can't read {path}: {e.strerror}.") from e


def _load_dataset(home: Home, reference: str) -> Dataset:
    with home.database.read() as session:
        digest = resolve_dataset(session, reference).digest
    return home.datasets.get(digest)


def _begin(
    home: Home, data: Dataset, model: str, kind: Any, estimator: str, recipe: dict[str, Any], seeds: list[int]
) -> _Made:
    environment = capture()
    made = _Made(
        dataset=data,
        model=model,
        run_id=secrets.token_hex(6),
        kind=kind,
        estimator_name=estimator,
        started=audit.now_ms(),
        environment=environment,
        revision=code_revision(Path.cwd()),
        recipe=recipe,
        recipe_digest="",
        seeds=seeds,
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
    return made


class _recorded:  # noqa: N801 - reads as a word in a with statement
    """Writes the end of the run, whatever it is."""

    def __init__(self, home: Home, made: _Made) -> None:
        self._home, self._made = home, made

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
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


def _gate(home: Home, made: _Made, heldout: Dataset, recipe: Recipe) -> GateDecision:
    assert made.metrics is not None
    champion = _champion_metrics(home, made, heldout)
    return decide_gate(made.metrics, recipe.gate, champion, recipe.max_regression)


def _champion_metrics(home: Home, made: _Made, rows: Dataset) -> Metrics | None:
    """The present champion on the same rows; None where there is none, or where it answers another question."""
    try:
        with home.database.read() as session:
            champion = versions.resolve(session, f"{made.model}@champion")
    except RegistryError:
        return None
    bundle = BundleCache(home.artifacts)(champion.digest)
    same_inputs = bundle.manifest.input_schema.names == rows.schema.names
    if not same_inputs or bundle.manifest.outputs.labels != rows.labels:
        return None
    made.parent = f"{made.model}@{champion.version}"
    return evaluate(_device_predict(load_model(bundle)), rows)


def _device_predict(model: LoadedModel) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]:
    def predict(rows: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        answer = model.predict(np.ascontiguousarray(rows))
        if answer.labels is not None:
            return answer.labels
        assert answer.values is not None
        return answer.values[:, 0]

    return predict


def _onnx_predict(converted: Converted) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]:
    model = OnnxModel(converted.onnx, converted.outputs)

    def predict(rows: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        answer = model.answer(rows)
        found = answer.labels if answer.labels is not None else answer.values
        assert found is not None
        return found

    return predict


def _register(
    home: Home,
    made: _Made,
    converted: Converted,
    reference: Dataset,
    heldout: Dataset,
    actor: str,
    force_reason: str | None,
) -> ModelVersion:
    members = _members(converted, reference, heldout)
    with home.database.write() as session:
        number = versions.newest(session, made.model) + 1
        members[CARD] = _card(made, number).encode()
        bundle = build_bundle(_manifest(made, converted, number), members)
        assert made.metrics is not None
        row = ModelVersion(
            model=made.model,
            version=number,
            run_id=made.run_id,
            state="registered",
            digest=home.artifacts.put(bundle),
            length=len(bundle),
            metrics=made.metrics.values,
            forced_reason=force_reason or "",
            created_at=audit.now_ms(),
        )
        session.add(row)
        session.flush()
        versions.set_alias(session, made.model, "challenger", number, actor=actor)
        detail: dict[str, Any] = {"run": made.run_id, "digest": row.digest, "metrics": row.metrics}
        if force_reason and made.gate is not None and not made.gate.passed:
            detail["forced"] = force_reason
            detail["failed_checks"] = [c.sentence for c in made.gate.checks if not c.holds]
        verb = "model.register-forced" if "forced" in detail else "model.register"
        audit.append(session, actor=actor, verb=verb, subject=f"{made.model}@{number}", detail=detail)
    return row


def _members(converted: Converted, reference: Dataset, heldout: Dataset) -> dict[str, bytes]:
    golden = golden_rows(converted, heldout.x, GOLDEN_ROWS)
    step = max(1, reference.rows // BACKGROUND_ROWS)
    background = np.ascontiguousarray(reference.x[::step][:BACKGROUND_ROWS])
    return {
        MODEL: converted.onnx,
        PROFILE: encode(_profile(converted, reference, heldout)),
        GOLDEN: encode_golden(golden),
        BACKGROUND: encode(Rows.of(background)),
    }


def _profile(converted: Converted, reference: Dataset, heldout: Dataset) -> ReferenceProfile:
    """What the device should see (all reference rows), and what the model says to rows it has not learnt.

    A model is surer of rows it was fitted on than it will ever be in the field, so its predictions and scores are
    counted on held-out rows only.
    """
    profile = reference_profile(reference.x, reference.schema.names)
    answer = OnnxModel(converted.onnx, converted.outputs).answer(heldout.x)
    if answer.labels is None:
        return profile
    scores = answer.scores if converted.outputs.score_kind == "probability" else None
    predictions, score_counts = count_outputs(answer.labels, scores, len(heldout.labels))
    return msgspec.structs.replace(
        profile,
        labels=heldout.labels,
        predictions=tuple(int(v) for v in predictions),
        scores=tuple(int(v) for v in score_counts),
        labelled=heldout.rows,
        errors=int((answer.labels != heldout.y).sum()),
    )


def _manifest(made: _Made, converted: Converted, number: int) -> Manifest:
    assert made.metrics is not None
    return Manifest(
        model=made.model,
        version=number,
        created=_rfc3339(made.started),
        input_schema=converted.schema,
        outputs=converted.outputs,
        requires=converted.requires,
        provenance=Provenance(
            dataset_digest=made.dataset.digest,
            recipe_digest=made.recipe_digest,
            code_revision=made.revision,
            environment_digest=environment_digest(made.environment),
            seeds=tuple(made.seeds),
            run=made.run_id,
            parent=made.parent,
        ),
        members={},
        metrics=made.metrics.values,
        importances=made.importances,
    )


def _card(made: _Made, number: int) -> str:
    assert made.metrics is not None
    data = made.dataset
    return render_card(
        CardFacts(
            model=made.model,
            version=number,
            created=_rfc3339(made.started),
            estimator=made.estimator_name,
            schema=data.schema,
            labels=data.labels,
            target=data.target,
            metrics=made.metrics,
            dataset_name=data.name,
            dataset_digest=data.digest,
            dataset_rows=data.rows,
            recipe_digest=made.recipe_digest,
            code_revision=made.revision,
            environment=made.environment,
            importances=made.importances,
            warnings=made.warnings,
        )
    )


def _rfc3339(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
