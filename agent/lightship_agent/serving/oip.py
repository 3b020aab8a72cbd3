"""Serving: the Open Inference Protocol V2 on the wire, JSON and binary tensors.

Rules:
* pure: bytes in, requests out, and back; bounds are checked before anything large is built;
* numbers are numbers: a string, a boolean among floats or a number out of its datatype's range is refused;
* a key that occurs twice, or an input, is refused: nobody can say which was meant;
* JSON null stands for NaN in floating-point tensors, and the schema decides whether that may be;
* binary tensors follow the JSON in order, little-endian, row-major; BYTES as u32 length + bytes each.

Source: the Open Inference Protocol and its binary tensor data extension.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent import __version__
from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.schema import FeatureSchema
from lightship_agent.contract.tensors import DTYPES
from lightship_agent.runtime.model import LoadedModel

from .feeds import described_inputs, described_outputs, images
from .keys import check_keys
from .tensors import MAX_ROWS, InferRequest, InferResponse, Tensor

MAX_BODY: Final = 16 * 1024 * 1024  # bytes
MAX_RANK: Final = 8
EXTENSIONS: Final = ("binary_tensor_data", "model_repository", "statistics")
_MAX_INPUTS: Final = 64


class _In(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw(b"")
    parameters: dict[str, Any] | None = None


class _Out(msgspec.Struct):
    name: str
    parameters: dict[str, Any] | None = None


class _Request(msgspec.Struct):
    inputs: list[_In]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[_Out] | None = None


class _TensorJson(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] | None = None
    data: Any = None


class _ResponseJson(msgspec.Struct):
    model_name: str
    model_version: str
    id: str
    parameters: Mapping[str, str]
    outputs: list[_TensorJson]


_LENGTH: Final = struct.Struct("<I")
_BYTES: Final = np.dtype("S")
_REQUEST: Final = msgspec.json.Decoder(_Request)
_ENCODER: Final = msgspec.json.Encoder()
#: The common case, flat data, decodes straight into the right Python numbers.
_FLAT: Final[dict[str, msgspec.json.Decoder[Any]]] = {
    "f": msgspec.json.Decoder(list[float]),
    "i": msgspec.json.Decoder(list[int]),
    "u": msgspec.json.Decoder(list[int]),
    "b": msgspec.json.Decoder(list[bool]),
    "S": msgspec.json.Decoder(list[str]),
}
_LEAVES: Final[dict[str, tuple[type, ...]]] = {
    "f": (float, int, type(None)),
    "i": (int,),
    "u": (int,),
    "b": (bool,),
    "S": (str, type(None)),
}


class Encoding(msgspec.Struct, frozen=True):
    """Which outputs the client wants as binary."""

    default: bool = False
    chosen: Mapping[str, bool] = msgspec.field(default_factory=dict)

    def is_binary(self, name: str) -> bool:
        """Whether that output goes after the JSON."""
        return self.chosen.get(name, self.default)


_JSON_ONLY: Final = Encoding()


def decode_infer(
    body: bytes, *, header_length: int | None = None, model: str | None = None, version: str | None = None
) -> tuple[InferRequest, Encoding]:
    """The request in `body`, and how its answer shall travel.

    Args:
        body: the whole HTTP body.
        header_length: the value of Inference-Header-Content-Length, None when it was not sent.
        model: name in the path.
        version: version in the path, if any.

    Raises:
        ServingError: serving.too-large, serving.malformed, serving.input.
    """
    if len(body) > MAX_BODY:
        raise ServingError("serving.too-large", f"Expected at most {MAX_BODY} bytes, found {len(body)}.")
    text, blobs = _split(body, header_length)
    try:
        parsed = _REQUEST.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise ServingError("serving.malformed", f"Expected an inference request in JSON: {e}.") from e
    if not 0 < len(parsed.inputs) <= _MAX_INPUTS:
        message = f"Expected 1 to {_MAX_INPUTS} inputs, found {len(parsed.inputs)}."
        raise ServingError("serving.malformed", message)
    check_keys(text, [bytes(tensor.data) for tensor in parsed.inputs])
    if len({tensor.name for tensor in parsed.inputs}) != len(parsed.inputs):
        raise ServingError("serving.input", "Expected each input once.")
    inputs, at = [], 0
    for tensor in parsed.inputs:
        size = tensor.parameters.get("binary_data_size") if tensor.parameters else None
        if size is None:
            inputs.append(_json_tensor(tensor))
        else:
            end = _blob_end(tensor, size, at, len(blobs))
            inputs.append(_binary_tensor(tensor, blobs[at:end]))
            at = end
    if at != len(blobs):
        raise ServingError("serving.malformed", f"{len(blobs) - at} bytes follow the last binary tensor.")
    request = InferRequest(
        inputs=tuple(inputs),
        model=model,
        version=version,
        id=parsed.id or "",
        outputs=tuple(out.name for out in parsed.outputs or ()),
        key=_key((parsed.parameters or {}).get("key", "")),
        timeout=_timeout(parsed.parameters or {}),
    )
    return request, _encoding(parsed)


def _key(told: Any) -> str:
    if isinstance(told, bool) or not isinstance(told, str | int):
        raise ServingError("serving.malformed", "Expected the parameter key to be a string or a whole number.")
    return str(told)


def _timeout(parameters: Mapping[str, Any]) -> float:
    """Seconds, of the microseconds in `timeout`; 0 and nothing are no bound, as Triton has it."""
    said = parameters.get("timeout", 0)
    if not isinstance(said, int) or isinstance(said, bool) or said < 0:
        raise ServingError("serving.malformed", "timeout: expected microseconds, 0 for no bound.")
    return min(said, 1 << 60) / 1e6 if said else math.inf


def encode_infer(response: InferResponse, encoding: Encoding = _JSON_ONLY) -> tuple[bytes, int | None]:
    """The body of `response`, and the length of its JSON when binary tensors follow it.

    Raises:
        ServingError: serving.output for half floats that were not asked for as binary.
    """
    tensors, blobs = [], []
    for tensor in response.outputs:
        if encoding.is_binary(tensor.name):
            blob = _blob(tensor)
            blobs.append(blob)
            parameters = {"binary_data_size": len(blob)}
            tensors.append(_TensorJson(tensor.name, tensor.datatype, tensor.shape, parameters))
        elif tensor.datatype == "FP16":
            message = f"{tensor.name!r} is FP16, which travels only as binary: ask for it with binary_data."
            raise ServingError("serving.output", message)
        else:
            data = tensor.data if isinstance(tensor.data, list) else tensor.data.ravel().tolist()
            tensors.append(_TensorJson(tensor.name, tensor.datatype, tensor.shape, None, data))
    text = _ENCODER.encode(
        _ResponseJson(response.model_name, response.model_version, response.id, response.parameters, tensors)
    )
    return (text + b"".join(blobs), len(text)) if blobs else (text, None)


def encode_error(code: str, message: str) -> bytes:
    """The protocol's error object, with our stable code beside it."""
    return _ENCODER.encode({"error": message, "code": code})


