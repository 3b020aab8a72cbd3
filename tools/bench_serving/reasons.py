"""Bench serving: why a bar is missed, where that can be told from what was measured. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from .bars import Bar
from .figures import Figures


def reasons(figures: Figures, missed: Sequence[Bar]) -> list[str]:
    """A sentence or two for each kind of bar that is missed."""
    names = [bar.name for bar in missed if bar.value is not None]
    told = []
    for words, explain in _EXPLANATIONS.items():
        about = [name for name in names if words in name]
        said = explain(figures) if about else None
        if said is not None:
            told.append(said)
            names = [name for name in names if name not in about]
    return told + [f"{name}: no reason found yet." for name in names]


def _binary(f: Figures) -> str | None:
    json, binary, run = (f.many(how, "hgb", "cpu") for how in ("json", "binary", "run"))
    if json is None or binary is None or run is None:
        return None
    return (
        f"Gradient boosting, a thousand rows: of {json / 1e3:.1f} ms of CPU in JSON and {binary / 1e3:.1f} in binary "
        f"the model itself takes {run / 1e3:.1f}. Whatever the format costs, {json / run:.1f} times is all that could "
        "be won; beside the model's own time, and for the network, the bar is the format's."
    )


def _start(f: Figures) -> str | None:
    ours, bare, fastapi = (f.start(who, "cpu") for who in ("ours", "bare", "fastapi"))
    if ours is None or bare is None or not fastapi:
        return None
    return (
        f"Starting: python, numpy, onnxruntime and the model take {bare:.2f} s of CPU before anybody serves anything, "
        f"{bare / fastapi:.0%} of FastAPI's whole start ({fastapi:.2f} s with the same two libraries in it). Ours "
        f"takes {ours:.2f} s: {ours - bare:.2f} s for faces, watching, updates and the link."
    )


def _forest(f: Figures) -> str | None:
    empty, forest = f.memory("ours", "empty"), f.memory("ours", "forest")
    nothing, untrimmed = f.memory("bare", "nothing"), f.memory("bare", "rf")
    if empty is None or forest is None or nothing is None or untrimmed is None:
        return None
    return (
        f"The forest adds {forest - empty:.1f} MB to the agent and {untrimmed - nothing:.1f} MB to a bare one. What "
        "is left after the trim are the nodes, as onnxruntime lays them out, and the profile and the golden rows."
    )


def _swapped(f: Figures) -> str | None:
    found = f.part("updates")
    if found is None:
        return None
    return (
        "After swaps the version that came before stays resident, so that a bad one can be left at once: "
        f"{found['before']:.1f} MB became {found['after_one']:.1f} with the first update, and {found['after']:.1f} "
        f"with the last of {len(found['windows'])}."
    )


def _above_bare(f: Figures) -> str | None:
    ours, empty, bare = f.memory("ours", "loaded"), f.memory("ours", "empty"), f.memory("bare", "nothing")
    if ours is None or empty is None or bare is None:
        return None
    return (
        f"Memory: before it has any model the agent takes {empty - bare:.1f} MB more than python, numpy and "
        "onnxruntime: the HTTP and MQTT clients, TLS and certificates, the faces."
    )


def _paced(f: Figures) -> str | None:
    paced, busy, idle = f.paced("ours", "rf"), f.burst("ours", "cpu", "rf"), f.memory("ours", "idle_cpu")
    if paced is None or busy is None or idle is None:
        return None
    return (
        f"Paced: the forest's request takes {busy.median:.0f} µs of CPU when one follows the other, and {paced:.0f} "
        f"when one comes every 10 ms and finds cold caches; being idle takes {idle * 100:.0f} µs of each 10 ms."
    )


def _on(f: Figures) -> str | None:
    on, off = f.watched("on", 1), f.watched("off", 1)
    if on is None or off is None:
        return None
    return (
        f"Watching: {on - off:.1f} µs a request more at one connection. What noting a row and counting it cost by "
        "themselves is in [drift.md](drift.md), and is the smaller part; the rest we have not accounted for yet."
    )


def _update(f: Figures) -> str | None:
    busy, quiet = f.update("busy", "paced"), f.update("quiet", "paced")
    if busy is None or quiet is None:
        return None
    return (
        f"While an update comes, p99 at 200 requests/s is {busy / 1e3:.1f} ms, where it is {quiet / 1e3:.1f} in quiet: "
        "a few of the hundreds of requests that come meanwhile wait for something else in the process. Which step it "
        "is we have not profiled; whatever holds Python's lock gives it up after a millisecond, but for calls into C."
    )


_EXPLANATIONS: Final[dict[str, Callable[[Figures], str | None]]] = {
    "binary extension at 1,000 rows, gradient boosting": _binary,
    "start of the process": _start,
    "forest after load": _forest,
    "after 20 swaps": _swapped,
    "above bare": _above_bare,
    "paced 100 requests/s": _paced,
    "telemetry on: CPU per request, of off, concurrency 1": _on,
    "of quiet, paced": _update,
}
