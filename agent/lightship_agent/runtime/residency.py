"""Runtime: which models may stay in memory. A decider: no I/O, no clock.

Rules:
* what serves, soaks, shadows or answers a share is `busy`, and is never let go of to make room;
* the rest goes by last use, the longest ago first, and no more of it than is needed;
* where that is not enough nothing goes, and what was to be loaded is refused;
* a model's need is known only once it was loaded; before that it is estimated from the size of its graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from lightship_agent.contract.codes import ServingError

#: Bytes of memory for each byte of the graph, once loaded and trimmed, and at the height of loading. Measured with
#: onnxruntime 1.32: forests and boosted trees 5.5-8.1 and 14-16, networks 2.0-2.8 and 3.0-3.5.
_TREES: Final = (6.0, 14.0)
_OTHERS: Final = (2.5, 3.5)
_BESIDE: Final = 1 << 20  # bytes that any session takes
#: Bytes that stay free on the device, whatever is loaded.
RESERVE: Final = 16 << 20


class Resident(msgspec.Struct, frozen=True):
    """A model in memory."""

    digest: str
    size: int  # bytes, as measured when it was loaded
    used: float  # monotonic seconds of the last answer
    busy: bool  # whether it may not go


class Need(msgspec.Struct, frozen=True):
    """Bytes that a model takes: for good, and while it is being loaded."""

    settled: int
    peak: int


def estimate(graph: bytes) -> Need:
    """What loading `graph` will take, as far as its size tells."""
    settled, peak = _TREES if b"TreeEnsemble" in graph else _OTHERS
    return Need(_BESIDE + int(len(graph) * settled), _BESIDE + int(len(graph) * peak))


def make_room(residents: Iterable[Resident], need: Need, *, budget: int, available: int | None) -> tuple[str, ...]:
    """The digests to let go of, so that `need` has room.

    Args:
        residents: what is in memory. Where that is nothing, nothing is refused: a device shall serve something.
        need: of what is to come.
        budget: bytes for all models; 0: as much as the device has.
        available: bytes that this process may still take; None: unknown.

    Raises:
        ServingError: serving.memory, when all that may go is not enough.
    """
    held = list(residents)
    if not held:
        return ()
    taken = sum(r.size for r in held)
    lacking = max(
        taken + need.settled - budget if budget else 0,
        need.peak + RESERVE - available if available is not None else 0,
    )
    gone: list[str] = []
    for one in sorted((r for r in held if not r.busy), key=lambda r: r.used):
        if lacking <= 0:
            break
        gone.append(one.digest)
        lacking -= one.size
    if lacking > 0:
        room = f"of {budget} bytes for models {taken} are taken" if budget else f"{taken} bytes of models are in memory"
        free = "" if available is None else f", and {available} bytes are available"
        message = f"The model needs about {need.settled} bytes ({need.peak} while it loads); {room}{free}."
        remedy = "Unload a model, raise LIGHTSHIP_AGENT_MODELS_MB, or use a smaller model."
        raise ServingError("serving.memory", message, remedy=remedy)
    return tuple(gone)


def surplus(residents: Iterable[Resident], spare: int) -> tuple[str, ...]:
    """The digests beyond the `spare` last used ones of those that are not busy."""
    idle = sorted((r for r in residents if not r.busy), key=lambda r: r.used, reverse=True)
    return tuple(r.digest for r in idle[spare:])
