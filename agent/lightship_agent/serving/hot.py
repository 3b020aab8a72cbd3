"""Serving: the hot path, one row of numbers in JSON, answered in JSON, with nothing in between that is not needed.

Rules:
* it answers to the byte what the long way (`oip`, `dataplane`) answers, or it leaves the request to it: whatever is
  unusual, and every refusal, goes the long way;
* what does not change between two requests is made once, when a model is installed;
* several rows that wait together are answered together, where the model's answers are to the bit the same;
* one thread, the loop's: it needs no lock but that of the bound row, which the long way may hold.
"""

from __future__ import annotations

import itertools
import math
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ServingError
from lightship_agent.runtime.model import LoadedModel, Prediction

#: Rows that are answered in one run; beyond it the trees of a forest no longer stay in the cache.
MAX_TOGETHER: Final = 16
MAX_BODY: Final = 64 * 1024  # bytes

ObserveRow = Callable[[LoadedModel, npt.NDArray[np.float32], int, float, str], None]
ObserveRows = Callable[[LoadedModel, npt.NDArray[np.float32], Sequence[int], Sequence[float], Sequence[str]], None]
Observe = Callable[[LoadedModel, npt.NDArray[np.float32], Prediction, str], None]


class _In(msgspec.Struct, gc=False):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]
    parameters: msgspec.UnsetType = msgspec.UNSET


class _Request(msgspec.Struct, gc=False):
    inputs: tuple[_In]
    id: str | msgspec.UnsetType = msgspec.UNSET
    parameters: msgspec.UnsetType = msgspec.UNSET
    outputs: msgspec.UnsetType = msgspec.UNSET


_DECODE: Final = msgspec.json.Decoder(_Request).decode
_ENCODE: Final = msgspec.json.Encoder().encode


#: What makes the body of an answer of (id, class or -1, scores, value).
Body = Callable[[str, int, list[float] | None, list[float] | None], bytes]


class HotRow(NamedTuple):
    """A request that the hot path takes: its numbers, the client's id, and who writes the answer if not in JSON."""

    data: bytes  # float32, as they lie in memory
    id: str
    body: Body | None = None


