"""Serving: the data plane every face speaks to. It knows tensors and models, and no transport.

Rules:
* a swap is one assignment: a request is answered wholly by the model it found, old or new, and says by which;
* what is not exactly what the schema asks for is refused, never guessed;
* in-flight requests are bounded; beyond the bound the answer is serving.overloaded, at once;
* the observer is called once per answered request and only copies; if it fails, the prediction still stands.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DataError, ServingError
from lightship_agent.contract.messages import Running
from lightship_agent.contract.schema import FeatureSchema
from lightship_agent.runtime.model import LoadedModel, Prediction

from .hot import HotModel, ObserveRow, ids

MAX_ROWS: Final = 65_536  # per request
MAX_ID: Final = 128  # characters of a client's request id
HOT_ROW_MS: Final = 1.0  # a model that takes longer for a row is asked in a thread, where it holds nobody up
_RECENT: Final = 512  # latencies kept per model
_RETRY: Final = "Try again after the time in Retry-After."
_LOG: Final = logging.getLogger("lightship.serving")

Observe = Callable[[LoadedModel, npt.NDArray[np.float32], Prediction, str], None]
Feedback = Callable[[str, str, str], bool]
Refused = Callable[[LoadedModel, int], None]


class Tensor(msgspec.Struct, frozen=True, eq=False):
    """A named tensor: `data` is a flat or shaped array of `datatype`, or a list of str for BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any


class InferRequest(msgspec.Struct, frozen=True, eq=False):
    """What to predict. No model: the only one. No version: the one that is served. No outputs: all."""

    inputs: tuple[Tensor, ...]
    model: str | None = None
    version: str | None = None
    id: str = ""
    outputs: tuple[str, ...] = ()


