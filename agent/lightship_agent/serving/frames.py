"""Serving: frames, the face for programs on the device that ask often and want their answer soonest.

    frame     length of the body as u32, little-endian; then the body, a MessagePack map
    request   {x, rows?, model?, version?, id?, key?}       rows of numbers
              {records, model?, version?, id?, key?}        rows by feature name, as in `records`
              {do: "feedback", id, label, model?}     {do: "ready", model?, version?}
    answer    {version, digest, labels, classes, id, scores?}     of a classifier
              {version, digest, id, values}                       of a regressor
              {counted: bool}     {ready: true, model, version, digest}
              {code, error}       of a request that was refused

Rules:
* `x` is float32 little-endian, row by row, as bytes; or a list of numbers, or of rows, where null is a missing value.
  Scores and values come the way `x` went;
* answers come in the order of requests, however many are on their way; a request that is refused costs only itself, a
  frame that is too large costs the connection, since nothing after it can be read;
* one plain row for a fast model goes the hot path, which answers to the bit what the long way answers; what is on its
  way together, on one connection or on several, is answered together;
* it translates, and decides nothing.
"""

from __future__ import annotations

import logging
import math
import struct
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from math import isfinite
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ServingError
from lightship_agent.runtime.model import LoadedModel

from .connections import Limits, Reply
from .dataplane import HOT_ROW_MS, DataPlane
from .hot import MAX_BODY as HOT_BODY
from .hot import Body, HotModel, HotRow, packer
from .records import request_of
from .slot import Slot
from .tensors import MAX_ID, InferRequest, InferResponse, Tensor
from .workers import in_thread

#: As for HTTP, but for time: a program on the device may stay connected without a word for as long as it runs.
LIMITS: Final = Limits(idle_seconds=math.inf)
LENGTH: Final = struct.Struct("<I")
_INLINE: Final = 64 * 1024  # bytes
_LOG: Final = logging.getLogger("lightship.serving")
_ENCODE: Final = msgspec.msgpack.Encoder().encode