class HotModel:
    """A model on the hot path."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        answered: Callable[[int, float, int], None],
        failed: Callable[[str], None],
        observe: Observe,
        observe_row: ObserveRow | None,
        observe_rows: ObserveRows | None,
        next_id: Callable[[], str],
        max_id: int,
    ) -> None:
        """Make what is the same for every answer.

        Args:
            model: with a bound row.
            answered: told (rows, seconds, requests) after each run.
            failed: told the code of each failure.
            observe: as `DataPlane`.
            observe_row: the same for one row, with its class and highest score (NaN without); -1 and the value of a
                regressor.
            observe_rows: the same for rows that were answered together: n of each.
            next_id: an id for whoever gave none.
            max_id: characters of a client's id.
        """
        assert model.bound is not None, "only a bound model is served on the hot path"
        self.model = model
        self._bound = model.bound
        self._answered, self._failed, self._next_id, self._max_id = answered, failed, next_id, max_id
        self._observe, self._observe_row, self._observe_rows = observe, observe_row, observe_rows
        self._name, self._width = model.schema.input_name, model.schema.width
        self._shapes = ([1, self._width], [self._width])
        self._pack = packer(self._width)
        self._is_classifier = model.outputs.task == "classification"
        self._threshold = model.outputs.threshold if len(model.outputs.labels) == 2 else None
        head = {"model_name": model.name, "model_version": str(model.version), "id": ""}
        self._before_id = _ENCODE(head)[:-3]
        after_id = b',"parameters":' + _ENCODE({"digest": model.digest}) + b',"outputs":['
        self._by_class = [after_id + part for part in _class_parts(model)]
        self._before_value = after_id + b'{"name":"value","datatype":"FP32","shape":[1],"data":'

    def parse(self, body: bytes) -> HotRow | None:
        """The row in a request's body; None where the long way must look at it."""
        try:
            request = _DECODE(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        tensor = request.inputs[0]
        data, request_id = tensor.data, request.id or ""
        if (
            tensor.name != self._name
            or tensor.datatype != "FP32"
            or len(data) != self._width
            or tensor.shape not in self._shapes
            or len(request_id) > self._max_id
            # Each key of the request once, and its strings: with a quote more there may be a key twice.
            or body.count(b'"') != (14 if request.id is msgspec.UNSET else 18)
        ):
            return None
        try:
            return HotRow(self._pack(*data), request_id)
        except OverflowError:
            return None

    def answer_all(self, asked: Sequence[HotRow]) -> list[bytes]:
        """The bodies of the answers, together where that changes no bit of them.

        Raises:
            ServingError: serving.runtime; then none is answered.
        """
        if len(asked) == 1 or not self.model.batches_exactly:
            return [self.answer(one) for one in asked]
        bodies: list[bytes] = []
        for at in range(0, len(asked), MAX_TOGETHER):
            bodies += self.answer_together(asked[at : at + MAX_TOGETHER])
        return bodies

    def answer(self, asked: HotRow) -> bytes:
        """The body of the answer.

        Raises:
            ServingError: serving.runtime.
        """
        begun = time.perf_counter()
        bound = self._bound
        if not bound.lock.acquire(blocking=False):
            return self.answer_together((asked,))[0]  # the long way has the row
        try:
            bound.memory[:] = asked.data
            try:
                bound.run()
            except Exception as e:
                raise self._failure(e) from e
            label = self._label(bound.label, bound.scores)
            scores = None if bound.scores is None else bound.scores.tolist()
            value = None if bound.value is None else bound.value.tolist()
            request_id = asked.id or self._next_id()
            self._watch(bound.row, label, scores or value, request_id)
        finally:
            bound.lock.release()
        self._answered(1, time.perf_counter() - begun, 1)
        return (asked.body or self._body)(request_id, label, scores, value)

    def answer_together(self, asked: Sequence[HotRow]) -> list[bytes]:
        """The bodies of the answers to several requests, by one run of the model.

        Raises:
            ServingError: serving.runtime; then none is answered.
        """
        begun = time.perf_counter()
        rows = np.frombuffer(b"".join([a.data for a in asked]), dtype=np.float32).reshape(len(asked), self._width)
        try:
            found = self.model.predict(rows)
        except ServingError as e:
            self._failed(e.code)
            raise
        labels = [-1] * len(asked) if found.labels is None else found.labels.tolist()
        scores = [None] * len(asked) if found.scores is None else found.scores.tolist()
        values = [None] * len(asked) if found.values is None else found.values.tolist()
        request_ids = [one.id or self._next_id() for one in asked]
        self._watch_all(rows, labels, values if found.scores is None else scores, request_ids)
        bodies = [
            (one.body or self._body)(request_id, label, said, value)
            for one, request_id, label, said, value in zip(asked, request_ids, labels, scores, values, strict=True)
        ]
        self._answered(len(asked), time.perf_counter() - begun, len(asked))
        return bodies

    def _label(self, label: npt.NDArray[np.int64] | None, scores: npt.NDArray[np.float32] | None) -> int:
        if not self._is_classifier:
            return -1
        if self._threshold is not None and scores is not None:
            found = int(scores[1] >= self._threshold)
        elif label is not None:
            found = label.item()
        else:
            assert scores is not None
            found = int(scores.argmax())
        if not 0 <= found < len(self._by_class):
            raise self._failure(ValueError(f"expected a class below {len(self._by_class)}, found {found}"))
        return found

    def _watch(self, row: npt.NDArray[np.float32], label: int, numbers: list[float] | None, request_id: str) -> None:
        """Tell of an answer; its numbers are the scores of a classifier, or the one value of a regressor."""
        if self._observe_row is not None:
            self._observe_row(self.model, row, label, max(numbers) if numbers else math.nan, request_id)
            return
        told = None if numbers is None else np.array([numbers], dtype=np.float32)
        if self._is_classifier:
            said = Prediction(labels=np.array([label], dtype=np.int64), scores=told)
        else:
            said = Prediction(values=told)
        self._observe(self.model, row.reshape(1, -1).copy(), said, request_id)

    def _watch_all(
        self,
        rows: npt.NDArray[np.float32],
        labels: list[int],
        numbers: Sequence[list[float] | None],
        request_ids: list[str],
    ) -> None:
        """The same of answers that were made together."""
        if self._observe_rows is None:
            for row, label, said, request_id in zip(rows, labels, numbers, request_ids, strict=True):
                self._watch(row, label, said, request_id)
            return
        tops = [max(said) if said else math.nan for said in numbers]
        self._observe_rows(self.model, rows, labels, tops, request_ids)

    def _body(self, request_id: str, label: int, scores: list[float] | None, value: list[float] | None) -> bytes:
        if not self._is_classifier:
            return b"%b%b%b%b}]}" % (self._before_id, _ENCODE(request_id), self._before_value, _ENCODE(value))
        head = b"%b%b%b" % (self._before_id, _ENCODE(request_id), self._by_class[label])
        return head + (b"]}" if scores is None else b"%b}]}" % _ENCODE(scores))

    def _failure(self, e: Exception) -> ServingError:
        self._failed("serving.runtime")
        return ServingError("serving.runtime", f"{self.model.name}@{self.model.version} failed to predict: {e}")


def _class_parts(model: LoadedModel) -> list[bytes]:
    """The outputs of each class, up to where the scores begin."""
    parts = []
    for index, word in enumerate(model.outputs.labels):
        label: dict[str, Any] = {"name": "label", "datatype": "BYTES", "shape": [1], "data": [word]}
        number: dict[str, Any] = {"name": "class", "datatype": "INT64", "shape": [1], "data": [index]}
        part = _ENCODE(label) + b"," + _ENCODE(number)
        if model.outputs.score_output:
            shape = _ENCODE([1, len(model.outputs.labels)])
            part += b',{"name":"scores","datatype":"FP32","shape":' + shape + b',"data":'
        parts.append(part)
    return parts


def packer(width: int) -> Callable[..., bytes]:
    """What makes float32 of `width` numbers as they lie in memory, and raises OverflowError where one is too large.

    `struct` looks for that only where the order of bytes is named.
    """
    return struct.Struct(f"{'<' if sys.byteorder == 'little' else '>'}{width}f").pack


def ids(prefix: str) -> Callable[[], str]:
    """Ids that are used once: the prefix, and a number."""
    numbers = itertools.count(1)
    return lambda: f"{prefix}-{next(numbers)}"
