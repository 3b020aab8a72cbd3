"""Serving: the in-process face, a model inside the application's own program.

Rules:
* it reads what is on disk and writes nothing: the agent stays the one who decides what is committed;
* what comes from a state folder is known by its digest; what comes from a file is whatever the file is, unless its
  digest is given; either way the golden rows must agree on this CPU before the first answer;
* rows are checked by the schema as every face does; float32 rows are handed over without a copy, and answers are arrays
  of their own that no later call touches;
* a row alone goes through memory that is bound once; whoever finds that memory taken goes the other way, and waits for
  nobody;
* nobody watches here: rows asked in process are not counted by the agent, for it does not see them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent import __version__
from lightship_agent.contract.bundle import Bundle, read_bundle
from lightship_agent.contract.codes import BundleError, DataError, ServingError, StorageError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.runtime.bound import BoundRow
from lightship_agent.runtime.compat import check_compatible
from lightship_agent.runtime.golden import check_bundle
from lightship_agent.runtime.model import LoadedModel, Prediction, load_model
from lightship_agent.runtime.ort import onnxruntime

from .named import as_float32


class Target(msgspec.Struct):
    """What `update.json` says of a bundle, as far as it matters here."""

    sha256: str


class _State(msgspec.Struct):
    current: Target | None = None


class Model:
    """A model in this process, safe to ask from several threads."""

    def __init__(self, path: Path, model: LoadedModel) -> None:
        """`model` was loaded from `path`, a bundle file or a state folder."""
        self._path = path
        self._changing = threading.Lock()
        self._take(model)

    def _take(self, model: LoadedModel) -> None:
        self._loaded = model
        # A function of its own: a call finds the old model with its memory, or the new one with its own.
        self._one_row = _one_row(model)

    @property
    def name(self) -> str:
        """The model's name."""
        return self._loaded.name

    @property
    def version(self) -> int:
        """The version that answers."""
        return self._loaded.version

    @property
    def digest(self) -> str:
        """The digest of the bundle that answers."""
        return self._loaded.digest

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return self._loaded.schema.names

    @property
    def labels(self) -> tuple[str, ...]:
        """The words of the classes: `labels[prediction.labels[i]]`; empty for a regressor."""
        return self._loaded.outputs.labels

    def predict(self, rows: Any) -> Prediction:
        """What the model says about `rows`.

        Args:
            rows: float32, C-contiguous, `[n, features]` or `[features]`; anything else that numpy makes numbers of is
                converted, and then copied.

        Returns:
            Prediction: `labels` int64 `[n]` and `scores` float32 `[n, classes]`, or `values` float32 `[n, 1]`.

        Raises:
            ServingError: serving.input when the rows do not fit the schema; serving.runtime.
        """
        found = self._one_row(rows)
        if found is not None:
            return found
        model = self._loaded
        return model.predict(_checked(rows, model))

    def reload(self) -> bool:
        """Take what is on disk now; False if it is what answers already. The old model answers until then.

        Raises:
            LightshipError: as `load`; then the old model goes on answering.
        """
        with self._changing:
            data, digest = _read(self._path)
            if digest == self._loaded.digest:
                return False
            self._take(_load(data, digest))
            return True


def load(path: str | Path, *, digest: str = "") -> Model:
    """The model at `path`, ready to answer.

    Args:
        path: a bundle file, uncompressed; or an agent's state folder, for the bundle that is committed there.
        digest: the sha256 that the bundle must have; "" takes a file as it is.

    Raises:
        BundleError: bundle.*, when it is no bundle, another one, or none that this device can run.
        ServingError: serving.no-model when nothing is committed in that folder.
        StorageError: storage.unreadable, storage.corrupt.
        UpdateError: update.golden when this CPU computes something else than the model's makers saw; update.swap.
    """
    where = Path(path)
    data, found = _read(where)
    if digest and found != digest.lower():
        raise BundleError("bundle.digest", f"{where}: expected a bundle of digest {digest[:80]}, found {found}.")
    return Model(where, _load(data, found))


def _load(data: bytes, digest: str) -> LoadedModel:
    bundle: Bundle = read_bundle(data)
    assert bundle.digest == digest
    classes = bundle.manifest.requires.device_classes
    check_compatible(
        bundle.manifest,
        agent_version=__version__,
        onnxruntime_version=onnxruntime.__version__,
        device_class=classes[0] if classes else "",  # whether it is meant for this kind of device, the caller knows
    )
    model = load_model(bundle)
    check_bundle(model, bundle)
    return model