class _Row(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """What the hot path takes: a part of `_Request`."""

    x: bytes | list[float]
    model: str | None = None
    version: int | str | None = None
    id: str = ""
    rows: Literal[1] = 1


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    x: bytes | list[list[float | None] | float | None] = b""
    rows: int | None = None
    model: str | None = None
    version: int | str | None = None
    id: str = ""
    do: Literal["predict", "feedback", "ready"] = "predict"
    label: str | int | float | bool | None = None
    records: list[Any] | None = None
    key: str = ""


_DECODE_ROW: Final = msgspec.msgpack.Decoder(_Row).decode
_DECODE: Final = msgspec.msgpack.Decoder(_Request).decode


class FrameFace:
    """What answers frames."""

    def __init__(self, plane: DataPlane) -> None:
        """A face of `plane`."""
        self._plane = plane
        self._seen: object = None
        self._hot: dict[tuple[str | None, int | str | None], _HotFrames] = {}
        plane.on_change(self._forget)

    def hot(self, frame: bytes) -> tuple[HotModel, HotRow] | None:
        """The model and the row, if this is one plain row for a fast model."""
        if len(frame) > HOT_BODY:
            return None
        try:
            asked = _DECODE_ROW(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if self._plane.hot is not self._seen:
            self._learn()
        found = self._hot.get((asked.model, asked.version))
        return None if found is None else found.row(asked)

    def answer_hot(self, model: HotModel, asked: list[HotRow]) -> list[bytes]:
        """The frames that answer; to the bit the same, however many are asked together.

        Raises:
            ServingError: serving.runtime.
        """
        return model.answer_all(asked)

    def respond(self, frame: bytes, *, only: str | None = None) -> Reply | Awaitable[Reply]:
        """The answer to any frame, or what will be it; of no other model than `only`, if one is named."""
        try:
            outcome = self._route(frame, only)
        except Exception as e:  # noqa: BLE001 - the last fence, see _explain
            return self._explain(e)
        return outcome if isinstance(outcome, Reply) else self._fenced(outcome)

    def refuse(self, error: ServingError) -> Reply:
        """The answer to what is no request, or too much of it; counted, unless a model has counted it."""
        if error.code != "serving.runtime":
            self._plane.count_error(error.code)
        return Reply(_error(error))

    async def _fenced(self, outcome: Awaitable[Reply]) -> Reply:
        try:
            return await outcome
        except Exception as e:  # noqa: BLE001 - the last fence, see _explain
            return self._explain(e)

    def _explain(self, e: Exception) -> Reply:
        if isinstance(e, ServingError):
            return Reply(_error(e))
        # The client gets an error like any other, the log the traceback.
        _LOG.error("A frame failed in a way nobody foresaw.", exc_info=e)
        self._plane.count_error("serving.runtime")
        return Reply(_error(ServingError("serving.runtime", "The agent failed to answer; its log says more.")))

    def _route(self, frame: bytes, only: str | None) -> Reply | Awaitable[Reply]:
        try:
            asked = _DECODE(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            return self.refuse(ServingError("serving.malformed", f"Expected a request in MessagePack: {e}."))
        if only is not None:
            if asked.model not in (None, only):
                return self.refuse(ServingError("serving.unknown-model", f"Only {only!r} is asked here."))
            asked.model = only
        model = self._find(asked).model
        if asked.do == "ready":
            said = {"ready": True, "model": model.name, "version": model.version, "digest": model.digest}
            return Reply(framed(_ENCODE(said)))
        if asked.do == "predict" and len(frame) <= _INLINE and model.row_ms <= HOT_ROW_MS:
            with self._plane.admission:
                return Reply(self._predict(asked))
        return self._in_thread(self._predict if asked.do == "predict" else self._feedback, asked)

    async def _in_thread(self, answer: Callable[[_Request], bytes], asked: _Request) -> Reply:
        return Reply(await in_thread(self._plane.admission, math.inf, partial(answer, asked)))

    def _find(self, asked: _Request) -> Slot:
        try:
            return self._plane.find(asked.model, None if asked.version is None else str(asked.version), asked.key)
        except ServingError as e:
            self._plane.count_error(e.code)
            raise

    def _predict(self, asked: _Request) -> bytes:
        found = self._find(asked)
        try:
            request = _request(asked, found.model)
        except ServingError as e:
            self._plane.count_error(e.code)
            raise
        response = self._plane.answer(request, by=found)
        return _answer(response, as_bytes=isinstance(asked.x, bytes))

    def _feedback(self, asked: _Request) -> bytes:
        if asked.label is None or not asked.id:
            self._plane.count_error("serving.malformed")
            raise ServingError("serving.malformed", "Expected the id of a prediction and its label.")
        label = asked.label if isinstance(asked.label, str) else msgspec.json.encode(asked.label).decode()
        counted = self._plane.feedback(self._find(asked).model.name, asked.id, label)
        return framed(_ENCODE({"counted": counted}))

    def _forget(self) -> None:
        """What was learnt would keep models in memory that have gone."""
        self._seen, self._hot = None, {}

    def _learn(self) -> None:
        """Prepare for the models that are on the hot path now, under every name one may call them by."""
        plane = self._plane
        self._seen = hot = plane.hot
        found: dict[tuple[str | None, int | str | None], _HotFrames] = {}
        for path, model in hot.items():
            frames = _HotFrames(model)
            name, version = model.model.name, model.model.version
            for called in (name, None) if len(plane.models()) == 1 else (name,):
                found[called, version] = found[called, str(version)] = frames
                if path == name.encode():  # the current version, which answers whoever names none
                    found[called, None] = frames
        self._hot = found


class _HotFrames:
    """A model on the hot path: its rows out of frames, and its answers into frames."""

    def __init__(self, hot: HotModel) -> None:
        self._hot = hot
        self._width = hot.model.schema.width
        self._pack, self._unpack = packer(self._width), struct.Struct(f"<{self._width}f").unpack
        outputs = hot.model.outputs
        head = _ENCODE({"version": hot.model.version, "digest": hot.model.digest})[1:]
        # What is the same for every answer of a class is made once: a map of so many fields, up to the id.
        if outputs.task == "classification":
            fields, numbers, name = 5 + bool(outputs.score_output), len(outputs.labels), b"\xa6scores"
            told = [_ENCODE({"labels": [w], "classes": [i]})[1:] for i, w in enumerate(outputs.labels)]
        else:
            fields, numbers, name, told = 4, 1, b"\xa6values", [b""]
        by_class = [b"%c%b%b\xa2id" % (0x80 + fields, head, words) for words in told]
        packed = struct.Struct(f"<{numbers}f")
        blob = name + _ENCODE(bytes(packed.size))[: -packed.size]

        def as_bytes(request_id: str, label: int, scores: list[float] | None, value: list[float] | None) -> bytes:
            body, said = by_class[label] + _ENCODE(request_id), scores or value
            return framed(body if said is None else b"%b%b%b" % (body, blob, packed.pack(*said)))

        def as_list(request_id: str, label: int, scores: list[float] | None, value: list[float] | None) -> bytes:
            body, said = by_class[label] + _ENCODE(request_id), scores or value
            return framed(body if said is None else b"%b%b%b" % (body, name, _ENCODE(said)))

        self._as_bytes: Body = as_bytes
        self._as_list: Body = as_list

    def row(self, asked: _Row) -> tuple[HotModel, HotRow] | None:
        """The row in `asked`; None where the long way must look at it."""
        x = asked.x
        if len(asked.id) > MAX_ID:
            return None
        if isinstance(x, bytes):
            if len(x) != 4 * self._width:
                return None
            data = self._unpack(x)
            # In float64, where no sum of float32 overflows; NaN and infinity survive any sum.
            if not isfinite(sum(data)):
                return None
            here = x if sys.byteorder == "little" else self._pack(*data)
            return self._hot, HotRow(here, asked.id, self._as_bytes)
        if len(x) != self._width or not isfinite(sum(x)):
            return None
        try:
            return self._hot, HotRow(self._pack(*x), asked.id, self._as_list)
        except OverflowError:
            return None


def framed(body: bytes) -> bytes:
    """The frame around `body`."""
    return LENGTH.pack(len(body)) + body


def _request(asked: _Request, model: LoadedModel) -> InferRequest:
    if asked.records is not None:
        return request_of(asked.records, model, asked.id)
    return InferRequest((_tensor(asked, model),), asked.model, None, asked.id)


def _tensor(asked: _Request, model: LoadedModel) -> Tensor:
    """The rows in `asked`, for the data plane to judge.

    Raises:
        ServingError: serving.input.
    """
    width, x = model.schema.width, asked.x
    if isinstance(x, bytes):
        if len(x) % (4 * width):
            message = f"Expected x in rows of {width} float32, {4 * width} bytes each; found {len(x)} bytes."
            raise ServingError("serving.input", message)
        data: npt.NDArray[Any] = np.frombuffer(x, dtype="<f4")
    else:
        data = _numbers(x, width)
    rows = len(data) // width if asked.rows is None else asked.rows
    return Tensor(model.schema.input_name, "FP32", (rows, width), data)


def _numbers(x: list[list[float | None] | float | None], width: int) -> npt.NDArray[np.float64]:
    flat: list[float | None] = []
    for item in x:
        if not isinstance(item, list):
            flat.append(item)
        elif len(item) == width:
            flat += item
        else:
            raise ServingError("serving.input", f"Expected rows of {width} numbers, found one of {len(item)}.")
    if len(flat) % width:
        raise ServingError("serving.input", f"Expected x in rows of {width} numbers, found {len(flat)} numbers.")
    # Through float64: a number too large for float32 becomes infinite there, and the schema refuses that.
    return np.array([math.nan if n is None else n for n in flat], dtype=np.float64)


def _answer(response: InferResponse, *, as_bytes: bool) -> bytes:
    outputs = {tensor.name: tensor.data for tensor in response.outputs}
    said: dict[str, Any] = {"version": int(response.model_version), "digest": response.parameters["digest"]}
    if "label" in outputs:
        said |= {"labels": outputs["label"], "classes": outputs["class"].tolist()}
    said["id"] = response.id
    for name, here in (("scores", "scores"), ("value", "values")):
        if name in outputs:
            numbers = np.ascontiguousarray(outputs[name], dtype="<f4")
            said[here] = numbers.tobytes() if as_bytes else numbers.ravel().tolist()
    return framed(_ENCODE(said))


def _error(error: ServingError) -> bytes:
    return framed(_ENCODE({"code": error.code, "error": str(error)}))
