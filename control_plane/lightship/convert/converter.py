"""Convert: scikit-learn estimators and foreign ONNX files become models a device can load.

Rules:
* the work is done in a child process with a limit on wall time, CPU time and memory: converters have been seen to
  loop for ever, and a file somebody brought may be made to;
* nothing is left behind: the job's folder is private and removed, the child's process group is ended;
* the graph that comes back is inspected here again before anybody uses it;
* the versions that made it are kept: an upgrade of the converter is a change of the model.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import joblib
import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import CODES, ConvertError, StorageError
from lightship_agent.contract.manifest import Requires
from lightship_agent.contract.schema import FeatureSchema, Outputs

from .convert_child import ERROR, INPUT, JOB, MODEL, RESULT, Failure, Job, Result
from .inspection import INVALID, OWN_IR, OnnxInfo, check_device_safe, describe, inspect_onnx, parse_onnx
from .reduce import CALIBRATION_ROWS, Precision, check_smaller
from .refusals import check_convertible
from .rows import evenly

__all__ = ["Converted", "convert", "import_onnx", "inspect_onnx", "reduce_precision"]

_STDERR: Final = "stderr.txt"
#: Libraries take some seconds to load on a small or busy machine; the job's own limit starts counting at once.
_KEPT_VARIABLES: Final = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")


@dataclass(frozen=True, eq=False, kw_only=True)
class Converted:
    """A model as the device will load it.

    Attributes:
        onnx: the model's bytes.
        schema: of its input.
        outputs: what its outputs mean.
        requires: what a device must have.
        versions: of what made it, by package.
        precision: what it computes in.
        golden_tolerance: how far a device's answers to the golden rows may be from ours.
    """

    onnx: bytes
    schema: FeatureSchema
    outputs: Outputs
    requires: Requires
    versions: dict[str, str]
    precision: Precision = "fp32"
    golden_tolerance: float = 1e-4


#: Devices round halves of a quantum either way, and sum up half floats in another order.
_GOLDEN_TOLERANCE: Final = {"fp16": 5e-3, "int8": 2e-2}


def convert(
    estimator: Any,
    schema: FeatureSchema,
    labels: tuple[str, ...],
    task: Literal["classification", "regression"],
    *,
    seconds: float = 120,
    memory_mb: int = 2048,
) -> Converted:
    """Convert a fitted estimator.

    Args:
        estimator: fitted on class indices, class names or values; it must pickle.
        schema: of the rows it takes, in column order.
        labels: class names in index order; empty for regression.
        task: what it does.
        seconds: limit on wall time and CPU time of the child, loading of libraries included.
        memory_mb: limit on the address space the child may take above its libraries.

    Raises:
        ConvertError: convert.refused, convert.failed, convert.timeout, convert.invalid-onnx.
        StorageError: storage.full when the job does not fit on the disk.
    """
    check_convertible(estimator, schema)
    if task == "classification" and len(labels) < 2:
        raise ConvertError("convert.failed", f"Expected two or more class names, found {len(labels)}.")
    job = Job(kind="convert", schema=schema, labels=labels, task=task, seconds=seconds, memory_mb=memory_mb)
    data, result = _in_child(job, estimator)
    info = _inspect_again(data, own=True)
    if info.ir_version > OWN_IR:
        raise ConvertError(INVALID, f"Expected IR version {OWN_IR} at most, found {info.ir_version}.")
    return _converted(data, info, result)


def import_onnx(
    data: bytes,
    schema: FeatureSchema | None,
    labels: tuple[str, ...] = (),
    *,
    seconds: float = 120,
    memory_mb: int = 2048,
) -> Converted:
    """Take in a model that somebody made elsewhere.

    One float32 input `[N, w]` is expected. A classifier may answer class indices, class numbers, class names or
    nothing but scores, and its scores may be dictionaries (ZipMap): in the result the label is the index into
    `labels`, and the scores stand in their order. A model that has one number per row, and no labels, is a regressor.

    Args:
        data: the ONNX file.
        schema: of the input; None makes one with features f1, f2, ….
        labels: class names in the order the rest of the system uses; empty takes them from the graph.
        seconds: limit on wall time and CPU time of the child.
        memory_mb: limit on the address space the child may take above its libraries.

    Raises:
        ConvertError: convert.invalid-onnx, convert.failed, convert.timeout.
        StorageError: storage.full when the job does not fit on the disk.
    """
    check_device_safe(_without_zipmap(inspect_onnx(data)))
    task: Literal["classification", "regression"] = "classification" if labels else "regression"
    job = Job(kind="import", schema=schema, labels=labels, task=task, seconds=seconds, memory_mb=memory_mb)
    made, result = _in_child(job, data)
    return _converted(made, _inspect_again(made, own=False), result)


def reduce_precision(
    converted: Converted,
    precision: Precision,
    rows: npt.NDArray[np.float32],
    *,
    seconds: float = 300,
    memory_mb: int = 2048,
) -> Converted:
    """The same model in fewer bits; fp32 gives it back as it is.

    Args:
        converted: from `convert` or `import_onnx`.
        precision: fp16 or int8.
        rows: float32 `[n, width]` like those it was fitted on: INT8 covers what they show, and no more.
        seconds: limit on wall time and CPU time of the child.
        memory_mb: limit on the address space the child may take above its libraries.

    Raises:
        ConvertError: convert.precision when it gains nothing; convert.failed, convert.timeout.
        StorageError: storage.full when the job does not fit on the disk.
    """
    if precision == "fp32":
        return converted
    outputs = converted.outputs
    if outputs.task == "tensors":
        message = f"{precision}: a model of named tensors is taken as it comes; export it in that precision."
        raise ConvertError("convert.precision", message)
    job = Job(
        kind="reduce",
        schema=converted.schema,
        labels=outputs.labels,
        task=outputs.task,
        seconds=seconds,
        memory_mb=memory_mb,
        outputs=outputs,
        precision=precision,
    )
    some = np.ascontiguousarray(rows[evenly(len(rows), CALIBRATION_ROWS)], dtype=np.float32)
    data, result = _in_child(job, (converted.onnx, some))
    check_smaller(len(converted.onnx), len(data), precision)
    made = _converted(data, _inspect_again(data, own=True), result)
    return replace(made, precision=precision, golden_tolerance=_GOLDEN_TOLERANCE[precision])


def _without_zipmap(info: OnnxInfo) -> OnnxInfo:
    return msgspec.structs.replace(info, ops=tuple(op for op in info.ops if op != "ZipMap"))


def _inspect_again(data: bytes, *, own: bool) -> OnnxInfo:
    info = describe(parse_onnx(data), len(data))
    check_device_safe(info, allow_scan=own)
    return info


def _converted(data: bytes, info: OnnxInfo, result: Result) -> Converted:
    # The probe loads the file, parses it and lays it out again: about four times its size, and room to work.
    memory = max(512, 4 * (info.size // (1024 * 1024)) + 256)
    requires = Requires(
        ir_version=info.ir_version,
        opset=info.opset,
        ml_opset=info.ml_opset,
        ops=info.ops,
        memory_mb=memory,
    )
    return Converted(
        onnx=data,
        schema=result.schema,
        outputs=result.outputs,
        requires=requires,
        versions=result.versions,
    )


def _in_child(job: Job, payload: Any) -> tuple[bytes, Result]:
    """Run `job` on `payload` (bytes, or an estimator) in a child process."""
    with tempfile.TemporaryDirectory(prefix="lightship-convert-") as name:
        folder = Path(name)
        _write_job(folder, job, payload)
        status = _run(folder, job.seconds)
        try:
            if status == 0:
                result = msgspec.json.decode((folder / RESULT).read_bytes(), type=Result)
                return (folder / MODEL).read_bytes(), result
            raise _failure(folder, job, status)
        except (OSError, msgspec.MsgspecError) as e:
            raise ConvertError("convert.failed", f"The converter left no readable result: {e}.") from e


def _write_job(folder: Path, job: Job, payload: Any) -> None:
    try:
        (folder / JOB).write_bytes(msgspec.json.encode(job))
        if isinstance(payload, bytes):
            (folder / INPUT).write_bytes(payload)
        else:
            joblib.dump(payload, folder / INPUT)
    except OSError as e:
        code = "storage.full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "storage.unwritable"
        raise StorageError(code, f"The conversion's folder can't be written: {e.strerror}.") from e
    except Exception as e:  # pickling raises anything, and its words are the only hint
        message = f"{type(payload).__name__} can't be handed to the converter: {type(e).__name__}: {e}."
        remedy = "Use importable functions and classes only, no lambdas."
        raise ConvertError("convert.failed", message, remedy=remedy) from e


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "lightship.convert.convert_child", str(folder)]


def _run(folder: Path, seconds: float) -> int:
    """The child's exit status, negative for a signal.

    Raises:
        ConvertError: convert.timeout after `seconds` of wall time.
    """
    environment = {k: v for k, v in os.environ.items() if k in _KEPT_VARIABLES}
    environment |= {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),  # the child knows the same modules
        "TMPDIR": str(folder),
        # One thread: linear algebra libraries reserve memory for each, and the job's CPU limit is for all together.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with (folder / _STDERR).open("wb") as stderr:
        child = subprocess.Popen(
            _command(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired as e:
            message = f"The conversion was stopped after {seconds:g} seconds."
            _end(child)
            raise ConvertError("convert.timeout", message, remedy=_SLOW) from e
        except BaseException:  # interrupted ourselves: the child must not go on alone
            _end(child)
            raise


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child with its whole group, in case it started others."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


_SLOW: Final = "Use a smaller model, or raise the limit."


def _failure(folder: Path, job: Job, status: int) -> ConvertError:
    """What to say about a child that failed."""
    if (folder / ERROR).exists():
        failure = msgspec.json.decode((folder / ERROR).read_bytes(), type=Failure)
        code = failure.code if failure.code in CODES and failure.code.startswith("convert.") else "convert.failed"
        remedy = failure.remedy or (_SLOW if code == "convert.timeout" else "")
        return ConvertError(code, failure.message, remedy=remedy)
    if -status in (signal.SIGXCPU, signal.SIGKILL):
        message = f"The conversion used more than {job.seconds:g} seconds of CPU time, or was killed."
        return ConvertError("convert.timeout", message, remedy=_SLOW)
    last = (folder / _STDERR).read_text(errors="replace").strip()[-500:]
    said = f" It said last: {last}" if last else ""
    return ConvertError("convert.failed", f"The converter's process ended with status {status}.{said}")