def server_metadata() -> dict[str, Any]:
    """What GET /v2 answers."""
    return {"name": "lightship-agent", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(model: LoadedModel) -> dict[str, Any]:
    """What GET /v2/models/{m} answers; -1 is a free dimension."""
    if model.spec is not None:
        return _model(model, described_inputs(model.spec), described_outputs(model), images(model.spec))
    classes = len(model.outputs.labels)
    outputs = [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "class", "datatype": "INT64", "shape": [-1]},
    ]
    if model.outputs.score_output:
        outputs.append({"name": "scores", "datatype": "FP32", "shape": [-1, classes]})
    if model.outputs.task == "regression":
        outputs = [{"name": "value", "datatype": "FP32", "shape": [-1]}]
    more = {"categories": _categories(model.schema)} if model.schema.has_categories else {}
    return _model(model, _described_inputs(model.schema), outputs, {"features": list(model.schema.names), **more})


def _model(
    model: LoadedModel, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], more: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": model.name,
        "versions": [str(model.version)],
        "platform": "onnx_onnxv1",
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {
            "digest": model.digest,
            "provider": model.provider,
            "precision": model.precision,
            "schema_digest": model.schema_digest,
            "labels": list(model.outputs.labels),
            **more,
            "max_rows": MAX_ROWS,
        },
    }


