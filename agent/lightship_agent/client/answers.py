"""Client: what is asked and what comes back, as bytes and as numbers; no I/O.

Rules:
* few numbers go as JSON, which the agent answers fastest; many as binary tensors;
* an answer that is not one becomes link.status, whoever sent it.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, cast

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.app_metrics import AppSample
from lightship_agent.contract.codes import CODES, LightshipError, LinkError, ServingError, error_of

#: Numbers beyond which binary tensors are worth their header.
_FEW: Final = 1_000
#: What may be better in a moment.
RETRIED: Final = frozenset({"serving.overloaded", "serving.no-model", "link.unreachable"})

#: What may come of a model that was exchanged for another since we asked for its name.
FORGETTING: Final = frozenset({"serving.unknown-model", "serving.input"})


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a model said about n rows.

    A classifier gives `labels`, and `scores` float32 `[n, classes]` if it has any; a regressor `values` float32 `[n]`.
    The id of row i for `feedback` is `id` when one row was asked, and `id:i` when there were more.
    """

    id: str
    version: int
    digest: str
    labels: tuple[str, ...] = ()
    scores: npt.NDArray[np.float32] | None = None
    values: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Reason:
    """How much a feature moved an answer from what it is on the average."""

    feature: str
    value: float | str | None  # of the feature in this row
    attribution: float


@dataclass(frozen=True, slots=True)
class Explained:
    """Why the model answered a row so: `explained` is `base` and all attributions; `reasons` are the largest."""

    target: str  # the class whose score is explained, or "value"
    base: float
    explained: float
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Got:
    """What came back."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, and what reads its answer; `read` raises LightshipError."""

    body: bytes
    read: Callable[[Got], Any]
    method: str = "POST"
    path: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class Known(NamedTuple):
    """The model that is asked, and the name of its input, where the protocol wants them."""

    model: str | None
    tensor: str = ""


class Wire(Protocol):
    """A way to say the same things."""

    def predict(self, rows: Any, known: Known, request_id: str, key: str) -> Ask:
        """Ask for an `Answer`."""

    def feedback(self, prediction_id: str, label: str | float, known: Known) -> Ask:
        """Tell a label; True when it counted, False when it was told before."""

    def explain(self, rows: Any, known: Known, wish: Mapping[str, int]) -> Ask:
        """Ask for `Explained` of each row; of None for those that `wish` says.

        Raises:
            ServingError: serving.not-found where this face has no explanations.
        """

    def ready(self, model: str | None) -> Ask:
        """Ask whether a model answers; True, or an error that says why not."""

    def tell(self, told: Sequence[AppSample]) -> Ask:
        """Tell the application's own numbers; how many were taken.

        Raises:
            ServingError: serving.not-found where this face takes none.
        """


class HttpWire:
    """The Open Inference Protocol, and records."""

    def predict(self, rows: Any, known: Known, request_id: str, key: str) -> Ask:
        """As `Wire`."""
        model = known.model or ""
        records = _records(rows)
        if records is not None:
            told = (("x-request-id", request_id), ("lightship-key", key))
            headers = (("content-type", "application/json"), *(one for one in told if one[1]))
            return Ask(_json(records), _record_answers, "POST", _path(model, "/predict"), headers)
        matrix = _matrix(rows)
        tensor: dict[str, Any] = {"name": known.tensor, "datatype": "FP32", "shape": list(matrix.shape)}
        asked: dict[str, Any] = {"inputs": [tensor], **({"id": request_id} if request_id else {})}
        parameters: dict[str, Any] = {"key": key} if key else {}
        if parameters:
            asked["parameters"] = parameters
        if matrix.size <= _FEW:
            tensor["data"] = matrix.ravel().tolist()
            return Ask(_json(asked), _tensors, "POST", _path(model, "/infer"), (("content-type", "application/json"),))
        tensor["parameters"] = {"binary_data_size": matrix.nbytes}
        asked["parameters"] = {**parameters, "binary_data_output": True}
        head = _json(asked)
        headers = (
            ("content-type", "application/octet-stream"),
            ("inference-header-content-length", str(len(head))),
        )
        return Ask(head + matrix.tobytes(), _tensors, "POST", _path(model, "/infer"), headers)

    def feedback(self, prediction_id: str, label: str | float, known: Known) -> Ask:
        """As `Wire`."""
        body = _json({"id": prediction_id, "label": label})
        headers = (("content-type", "application/json"),)
        return Ask(
            body, _reader(lambda said: bool(said["counted"])), "POST", _path(known.model or "", "/feedback"), headers
        )

    def explain(self, rows: Any, known: Known, wish: Mapping[str, int]) -> Ask:
        """As `Wire`."""
        asked: dict[str, Any] = {"parameters": dict(wish)}
        if rows is not None:
            matrix = _matrix(rows)
            tensor = {"name": known.tensor, "datatype": "FP32", "shape": list(matrix.shape)}
            asked["inputs"] = [{**tensor, "data": matrix.ravel().tolist()}]
        headers = (("content-type", "application/json"),)
        return Ask(_json(asked), _reader(_explained), "POST", _path(known.model or "", "/explain"), headers)

    def ready(self, model: str | None) -> Ask:
        """As `Wire`."""
        path = "/v2/health/ready" if model is None else _path(model, "/ready")
        return Ask(b"", _reader(lambda said: bool(said["ready"])), "GET", path)

    def tell(self, told: Sequence[AppSample]) -> Ask:
        """As `Wire`."""
        headers = (("content-type", "application/json"),)
        return Ask(_json(told), _reader(lambda said: int(said["taken"])), "POST", "/v2/lightship/metrics", headers)

    def models(self) -> Ask:
        """Ask for the names of the models that are served."""
        return Ask(b"{}", _reader(lambda said: tuple(str(m["name"]) for m in said)), "POST", "/v2/repository/index")

    def tensor(self, model: str) -> Ask:
        """Ask for the name of a model's input."""
        return Ask(b"", _reader(lambda said: str(said["inputs"][0]["name"])), "GET", _path(model, ""))


