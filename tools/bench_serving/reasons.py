"""Bench serving: why a bar is missed, where that can be told from what was measured. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from missed_bars import explained

from .bars import Bar
from .figures import Figures


def reasons(figures: Figures, missed: Sequence[Bar]) -> list[str]:
    """A sentence or two for each kind of bar that is missed."""
    return explained([bar.name for bar in missed if bar.value is not None], _EXPLANATIONS, figures)


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
    ours, fastapi, steps = f.start("ours"), f.start("fastapi"), f.steps()
    if ours is None or fastapi is None or not steps:
        return None
    floor = steps["python"] + steps["numpy"] + steps["onnxruntime"]
    return (
        f"Starting: the bar is {0.4 * fastapi * 1e3:.0f} ms here. Python, numpy and onnxruntime take "
        f"{floor * 1e3:.0f} of them before anything else is loaded ({steps['python'] * 1e3:.0f}, "
        f"{steps['numpy'] * 1e3:.0f} and {steps['onnxruntime'] * 1e3:.0f}). Ours takes {ours * 1e3:.0f}: "
        f"{steps['modules'] * 1e3:.0f} go to our modules and what else of the standard library they need, and "
        f"{(ours - floor - steps['modules']) * 1e3:.0f} to the state on disk, a bundle that is verified, a model that "
        "is loaded, proven and measured, and the doors; and to being asked every 5 ms whether it answers yet."
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
    on, off, beside = f.watched("on", 1), f.watched("off", 1), f.watched("on", 1, "beside")
    if on is None or off is None or beside is None:
        return None
    return (
        f"Watching: {on - off:.1f} µs a request more at one connection, {beside:.1f} of them in other threads, which "
        "count, report and answer who scrapes; the rest where the row is noted. What noting one costs by itself is in "
        "[drift.md](drift.md); between two requests the code for it has left the processor's caches."
    )


def _update(f: Figures) -> str | None:
    busy, quiet = f.update("busy", "paced"), f.update("quiet", "paced")
    if busy is None or quiet is None:
        return None
    return (
        f"While an update comes, p99 at 200 requests/s is {busy / 1e3:.1f} ms, where it is {quiet / 1e3:.1f} in quiet: "
        "a few of the hundreds of requests that come meanwhile wait for something else in the process, or for one of "
        "the two CPUs, which the control plane, the broker and the probe want too. Which of them it is was not "
        f"measured; over one connection that is never idle p99 is {_times(f)} times that of quiet."
    )


def _times(f: Figures) -> str:
    busy, quiet = f.update("busy", "closed"), f.update("quiet", "closed")
    return "–" if busy is None or not quiet else f"{busy / quiet:.2f}"


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