def _described_inputs(schema: FeatureSchema) -> list[dict[str, Any]]:
    """One tensor; or where words are among the features, one input for each, which is what can hold them."""
    if not schema.has_categories:
        return [{"name": schema.input_name, "datatype": "FP32", "shape": [-1, schema.width]}]
    return [
        {"name": f.name, "datatype": "BYTES" if f.is_categorical else "FP32", "shape": [-1]} for f in schema.features
    ]


def _categories(schema: FeatureSchema) -> dict[str, list[str]]:
    return {f.name: list(f.levels) for f in schema.features if f.is_categorical}


def _split(body: bytes, header_length: int | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return body, b""
    if not 0 < header_length <= len(body):
        message = f"Inference-Header-Content-Length: expected 1 to {len(body)}, found {header_length}."
        raise ServingError("serving.malformed", message)
    return body[:header_length], body[header_length:]


def _encoding(parsed: _Request) -> Encoding:
    default = (parsed.parameters or {}).get("binary_data_output") is True
    told = [(o.name, o.parameters) for o in parsed.outputs or () if o.parameters]
    chosen = {name: parameters["binary_data"] is True for name, parameters in told if "binary_data" in parameters}
    return Encoding(default, chosen) if default or chosen else _JSON_ONLY


def _dtype(tensor: _In) -> np.dtype[Any]:
    if tensor.datatype == "BYTES":
        return _BYTES
    if tensor.datatype not in DTYPES:
        known = ", ".join((*DTYPES, "BYTES"))
        raise ServingError(
            "serving.input", f"{tensor.name[:64]!r}: expected one of {known}; found {tensor.datatype[:16]!r}."
        )
    return np.dtype(DTYPES[tensor.datatype])


def _elements(tensor: _In) -> int:
    if not 0 < len(tensor.shape) <= MAX_RANK or min(tensor.shape) < 0:
        message = f"{tensor.name[:64]!r}: expected 1 to {MAX_RANK} dimensions of 0 or more, found {tensor.shape[:9]}."
        raise ServingError("serving.input", message)
    if tensor.shape[0] > MAX_ROWS:
        message = f"{tensor.name[:64]!r}: expected at most {MAX_ROWS} rows, found {tensor.shape[0]}."
        raise ServingError("serving.too-large", message)
    elements = math.prod(tensor.shape)
    if elements > MAX_BODY:
        message = f"{tensor.name[:64]!r}: expected at most {MAX_BODY} elements, found {elements}."
        raise ServingError("serving.too-large", message)
    return elements


def _json_tensor(tensor: _In) -> Tensor:
    dtype, elements = _dtype(tensor), _elements(tensor)
    if tensor.datatype == "FP16":
        raise ServingError("serving.input", "FP16 travels only as a binary tensor.")
    raw = bytes(tensor.data)
    if not raw:
        raise ServingError("serving.malformed", f"{tensor.name[:64]!r} has neither data nor binary_data_size.")
    if _least(raw, dtype.kind) > max(1, elements):
        message = f"{tensor.name[:64]!r}: shape {tensor.shape} is {elements} elements, found more."
        raise ServingError("serving.input", message)
    try:
        flat = _FLAT[dtype.kind].decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        flat = _flatten(tensor.name, raw, dtype.kind)
    if len(flat) != elements:
        message = f"{tensor.name[:64]!r}: shape {tensor.shape} is {elements} elements, found {len(flat)}."
        raise ServingError("serving.input", message)
    return Tensor(
        tensor.name,
        tensor.datatype,
        tuple(tensor.shape),
        flat if dtype.kind == "S" else _array(tensor, flat, dtype),
    )


def _least(raw: bytes, kind: str) -> int:
    """How many elements JSON data has at least: what holds too many is refused before it becomes objects."""
    if kind != "S":
        return raw.count(b",") + 1  # a comma stands between two numbers
    return (raw.count(b'"') - raw.count(b'\\"')) // 2  # a string may hold commas, and escaped quotes


def _array(tensor: _In, flat: list[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    try:
        # Through float64: a number too large for float32 becomes infinite there, without a warning here.
        return np.array(flat, dtype=np.float64 if dtype.kind == "f" else dtype)
    except (OverflowError, ValueError) as e:
        message = f"{tensor.name[:64]!r}: a number is outside the range of {tensor.datatype}."
        raise ServingError("serving.input", message) from e


def _flatten(name: str, raw: bytes, kind: str) -> list[Any]:
    """Nested data, row-major, and floats with nulls; every leaf is checked."""
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise ServingError("serving.malformed", f"{name[:64]!r}: {e}.") from e
    flat: list[Any] = []
    _collect(name, value, kind, flat, MAX_RANK)
    return flat


def _collect(name: str, value: Any, kind: str, flat: list[Any], depth: int) -> None:
    if not isinstance(value, list) or not depth:
        _not_its_kind(name, value)
    allowed = _LEAVES[kind]
    for item in value:
        if isinstance(item, list):
            _collect(name, item, kind, flat, depth - 1)
        elif not isinstance(item, allowed) or (isinstance(item, bool) and kind != "b"):
            _not_its_kind(name, item)
        else:
            flat.append(math.nan if item is None and kind == "f" else item)


def _not_its_kind(name: str, value: Any) -> NoReturn:
    found = "a deeper list" if isinstance(value, list) else f"{value!r:.40}"
    raise ServingError("serving.input", f"{name[:64]!r}: expected a list of what its datatype holds, found {found}.")


def _blob_end(tensor: _In, size: object, at: int, length: int) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 0 or at + size > length:
        message = f"{tensor.name[:64]!r}: binary_data_size {size!r:.24}, but {length - at} bytes are left."
        raise ServingError("serving.malformed", message)
    return at + size


def _binary_tensor(tensor: _In, blob: bytes) -> Tensor:
    dtype, elements = _dtype(tensor), _elements(tensor)
    if bytes(tensor.data):
        raise ServingError("serving.malformed", f"{tensor.name[:64]!r} has both data and binary_data_size.")
    if dtype.kind == "S":
        return Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), _words(tensor, blob, elements))
    expected = elements * dtype.itemsize
    if len(blob) != expected:
        message = f"{tensor.name[:64]!r}: {tensor.datatype} {tensor.shape} is {expected} bytes, found {len(blob)}."
        raise ServingError("serving.input", message)
    if dtype.kind == "b" and blob.strip(b"\0\1"):
        raise ServingError("serving.input", f"{tensor.name[:64]!r}: a BOOL is 0 or 1.")
    return Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), np.frombuffer(blob, dtype=dtype))


def _words(tensor: _In, blob: bytes, elements: int) -> list[bytes]:
    """The elements of a binary BYTES tensor, each behind its length."""
    words: list[bytes] = []
    at, end = 0, len(blob)
    while at + 4 <= end and len(words) < elements:
        (length,) = _LENGTH.unpack_from(blob, at)
        at += 4 + length
        words.append(blob[at - length : at])
    if at != end or len(words) != elements:
        message = f"{tensor.name[:64]!r}: expected {elements} elements, each behind its length as u32, in {end} bytes."
        raise ServingError("serving.input", message)
    return words


def _blob(tensor: Tensor) -> bytes:
    if tensor.datatype == "BYTES":
        # A class has a word, and many rows have few: each is packed once.
        packed = {word: _LENGTH.pack(len(word.encode())) + word.encode() for word in set(tensor.data)}
        return b"".join([packed[word] for word in tensor.data])
    data: bytes = np.ascontiguousarray(tensor.data, dtype=DTYPES[tensor.datatype]).tobytes()
    return data
