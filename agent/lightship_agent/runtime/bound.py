"""Runtime: one row through a model, in memory that is bound once.

Rules:
* input and outputs are arrays of ours that onnxruntime reads and writes in place: half the cost of `session.run`;
* one caller at a time: `lock` is for whoever might not be alone, and is never waited for on the hot path;
* a graph whose outputs have no fixed type and shape for one row, or that answers otherwise than `session.run`, is not
  bound at all;
* what is read from the arrays is read before the next run.

Source: onnxruntime, "I/O Binding".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.schema import Outputs

from .ort import onnxruntime

_TYPES: Final = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class BoundRow:
    """A session with one row of memory.

    `row` is float32 `[width]` for the caller to fill, and `memory` its bytes. After `run`, `label` int64 `[1]`,
    `scores` float32 `[classes]` and `value` float32 `[1]` hold the answer, None where the graph has no such output.
    """

    __slots__ = ("_io", "label", "lock", "memory", "row", "run", "scores", "value")

    def __init__(self, session: Any, input_name: str, width: int, outputs: Outputs) -> None:
        """Bind; raises whatever onnxruntime raises."""
        self.lock = threading.Lock()
        self.row: npt.NDArray[np.float32] = np.zeros(width, dtype=np.float32)
        self.memory = self.row.data.cast("B")
        self.label: npt.NDArray[np.int64] | None = None
        self.scores: npt.NDArray[np.float32] | None = None
        self.value: npt.NDArray[np.float32] | None = None
        self._io = session.io_binding()
        self._io.bind_input(input_name, "cpu", 0, np.float32, (1, width), self.row.ctypes.data)
        for found in session.get_outputs():
            if found.name == outputs.label_output:
                self.label = self._bind(found, np.int64, 1)
            elif found.name == outputs.score_output:
                self.scores = self._bind(found, np.float32, len(outputs.labels))
            elif found.name == outputs.value_output:
                self.value = self._bind(found, np.float32, 1)
        #: Answer what is in `row`; raises whatever onnxruntime raises.
        self.run: Callable[[], None] = _runner(session, self._io)

    def _bind(self, found: Any, kind: Any, size: int) -> Any:
        shape = tuple(n if isinstance(n, int) else 1 for n in found.shape)
        if _TYPES.get(found.type) is not kind or int(np.prod(shape)) != size:
            message = f"{found.name!r} has no fixed shape for one row: {found.type} {found.shape}"
            raise ValueError(message)
        array = np.zeros(size, dtype=kind)
        self._io.bind_output(found.name, "cpu", 0, kind, shape, array.ctypes.data)
        return array


def _runner(session: Any, io: Any) -> Callable[[], None]:
    """`session.run_with_iobinding(io)`, past the wrappers that onnxruntime has around it, where they are as we know."""
    # Without options of ours onnxruntime makes new ones for each run, which is a sixth of a short run's time.
    options = onnxruntime.RunOptions()
    inner, bound = getattr(session, "_sess", None), getattr(io, "_iobinding", None)
    if inner is None or bound is None or not hasattr(inner, "run_with_iobinding"):
        return partial(session.run_with_iobinding, io, options)
    return partial(inner.run_with_iobinding, bound, options)


def bind_row(session: Any, input_name: str, outputs: Outputs, rows: npt.NDArray[np.float32]) -> BoundRow | None:
    """A bound row that answers `rows`, float32 `[n, width]`, to the bit as `session.run` does; None where none does."""
    try:
        bound = BoundRow(session, input_name, rows.shape[1], outputs)
        names = [n for n in (outputs.label_output, outputs.score_output, outputs.value_output) if n]
        for row in rows:
            bound.row[:] = row
            bound.run()
            got = [a for a in (bound.label, bound.scores, bound.value) if a is not None]
            expected = session.run(names, {input_name: row.reshape(1, -1)})
            if len(got) != len(expected) or any(
                g.tobytes() != np.ravel(e).tobytes() for g, e in zip(got, expected, strict=True)
            ):
                return None
    except Exception:  # noqa: BLE001 - onnxruntime's exceptions share no base class; without a binding all still works
        return None
    return bound


def batches_exactly(session: Any, input_name: str, names: list[str], rows: npt.NDArray[np.float32], most: int) -> bool:
    """Whether `rows`, float32 `[n, width]`, in batches of up to `most`, are answered to the bit as each is alone."""
    alone = [session.run(names, {input_name: row.reshape(1, -1)}) for row in rows]
    size = 2
    while size <= min(most, len(rows)):
        together = session.run(names, {input_name: rows[:size]})
        for i in range(size):
            for one, many in zip(alone[i], together, strict=True):
                if np.ravel(one).tobytes() != np.ravel(many[i]).tobytes():
                    return False
        size *= 2
    return len(rows) >= 2
