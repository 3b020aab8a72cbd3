"""Convert: the child process. It reads a job from its folder, converts within limits, and writes the result there.

Rules:
* run as `python -m lightship.convert.convert_child FOLDER`; the folder is private to the job;
* limits first, work second: CPU time at once, memory as soon as the libraries are loaded;
* whatever goes wrong becomes `error.json` with a code; a crash without one is the parent's to explain.
"""

from __future__ import annotations

import re
import resource
import sys
import warnings
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from lightship_agent.contract.codes import ConvertError, LightshipError
from lightship_agent.contract.schema import FeatureSchema, Outputs

JOB: Final = "job.json"
INPUT: Final = "input.bin"
MODEL: Final = "model.onnx"
RESULT: Final = "result.json"
ERROR: Final = "error.json"
#: How the converter names what it does not know, in twelve lines of advice for its own developers.
_CLASS: Final = re.compile(r"<class '([\w.]+)'>")
_OTHER_WAYS: Final = "Choose another estimator, or make the ONNX file yourself and bring it: `lightship model import`."


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to do: convert the estimator in `input.bin`, take in the ONNX model there, or reduce its precision."""

    kind: Literal["convert", "import", "reduce"]
    schema: FeatureSchema | None
    labels: tuple[str, ...]
    task: Literal["classification", "regression"]
    seconds: float
    memory_mb: int
    outputs: Outputs | None = None  # of the model to reduce,
    precision: str = "fp32"  # and to what


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came out, beside `model.onnx`."""

    schema: FeatureSchema
    outputs: Outputs
    versions: dict[str, str]


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why nothing came out."""

    code: str
    message: str
    remedy: str = ""


def main(folder: Path) -> int:
    """Do the job in `folder`; the exit status is 0 when there is a result."""
    job = msgspec.json.decode((folder / JOB).read_bytes(), type=Job)
    limit_cpu(job.seconds)
    try:
        _work(folder, job)
    except LightshipError as e:
        failure = Failure(code=e.code, message=e.message, remedy=e.remedy)
    except MemoryError:
        failure = _out_of_memory(job)
    except Exception as e:  # noqa: BLE001 - converters raise anything; their words are passed on
        failure = Failure(code="convert.failed", message=f"{type(e).__name__}: {str(e).strip()[:2_000]}")
        if any(words in str(e) for words in ("bad_alloc", "bad allocation")):  # C++ for the same
            failure = _out_of_memory(job)
    else:
        return 0
    (folder / ERROR).write_bytes(msgspec.json.encode(failure))
    return 1


def _out_of_memory(job: Job) -> Failure:
    return Failure(code="convert.timeout", message=f"More than {job.memory_mb} MB of memory were asked for.")


def limit_cpu(seconds: float) -> None:
    """At most `seconds` of CPU time, and no core files."""
    cpu = max(1, int(seconds) + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_memory(megabytes: int) -> None:
    """At most `megabytes` of address space above what the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + megabytes * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _work(folder: Path, job: Job) -> None:
    from lightship.training.environment import capture

    # Loaded before memory is limited: the limit is for the work, not for the libraries.
    from .foreign import normalise
    from .inspection import check_standard, parse_onnx

    warnings.simplefilter("ignore")
    if job.kind == "convert":
        import joblib
        import skl2onnx  # noqa: F401 - as above

        limit_memory(job.memory_mb)
        assert job.schema is not None  # the parent always gives one
        model, outputs = convert_estimator(joblib.load(folder / INPUT), job.schema, job.labels, job.task)
        schema = job.schema
    elif job.kind == "reduce":
        assert job.schema is not None
        assert job.outputs is not None
        model, schema, outputs = _reduced(folder, job), job.schema, job.outputs
    else:
        limit_memory(job.memory_mb)
        model = parse_onnx((folder / INPUT).read_bytes())
        schema, outputs = normalise(model, job.schema, job.labels)
    check_standard(model)
    (folder / MODEL).write_bytes(model.SerializeToString(deterministic=True))
    result = Result(schema=schema, outputs=outputs, versions=capture())
    (folder / RESULT).write_bytes(msgspec.json.encode(result))


def _reduced(folder: Path, job: Job) -> Any:
    """The `ModelProto` of the model in `input.bin`, in fewer bits; beside it lie rows of its input."""
    import joblib

    from .inspection import parse_onnx
    from .reduce import check_gains, quantisation, to_fp16, to_int8

    quantisation()  # loaded before memory is limited
    limit_memory(job.memory_mb)
    data, rows = joblib.load(folder / INPUT)
    model = parse_onnx(data)
    check_gains(model, job.precision)
    return to_fp16(model) if job.precision == "fp16" else to_int8(model, rows, folder)