class FrameWire:
    """Frames."""

    def predict(self, rows: Any, known: Known, request_id: str, key: str) -> Ask:
        """As `Wire`."""
        asked: dict[str, Any] = {"id": request_id, **({"key": key} if key else {})}
        records = _records(rows)
        if records is not None:
            asked["records"] = records
        else:
            matrix = _matrix(rows)
            asked |= {"x": matrix.tobytes(), "rows": len(matrix)}
        return self._ask(asked, known.model, _frame_answer)

    def feedback(self, prediction_id: str, label: str | float, known: Known) -> Ask:
        """As `Wire`."""
        asked = {"do": "feedback", "id": prediction_id, "label": label}
        return self._ask(asked, known.model, lambda said: bool(said["counted"]))

    def explain(self, rows: Any, known: Known, wish: Mapping[str, int]) -> Ask:  # noqa: ARG002 - the protocol's names
        """As `Wire`."""
        message = "Explanations are given over HTTP and the Unix socket: address the agent as http://… or unix:…."
        raise ServingError("serving.not-found", message)

    def tell(self, told: Sequence[AppSample]) -> Ask:  # noqa: ARG002 - the protocol's names
        """As `Wire`."""
        message = "Numbers are told over HTTP and the Unix socket: address the agent as http://… or unix:…."
        raise ServingError("serving.not-found", message)

    def ready(self, model: str | None) -> Ask:
        """As `Wire`."""
        return self._ask({"do": "ready"}, model, lambda said: bool(said["ready"]))

    def _ask(self, asked: dict[str, Any], model: str | None, read: Callable[[Any], Any]) -> Ask:
        if model is not None:
            asked["model"] = model

        def unpacked(got: Got) -> Any:
            return _trusting(lambda: read(_refused(msgspec.msgpack.decode(got.body))))

        return Ask(_packed(asked), unpacked)


def _records(rows: Any) -> list[Any] | None:
    """The records in `rows`, None if it is numbers."""
    if isinstance(rows, Mapping):
        return [rows]
    return list(rows) if isinstance(rows, list | tuple) and rows and isinstance(rows[0], Mapping) else None


def _matrix(rows: Any) -> npt.NDArray[np.float32]:
    try:
        return np.atleast_2d(np.ascontiguousarray(rows, dtype="<f4"))
    except (TypeError, ValueError, OverflowError) as e:
        raise ServingError("serving.input", f"Expected rows of numbers, or records by feature name: {e}.") from e


def _json(value: Any) -> bytes:
    return _sayable(lambda: msgspec.json.encode(value, enc_hook=_plain))


def _packed(value: Any) -> bytes:
    return _sayable(lambda: msgspec.msgpack.encode(value, enc_hook=_plain))


def _sayable(encode: Callable[[], bytes]) -> bytes:
    try:
        return encode()
    except (TypeError, ValueError, OverflowError, RecursionError) as e:
        raise ServingError("serving.input", f"Expected numbers, text and null: {e}.") from e


