"""Contract: models whose inputs are tensors of any shape, or images, instead of a table of features.

Rules:
* a manifest that declares `tensors` takes these inputs and gives these outputs, by name, datatype and shape; the first
  dimension is that of the rows;
* what is watched of such a model is a row of plain numbers: mean, spread, lowest and highest of each input, and, where
  `directions` are declared, its coordinates along them (`projection`). They are
  the bundle's schema, so that profile, windows and drift know no difference;
* an image is sent as it is; how it becomes the tensor is declared here, and done alike wherever it is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from .codes import BundleError, DataError
from .names import feature_name
from .projection import MAX_DIRECTIONS, Projection, Projector, projected_names
from .schema import Feature, FeatureSchema

MAX_TENSORS: Final = 32
MAX_DIMENSIONS: Final = 8
MAX_ELEMENTS: Final = 16 * 1024 * 1024  # of one row
WATCHED: Final = ("mean", "std", "min", "max")

#: Datatype of the Open Inference Protocol → little-endian numpy type.
DTYPES: Final[dict[str, str]] = {
    "BOOL": "?",
    "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip


class ImageRules(msgspec.Struct, frozen=True, kw_only=True):
    """How an image of 8 bits a channel becomes the tensor: resized, then (pixel · scale - mean) / std per channel.

    `resize` is what happens to an image of another size: it is refused ("no"), drawn to the size ("stretch"), or drawn
    until its shorter side fits and cut in the middle ("crop").
    """

    layout: Literal["NHWC", "NCHW"]
    resize: Literal["no", "stretch", "crop"] = "no"
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class TensorInput(msgspec.Struct, frozen=True, kw_only=True):
    """One input of the graph; -1 is a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    image: ImageRules | msgspec.UnsetType = msgspec.UNSET
    directions: int | msgspec.UnsetType = msgspec.UNSET  # along which it is watched, 1 to 32; none when absent

    def __post_init__(self) -> None:
        """An image has one or three channels, and rules that fit it; what has directions has a fixed width.

        Raises:
            DataError: data.type.
        """
        _check_tensor(self.name, self.datatype, self.shape)
        if self.directions is not msgspec.UNSET and (
            not 1 <= self.directions <= MAX_DIRECTIONS or min((*self.shape[1:], 1)) < 1
        ):
            message = f"Tensor {self.name!r}: expected 1 to {MAX_DIRECTIONS} directions, of a shape without free "
            raise DataError("data.type", message + f"dimensions, found {self.directions} of {list(self.shape)}.")
        if not self.image:
            return
        rules = self.image
        if len(self.shape) != 4 or min(self.shape[1:]) < 1 or self.size[2] not in (1, 3):
            message = (
                f"Image {self.name!r}: expected rows, height, width and 1 or 3 channels, found {list(self.shape)}."
            )
            raise DataError("data.type", message)
        numbers = (rules.scale, *rules.mean, *rules.std)
        lengths = {len(rules.mean), len(rules.std)} - {0}
        if lengths - {self.size[2]} or not all(map(math.isfinite, numbers)) or 0.0 in (rules.scale, *rules.std):
            message = (
                f"Image {self.name!r}: expected a mean and a std per channel, finite, and neither scale nor std 0."
            )
            raise DataError("data.type", message)
        if self.datatype != "FP32" and (self.datatype != "UINT8" or numbers != (1.0,)):
            message = f"Image {self.name!r}: expected FP32, or UINT8 that is not normalised, found {self.datatype}."
            raise DataError("data.type", message)

    @property
    def watched_as(self) -> tuple[str, ...]:
        """What the numbers are called that are watched of it."""
        return WATCHED if self.directions is msgspec.UNSET else (*WATCHED, *projected_names(self.directions))

    @property
    def size(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        _, a, b, c = self.shape
        return (b, c, a) if self.image and self.image.layout == "NCHW" else (a, b, c)


class TensorOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One output of the graph; -1 is a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Parse, don't validate later.

        Raises:
            DataError: data.type.
        """
        _check_tensor(self.name, self.datatype, self.shape)


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes and gives."""

    inputs: tuple[TensorInput, ...]
    outputs: tuple[TensorOutput, ...]

    def __post_init__(self) -> None:
        """Some of each, each name once.

        Raises:
            DataError: data.type.
        """
        for what, names in (("inputs", [i.name for i in self.inputs]), ("outputs", [o.name for o in self.outputs])):
            if not 0 < len(names) <= MAX_TENSORS or len(set(names)) != len(names):
                message = f"Expected 1 to {MAX_TENSORS} {what} with different names, found {names[:8]}."
                raise DataError("data.type", message)

    def gives(self, name: str) -> bool:
        """Whether that output is declared."""
        return any(output.name == name for output in self.outputs)

    def schema(self) -> FeatureSchema:
        """The row that is watched, as a schema."""
        taken: set[str] = set()
        features = []
        for tensor in self.inputs:
            for what in tensor.watched_as:
                name = feature_name(f"{tensor.name} {what}", taken)
                taken.add(name)
                features.append(Feature(name=name))
        return FeatureSchema(features=tuple(features))

    def check_projections(self, projections: Sequence[Projection]) -> None:
        """Refuse other projections than those that are declared.

        Raises:
            BundleError: bundle.manifest.
        """
        told = {(p.input, p.width, p.count) for p in projections}
        asked = {(t.name, math.prod(t.shape[1:]), t.directions) for t in self.inputs if t.directions}
        if told != asked or len(told) != len(projections):
            raise BundleError("bundle.manifest", "The profile's projections are not those that the manifest declares.")

    def watched(
        self, feeds: Mapping[str, npt.NDArray[Any]], projectors: Mapping[str, Projector]
    ) -> npt.NDArray[np.float32]:
        """The rows that are watched of the tensors `feeds`, float32 `[n, width of the schema]`.

        Args:
            feeds: by input.
            projectors: by input, of those with directions.
        """
        columns = []
        for tensor in self.inputs:
            data = feeds[tensor.name]
            flat = data.reshape(len(data), -1)
            if not flat.shape[1]:
                flat = np.zeros((len(data), 1), dtype=np.float32)
            mean = flat.mean(axis=1, dtype=np.float64)
            # By squares: half the time of `std`, and exact enough to be watched.
            squares = np.einsum("ij,ij->i", flat, flat, dtype=np.float64) / flat.shape[1]
            columns += [mean, np.sqrt(np.maximum(squares - mean * mean, 0)), flat.min(axis=1), flat.max(axis=1)]
            if tensor.directions:
                columns += list(projectors[tensor.name].of(data).T)
        largest = float(np.finfo(np.float32).max)
        rows = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
        return np.clip(rows, -largest, largest).astype(np.float32)


class Array(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor on the wire: little-endian, row-major."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, name: str, datatype: str, array: npt.NDArray[Any]) -> Array:
        """From an array of that datatype."""
        data = np.ascontiguousarray(array, dtype=DTYPES[datatype]).tobytes()
        return cls(name=name, datatype=datatype, shape=array.shape, data=data)

    def array(self) -> npt.NDArray[Any]:
        """Back to an array in the machine's order.

        Raises:
            BundleError: bundle.malformed when the sizes disagree.
        """
        kind = np.dtype(DTYPES.get(self.datatype, "V1"))
        whole = all(n >= 0 for n in self.shape) and len(self.data) == math.prod(self.shape) * kind.itemsize
        if self.datatype not in DTYPES or not self.shape or not whole:
            message = f"Tensor {self.name!r}: {len(self.data)} bytes are not {self.datatype[:16]} {list(self.shape)}."
            raise BundleError("bundle.malformed", message)
        return np.frombuffer(self.data, dtype=kind).reshape(self.shape).astype(kind.newbyteorder("="))


class GoldenTensors(msgspec.Struct, frozen=True, kw_only=True):
    """Input tensors, and what the model must answer to them on every CPU; as many rows in each."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    def check(self, spec: TensorSpec) -> None:
        """Refuse what the spec does not ask for.

        Raises:
            BundleError: bundle.manifest, bundle.malformed.
        """
        arrays = (*self.inputs, *self.outputs)
        told = [(t.name, t.datatype, t.shape) for t in spec.inputs]
        told += [(t.name, t.datatype, t.shape) for t in spec.outputs]
        rows = {array.shape[0] if array.shape else 0 for array in arrays}
        if len(self.inputs) != len(spec.inputs) or len(arrays) != len(told) or len(rows) != 1 or min(rows) < 1:
            raise BundleError("bundle.manifest", "The golden tensors are not those that the manifest declares.")
        for array, (name, datatype, shape) in zip(arrays, told, strict=True):
            if (array.name, array.datatype) != (name, datatype) or not fits(array.shape, shape):
                message = f"Golden tensor {array.name!r}: expected {name!r}, {datatype} {list(shape)}, "
                raise BundleError("bundle.manifest", message + f"found {array.datatype} {list(array.shape)}.")
            array.array()


def fits(found: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Whether a tensor has a declared shape."""
    return len(found) == len(declared) and all(want in (-1, have) for have, want in zip(found, declared, strict=True))


def _check_tensor(name: str, datatype: str, shape: tuple[int, ...]) -> None:
    if not 0 < len(name) <= 128 or not name.isprintable():
        raise DataError("data.type", f"Expected a tensor's name of 1 to 128 characters, found {name[:128]!r}.")
    if datatype not in DTYPES:
        message = f"Tensor {name!r}: expected one of {', '.join(DTYPES)}; found {datatype[:16]!r}."
        raise DataError("data.type", message)
    elements = math.prod(n for n in shape if n > 0)
    if not 0 < len(shape) <= MAX_DIMENSIONS or shape[0] != -1 or min(shape) < -1 or elements > MAX_ELEMENTS:
        message = f"Tensor {name!r}: expected -1 for the rows and up to {MAX_DIMENSIONS - 1} further dimensions of at "
        raise DataError("data.type", message + f"most {MAX_ELEMENTS} elements, found {list(shape)}.")
