"""Serving: the data plane every face speaks to. It knows tensors and models, and no transport.

Rules:
* a swap is one assignment: a request is answered wholly by the model it found, old or new, and says by which;
* under a name one version is current and answers whoever names none; others may be resident beside it, and answer only
  whoever asks for them by version, or whose key falls to them. Those are counted, and not watched unless kept so;
* what is not exactly what the schema asks for is refused, never guessed;
* in-flight requests are bounded; beyond the bound the answer is serving.overloaded, at once;
* the observer is called once per answered request and only copies; if it fails, the prediction still stands.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.latency import trimmed
from lightship_agent.contract.messages import Running
from lightship_agent.runtime.model import LoadedModel, Prediction

from .feeds import tensor_feeds, tensor_output_names, tensor_outputs
from .hot import HotModel, ObserveRow, ObserveRows, ids
from .slot import Admission, ModelStats, Slot, most_frequent
from .split import Split
from .tensors import MAX_ID, InferRequest, InferResponse, answered, claimed_rows, input_rows, output_names

HOT_ROW_MS: Final = 1.0  # a model that takes longer for a row is asked in a thread, where it holds nobody up
_LOG: Final = logging.getLogger("lightship.serving")

Observe = Callable[[LoadedModel, npt.NDArray[np.float32], Prediction, str], None]
Feedback = Callable[[str, str, str], bool]
Refused = Callable[[LoadedModel, int, object], None]
Newest = Callable[[LoadedModel, int], npt.NDArray[np.float32]]


class Observer(Protocol):
    """Somebody who is told what was answered, and only copies."""

    def observe(
        self, model: LoadedModel, rows: npt.NDArray[np.float32], prediction: Prediction, request_id: str, /
    ) -> None:
        """Note one answered request."""

    def observe_row(
        self, model: LoadedModel, row: npt.NDArray[np.float32], label: int, top: float, request_id: str, /
    ) -> None:
        """Note one answered row."""


class _World(NamedTuple):
    """What is resident. Replaced whole, never changed: a reader sees the old world or the new, and needs no lock."""

    current: Mapping[str, Slot]  # by name
    versions: Mapping[tuple[str, str], Slot]  # by name and version, the current ones among them
    splits: Mapping[str, Split] = {}  # by name: which keys fall to versions beside the current one


class DataPlane:
    """Models by name, and the one way to ask them.

    Args:
        observe: called with (model, rows, prediction, request id) after each prediction; must only copy.
        observe_row: the same on the hot path, with (model, row, class, highest score, id); `observe` when None.
        observe_rows: the same for rows of several requests that were answered together, with (model, rows, classes,
            highest scores, ids); `observe_row`, for each, when None.
        feedback: called with (model name, prediction id, label); True when the label was counted.
        refused: called with (model, rows, data) when a request for that model does not fit its schema.
        newest: the last rows that a model answered, at most so many; none when None.
        max_in_flight: requests that may be inside at once.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        observe: Observe,
        *,
        observe_row: ObserveRow | None = None,
        observe_rows: ObserveRows | None = None,
        feedback: Feedback | None = None,
        refused: Refused | None = None,
        newest: Newest | None = None,
        max_in_flight: int = 64,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._observers = observe, observe_row, observe_rows
        self._observe, self._observe_row, self._observe_rows = self._observers
        self._feedback = feedback or _no_feedback
        self._refused = refused
        self.newest = newest or _no_rows
        self._clock = clock
        self._world = _World({}, {})
        self._told: tuple[Callable[[], None], ...] = ()
        self._lock = threading.Lock()
        self._errors: Counter[str] = Counter()
        self._observe_failures = 0
        self._next_id = ids(secrets.token_hex(6))
        #: Models on the hot path by name and by name/versions/version, as they stand in a path.
        self.hot: dict[bytes, HotModel] = {}
        self.admission = Admission(max_in_flight, self.count_error)

    def on_change(self, told: Callable[[], None]) -> None:
        """Tell a face that keeps something of the models when what is resident has changed, so that it lets go."""
        self._told = (*self._told, told)

    def install(self, model: LoadedModel) -> LoadedModel | None:
        """Serve `model` under its name from now on, and return the one it replaces, which stays resident.

        A resident model of the same version but another digest goes: a version is one bundle.
        """
        with self._lock:
            current, versions, splits = self._world
            previous = current.get(model.name)
            beside = {key: slot.aside() if slot is previous else slot for key, slot in versions.items()}
            slot = Slot(model)
            self._assign(_World({**current, model.name: slot}, {**beside, _key(model): slot}, splits))
        return previous.model if previous else None

    def keep(self, model: LoadedModel, *, watched: bool = False) -> None:
        """Have `model` resident beside what serves: it answers whoever asks for its version.

        Args:
            model: another version than the current one, or nothing changes.
            watched: whether the observer is told of its answers; as a rule it is told only of the current version's.
        """
        with self._lock:
            current, versions, splits = self._world
            serves = current.get(model.name)
            if serves is None or serves.model.version != model.version:
                self._assign(_World(current, {**versions, _key(model): Slot(model, watched)}, splits))

    def watches(self, digest: str) -> bool:
        """Whether that bundle is resident, and its answers are watched."""
        return any(slot.watched and slot.model.digest == digest for slot in self._world.versions.values())

    def drop(self, digest: str) -> LoadedModel | None:
        """Let go of a resident model that is not current, and return it; None where there is none such."""
        with self._lock:
            current, versions, splits = self._world
            serving = {slot.model.digest for slot in current.values()}
            gone = [slot.model for slot in versions.values() if slot.model.digest == digest and digest not in serving]
            self._assign(_World(current, {k: s for k, s in versions.items() if s.model not in gone}, splits))
        return gone[0] if gone else None

    def remove(self, name: str) -> LoadedModel | None:
        """Stop serving `name` in any version, and return what was current."""
        with self._lock:
            current, versions, splits = self._world
            previous = current.get(name)
            left = {key: slot for key, slot in versions.items() if slot.model.name != name}
            others = {n: split for n, split in splits.items() if n != name}
            self._assign(_World({n: slot for n, slot in current.items() if n != name}, left, others))
        return previous.model if previous else None

    def divide(self, name: str, split: Split | None) -> None:
        """Deal the keys of requests for `name` among its resident versions from now on; None: the current one's all."""
        with self._lock:
            current, versions, splits = self._world
            others = {n: s for n, s in splits.items() if n != name}
            self._assign(_World(current, versions, others if split is None else {**others, name: split}))

    def mirror_to(self, mirror: Observer | None) -> None:
        """Tell `mirror` too what is answered from now on."""
        observe, observe_row, observe_rows = self._observers
        if mirror is not None:
            observe, observe_row = _both(observe, mirror.observe), _both_rows(observe_row, mirror.observe_row)
            observe_rows = None  # the mirror is told of each by itself
        self._observe, self._observe_row, self._observe_rows = observe, observe_row, observe_rows

    def get(self, name: str | None = None, version: str | None = None) -> LoadedModel:
        """The model of that name and version; without a name, the only one; without a version, the current one.

        Raises:
            ServingError: serving.no-model, serving.unknown-model.
        """
        return self.find(name, version).model

    def find(self, name: str | None = None, version: str | None = None, key: str = "") -> Slot:
        """As `get`, with the model's place: what a face hands to `answer` when it needs the schema to read the rows.

        Without a version, `key` says whose share the request is, where keys are dealt among versions.

        Raises:
            ServingError: as `get`; serving.malformed for a key that is too long.
        """
        current, versions, splits = self._world
        if not versions:
            raise ServingError("serving.no-model", "This device has no model yet.", remedy="Assign it one.")
        if name is None:
            if len(current) != 1:
                message = f"Several models are here ({', '.join(_names(versions))}); name one."
                raise ServingError("serving.unknown-model", message)
            name = next(iter(current))
        slot = current.get(name) if version is None else versions.get((name, version))
        if slot is None:
            raise _unknown(versions, name, version)
        if version is None and name in splits:
            chosen = splits[name].choose(key)
            return slot if chosen is None else versions.get((name, str(chosen)), slot)
        return slot

    def row_ms(self, name: str | None, version: str | None) -> float:
        """What a row may take at most, whichever version its key falls to.

        Raises:
            ServingError: as `get`.
        """
        model, world = self.get(name, version), self._world
        if model.spec is not None:
            return math.inf  # nobody knows how large a row of tensors is, or how long an image takes to decode
        split = world.splits.get(model.name) if version is None else None
        arms = [world.versions.get((model.name, str(arm.version))) for arm in split.arms] if split else []
        return max(model.row_ms, *(slot.model.row_ms for slot in arms if slot), 0.0)

    def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request.

        Raises:
            ServingError: any serving.* code but those of transports.
        """
        with self.admission:
            return self.answer(request)

    def answer(self, request: InferRequest, *, by: Slot | None = None) -> InferResponse:
        """Answer a request that already holds its `admission`.

        Args:
            request: what to predict.
            by: what `find` gave to a face that read the rows by its schema; a swap since then changes nothing.

        Raises:
            ServingError: as `infer`, but never serving.overloaded.
        """
        begun = self._clock()
        slot = by
        try:
            slot = slot or self.find(request.model, request.version, request.key)
            response, rows, prediction = self._predict(slot, request)
        except ServingError as e:
            self.count_error(e.code)
            if slot:
                slot.counters.failed(e.code)
            raise
        slot.counters.answered(len(rows), self._clock() - begun)
        if slot.watched:
            self._watch(slot.model, rows, prediction, response.id)
        return response

    def feedback(self, model: str, prediction_id: str, label: str) -> bool:
        """Tell what a prediction should have been; False when that was told before.

        Raises:
            ServingError: serving.unknown-model, serving.unknown-prediction, serving.input.
        """
        try:
            self.find(model)
            return self._feedback(model, prediction_id, label)
        except ServingError as e:
            self.count_error(e.code)
            raise

    def models(self) -> tuple[LoadedModel, ...]:
        """The current model of every name: what is being served."""
        return tuple(slot.model for slot in self._world.current.values())

    def resident(self) -> tuple[LoadedModel, ...]:
        """Every model in memory, current or not."""
        return tuple(slot.model for slot in self._world.versions.values())

    def running(self) -> tuple[Running, ...]:
        """The heartbeat's view of what is being served: the current models, then those for whom keys are dealt."""
        world = self._world
        served = [*world.current.values()]
        served += [s for s in world.versions.values() if s.watched and s not in served]
        return tuple(
            Running(
                model=s.model.name,
                version=s.model.version,
                digest=s.model.digest,
                since=s.model.since_ms,
                requests=s.rows,
                failures=s.failures,
                latency_ms=round(s.p95_ms, 4),
                provider=s.model.provider,
                latencies=trimmed(s.latencies),
                busy_us=round(s.seconds * 1e6),
                errors=most_frequent(s.errors),
            )
            for s in (slot.stats() for slot in served)
        )

    def stats(self, name: str | None = None) -> tuple[ModelStats, ...]:
        """Counters per resident model, of all names or of one."""
        return tuple(slot.stats() for slot in self._world.versions.values() if name in (None, slot.model.name))

    def errors(self) -> dict[str, int]:
        """Refused and failed requests by code, of all models and faces since the agent began."""
        with self._lock:
            return dict(self._errors)

    def count_error(self, code: str) -> None:
        """Count an error that a face found before the data plane saw the request."""
        with self._lock:
            self._errors[code] += 1

    def _assign(self, world: _World) -> None:
        self._world = world
        self.hot = self._hot_models(world)
        for told in self._told:
            told()

    def _hot_models(self, world: _World) -> dict[bytes, HotModel]:
        found = {}
        for slot in world.versions.values():
            model = slot.model
            if model.bound is None or model.row_ms > HOT_ROW_MS:
                continue
            slot.hot = hot = slot.hot or self._make_hot(slot)
            name = model.name.encode()
            found[b"%b/versions/%d" % (name, model.version)] = hot
            split = world.splits.get(model.name)
            if world.current.get(model.name) is slot and (split is None or not split.per_request):
                found[name] = hot
        return found

    def _make_hot(self, slot: Slot) -> HotModel:
        counters = slot.counters  # and not the slot: a circle would keep the session until the garbage collector comes

        def failed(code: str) -> None:
            self.count_error(code)
            counters.failed(code)

        return HotModel(
            slot.model,
            answered=counters.answered,
            failed=failed,
            observe=self._watch if slot.watched else _unseen,
            observe_row=None if self._observe_row is None else self._watch_row if slot.watched else _unseen_row,
            observe_rows=None if self._observe_row is None else self._watch_rows if slot.watched else _unseen_rows,
            next_id=self._next_id,
            max_id=MAX_ID,
        )

    def _predict(self, slot: Slot, request: InferRequest) -> tuple[InferResponse, npt.NDArray[np.float32], Prediction]:
        model = slot.model
        names = output_names(model) if model.spec is None else tensor_output_names(model)
        unknown = [name for name in request.outputs if name not in names]
        if unknown:
            message = f"No output {unknown[0][:64]!r}; {model.name} gives {', '.join(names)}."
            raise ServingError("serving.output", message)
        if len(request.id) > MAX_ID:
            message = f"Expected an id of at most {MAX_ID} characters, found {len(request.id)}."
            raise ServingError("serving.malformed", message)
        wanted = request.outputs or names
        try:
            if model.spec is None:
                rows = input_rows(request.inputs, model.schema)
            else:
                feeds = tensor_feeds(request.inputs, model.spec)
                rows = model.spec.watched(feeds, model.projectors)
        except ServingError as e:
            if e.code == "serving.input" and self._refused and slot.watched:
                data = request.inputs[0].data if len(request.inputs) == 1 else None
                self._refused(model, claimed_rows(request.inputs), data)
            raise
        if model.spec is None:
            prediction = model.predict(rows)
            outputs = answered(model, prediction, wanted)
        else:
            found, prediction = model.predict_tensors(feeds, [name for name in wanted if model.spec.gives(name)])
            outputs = tensor_outputs(model, found, prediction, wanted)
        response = InferResponse(
            model_name=model.name,
            model_version=str(model.version),
            id=request.id or self._next_id(),
            parameters={"digest": model.digest},
            outputs=outputs,
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

    def _watch_rows(
        self,
        model: LoadedModel,
        rows: npt.NDArray[np.float32],
        labels: Sequence[int],
        tops: Sequence[float],
        request_ids: Sequence[str],
    ) -> None:
        if self._observe_rows is None:
            for row, label, top, request_id in zip(rows, labels, tops, request_ids, strict=True):
                self._watch_row(model, row, label, top, request_id)
            return
        try:
            self._observe_rows(model, rows, labels, tops, request_ids)
        except Exception:  # noqa: BLE001 - as above
            self._observer_failed()

    def _observer_failed(self) -> None:
        self._observe_failures += 1
        if self._observe_failures == 1:
            _LOG.exception("The observer failed; serving goes on without it.")


def _no_feedback(_model: str, _prediction_id: str, _label: str) -> bool:
    raise ServingError("serving.unknown-prediction", "This agent keeps no predictions to compare with.")


def _no_rows(model: LoadedModel, _rows: int) -> npt.NDArray[np.float32]:
    return np.empty((0, model.schema.width), dtype=np.float32)


def _both(first: Observe, second: Observe) -> Observe:
    def observe(model: LoadedModel, rows: npt.NDArray[np.float32], prediction: Prediction, request_id: str) -> None:
        first(model, rows, prediction, request_id)
        second(model, rows, prediction, request_id)

    return observe


def _both_rows(first: ObserveRow | None, second: ObserveRow) -> ObserveRow | None:
    if first is None:  # then nobody is told of single rows: they come as requests
        return None

    def observe_row(model: LoadedModel, row: npt.NDArray[np.float32], label: int, top: float, request_id: str) -> None:
        first(model, row, label, top, request_id)
        second(model, row, label, top, request_id)

    return observe_row


def _unseen(_model: LoadedModel, _rows: npt.NDArray[np.float32], _prediction: Prediction, _id: str) -> None:
    """What is told of answers that nobody watches."""


def _unseen_row(_model: LoadedModel, _row: npt.NDArray[np.float32], _label: int, _top: float, _id: str) -> None:
    """The same for one row."""


def _unseen_rows(
    _model: LoadedModel,
    _rows: npt.NDArray[np.float32],
    _labels: Sequence[int],
    _tops: Sequence[float],
    _ids: Sequence[str],
) -> None:
    """The same for several."""


def _key(model: LoadedModel) -> tuple[str, str]:
    return model.name, str(model.version)


def _names(versions: Mapping[tuple[str, str], Slot]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in versions))


def _unknown(versions: Mapping[tuple[str, str], Slot], name: str, version: str | None) -> ServingError:
    resident = [v for n, v in versions if n == name]
    if not resident:
        message = f"No model {name[:64]!r} is here, only {', '.join(_names(versions))}."
    elif version is None:
        message = f"No version of {name} is current; name one of {', '.join(resident)}."
    else:
        message = f"Version {version[:20]!r} of {name} is not in memory; {', '.join(resident)} is."
    return ServingError("serving.unknown-model", message)