def _plain(value: Any) -> Any:
    """Numpy's scalars as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    message = f"found a {type(value).__name__}"
    raise TypeError(message)


def _path(model: str, what: str) -> str:
    return f"/v2/models/{urllib.parse.quote(model, safe='')}{what}"


def _reader(read: Callable[[Any], Any]) -> Callable[[Got], Any]:
    """What reads an answer in JSON."""
    return lambda got: _trusting(lambda: read(_said(got)))


def _said(got: Got, body: bytes | None = None) -> Any:
    """What the agent said in JSON; raises what it refused with."""
    return _trusting(lambda: _refused(msgspec.json.decode(got.body if body is None else body), got.status))


def _refused(said: Any, status: int = 200) -> Any:
    code = said.get("code") if isinstance(said, dict) else None
    if code is not None:
        message = str(said.get("error", ""))
        raise error_of(code, message) if code in CODES else ServingError("serving.runtime", f"{code}: {message}")
    if status != 200:
        raise LinkError("link.status", f"Expected the agent's answer, found HTTP status {status}.")
    return said


def _trusting(read: Callable[[], Any]) -> Any:
    """What `read` reads; what has not the shape of an answer was not sent by an agent."""
    try:
        return read()
    except LightshipError:
        raise
    except Exception as e:
        raise LinkError("link.status", f"Expected the agent's answer, found something else: {e}.") from e


def _explained(said: Any) -> tuple[Explained, ...]:
    return tuple(
        Explained(
            str(one["target"]),
            float(one["base"]),
            float(one["explained"]),
            tuple(Reason(str(r["feature"]), r["value"], float(r["attribution"])) for r in one["top"]),
        )
        for one in said["explanations"]
    )


def _tensors(got: Got) -> Answer:
    told = got.headers.get("inference-header-content-length", "")
    length = int(told) if told.isdigit() else len(got.body)
    head, blobs = got.body[:length], got.body[length:]
    said = _said(got, head)
    return cast("Answer", _trusting(lambda: _tensor_answer(said, blobs)))


def _tensor_answer(said: dict[str, Any], blobs: bytes) -> Answer:
    found: dict[str, Any] = {}
    at = 0
    for tensor in said["outputs"]:
        size = (tensor.get("parameters") or {}).get("binary_data_size")
        if size is None:
            found[tensor["name"]] = tensor["data"]
            continue
        blob = blobs[at : at + size]
        at += size
        found[tensor["name"]] = _words(blob) if tensor["datatype"] == "BYTES" else np.frombuffer(blob, "<f4")
    return _answer(said["id"], int(said["model_version"]), said["parameters"]["digest"], found)


def _words(blob: bytes) -> list[str]:
    words, at = [], 0
    while at < len(blob):
        size = int.from_bytes(blob[at : at + 4], "little")
        words.append(blob[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return words


def _record_answers(got: Got) -> Answer:
    said = _said(got)

    def read() -> Answer:
        first = said[0]
        found: dict[str, Any] = {}
        if "value" in first:
            found["value"] = [one["value"] for one in said]
        else:
            found["label"] = [one["label"] for one in said]
            if "scores" in first:
                found["scores"] = [list(one["scores"].values()) for one in said]
        request_id = first["id"] if len(said) == 1 else first["id"].rpartition(":")[0]
        return _answer(request_id, first["version"], first["digest"], found)

    return cast("Answer", _trusting(read))


def _frame_answer(said: dict[str, Any]) -> Answer:
    found: dict[str, Any] = {"label": said["labels"]} if "labels" in said else {}
    for name, here in (("scores", "scores"), ("values", "value")):
        numbers = said.get(name)
        if numbers is not None:
            found[here] = np.frombuffer(numbers, "<f4") if isinstance(numbers, bytes) else numbers
    return _answer(said["id"], said["version"], said["digest"], found)


def _answer(request_id: str, version: int, digest: str, found: dict[str, Any]) -> Answer:
    labels = tuple(found.get("label", ()))
    scores, values = found.get("scores"), found.get("value")
    return Answer(
        id=request_id,
        version=version,
        digest=digest,
        labels=labels,
        scores=None if scores is None else np.array(scores, np.float32).reshape(len(labels), -1),
        values=None if values is None else np.array(values, np.float32).ravel(),
    )


def only_one(names: tuple[str, ...]) -> str:
    """The name of the only model.

    Raises:
        ServingError: serving.no-model, serving.unknown-model.
    """
    if not names:
        raise ServingError("serving.no-model", "This device has no model yet.")
    if len(names) > 1:
        raise ServingError("serving.unknown-model", f"Several models are served ({', '.join(names)}); name one.")
    return names[0]


def pause(error: LightshipError, got: Got | None, attempt: int) -> float | None:
    """Seconds to wait before asking again after that error; None if it would not help."""
    if error.code not in RETRIED:
        return None
    told = got.headers.get("retry-after", "") if got is not None else ""
    return float(told) if told.isdigit() else 0.05 * (1 << min(attempt, 6))


def parse_address(address: str) -> tuple[str, str]:
    """What is spoken there, "http", "unix", "frames" or "mqtt", and where.

    Raises:
        LinkError: link.unreachable for an address that can't be one.
    """
    kind, _, where = address.partition(":")
    if kind in {"http", "https"} and where.startswith("//"):
        return "http", address.rstrip("/")
    if kind in {"unix", "frames"} and where:
        return kind, where
    if kind in {"mqtt", "mqtts"} and where.startswith("//"):
        return "mqtt", address
    message = f"Expected http://host:port, unix:/path, frames:/path or mqtt://host:port, found {address[:80]!r}."
    raise LinkError("link.unreachable", message)
