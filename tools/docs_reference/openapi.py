"""OpenAPI: the agent's HTTP as a document that programs read.

Rules: every route of the agent's table has its operation here, and no other; a difference is an error. Statuses of
refusals are those that the codes have; tests hold real answers to this document.

Source: OpenAPI 3.1.
"""

from __future__ import annotations

import json
from typing import Any, Final

from lightship_agent import __version__
from lightship_agent.contract.codes import CODES
from lightship_agent.serving.http import STATUS

from .http import agent_routes

Json = dict[str, Any]

#: Codes that may answer anything, and how these may: to what is no request, and to whoever may not ask.
_ALWAYS: Final = ("malformed", "token", "origin", "slow", "too-large", "overloaded", "runtime")
_OF_MODEL: Final = ("unknown-model", "no-model")
_PREDICTING: Final = (*_OF_MODEL, "input", "output", "deadline")


def openapi() -> str:
    """The document."""
    paths: Json = {}
    for method, template, words in agent_routes():
        for path in _expanded(template):
            paths.setdefault(path, {})[method.lower()] = _operation(template, path, words)
    unknown = set(_OPERATIONS) - {template for _, template, _ in agent_routes()}
    if unknown:
        message = f"No such route: {', '.join(sorted(unknown))}."
        raise ValueError(message)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Lightship agent",
            "version": __version__,
            "summary": "The Open Inference Protocol V2, and what the agent adds to it.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:8500"}],
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _expanded(template: str) -> list[str]:
    if "[" not in template:
        return [template]
    before, _, rest = template.partition("[")
    optional, _, after = rest.partition("]")
    return [before + after, before + optional + after]


def _operation(template: str, path: str, words: str) -> Json:
    if template not in _OPERATIONS:
        message = f"{template} has no operation."
        raise ValueError(message)
    answer, codes, body = _OPERATIONS[template]
    named = [word[1:].partition("}")[0] for word in path.split("/") if word.startswith("{")]
    parameters: list[Json] = [
        {"name": n, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for n in named
    ]
    if template.endswith(("/infer", "/predict", "/explain")):
        seconds = {"type": "number", "minimum": 0, "maximum": 86_400}
        said = "Seconds from the request's first byte within which an answer is of use."
        parameters.append({"name": "Request-Timeout", "in": "header", "description": said, "schema": seconds})
    operation: Json = {
        "summary": words,
        "parameters": parameters,
        "responses": {"200": answer, **_refusals((*_ALWAYS, *codes))},
        "security": [{}] if template.startswith("/v2/health/") else [{}, {"token": []}],
    }
    return {**operation, "requestBody": body} if body else operation


def _refusals(names: tuple[str, ...]) -> Json:
    """Answers by status; 405 is for other methods, and so no answer of an operation."""
    found: dict[str, list[str]] = {}
    for name in names:
        code = f"serving.{name}"
        found.setdefault(str(STATUS[code]), []).append(f"`{code}`: {CODES[code]}")
    answers: Json = {
        status: {
            "description": " ".join(sorted(words)),
            "content": {"application/json": {"schema": _ref("Error")}},
        }
        for status, words in sorted(found.items())
    }
    for status, header in (("503", "Retry-After"), ("401", "WWW-Authenticate")):
        if status in answers:
            answers[status]["headers"] = {header: {"schema": {"type": "string"}}}
    return answers


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Json, optional: Json | None = None, **more: Any) -> Json:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}, **more}


def _list(items: Json, **more: Any) -> Json:
    return {"type": "array", "items": items, **more}


def _answer(schema: Json, words: str = "Answered.", kind: str = "application/json") -> Json:
    return {"description": words, "content": {kind: {"schema": schema}}}


def _body(schema: Json, *, required: bool = True, **others: Json) -> Json:
    kinds = {"application/json": {"schema": schema}, **{k.replace("_", "/"): {"schema": s} for k, s in others.items()}}
    return {"required": required, "content": kinds}


