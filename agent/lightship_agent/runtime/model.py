"""Runtime: an ONNX model in memory.

Rules:
* the session is made from bytes that were verified, never from a path that may change under us;
* one thread per call and no spinning: the same rows give the same bits however busy the device is, and an idle
  agent is idle. A row alone and the same row in a batch may differ in the last bit, since kernels differ;
* a loaded model never changes; another version is another object;
* what the manifest wishes for beside the CPU is tried first, and must give the golden rows; otherwise the CPU computes,
  and the model says why;
* what no device loads (`graph`) is refused before onnxruntime sees a byte of it;
* the graph must be what manifest and schema say, or it is refused before it serves a single row;
* errors of onnxruntime stop at this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import BundleError, ServingError, UpdateError
from lightship_agent.contract.profile import ReferenceProfile
from lightship_agent.contract.projection import Projector
from lightship_agent.contract.schema import FeatureSchema, Outputs
from lightship_agent.contract.tensors import TensorSpec, fits

from .bound import BoundRow, batches_exactly, bind_row
from .golden import check_bundle
from .graph import check_graph
from .session import CPU, Allowed, Plan, open_session, plan_session
from .tensors import check_tensor_graph

MAX_BACKGROUND: Final = 64  # rows that are kept
_WARM_UP_RUNS: Final = 5
_COMPARED_ROWS: Final = 16  # of the golden rows, that must come out the same however they are asked


class Prediction(msgspec.Struct, frozen=True, eq=False):
    """What a model said about n rows.

    `labels` are class indices, int64 `[n]`; `scores` float32 `[n, classes]`; `values` float32 `[n, 1]`.
    """

    labels: npt.NDArray[np.int64] | None = None
    scores: npt.NDArray[np.float32] | None = None
    values: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """The number of rows."""
        for part in (self.labels, self.scores, self.values):
            if part is not None:
                return len(part)
        return 0


class LoadedModel(msgspec.Struct, frozen=True, eq=False):
    """A model that is ready to predict; immutable, and safe to call from several threads."""

    name: str
    version: int
    digest: str  # of the bundle
    schema: FeatureSchema
    schema_digest: str
    outputs: Outputs
    profile: ReferenceProfile
    since_ms: int  # wall ms, when it was loaded
    row_ms: float  # the fastest warm-up run of one row
    _session: Any
    _fetch: tuple[str, ...]
    _classes: int  # 0 for a regressor
    spec: TensorSpec | None = None  # of a model that takes tensors instead of rows
    projectors: Mapping[str, Projector] = msgspec.field(default_factory=dict)  # of its inputs
    bound: BoundRow | None = None  # memory for one row, where the graph allows it
    batches_exactly: bool = False  # whether rows answered together are to the bit what each is alone
    provider: str = CPU  # what computes
    precision: str = "fp32"
    notes: tuple[str, ...] = ()  # why not what the manifest wished for
    background: npt.NDArray[np.float32] | None = None  # what is usual, for explanations

    def __repr__(self) -> str:
        """Which one it is; what it holds is large."""
        return f"LoadedModel({self.name}@{self.version}, {self.digest[:12]})"

    def predict(self, rows: npt.NDArray[np.float32]) -> Prediction:
        """Predict `rows`, float32 C-contiguous `[n, width]`, as `FeatureSchema.check_rows` returns them.

        Raises:
            ServingError: serving.runtime when the runtime raises or answers nonsense; serving.input for rows that a
                model of tensors can't take.
        """
        if self.spec is not None:
            raise ServingError("serving.input", f"{self.name}@{self.version} takes tensors by name, not rows.")
        try:
            found = self._session.run(self._fetch, {self.schema.input_name: rows})
        except Exception as e:  # onnxruntime's exceptions share no base class
            raise ServingError("serving.runtime", f"{self.name}@{self.version} failed to predict: {e}") from e
        try:
            if self._classes:
                return self._classify(found, len(rows))
            return Prediction(values=found[0].reshape(len(rows), 1))
        except (ValueError, TypeError, AttributeError) as e:
            message = f"{self.name}@{self.version} answered in another shape than it should: {e}"
            raise ServingError("serving.runtime", message) from e

    def predict_tensors(
        self, feeds: Mapping[str, npt.NDArray[Any]], names: Sequence[str] = ()
    ) -> tuple[dict[str, npt.NDArray[Any]], Prediction]:
        """The declared outputs `names` for tensors as the spec declares them, and what they say of each row.

        Raises:
            ServingError: serving.runtime when the runtime raises or answers nonsense.
        """
        assert self.spec is not None
        rows = len(next(iter(feeds.values())))
        declared = {output.name: output for output in self.spec.outputs}
        wanted = list(dict.fromkeys((*names, *self.outputs.names))) or list(declared)[:1]
        try:
            found = dict(zip(wanted, self._session.run(wanted, dict(feeds)), strict=True))
        except Exception as e:  # onnxruntime's exceptions share no base class
            raise ServingError("serving.runtime", f"{self.name}@{self.version} failed to predict: {e}") from e
        for name, array in found.items():
            if len(array.shape) == 0 or len(array) != rows or not fits(array.shape, declared[name].shape):
                message = f"Output {name!r}: expected {[rows, *declared[name].shape[1:]]}, found {list(array.shape)}."
                raise ServingError("serving.runtime", message)
        told = [found[name] for name in self.outputs.names]
        if self._classes:
            return found, self._classify(told, rows)
        return found, Prediction(values=told[0].reshape(rows, 1)) if told else Prediction()

    def described(self) -> LoadedModel:
        """The same without its session: what may be kept for long, and does not keep the model in memory."""
        return msgspec.structs.replace(self, _session=None, bound=None, background=None)

    def _classify(self, found: list[Any], rows: int) -> Prediction:
        """The graph's answers come in the order of `Outputs.names`: label, then scores, each if there."""
        outputs, classes = self.outputs, self._classes
        scores: npt.NDArray[np.float32] | None = found[-1] if outputs.score_output else None
        if scores is not None and scores.shape != (rows, classes):
            message = f"Expected scores [{rows}, {classes}], found {list(scores.shape)}."
            raise ServingError("serving.runtime", message)
        labels: npt.NDArray[np.int64]
        if scores is not None and outputs.threshold is not None and classes == 2:
            labels = (scores[:, 1] >= outputs.threshold).astype(np.int64)
        elif outputs.label_output:
            labels = found[0].reshape(rows)
        else:
            assert scores is not None  # _check_graph wants one of the two
            labels = scores.argmax(axis=1)
        highest = labels.item() if rows == 1 else int(labels.max(initial=0))
        lowest = highest if rows == 1 else int(labels.min(initial=0))
        if lowest < 0 or highest >= classes:
            raise ServingError("serving.runtime", f"Expected class indices below {classes}, found {highest}.")
        return Prediction(labels, scores)


