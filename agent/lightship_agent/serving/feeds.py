"""Serving: tensors and images for a model that takes tensors, checked by what its manifest declares; and its answers.

Rules:
* every declared input once, of its datatype and shape, with as many rows as the others; nothing is cast;
* NaN and infinities are refused: who declares tensors says nothing of missing values;
* an image may come as it is instead, see `images`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.tensors import DTYPES, TensorInput, TensorSpec, fits
from lightship_agent.runtime.model import LoadedModel, Prediction

from .images import image_tensor
from .tensors import MAX_ROWS, InferRequest, InferResponse, Tensor

_IMAGES: Final = ("image/png", "image/jpeg")


def tensor_feeds(inputs: tuple[Tensor, ...], spec: TensorSpec) -> dict[str, npt.NDArray[Any]]:
    """The graph's inputs by name.

    Raises:
        ServingError: serving.input, serving.too-large.
    """
    given = {tensor.name: tensor for tensor in inputs}
    wanted = [declared.name for declared in spec.inputs]
    if len(given) != len(inputs) or set(given) != set(wanted):
        found = ", ".join(repr(t.name[:64]) for t in inputs[:8])
        expected = ", ".join(repr(name) for name in wanted)
        raise ServingError("serving.input", f"Expected the inputs {expected}, each once; found {found or 'none'}.")
    feeds = {declared.name: _feed(given[declared.name], declared) for declared in spec.inputs}
    rows = {len(array) for array in feeds.values()}
    if len(rows) != 1 or min(rows) < 1:
        raise ServingError("serving.input", f"Expected one or more rows, as many in each input, found {sorted(rows)}.")
    if max(rows) > MAX_ROWS:
        raise ServingError("serving.too-large", f"Expected at most {MAX_ROWS} rows, found {max(rows)}.")
    return feeds


def _feed(tensor: Tensor, declared: TensorInput) -> npt.NDArray[Any]:
    is_whole = tensor.datatype == declared.datatype and fits(tensor.shape, declared.shape)
    if not is_whole and declared.image:
        return image_tensor(tensor, declared)
    if not is_whole or not isinstance(tensor.data, np.ndarray):
        message = f"{tensor.name!r}: expected {declared.datatype} {list(declared.shape)}, "
        raise ServingError("serving.input", message + f"found {tensor.datatype[:16]} {list(tensor.shape)}.")
    if tensor.data.size != np.prod(tensor.shape):
        message = f"{tensor.name!r}: shape {list(tensor.shape)} does not have {tensor.data.size} elements."
        raise ServingError("serving.input", message)
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused
        array = np.ascontiguousarray(tensor.data.reshape(tensor.shape), dtype=np.dtype(DTYPES[declared.datatype]))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ServingError("serving.input", f"{tensor.name!r}: a number is missing, or not finite.")
    return array


def tensor_output_names(model: LoadedModel) -> tuple[str, ...]:
    """What a model of tensors can answer with: its declared outputs, and of a classifier the label and the class."""
    assert model.spec is not None
    declared = tuple(output.name for output in model.spec.outputs)
    if model.outputs.task != "classification":
        return declared
    return declared + tuple(name for name in ("label", "class") if name not in declared)


def tensor_outputs(
    model: LoadedModel, found: dict[str, npt.NDArray[Any]], prediction: Prediction, names: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """The answer's tensors of those names, in that order."""
    assert model.spec is not None
    declared = {output.name: output for output in model.spec.outputs}
    told = []
    for name in names:
        if name in declared:
            told.append(Tensor(name, declared[name].datatype, found[name].shape, found[name]))
            continue
        assert prediction.labels is not None
        labels, words = prediction.labels, model.outputs.labels
        if name == "label":
            told.append(Tensor(name, "BYTES", labels.shape, [words[i] for i in labels.tolist()]))
        else:
            told.append(Tensor(name, "INT64", labels.shape, labels))
    return tuple(told)


def image_request(body: bytes, content_type: str, model: LoadedModel, request_id: str) -> InferRequest:
    """The request whose body is one PNG or JPEG image.

    Raises:
        ServingError: serving.input when the body or the model is of another kind.
    """
    assert model.spec is not None
    kind = content_type.partition(";")[0].strip().lower()
    inputs = model.spec.inputs
    if len(inputs) != 1 or not inputs[0].image:
        message = f"{model.name} takes tensors by name: {', '.join(repr(i.name) for i in inputs)}; ask for …/infer."
        raise ServingError("serving.input", message)
    if kind not in _IMAGES:
        message = f"Expected an image, Content-Type {' or '.join(_IMAGES)}, found {kind[:40]!r}."
        raise ServingError("serving.input", message)
    return InferRequest((Tensor(inputs[0].name, "BYTES", (1,), [body]),), model.name, None, request_id)


def image_answer(response: InferResponse, model: LoadedModel) -> dict[str, Any]:
    """The answer to one image: label and scores of a classifier, and else the declared outputs."""
    outputs = {tensor.name: tensor for tensor in response.outputs}
    source = {"model": response.model_name, "version": int(response.model_version), **response.parameters}
    if model.outputs.task != "classification":
        told: dict[str, Any] = {"outputs": {name: tensor.data[0].tolist() for name, tensor in outputs.items()}}
    else:
        told = {"label": outputs["label"].data[0]}
        if model.outputs.score_output:
            scores = outputs[model.outputs.score_output].data[0].tolist()
            told["scores"] = dict(zip(model.outputs.labels, scores, strict=True))
    return {**told, "id": response.id, **source}


def described_inputs(spec: TensorSpec) -> list[dict[str, Any]]:
    """The inputs as the protocol describes them: an image as the pixels it may come in."""
    told = []
    for tensor in spec.inputs:
        if tensor.image:
            told.append({"name": tensor.name, "datatype": "UINT8", "shape": [-1, *tensor.size]})
        else:
            told.append({"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)})
    return told


def described_outputs(model: LoadedModel) -> list[dict[str, Any]]:
    """The outputs as the protocol describes them."""
    assert model.spec is not None
    declared = {output.name: output for output in model.spec.outputs}
    words = {"label": "BYTES", "class": "INT64"}
    return [
        {"name": name, "datatype": declared[name].datatype, "shape": list(declared[name].shape)}
        if name in declared
        else {"name": name, "datatype": words[name], "shape": [-1]}
        for name in tensor_output_names(model)
    ]


def images(spec: TensorSpec) -> dict[str, Any]:
    """What else images may come as."""
    names = {t.name: ["PNG", "JPEG", f"{t.datatype} {list(t.shape)}"] for t in spec.inputs if t.image}
    return {"images": names} if names else {}