def convert_estimator(estimator: Any, schema: FeatureSchema, labels: tuple[str, ...], task: str) -> tuple[Any, Outputs]:
    """The `ModelProto` of a fitted estimator, with a device's ends. The estimator's thresholds are rounded in place.

    Raises:
        ConvertError: convert.failed, convert.invalid-onnx.
    """
    from .graph import Editor
    from .settle import check_answers, look, probe_rows, settle_regressor
    from .thresholds import round_thresholds

    round_thresholds(estimator)
    model = _to_onnx(estimator, schema, task)
    rows = probe_rows(schema)
    names = [o.name for o in model.graph.output]
    seen = look(model, names, rows)
    editor = Editor(model)
    if task == "regression":
        if len(names) != 1:
            raise ConvertError("convert.failed", f"Expected one output of a regressor, found: {', '.join(names)}.")
        outputs = settle_regressor(editor, schema, names[0], seen[names[0]])
    else:
        kind = _score_kind(estimator, len(labels))
        if kind == "score" and len(names) > 1 and not _scores_agree(estimator, rows, seen[names[1]]):
            kind = "none"  # the label is still the estimator's; parity looks at that
        outputs = _settle_classes(editor, class_keys(estimator, labels), schema, labels, seen, kind=kind)
    check_answers(model, outputs, rows)
    return model, outputs


def _to_onnx(estimator: Any, schema: FeatureSchema, task: str) -> Any:
    """Convert with the first set of options that this kind of model knows."""
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType
    from skl2onnx.common.exceptions import MissingConverter, MissingShapeCalculator

    from .inspection import ML_DOMAIN, OWN_ML_OPSET, OWN_OPSET
    from .walk import final_estimator

    final = final_estimator(estimator)
    choices: list[dict[str, bool]] = [{}]
    if task == "classification" and hasattr(estimator, "predict_proba"):
        choices = [{"zipmap": False}, {}]
    elif task == "classification":
        # Without raw scores, binary decision values come out with the opposite sign.
        choices = [{"zipmap": False, "raw_scores": True}, {"raw_scores": True}, {"zipmap": False}, {}]
    for options in choices:
        try:
            return convert_sklearn(
                estimator,
                name="lightship",
                initial_types=[(schema.input_name, FloatTensorType([None, schema.width]))],
                options={id(final): options} if options else None,
                target_opset={"": OWN_OPSET, ML_DOMAIN: OWN_ML_OPSET},
            )
        except NameError as e:  # how the converter says that it does not know an option
            unknown = e
        except (MissingShapeCalculator, MissingConverter) as e:
            kind = _CLASS.search(str(e))
            message = f"skl2onnx has no converter for {kind[1] if kind else type(final).__name__}."
            raise ConvertError("convert.failed", message, remedy=_OTHER_WAYS) from e
    raise ConvertError("convert.failed", f"The converter knows no usable options: {unknown}.")


def _settle_classes(
    editor: Any,
    classes: tuple[tuple[str, ...] | tuple[int, ...] | None, list[int]],
    schema: FeatureSchema,
    labels: tuple[str, ...],
    seen: dict[str, Any],
    *,
    kind: Literal["probability", "score", "none"],
) -> Outputs:
    from .settle import settle_classifier, settle_label, settle_scores

    keys, order = classes
    names, scores = list(seen), None
    if len(names) > 1 and seen[names[1]].dtype.kind == "f":
        scores = settle_scores(editor, names[1], seen[names[1]], kind, order)
    label = settle_label(editor, names[0], seen[names[0]], keys)
    return settle_classifier(editor, schema, labels, label=label, scores=scores, kind=kind)


def class_keys(estimator: Any, labels: tuple[str, ...]) -> tuple[tuple[str, ...] | tuple[int, ...] | None, list[int]]:
    """What the estimator calls class 0, 1, … of `labels` (None when it calls them so), and their columns.

    Raises:
        ConvertError: convert.failed when estimator and labels do not fit.
    """
    known = list(getattr(estimator, "classes_", range(len(labels))))
    if len(known) != len(labels):
        raise ConvertError("convert.failed", f"The model knows {len(known)} classes, {len(labels)} were named.")
    texts = [str(k) for k in known]
    if all(isinstance(k, str) for k in known):
        if sorted(texts) != sorted(labels):
            message = f"The model's classes are {', '.join(texts[:20])}; expected {', '.join(labels[:20])}."
            raise ConvertError("convert.failed", message)
        return labels, [texts.index(label) for label in labels]
    numbers = tuple(int(k) for k in known)
    if numbers == tuple(range(len(labels))):
        return None, list(range(len(labels)))
    whole = [str(n) for n in numbers]
    order = [whole.index(label) for label in labels] if sorted(whole) == sorted(labels) else list(range(len(labels)))
    return tuple(numbers[i] for i in order), order


def _score_kind(estimator: Any, classes: int) -> Literal["probability", "score", "none"]:
    from .walk import final_estimator

    if hasattr(estimator, "predict_proba"):
        return "probability"
    one_against_one = getattr(final_estimator(estimator), "decision_function_shape", "") == "ovo" and classes > 2
    return "score" if hasattr(estimator, "decision_function") and not one_against_one else "none"


def _scores_agree(estimator: Any, rows: Any, seen: Any) -> bool:
    """Whether the graph's scores are the estimator's decision values, for converters have been seen to differ."""
    import numpy as np

    wanted = np.asarray(estimator.decision_function(rows))
    found = seen.reshape(len(rows), -1)
    if wanted.ndim == 1:
        wanted, found = wanted[:, None], found[:, -1:]
    scale = np.maximum(np.abs(wanted), wanted.std())
    return wanted.shape == found.shape and bool((np.abs(wanted - found) <= 1e-2 * scale).all())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