def load_model(bundle: Bundle, *, since_ms: int | None = None, allowed: Allowed | None = None) -> LoadedModel:
    """Make a session of the bundle's model, compare it with the manifest, and run it once.

    Args:
        bundle: verified.
        since_ms: wall milliseconds to note as the start of service; now when None.
        allowed: what this device allows of the manifest's wishes; all of them when None.

    Raises:
        BundleError: bundle.graph when no device may load it; bundle.incompatible when this runtime can't, or it is not
            what the manifest says.
        UpdateError: update.swap when it loads but can't answer.
    """
    manifest = bundle.manifest
    check_graph(bundle.model, max_bytes=manifest.requires.memory_mb << 20)
    plan = plan_session(manifest.runtime, allowed or Allowed())
    since = time.time_ns() // 1_000_000 if since_ms is None else since_ms
    notes = list(plan.notes)
    for provider in plan.providers:
        try:
            model = _load_on(provider, bundle, plan, since)
            check_bundle(model, bundle)
        except (BundleError, UpdateError) as e:
            notes.append(f"{provider}: {e.message[:200]}")
        else:
            return msgspec.structs.replace(model, notes=tuple(notes))
    return msgspec.structs.replace(_load_on(CPU, bundle, plan, since), notes=tuple(notes))


def _load_on(provider: str, bundle: Bundle, plan: Plan, since_ms: int) -> LoadedModel:
    manifest = bundle.manifest
    session = open_session(bundle.model, f"{manifest.model}@{manifest.version}", provider, plan)
    spec = manifest.tensors or None
    if spec is None:
        _check_graph(session, manifest.input_schema, manifest.outputs)
    else:
        check_tensor_graph(session, spec, manifest.outputs)
    model = LoadedModel(
        name=manifest.model,
        version=manifest.version,
        digest=bundle.digest,
        schema=manifest.input_schema,
        schema_digest=manifest.input_schema.digest,
        outputs=manifest.outputs,
        profile=bundle.profile,
        since_ms=since_ms,
        row_ms=0.0,
        _session=session,
        _fetch=manifest.outputs.names,
        _classes=len(manifest.outputs.labels) if manifest.outputs.task == "classification" else 0,
        provider=provider,
        precision=manifest.runtime.precision,
        spec=spec,
        projectors={p.input: Projector(p) for p in bundle.profile.projections},
        background=_background(bundle),
    )
    if bundle.tensors is not None:
        first = {array.name: array.array()[:1] for array in bundle.tensors.inputs}
        return msgspec.structs.replace(model, row_ms=_warm_up(lambda: model.predict_tensors(first)))
    rows = np.ascontiguousarray(bundle.golden.inputs.matrix()[:_COMPARED_ROWS], dtype=np.float32)
    name, names = model.schema.input_name, list(manifest.outputs.names)
    # Threads share out a sum as they come, and other hardware in its own way: sixteen rows prove nothing then.
    is_steady = provider == CPU and plan.threads == 1
    return msgspec.structs.replace(
        model,
        row_ms=_warm_up(lambda: model.predict(rows[:1])),
        # A bound row is filled unchecked, and a number there must stand for a category.
        bound=None if model.schema.has_categories else bind_row(session, name, model.outputs, rows),
        batches_exactly=is_steady and batches_exactly(session, name, names, rows, _COMPARED_ROWS),
    )