_TEXT: Final = {"type": "string"}
_NUMBER: Final = {"type": ["number", "null"]}  # null: not finite
_COUNT: Final = {"type": "integer", "minimum": 0}
_DONE: Final[Json] = {"description": "Done; the answer is empty."}
_FREE: Final = {"type": "object"}
_SHAPE: Final = _list({"type": "integer"}, maxItems=8)
_DATATYPE: Final = {
    "enum": [
        "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64",
        "BYTES",
    ]
}  # fmt: skip
_DIGEST: Final = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_ID: Final = {"type": "string", "maxLength": 128}
_LABEL: Final = {"type": ["string", "number", "boolean"]}
_SOURCE: Final = {"id": _TEXT, "model": _TEXT, "version": {"type": "integer"}, "digest": _DIGEST}
_SCORES: Final = {"type": "object", "additionalProperties": {"type": ["number", "null"]}}
_SCHEMAS: Final[Json] = {
    "Error": _object(
        {"error": _TEXT, "code": {"enum": sorted(c for c in CODES if c in STATUS)}}, additionalProperties=False
    ),
    "Tensor": _object(
        {"name": _TEXT, "shape": _SHAPE, "datatype": _DATATYPE}, {"data": {"type": "array"}, "parameters": _FREE}
    ),
    "Asked": _object({"name": _TEXT}, {"parameters": _FREE}),
    "InferRequest": _object(
        {"inputs": _list(_ref("Tensor"), minItems=1, maxItems=64)},
        {"id": _ID, "parameters": _FREE, "outputs": _list(_ref("Asked"))},
    ),
    "InferResponse": _object(
        {"model_name": _TEXT, "model_version": _TEXT, "id": _TEXT, "outputs": _list(_ref("Tensor"))},
        {"parameters": _object({"digest": _DIGEST})},
    ),
    "ExplainRequest": _object(
        {"inputs": _list(_ref("Tensor"), minItems=1, maxItems=64)},
        {
            "id": _ID,
            "parameters": _object(
                {},
                {
                    "permutations": {"type": "integer", "minimum": 1, "maximum": 1_000},
                    "seed": {"type": "integer", "minimum": 0, "maximum": 2**32},
                    "top": {"type": "integer", "minimum": 1, "maximum": 100},
                },
            ),
        },
    ),
    "Explained": _object(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "id": _TEXT,
            "parameters": _FREE,
            "outputs": _list(_ref("Tensor")),
            "explanations": _list(
                _object({"target": _TEXT, "base": _NUMBER, "explained": _NUMBER, "top": _list(_ref("Reason"))})
            ),
        }
    ),
    "Reason": _object({"feature": _TEXT, "value": {"type": ["number", "string", "null"]}, "attribution": _NUMBER}),
    "Record": {"type": "object", "additionalProperties": {"type": ["number", "string", "boolean", "null", "object"]}},
    "Predicted": {
        "oneOf": [
            _object({"label": _TEXT, **_SOURCE}, {"scores": _SCORES}),
            _object({"value": {"type": ["number", "null"]}, **_SOURCE}),
        ]
    },
    "Label": _object({"id": _TEXT, "label": _LABEL}),
    "AppSample": _object(
        {
            "name": {"type": "string", "pattern": "^[a-z][a-z0-9_]{0,63}$"},
            "kind": {"enum": ["counter", "gauge", "histogram"]},
        },
        {
            "value": {"type": ["number", "null"]},
            "values": _list({"type": "number"}),
            "edges": _list({"type": "number"}),
            "counts": _list({"type": "integer", "minimum": 0}),
            "sum": {"type": "number"},
        },
    ),
    "Counted": _object(
        {
            "counted": _COUNT,
            "duplicates": _COUNT,
            "refused": _list(_object({"id": _TEXT, "error": _TEXT, "code": _TEXT})),
        }
    ),
    "Described": _object({"name": _TEXT, "datatype": _DATATYPE, "shape": _SHAPE}),
    "Model": _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _list(_ref("Described")),
            "outputs": _list(_ref("Described")),
        },
        {"parameters": _FREE},
    ),
    "Stats": _object(
        {
            "model_stats": _list(
                _object(
                    {
                        "name": _TEXT,
                        "version": _TEXT,
                        "inference_count": _COUNT,
                        "execution_count": _COUNT,
                        "inference_stats": _FREE,
                        "latency_ms": _object({"p50": {"type": "number"}, "p95": {"type": "number"}}),
                        "errors": {"type": "object", "additionalProperties": _COUNT},
                        "digest": _DIGEST,
                    }
                )
            )
        }
    ),
    "Mode": _object({"code": _TEXT, "since": _COUNT, "means": _TEXT}),
    "Health": _object(
        {
            "state": {"enum": ["ok", "degraded", "unhealthy"]},
            "degraded": _list(_TEXT),
            "modes": _list(_ref("Mode")),
            "device": _TEXT,
            "agent": _TEXT,
            "running": _list(_FREE),
            "update": _FREE,
            "link": _FREE,
            "health": {"type": "object", "additionalProperties": {"type": "number"}},
        }
    ),
    "Indexed": _object(
        {
            "name": _TEXT,
            "version": _TEXT,
            "state": {"enum": ["READY", "UNAVAILABLE", "LOADING", "UNLOADING"]},
            "reason": _TEXT,
        }
    ),
}
_RECORDS: Final = {"oneOf": [_ref("Record"), _list(_ref("Record"))]}
_LABELS: Final = {"oneOf": [_ref("Label"), _list(_ref("Label"), maxItems=10_000)]}
_READY: Final = {"type": "boolean"}
_CHANGE: Final = _body(_object({}, {"parameters": _FREE}), required=False)
_NONE: Final[Json] = {}
_MODEL: Final = "/v2/models/{model}[/versions/{version}]"
#: Answer, codes of its refusals beside those of all, and body, by route.
_OPERATIONS: Final[dict[str, tuple[Json, tuple[str, ...], Json]]] = {
    "/v2": (_answer(_object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)})), (), _NONE),
    "/v2/health": (_answer(_ref("Health")), (), _NONE),
    "/v2/health/live": (_answer(_object({"live": _READY})), (), _NONE),
    "/v2/health/ready": (_answer(_object({"ready": _READY})), ("no-model",), _NONE),
    "/metrics": (_answer(_TEXT, "Prometheus exposition.", "text/plain"), (), _NONE),
    _MODEL: (_answer(_ref("Model")), _OF_MODEL, _NONE),
    _MODEL + "/ready": (_answer(_object({"name": _TEXT, "ready": _READY})), _OF_MODEL, _NONE),
    _MODEL + "/stats": (_answer(_ref("Stats")), _OF_MODEL, _NONE),
    "/v2/models/stats": (_answer(_ref("Stats")), (), _NONE),
    _MODEL + "/infer": (_answer(_ref("InferResponse")), _PREDICTING, _body(_ref("InferRequest"))),
    _MODEL + "/predict": (
        _answer({"oneOf": [_ref("Predicted"), _list(_ref("Predicted"))]}),
        _PREDICTING,
        _body(_RECORDS, text_csv=_TEXT),
    ),
    _MODEL + "/explain": (
        _answer(_ref("Explained")),
        (*_PREDICTING, "no-background"),
        _body(_ref("ExplainRequest")),
    ),
    "/v2/models/{model}/feedback": (
        _answer(_ref("Counted")),
        (*_OF_MODEL, "input", "unknown-prediction"),
        _body(_LABELS),
    ),
    "/v2/lightship/metrics": (
        _answer(_object({"taken": {"type": "integer"}})),
        ("metric-name", "metric-kind", "metric-value", "metric-full"),
        _body({"oneOf": [_ref("AppSample"), _list(_ref("AppSample"))]}),
    ),
    "/v2/repository/index": (
        _answer(_list(_ref("Indexed"))),
        (),
        _body(_object({}, {"ready": _READY}), required=False),
    ),
    "/v2/repository/models/{model}/load": (_DONE, (*_OF_MODEL, "not-allowed", "memory", "in-use"), _CHANGE),
    "/v2/repository/models/{model}/unload": (_DONE, (*_OF_MODEL, "not-allowed", "memory", "in-use"), _CHANGE),
}