def _read(path: Path) -> tuple[bytes, str]:
    """A bundle's bytes, and what they are."""
    if not path.is_dir():
        data = _bytes(path)
        return data, sha256_hex(data)
    current = _state(path).current
    if current is None:
        raise ServingError("serving.no-model", f"No bundle is committed in {path}.", remedy="Assign this device one.")
    data = _bytes(path / "bundles" / f"{current.sha256}.tar")
    if sha256_hex(data) != current.sha256:
        message = f"The committed bundle in {path} is not what its name says."
        raise StorageError("storage.corrupt", message, remedy="Restart the agent: it fetches the bundle anew.")
    return data, current.sha256


def _state(folder: Path) -> _State:
    """The update state, read only: `update.json`, or the copy of it at the last time of rest."""
    for name in ("update.json", "committed.json"):
        path = folder / name
        try:
            return msgspec.json.decode(path.read_bytes(), type=_State)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise _unreadable(path, e) from e
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return _State()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, error: OSError) -> StorageError:
    message = f"{path} can't be read: {error.strerror or error}."
    return StorageError("storage.unreadable", message, remedy="Check the path, and who may read it.")


def _checked(rows: Any, model: LoadedModel) -> npt.NDArray[np.float32]:
    try:
        array = np.asarray(rows)
        if array.dtype.kind not in "fiub":
            message = f"Expected rows of numbers, found numpy's {array.dtype}."
            raise ServingError("serving.input", message)
        matrix = np.atleast_2d(as_float32(array))
        if not len(matrix):
            raise ServingError("serving.input", "Expected at least one row, found none.")
        return model.schema.check_rows(matrix)
    except DataError as e:
        raise ServingError("serving.input", str(e)) from e
    except (ValueError, OverflowError) as e:  # rows of different lengths
        raise ServingError("serving.input", f"Expected rows of numbers: {e}.") from e


def _one_row(model: LoadedModel) -> Callable[[Any], Prediction | None]:
    """What answers one plain float32 row at once; None for whatever has to go the other way.

    Everything that can be looked up before the first call is: what is left costs less than the other way's wrappers.
    """
    bound = model.bound
    if bound is None:
        return lambda _rows: None
    # Names are bound here, and nothing is called that could be written out: what is left counts in tenths of a µs.
    row, run, acquire, release = bound.row, bound.run, bound.lock.acquire, bound.lock.release
    width, floats, array, table = len(row), row.dtype, np.ndarray, row.reshape(1, -1)
    flat_shape, table_shape = row.shape, table.shape
    isfinite, finite = np.isfinite, np.empty(width, dtype=np.bool_)
    which, all_finite = finite.tobytes, b"\1" * width
    classes, find = len(model.outputs.labels), _finder(model, bound)
    scores = None if bound.scores is None else bound.scores.reshape(1, -1).copy
    value = None if bound.value is None else bound.value.reshape(1, 1)

    def answer(rows: Any) -> Prediction | None:
        if type(rows) is not array or rows.dtype is not floats or not acquire(False):
            return None
        try:
            shape = rows.shape
            if shape == table_shape:
                table[...] = rows
            elif shape == flat_shape:
                row[...] = rows
            else:
                return None
            isfinite(row, finite)
            if which() != all_finite:
                return None
            run()
            if value is not None:
                return Prediction(None, None, value.copy())
            found = find()
            if 0 <= found.item() < classes:
                return Prediction(found, None if scores is None else scores())
        except Exception as e:  # onnxruntime's exceptions share no base class
            message = f"{model.name}@{model.version} failed to predict: {e}"
            raise ServingError("serving.runtime", message) from e
        finally:
            release()
        return None  # a class that does not exist: the other way says so

    return answer


def _finder(model: LoadedModel, bound: BoundRow) -> Callable[[], npt.NDArray[np.int64]]:
    """What gives the class in the bound memory, as an array of its own."""
    scores, label, threshold = bound.scores, bound.label, model.outputs.threshold
    if scores is not None and threshold is not None and len(scores) == 2:
        return lambda: np.array([scores[1] >= threshold], dtype=np.int64)
    if label is not None:
        return label.copy
    return lambda: np.array([0 if scores is None else scores.argmax()], dtype=np.int64)