def _background(bundle: Bundle) -> npt.NDArray[np.float32] | None:
    rows = bundle.background
    if rows is None or not len(rows) or rows.shape[1] != bundle.manifest.input_schema.width:
        return None
    return rows[:MAX_BACKGROUND]


def _warm_up(ask: Callable[[], object]) -> float:
    fastest = float("inf")
    for _ in range(_WARM_UP_RUNS):
        begun = time.perf_counter()
        try:
            ask()
        except ServingError as e:
            raise UpdateError("update.swap", f"The new model can't answer its first golden row: {e}") from e
        fastest = min(fastest, time.perf_counter() - begun)
    return fastest * 1_000


def _check_graph(session: Any, schema: FeatureSchema, outputs: Outputs) -> None:
    inputs = session.get_inputs()
    names = [i.name for i in inputs]
    if names != [schema.input_name]:
        raise _differs("the inputs", [schema.input_name], names)
    _check_tensor(inputs[0], "tensor(float)", (None, schema.width))
    found = {o.name: o for o in session.get_outputs()}
    if not set(outputs.names) <= set(found):
        raise _differs("the outputs", list(outputs.names), list(found))
    if outputs.task == "classification":
        answers = outputs.label_output or outputs.score_output
        if not answers or outputs.value_output or len(outputs.labels) < 2:
            raise _differs("a classifier", "a label or score output and two or more labels", list(outputs.names))
        if outputs.label_output:
            _check_tensor(found[outputs.label_output], "tensor(int64)", (None,))
        if outputs.score_output:
            _check_tensor(found[outputs.score_output], "tensor(float)", (None, len(outputs.labels)))
    elif outputs.names != (outputs.value_output,):
        raise _differs("a regressor", "one value output", list(outputs.names))
    else:
        rank = len(found[outputs.value_output].shape or (None, 1))
        _check_tensor(found[outputs.value_output], "tensor(float)", (None, 1)[:rank])


def _check_tensor(found: Any, kind: str, shape: tuple[int | None, ...]) -> None:
    """Names and None stand for a free dimension in onnxruntime's shapes; a graph may leave its shape open."""
    if found.type != kind:
        what = f"the type of {found.name!r}"
        raise _differs(what, kind, found.type)
    if not found.shape:
        return
    fits = len(found.shape) == len(shape) and all(
        want is None or not isinstance(have, int) or have == want for have, want in zip(found.shape, shape, strict=True)
    )
    if not fits or isinstance(found.shape[0], int):  # a fixed number of rows can't serve batches
        what = f"the shape of {found.name!r}"
        raise _differs(what, ["rows", *shape[1:]], found.shape)


def _differs(what: str, expected: object, found: object) -> BundleError:
    message = f"The graph is not what the manifest says: {what}: expected {expected}, found {found}."
    return BundleError("bundle.incompatible", message, remedy="Convert the model again.")
