"""Registry: the pipeline from data to a registered version.

    fit → gate (minima, champion) → convert → parity → profile, golden rows, card → bundle → version
                                                   ↘ fewer bits → parity → gate ↗

Rules:
* every execution is a run in the database, whatever its end; a run that was refused or failed says why;
* the champion is judged on the same held-out rows, as the ONNX model that devices run;
* a model in fewer bits is gated again, as what it then is;
* a version is registered in one transaction, with its bundle already stored; nothing half-made is visible.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from lightship.convert.converter import Converted, convert, import_onnx, inspect_onnx, reduce_precision
from lightship.convert.parity import check_import, check_parity, check_reduced, parity_rows, require
from lightship.convert.reduce import Precision
from lightship.convert.session import OnnxModel
from lightship.data.dataset import Dataset
from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import ModelVersion
from lightship.training.explain import Explained, check_explainable, explain, importances
from lightship.training.gate import GateDecision, decide_gate
from lightship.training.metrics import Metrics, evaluate
from lightship.training.recipe import Recipe, recipe_digest
from lightship.training.train import fit
from lightship_agent.contract.bundle import CARD, build_bundle
from lightship_agent.contract.codes import ConvertError, RegistryError
from lightship_agent.contract.manifest import Runtime
from lightship_agent.contract.names import check_name
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.runtime.model import LoadedModel, load_model

from . import assemble, versions
from .bundles import BundleCache
from .datasets import resolve_dataset
from .rules import may_register
from .runs import Making, begin, recorded

Progress = Callable[[str], None]


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
    check_explainable(recipe.explain)
    data = _load_dataset(home, dataset)
    made = begin(home, data, model, kind, recipe.estimator, msgspec.to_builtins(recipe), [recipe.seed], actor)
    made.recipe_digest = recipe_digest(recipe)
    made.runtime = Runtime(
        providers=recipe.providers,
        intra_op_threads=recipe.intra_op_threads,
        graph_optimization=recipe.graph_optimization,
    )
    with recorded(home, made):
        tell = progress or (lambda _: None)
        fitted = fit(data, recipe, progress=tell, allow_modules=allow_modules)
        made.metrics, made.warnings = fitted.metrics, fitted.warnings
        heldout = data.take(fitted.heldout)
        made.gate = _gate(home, made, heldout, recipe)
        _pass_gate(made.gate, force_reason)
        tell("converting to ONNX in a process of its own")
        converted = convert(fitted.estimator, data.schema, data.labels, data.task)
        tell("proving parity with the original")
        rows = parity_rows(fitted.heldout_rows, data.schema, fitted.estimator)
        made.parity = check_parity(fitted.estimator, converted, rows)
        require(made.parity)
        if recipe.precision != "fp32":
            converted = _reduced(made, converted, recipe.precision, data.x[fitted.train], heldout, tell)
            made.gate = _gate(home, made, heldout, recipe)
            _pass_gate(made.gate, force_reason)
        tell("measuring what matters to the model")
        made.explained = explain(
            recipe.explain,
            fitted.estimator,
            fitted.heldout_rows,
            fitted.heldout_y,
            data.schema.names,
            background=data.x[fitted.train],
            seed=recipe.seed,
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
    precision: Precision = "fp32",
    runtime: Runtime | None = None,
) -> ModelVersion:
    """Take a model made elsewhere through the same gates, judged on `reference` rows with their truth.

    Args:
        home: an open home.
        onnx: the file.
        reference: rows with their truth.
        model: the registered model's name; made if it is new.
        gate: the least a metric may be, by name.
        actor: for the audit log.
        force_reason: overrides a failed metric gate; audited.
        progress: is told each step in a few words.
        precision: what the model on devices computes in.
        runtime: how devices shall run it.

    Raises:
        LightshipError: data.*, gate.*, convert.*, storage.*; the run says the same.
    """
    check_name("model name", model)
    home.datasets.put(reference)
    recipe = {"source": onnx.name, "gate": gate, "precision": precision}
    made = begin(home, reference, model, "import", f"onnx:{onnx.name}", recipe, [], actor)
    made.runtime = runtime or Runtime()
    with recorded(home, made):
        tell = progress or (lambda _: None)
        tell("reading the model in a process of its own")
        converted = import_onnx(read_model(onnx), reference.schema, reference.labels)
        made.recipe_digest = sha256_hex(converted.onnx)
        tell("asking it one row at a time and in batches")
        made.parity = check_import(converted, parity_rows(reference.x, reference.schema), None)
        require(made.parity)
        if precision != "fp32":
            converted = _reduced(made, converted, precision, reference.x, reference, tell)
        predict = _onnx_predict(converted)
        made.metrics = evaluate(predict, reference)
        made.gate = decide_gate(made.metrics, gate, _champion_metrics(home, made, reference))
        _pass_gate(made.gate, force_reason)
        shares = importances(predict, reference.x, reference.y, reference.schema.names)
        made.explained = Explained(shares=shares, method="loss of quality when the feature is shuffled")
        return _register(home, made, converted, reference, reference, actor, force_reason)


def check_is_model(onnx: Path) -> None:
    """Refuse what is no ONNX model at all, before anything is kept on its behalf.

    Raises:
        ConvertError: convert.invalid-onnx.
    """
    inspect_onnx(read_model(onnx))


def _reduced(
    made: Making,
    converted: Converted,
    precision: Precision,
    seen: npt.NDArray[np.float32],
    heldout: Dataset,
    tell: Progress,
) -> Converted:
    """The model in fewer bits, proven, and measured as what it then is."""
    tell(f"reducing to {precision} in a process of its own")
    reduced = reduce_precision(converted, precision, seen)
    tell("proving parity with the model in 32 bits")
    made.parity = check_reduced(converted, reduced, heldout.x)
    require(made.parity)
    made.metrics = evaluate(_onnx_predict(reduced), heldout)
    return reduced


def _pass_gate(gate: GateDecision, force_reason: str | None) -> None:
    """Let nothing past a failed gate but by force, with a reason."""
    broken = [c for c in gate.checks if not c.holds]
    only_champion = all(c.name.startswith("champion:") for c in broken)
    may_register(
        gate_passed=gate.passed,
        parity_passed=True,  # not asked yet; `require` lets nobody past, forced or not
        force_reason=force_reason,
        failed=" ".join(c.sentence for c in broken),
        code="gate.champion" if only_champion else "gate.metric",
    )


def read_model(path: Path) -> bytes:
    """The bytes of a model's file.

    Raises:
        ConvertError: convert.invalid-onnx.
    """
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConvertError("convert.invalid-onnx", f"Can't read {path}: {e.strerror}.") from e


def _load_dataset(home: Home, reference: str) -> Dataset:
    with home.database.read() as session:
        digest = resolve_dataset(session, reference).digest
    return home.datasets.get(digest)


def _gate(home: Home, made: Making, heldout: Dataset, recipe: Recipe) -> GateDecision:
    assert made.metrics is not None
    champion = _champion_metrics(home, made, heldout)
    return decide_gate(made.metrics, recipe.gate, champion, recipe.max_regression)


def _champion_metrics(home: Home, made: Making, rows: Dataset) -> Metrics | None:
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
    made: Making,
    converted: Converted,
    reference: Dataset,
    heldout: Dataset,
    actor: str,
    force_reason: str | None,
) -> ModelVersion:
    members = assemble.members(converted, reference, heldout)
    assert made.metrics is not None

    def bundle(number: int) -> bytes:
        members[CARD] = assemble.card(made, number).encode()
        return build_bundle(assemble.manifest(made, converted, number), members)

    return commit(home, made, bundle, made.metrics.values, actor=actor, force_reason=force_reason)


def commit(
    home: Home,
    made: Making,
    bundle_of: Callable[[int], bytes],
    metrics: dict[str, float],
    *,
    actor: str,
    force_reason: str | None = None,
) -> ModelVersion:
    """Register what `bundle_of` makes as the next version, in one transaction, its bundle already stored."""
    with home.database.write() as session:
        number = versions.newest(session, made.model) + 1
        bundle = bundle_of(number)
        row = ModelVersion(
            model=made.model,
            version=number,
            run_id=made.run_id,
            state="registered",
            digest=home.artifacts.put(bundle),
            length=len(bundle),
            metrics=metrics,
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
