"""Registry: a model that takes tensors or images, made elsewhere, becomes a version.

    declaration and golden tensors → graph → bundle → tried as a device tries it → version

Rules:
* the same trial as on a device: its own process, memory and time bounded, golden tensors, latency;
* the run, the version and the audit are those of any other model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lightship.convert.declared import Declared, golden_tensors, read_arrays, read_declared
from lightship.convert.inspection import OnnxInfo, check_device_safe, check_standard, describe, inspect_onnx, parse_onnx
from lightship.data.dataset import Dataset
from lightship.data.profile import reference_profile
from lightship.data.projection import fit_projection
from lightship.home import Home
from lightship.storage.models import ModelVersion
from lightship.training.environment import environment_digest
from lightship_agent.contract.bundle import (
    CARD,
    GOLDEN,
    MODEL,
    PROFILE,
    TENSORS,
    Golden,
    Rows,
    build_bundle,
    encode_golden,
)
from lightship_agent.contract.codes import ConvertError, UpdateError
from lightship_agent.contract.manifest import Manifest, Provenance, Requires
from lightship_agent.contract.names import check_name
from lightship_agent.contract.profile import count_outputs
from lightship_agent.contract.projection import Projection, Projector
from lightship_agent.contract.tensors import GoldenTensors
from lightship_agent.contract.wire import encode, sha256_hex
from lightship_agent.runtime.probe import ProbeReport, probe

from .assemble import rfc3339
from .pipeline import Progress, commit, read_model
from .runs import Making, begin, recorded


def import_tensors(
    home: Home, *, onnx: Path, declared: Path, golden: Path, model: str, actor: str, progress: Progress | None = None
) -> ModelVersion:
    """Register the ONNX model in `onnx` as the next version of `model`.

    Args:
        home: an open home.
        onnx: the file.
        declared: a TOML file, see `Declared`.
        golden: an .npz file with one array per declared input and output, as many rows in each.
        model: the registered model's name; made if it is new.
        actor: for the audit log.
        progress: is told each step in a few words.

    Raises:
        LightshipError: data.*, convert.*, storage.*; from the graph on, the run says the same.
    """
    check_name("model name", model)
    tell = progress or (lambda _: None)
    told = read_declared(declared)
    arrays = read_arrays(golden, told.spec)
    proof = golden_tensors(told.spec, arrays)
    projections = fitted(told, arrays)
    seen = watched_rows(told, arrays, f"{model}-golden", projections)
    data = read_model(onnx)
    inspect_onnx(data)
    home.datasets.put(seen)
    recipe = {"source": onnx.name, "declared": sha256_hex(encode(told))}
    made = begin(home, seen, model, "import", f"onnx:{onnx.name}", recipe, [], actor)
    with recorded(home, made):
        made.recipe_digest = sha256_hex(data)
        tell("reading the model")
        info = _inspected(data)
        tell("trying it as a device does")
        report = _tried(tensor_bundle(made, told, proof, seen, data, info, 1, projections), told, info)
        metrics = {"golden_difference": report.max_difference, "latency_ms": report.latency_ms_p95}
        return commit(
            home,
            made,
            lambda number: tensor_bundle(made, told, proof, seen, data, info, number, projections),
            metrics,
            actor=actor,
        )


def tensor_bundle(
    made: Making,
    told: Declared,
    proof: GoldenTensors,
    seen: Dataset,
    model: bytes,
    info: OnnxInfo,
    number: int,
    projections: tuple[Projection, ...] = (),
) -> bytes:
    """The bundle of version `number`."""
    spec, outputs = told.spec, told.meant
    kept = proof.inputs[0].shape[0]
    answers = {array.name: array.array() for array in proof.outputs}
    values = np.zeros((kept, 1), dtype=np.float32)
    for name in (outputs.score_output, outputs.value_output):
        if name:
            values = answers[name].reshape(kept, -1).astype(np.float32)
    labels = tuple(seen.y[:kept].tolist()) if outputs.labels else ()
    manifest = Manifest(
        model=made.model,
        version=number,
        created=rfc3339(made.started),
        input_schema=spec.schema(),
        outputs=outputs,
        requires=_requires(told, info),
        provenance=Provenance(
            dataset_digest=seen.digest,
            recipe_digest=made.recipe_digest,
            code_revision=made.revision,
            environment_digest=environment_digest(made.environment),
            run=made.run_id,
            parent=made.parent,
        ),
        members={},
        golden_tolerance=told.tolerance,
        tensors=spec,
    )
    predictions: tuple[int, ...] = ()
    if outputs.labels:
        predictions = tuple(int(n) for n in count_outputs(seen.y, None, len(outputs.labels))[0])
    profile = msgspec.structs.replace(reference_profile(seen.x, seen.schema.names), projections=projections)
    members = {
        MODEL: model,
        PROFILE: encode(_with(profile, outputs.labels, predictions)),
        GOLDEN: encode_golden(Golden(inputs=Rows.of(seen.x[:kept]), values=Rows.of(values), labels=labels)),
        TENSORS: encode(proof),
        CARD: _card(made, told, seen, number).encode(),
    }
    return build_bundle(manifest, members)


def fitted(told: Declared, arrays: dict[str, npt.NDArray[Any]]) -> tuple[Projection, ...]:
    """The directions along which inputs are to be watched.

    Raises:
        DataError: data.type, data.empty.
    """
    return tuple(fit_projection(t.name, arrays[t.name], t.directions) for t in told.inputs if t.directions)


def watched_rows(
    told: Declared, arrays: dict[str, npt.NDArray[Any]], name: str, projections: tuple[Projection, ...] = ()
) -> Dataset:
    """What a device would watch of the golden tensors, as a dataset.

    Raises:
        DataError: data.*.
    """
    spec, outputs = told.spec, told.meant
    projectors = {p.input: Projector(p) for p in projections}
    rows = spec.watched({t.name: arrays[t.name] for t in spec.inputs}, projectors)
    if outputs.labels:
        if outputs.label_output:
            found = arrays[outputs.label_output].reshape(len(rows))
        else:
            found = arrays[outputs.score_output].reshape(len(rows), -1).argmax(axis=1)
        task, y = "classification", found.astype(np.int64)
    else:
        task, y = "regression", np.zeros(len(rows), dtype=np.float32)
        if outputs.value_output:
            y = arrays[outputs.value_output].reshape(len(rows)).astype(np.float32)
    schema = spec.schema()
    return Dataset(
        name=name,
        schema=schema,
        task=task,  # type: ignore[arg-type]
        target="answer",
        labels=outputs.labels,
        x=rows,
        y=y,
        titles=schema.names,
    )


def _with(profile: Any, labels: tuple[str, ...], predictions: tuple[int, ...]) -> Any:
    return msgspec.structs.replace(profile, labels=labels, predictions=predictions) if labels else profile


def _inspected(data: bytes) -> OnnxInfo:
    parsed = parse_onnx(data)
    check_standard(parsed)
    info = describe(parsed, len(data))
    check_device_safe(info)
    return info


def _requires(told: Declared, info: OnnxInfo) -> Requires:
    return Requires(
        ir_version=info.ir_version,
        opset=info.opset,
        ml_opset=info.ml_opset,
        ops=info.ops,
        # The probe loads the file, parses it and lays it out again: about four times its size, and room to work.
        memory_mb=told.requires.memory_mb or max(512, 4 * (info.size // (1024 * 1024)) + 256),
        latency_ms=told.requires.latency_ms,
        probe_seconds=told.requires.probe_seconds,
        device_classes=told.requires.device_classes,
    )


def _tried(bundle: bytes, told: Declared, info: OnnxInfo) -> ProbeReport:
    """The probe of the agent, here: what fails it would fail on every device."""
    with tempfile.TemporaryDirectory(prefix="lightship-import-") as folder:
        path = Path(folder) / "bundle.tar"
        path.write_bytes(bundle)
        try:
            return probe(path, _requires(told, info))
        except UpdateError as e:
            code = "convert.parity" if e.code == "update.golden" else "convert.failed"
            raise ConvertError(code, f"A device would refuse the model [{e.code}]: {e}") from e


def _card(made: Making, told: Declared, seen: Dataset, number: int) -> str:
    inputs = [f"* input `{t.name}`: {t.datatype} {list(t.shape)}{', an image' if t.image else ''}" for t in told.inputs]
    outputs = [f"* output `{t.name}`: {t.datatype} {list(t.shape)}" for t in told.outputs]
    labels = [f"* classes: {', '.join(told.meaning.labels[:40])}"] if told.meaning.labels else []
    lines = [
        f"# {made.model}, version {number}",
        "",
        f"Imported from `{made.estimator_name}`. Made elsewhere: how it was trained and judged is not known here.",
        "",
        *inputs,
        *outputs,
        *labels,
        "",
        f"Proved on {seen.rows} golden rows from its makers, to within {told.tolerance:g}.",
    ]
    return "\n".join(lines) + "\n"