class InferResponse(msgspec.Struct, frozen=True, eq=False):
    """The answer, and in `parameters` the digest of the bundle that gave it."""

    model_name: str
    model_version: str
    id: str
    parameters: Mapping[str, str]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Counters of one served model since it was installed."""

    model: LoadedModel
    requests: int  # answered
    rows: int  # predicted
    failures: int  # requests that ended in serving.runtime
    errors: Mapping[str, int]  # refused or failed requests by code
    seconds: float  # spent in answered requests
    p50_ms: float  # of recent requests
    p95_ms: float


class DataPlane:
    """Models by name, and the one way to ask them.

    Args:
        observe: called with (model, rows, prediction, request id) after each prediction; must only copy.
        observe_row: the same on the hot path, with (model, row, class, highest score, id); `observe` when None.
        feedback: called with (model name, prediction id, label); True when the label was counted.
        refused: called with (model, rows) when a request for that model does not fit its schema.
        max_in_flight: requests that may be inside at once.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        observe: Observe,
        *,
        observe_row: ObserveRow | None = None,
        feedback: Feedback | None = None,
        refused: Refused | None = None,
        max_in_flight: int = 64,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._observe = observe
        self._observe_row = observe_row
        self._feedback = feedback or _no_feedback
        self._refused = refused
        self._clock = clock
        self._slots: dict[str, _Slot] = {}
        self._lock = threading.Lock()
        self._errors: Counter[str] = Counter()
        self._observe_failures = 0
        self._next_id = ids(secrets.token_hex(6))
        #: Models on the hot path by name and by name/versions/version, as they stand in a path.
        self.hot: dict[bytes, HotModel] = {}
        self.admission = Admission(max_in_flight, self.count_error)

    def install(self, model: LoadedModel) -> LoadedModel | None:
        """Serve `model` under its name from now on, and return the one it replaces."""
        with self._lock:
            previous = self._slots.get(model.name)
            # A new dict, assigned whole: a reader sees the old world or the new one, and needs no lock.
            self._slots = {**self._slots, model.name: _Slot(model)}
            self.hot = self._hot_models()
        return previous.model if previous else None

    def remove(self, name: str) -> LoadedModel | None:
        """Stop serving `name`, and return what was served."""
        with self._lock:
            previous = self._slots.get(name)
            self._slots = {n: slot for n, slot in self._slots.items() if n != name}
            self.hot = self._hot_models()
        return previous.model if previous else None

    def get(self, name: str | None = None, version: str | None = None) -> LoadedModel:
        """The model of that name and version; without a name, the only one.

        Raises:
            ServingError: serving.no-model, serving.unknown-model.
        """
        return self._slot(name, version).model

    def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request.

        Raises:
            ServingError: any serving.* code but those of transports.
        """
        with self.admission:
            return self.answer(request)

    def answer(self, request: InferRequest, *, by: LoadedModel | None = None) -> InferResponse:
        """Answer a request that already holds its `admission`.

        Args:
            request: what to predict.
            by: the model that `get` gave to a face that read the rows by its schema; a swap since then changes nothing.

        Raises:
            ServingError: as `infer`, but never serving.overloaded.
        """
        begun = self._clock()
        slot: _Slot | None = None
        try:
            slot = self._slot(request.model, request.version if by is None else None)
            model = by or slot.model
            response, rows, prediction = self._predict(model, request)
        except ServingError as e:
            self.count_error(e.code)
            if slot:
                slot.failed(e.code)
            raise
        slot.answered(len(rows), self._clock() - begun)
        self._watch(model, rows, prediction, response.id)
        return response

    def feedback(self, model: str, prediction_id: str, label: str) -> bool:
        """Tell what a prediction should have been; False when that was told before.

        Raises:
            ServingError: serving.unknown-model, serving.unknown-prediction, serving.input.
        """
        try:
            self._slot(model, None)
            return self._feedback(model, prediction_id, label)
        except ServingError as e:
            self.count_error(e.code)
            raise

    def models(self) -> tuple[LoadedModel, ...]:
        """Everything that is being served."""
        return tuple(slot.model for slot in self._slots.values())

    def running(self) -> tuple[Running, ...]:
        """The heartbeat's view of what is being served."""
        return tuple(
            Running(
                model=s.model.name,
                version=s.model.version,
                digest=s.model.digest,
                since=s.model.since_ms,
                requests=s.rows,
                failures=s.failures,
                latency_ms=round(s.p95_ms, 4),
            )
            for s in self.stats()
        )

    def stats(self, name: str | None = None) -> tuple[ModelStats, ...]:
        """Counters per served model."""
        return tuple(slot.stats() for n, slot in self._slots.items() if name in (None, n))

    def errors(self) -> dict[str, int]:
        """Refused and failed requests by code, of all models and faces since the agent began."""
        with self._lock:
            return dict(self._errors)

    def count_error(self, code: str) -> None:
        """Count an error that a face found before the data plane saw the request."""
        with self._lock:
            self._errors[code] += 1

    def _hot_models(self) -> dict[bytes, HotModel]:
        found = {}
        for slot in self._slots.values():
            model = slot.model
            if model.bound is None or model.row_ms > HOT_ROW_MS:
                continue
            hot = slot.hot or self._make_hot(slot)
            slot.hot = hot
            name = model.name.encode()
            found[name] = found[b"%b/versions/%d" % (name, model.version)] = hot
        return found

    def _make_hot(self, slot: _Slot) -> HotModel:
        def failed(code: str) -> None:
            self.count_error(code)
            slot.failed(code)

        return HotModel(
            slot.model,
            answered=slot.answered,
            failed=failed,
            observe=self._watch,
            observe_row=None if self._observe_row is None else self._watch_row,
            next_id=self._next_id,
            max_id=MAX_ID,
        )

    def _slot(self, name: str | None, version: str | None) -> _Slot:
        slots = self._slots
        if not slots:
            raise ServingError("serving.no-model", "This device has no model yet.", remedy="Assign it one.")
        if name is None:
            if len(slots) > 1:
                message = f"Several models are served ({', '.join(slots)}); name one."
                raise ServingError("serving.unknown-model", message)
            slot = next(iter(slots.values()))
        elif name in slots:
            slot = slots[name]
        else:
            message = f"No model {name[:64]!r} is served here, only {', '.join(slots)}."
            raise ServingError("serving.unknown-model", message)
        if version is not None and version != str(slot.model.version):
            message = f"Version {version[:20]!r} is not served; {slot.model.name} is at {slot.model.version}."
            raise ServingError("serving.unknown-model", message)
        return slot

    def _predict(
        self, model: LoadedModel, request: InferRequest
    ) -> tuple[InferResponse, npt.NDArray[np.float32], Prediction]:
        names = output_names(model)
        unknown = [name for name in request.outputs if name not in names]
        if unknown:
            message = f"No output {unknown[0][:64]!r}; {model.name} gives {', '.join(names)}."
            raise ServingError("serving.output", message)
        if len(request.id) > MAX_ID:
            message = f"Expected an id of at most {MAX_ID} characters, found {len(request.id)}."
            raise ServingError("serving.malformed", message)
        try:
            rows = input_rows(request.inputs, model.schema)
        except ServingError as e:
            if e.code == "serving.input" and self._refused:
                self._refused(model, claimed_rows(request.inputs))
            raise
        prediction = model.predict(rows)
        response = InferResponse(
            model_name=model.name,
            model_version=str(model.version),
            id=request.id or self._next_id(),
            parameters={"digest": model.digest},
            outputs=_outputs(model, prediction, request.outputs or names),
        )
        return response, rows, prediction

    def _watch(
        self, model: LoadedModel, rows: npt.NDArray[np.float32], prediction: Prediction, request_id: str
    ) -> None:
        try:
            self._observe(model, rows, prediction, request_id)
        except Exception:  # noqa: BLE001 - watching must never cost a prediction; logged once, not per request
            self._observer_failed()

    def _watch_row(
        self, model: LoadedModel, row: npt.NDArray[np.float32], label: int, top: float, request_id: str
    ) -> None:
        assert self._observe_row is not None
        try:
            self._observe_row(model, row, label, top, request_id)
        except Exception:  # noqa: BLE001 - as above
            self._observer_failed()

    def _observer_failed(self) -> None:
        self._observe_failures += 1
        if self._observe_failures == 1:
            _LOG.exception("The observer failed; serving goes on without it.")


