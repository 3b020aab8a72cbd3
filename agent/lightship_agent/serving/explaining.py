"""Serving: reasons for answers, on demand: `POST /v2/models/{model}/explain`.

Rules:
* one explanation at a time and one in line, in a thread of its own that yields to everything else on the device: a
  prediction never waits for an explanation;
* bounded before it begins: rows, permutations, and the rows that the model would have to predict;
* nothing is observed: what an explanation asks the model is nobody's measurement;
* the rows are the client's, or the newest that the device answered: while an alarm stands, those that it is about.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Final

import msgspec

from lightship_agent.contract.codes import ServingError
from lightship_agent.runtime.explain import Floats, evaluations
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.runtime.reasons import explain_rows, plain

from .oip import decode_infer
from .slot import Admission
from .tensors import MAX_ID, input_rows
from .workers import check_in_time

MAX_ROWS: Final = 16
MAX_EVALUATIONS: Final = 100_000  # rows predicted in one explanation
_WAITING: Final = 2
_NICE: Final = 10
_NOTHING: Final = {b"[]", b"null"}


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the parameters of a request may say."""

    permutations: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 10
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**32)] = 0
    top: Annotated[int, msgspec.Meta(ge=1, le=100)] = 5
    newest: Annotated[int, msgspec.Meta(ge=0, le=MAX_ROWS)] = 0  # rows of the device's own, instead of inputs


class _Asked(msgspec.Struct):
    parameters: Wish = Wish()
    id: str | None = None
    inputs: msgspec.Raw = msgspec.Raw(b"[]")


class Explainer:
    """Explains what the models of a data plane say.

    Args:
        get: the model of a name and a version.
        count_error: called with the code of what is refused.
        newest: the last rows that a model answered, at most so many.
    """

    def __init__(
        self,
        get: Callable[[str, str | None], LoadedModel],
        count_error: Callable[[str], None],
        newest: Callable[[LoadedModel, int], Floats],
    ) -> None:
        self._get = get
        self._newest = newest
        self._count_error = count_error
        self._admission = Admission(_WAITING, count_error)
        self._pool: ThreadPoolExecutor | None = None

    async def answer(
        self, text: Callable[[], bytes], length: int | None, name: str, version: str | None, ends: float
    ) -> bytes:
        """The JSON of an explanation.

        Args:
            text: gives the body.
            length: of the JSON before binary tensors, if there are any.
            name: the model's.
            version: its version, if one is asked for.
            ends: when its time is over, in monotonic seconds.

        Raises:
            ServingError: as a prediction, and serving.no-background.
        """
        work = self._work
        with self._admission:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="lightship-explain", initializer=_yield)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, work, text, length, (name, version), ends)

    def _work(self, text: Callable[[], bytes], length: int | None, which: tuple[str, str | None], ends: float) -> bytes:
        try:
            check_in_time(ends)
            model, rows, wish, told_id = self._understand(text(), length, which)
            _check(model, rows, wish)
            told = explain_rows(
                model, rows, permutations=wish.permutations, seed=wish.seed, go_on=lambda: check_in_time(ends)
            )
        except ServingError as e:
            self._count_error(e.code)
            raise
        return msgspec.json.encode({"id": told_id, **plain(told, model, wish.top)})

    def _understand(
        self, body: bytes, length: int | None, which: tuple[str, str | None]
    ) -> tuple[LoadedModel, Floats, Wish, str]:
        asked = _asked(body if length is None else body[:length])
        wish, told_id = asked.parameters, asked.id or ""
        if len(told_id) > MAX_ID:
            raise _too_long(told_id)
        if wish.newest:
            if bytes(asked.inputs) not in _NOTHING:
                raise ServingError("serving.malformed", "Expected inputs, or the parameter `newest`; found both.")
            model = self._get(*which)
            _check_kind(model)
            return model, self._latest(model, wish.newest), wish, told_id
        request, _ = decode_infer(body, header_length=length, model=which[0], version=which[1])
        model = self._get(*which)
        _check_kind(model)
        return model, input_rows(request.inputs, model.schema), wish, told_id

    def _latest(self, model: LoadedModel, count: int) -> Floats:
        rows = self._newest(model, count)
        if not len(rows):
            message = f"{model.name}@{model.version} has answered no rows that are still held."
            raise ServingError("serving.input", message, remedy="Send the rows in `inputs`.")
        return rows


def _too_long(told: str) -> ServingError:
    return ServingError("serving.malformed", f"Expected an id of at most {MAX_ID} characters, found {len(told)}.")


def _check_kind(model: LoadedModel) -> None:
    if model.spec is not None:
        message = f"{model.name} takes tensors, and only models of rows are explained."
        raise ServingError("serving.input", message)


def _check(model: LoadedModel, rows: Floats, wish: Wish) -> None:
    background = 0 if model.background is None else len(model.background)
    cost = evaluations(len(rows), rows.shape[1], wish.permutations, background)
    if len(rows) > MAX_ROWS or cost > MAX_EVALUATIONS:
        message = f"Expected at most {MAX_ROWS} rows and {MAX_EVALUATIONS} predictions, found {len(rows)} and {cost}."
        raise ServingError("serving.too-large", message, remedy="Ask for fewer rows or permutations.")


def _asked(text: bytes) -> _Asked:
    try:
        return msgspec.json.decode(text, type=_Asked)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise ServingError("serving.malformed", f"The parameters of an explanation: {e}.") from e


def _yield() -> None:
    """Let this thread run only when nothing else wants to; on Linux a thread has a niceness of its own."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    except (OSError, AttributeError):  # another system: it shares out its time alike
        return
