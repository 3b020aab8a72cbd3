"""Registry: what goes into a bundle besides the model: profile, golden rows, background rows, manifest, card."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import numpy as np
import numpy.typing as npt

from lightship.convert.converter import Converted
from lightship.convert.parity import golden_rows
from lightship.convert.session import OnnxModel
from lightship.data.dataset import Dataset
from lightship.data.moments import reference_residuals
from lightship.data.profile import reference_profile
from lightship.training.card import CardFacts, render_card
from lightship.training.environment import environment_digest
from lightship_agent.contract.bundle import BACKGROUND, GOLDEN, MODEL, PROFILE, Rows, encode_golden
from lightship_agent.contract.manifest import Manifest, Provenance
from lightship_agent.contract.profile import ReferenceProfile, count_outputs, profile_features
from lightship_agent.contract.wire import encode

from .runs import Making

BACKGROUND_ROWS = 32
GOLDEN_ROWS = 32


def members(converted: Converted, reference: Dataset, heldout: Dataset) -> dict[str, bytes]:
    """The members that the run alone decides; the card and the manifest also carry the version's number."""
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
    features = reference.schema.features
    profile = reference_profile(
        reference.x,
        reference.schema.names,
        categories={f.name: f.levels for f in features if f.is_categorical},
    )
    model = OnnxModel(converted.onnx, converted.outputs)
    answer = model.answer(heldout.x)
    if answer.values is not None:
        return _with_values(profile, answer.values, heldout)
    if answer.labels is None:
        return profile
    labels = model.predict(heldout.x)  # by the decision threshold, as on the device
    right = labels == heldout.y
    scores = answer.scores if converted.outputs.score_kind == "probability" else None
    classes = len(heldout.labels)
    predictions, score_counts = count_outputs(labels, scores, classes)
    _, hits = count_outputs(labels[right], None if scores is None else scores[right], classes)
    return msgspec.structs.replace(
        profile,
        labels=heldout.labels,
        predictions=tuple(predictions.tolist()),
        scores=tuple(score_counts.tolist()),
        hits=tuple(hits.tolist()) if scores is not None else (),
        labelled=heldout.rows,
        errors=int((~right).sum()),
    )


def _with_values(profile: ReferenceProfile, predicted: npt.NDArray[np.float32], heldout: Dataset) -> ReferenceProfile:
    """What a regressor says, and how far that is off."""
    (values,) = profile_features(predicted[:, None], ("value",))
    residuals = reference_residuals(predicted, heldout.y)
    if residuals is None:
        return msgspec.structs.replace(profile, values=values)
    off = np.abs(heldout.y.astype(np.float64) - predicted).astype(np.float32)
    errors = int((off > np.float32(residuals.bound)).sum())
    return msgspec.structs.replace(profile, values=values, residuals=residuals, labelled=heldout.rows, errors=errors)


def manifest(made: Making, converted: Converted, number: int) -> Manifest:
    """The manifest, still without its members' digests."""
    assert made.metrics is not None
    return Manifest(
        model=made.model,
        version=number,
        created=rfc3339(made.started),
        input_schema=converted.schema,
        outputs=converted.outputs,
        requires=converted.requires,
        runtime=msgspec.structs.replace(made.runtime, precision=converted.precision),
        golden_tolerance=converted.golden_tolerance,
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
        importances=made.explained.shares,
    )


def card(made: Making, number: int) -> str:
    """The model card."""
    assert made.metrics is not None
    data = made.dataset
    return render_card(
        CardFacts(
            model=made.model,
            version=number,
            created=rfc3339(made.started),
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
            importances=made.explained.shares,
            importance_method=made.explained.method,
            effects=made.explained.effects,
            warnings=made.warnings,
        )
    )


def rfc3339(ms: int) -> str:
    """Milliseconds since 1970 as RFC 3339, UTC."""
    return datetime.fromtimestamp(ms / 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