def _no_feedback(_model: str, _prediction_id: str, _label: str) -> bool:
    raise ServingError("serving.unknown-prediction", "This agent keeps no predictions to compare with.")


class Admission:
    """A bound on requests that are inside at once: `with plane.admission: …`.

    Raises:
        ServingError: serving.overloaded on entry beyond the bound.
    """

    def __init__(self, limit: int, count_error: Callable[[str], None]) -> None:
        self._limit = limit
        self._inside = 0
        self._lock = threading.Lock()
        self._count_error = count_error

    def __enter__(self) -> None:
        with self._lock:
            if self._inside < self._limit:
                self._inside += 1
                return
        self._count_error("serving.overloaded")
        message = f"{self._limit} requests are being answered already."
        raise ServingError("serving.overloaded", message, remedy=_RETRY)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1


class _Slot:
    """A served model and its counters; the model never changes, the counters do."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.hot: HotModel | None = None
        self._lock = threading.Lock()
        self._requests = self._rows = self._failures = 0
        self._seconds = 0.0
        self._errors: Counter[str] = Counter()
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def answered(self, rows: int, seconds: float) -> None:
        with self._lock:
            self._requests += 1
            self._rows += rows
            self._seconds += seconds
            self._recent.append(seconds)

    def failed(self, code: str) -> None:
        with self._lock:
            self._errors[code] += 1
            self._failures += code == "serving.runtime"

    def stats(self) -> ModelStats:
        with self._lock:
            recent = list(self._recent)
            requests, rows, failures = self._requests, self._rows, self._failures
            seconds, errors = self._seconds, dict(self._errors)
        p50, p95 = (np.percentile(recent, (50, 95)) * 1_000).tolist() if recent else (0.0, 0.0)
        return ModelStats(self.model, requests, rows, failures, errors, seconds, p50, p95)


def output_names(model: LoadedModel) -> tuple[str, ...]:
    """The tensors a model can answer with: label, class and scores, or value."""
    if model.outputs.task == "regression":
        return ("value",)
    return ("label", "class", "scores") if model.outputs.score_output else ("label", "class")


def claimed_rows(inputs: tuple[Tensor, ...]) -> int:
    """How many rows a refused request meant, as far as can be told and at most `MAX_ROWS`."""
    shape = inputs[0].shape if inputs else ()
    return max(1, min(shape[0], MAX_ROWS)) if len(shape) == 2 else 1


def input_rows(inputs: tuple[Tensor, ...], schema: FeatureSchema) -> npt.NDArray[np.float32]:
    """The rows in the one input tensor, float32 `[n, width]`, as the schema wants them.

    Raises:
        ServingError: serving.input, serving.too-large.
    """
    if len(inputs) != 1 or inputs[0].name != schema.input_name:
        found = ", ".join(repr(t.name[:64]) for t in inputs[:8])
        raise ServingError("serving.input", f"Expected one input {schema.input_name!r}, found {found or 'none'}.")
    tensor = inputs[0]
    if not isinstance(tensor.data, np.ndarray) or tensor.data.dtype.kind not in "fiub":
        message = f"Expected numbers for {tensor.name!r}, found datatype {tensor.datatype[:16]!r}."
        raise ServingError("serving.input", message)
    width, shape = schema.width, tensor.shape
    rows = shape[0] if len(shape) == 2 else 1
    if shape not in ((rows, width), (width,)) or rows < 1 or tensor.data.size != rows * width:
        message = f"Expected shape [rows, {width}] or [{width}], found {list(shape)} with {tensor.data.size} numbers."
        raise ServingError("serving.input", message)
    if rows > MAX_ROWS:
        raise ServingError("serving.too-large", f"Expected at most {MAX_ROWS} rows, found {rows}.")
    try:
        return schema.check_rows(as_float32(tensor.data).reshape(rows, width))
    except DataError as e:
        raise ServingError("serving.input", str(e)) from e


def as_float32(data: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Numbers as float32: floats are rounded as JSON decimals are, integers must be exact.

    Raises:
        ServingError: serving.input for an integer float32 can't hold.
    """
    if data.dtype == np.float32:
        return data
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and the schema refuses that
        cast = data.astype(np.float32)
    # Compared as float64, which holds every integer up to 2⁵³; beyond it the largest magnitude decides.
    if data.dtype.kind in "iu" and (
        np.any(cast.astype(np.float64) != data.astype(np.float64)) or np.any(np.abs(cast) > 2.0**53)
    ):
        message = "An integer is too large to be exact as float32; send FP32 or FP64 if rounding is meant."
        raise ServingError("serving.input", message)
    return cast


def _outputs(model: LoadedModel, prediction: Prediction, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    return tuple(_output(model, prediction, name) for name in names)


def _output(model: LoadedModel, prediction: Prediction, name: str) -> Tensor:
    rows = len(prediction)
    if name == "label":
        assert prediction.labels is not None
        words = model.outputs.labels
        return Tensor(name, "BYTES", (rows,), [words[i] for i in prediction.labels.tolist()])
    if name == "class":
        return Tensor(name, "INT64", (rows,), prediction.labels)
    if name == "scores":
        return Tensor(name, "FP32", (rows, len(model.outputs.labels)), prediction.scores)
    assert prediction.values is not None
    return Tensor(name, "FP32", (rows,), prediction.values.reshape(rows))
