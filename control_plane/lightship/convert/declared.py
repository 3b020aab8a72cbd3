"""Convert: what somebody declares of a model that takes tensors, and the golden tensors that prove it.

Rules:
* pure but for reading the two files; arrays hold numbers and no pickled objects;
* the answers in the golden file come from where the model was made: the device must compute the same;
* labels, scores and values are named among the outputs, or there are none.
"""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import BundleError, DataError
from lightship_agent.contract.schema import Outputs
from lightship_agent.contract.tensors import DTYPES, Array, GoldenTensors, TensorInput, TensorOutput, TensorSpec

MAX_GOLDEN: Final = 16 * 1024 * 1024  # bytes of golden tensors that travel in the bundle
MAX_GOLDEN_ROWS: Final = 32
MAX_FILE: Final = 1024 * 1024 * 1024  # bytes of arrays that are read


class Meaning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What some outputs mean: `labels` with `label_output` or `score_output` of a classifier, `value_output` else."""

    labels: tuple[str, ...] = ()
    label_output: str = ""
    score_output: str = ""
    value_output: str = ""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device must have; 0 is what the model's size suggests."""

    memory_mb: int = 0
    latency_ms: float = 250.0
    probe_seconds: int = 60
    device_classes: tuple[str, ...] = ()


class Declared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file: inputs, outputs, what they mean, and how exactly a device must agree."""

    inputs: tuple[TensorInput, ...]
    outputs: tuple[TensorOutput, ...]
    meaning: Meaning = Meaning()
    requires: Limits = Limits()
    tolerance: float = 1e-4

    @property
    def spec(self) -> TensorSpec:
        """The contract's part of it."""
        return TensorSpec(inputs=self.inputs, outputs=self.outputs)

    @property
    def meant(self) -> Outputs:
        """The outputs as a manifest has them."""
        told = self.meaning
        if told.labels:
            kind: Any = "score" if told.score_output else "none"
            return Outputs(
                task="classification",
                labels=told.labels,
                label_output=told.label_output,
                score_output=told.score_output,
                score_kind=kind,
            )
        if told.value_output:
            return Outputs(task="regression", value_output=told.value_output)
        return Outputs(task="tensors")


def read_declared(path: Path) -> Declared:
    """The declaration in a TOML file.

    Raises:
        DataError: data.unreadable, data.type.
    """
    try:
        declared = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Declared)
    except OSError as e:
        raise DataError("data.unreadable", f"{path}: {e.strerror or e}.") from e
    except (ValueError, msgspec.ValidationError) as e:  # TOML and UTF-8 errors are ValueErrors
        raise DataError("data.unreadable", f"{path.name}: {e}.") from e
    _check(declared)
    return declared


def _check(declared: Declared) -> None:
    spec, told, meant = declared.spec, declared.meaning, declared.meant
    known = {output.name for output in spec.outputs}
    absent = [name for name in meant.names if name not in known]
    if absent:
        raise DataError("data.type", f"meaning: {absent[0]!r} is none of the outputs {', '.join(sorted(known))}.")
    if (told.value_output and told.labels) or ((told.label_output or told.score_output) and not told.labels):
        raise DataError(
            "data.type", "meaning: expected labels with label_output or score_output, or value_output alone."
        )
    if not 0 < declared.tolerance <= 1:
        raise DataError("data.type", f"tolerance: expected above 0 and up to 1, found {declared.tolerance}.")


def read_arrays(path: Path, spec: TensorSpec) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz file, one for each declared input and output, of their datatypes.

    Raises:
        DataError: data.unreadable, data.column-missing, data.type.
    """
    wanted = {t.name: t.datatype for t in spec.inputs} | {t.name: t.datatype for t in spec.outputs}
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
        if size > MAX_FILE:
            raise DataError(
                "data.unreadable", f"{path.name}: expected at most {MAX_FILE} bytes of arrays, found {size}."
            )
        with np.load(path, allow_pickle=False) as file:
            absent = [name for name in wanted if name not in file]
            if absent:
                message = f"{path.name} has no array {absent[0]!r}; it has {', '.join(list(file)[:20])}."
                raise DataError("data.column-missing", message, remedy="Save one array per declared input and output.")
            arrays = {name: np.asarray(file[name]) for name in wanted}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as e:
        raise DataError("data.unreadable", f"{path.name}: expected an .npz file: {e}.") from e
    for name, array in arrays.items():
        if array.dtype != np.dtype(DTYPES[wanted[name]]):
            message = f"{path.name}: {name!r}: expected {wanted[name]}, found {array.dtype}."
            raise DataError("data.type", message)
    return arrays


def golden_tensors(spec: TensorSpec, arrays: dict[str, npt.NDArray[Any]]) -> GoldenTensors:
    """As many of the first rows as may travel, at most 32; checked.

    Raises:
        DataError: data.type when arrays and declaration disagree, or one row is too large.
    """
    rows = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    most = min(rows.values())
    a_row = sum(array.nbytes for array in arrays.values()) // max(1, most)
    kept = min(most, MAX_GOLDEN_ROWS, MAX_GOLDEN // max(1, a_row))
    if len(set(rows.values())) != 1 or kept < 1:
        message = f"Expected as many rows in every array, at most {MAX_GOLDEN} bytes each, found {rows}."
        raise DataError("data.type", message)
    golden = GoldenTensors(
        inputs=tuple(Array.of(t.name, t.datatype, arrays[t.name][:kept]) for t in spec.inputs),
        outputs=tuple(Array.of(t.name, t.datatype, arrays[t.name][:kept]) for t in spec.outputs),
    )
    try:
        golden.check(spec)
    except BundleError as e:
        raise DataError("data.type", str(e)) from e
    for tensor in spec.inputs:
        if arrays[tensor.name].dtype.kind == "f" and not np.isfinite(arrays[tensor.name]).all():
            raise DataError("data.range", f"Golden input {tensor.name!r} has numbers that are not finite.")
    return golden
