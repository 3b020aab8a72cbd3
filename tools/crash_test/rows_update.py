"""Crash test: rows that cut, fail, hang and starve an update in each of its states, and at each of its steps."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable
from typing import Final

from .bundles import BRITTLE_AT
from .device import PATIENCE, Device, children
from .row import FULL, PHASES, Row, cut, until, way

#: Points inside an action: the state that update.json holds there, and an error that can be met there.
STEPS: Final = {
    "fetching": ("fetching", "link.unreachable"),
    "unpacking": ("fetching", "bundle.too-large"),
    "before-store": ("fetching", "storage.unwritable"),
    "probing": ("trying", "update.probe-failed"),
    "soaking": ("swapped", "update.soak"),
    "reaching": ("reaching", "update.server-unreachable"),
}
#: What serves while an update hangs in a state: the new model only after the swap.
MEANWHILE: Final = {"fetching": "v1", "trying": "v1", "swapped": "v2", "reaching": "v2", "idle": "v2"}
Act = Callable[[Device], None]


def rows() -> list[Row]:
    """The rows of this file."""
    return [
        Row("undisturbed", "none", "none", FULL, "v2", _undisturbed),
        *_saves(),
        *_steps(),
        *_store(),
        *_downloads(),
        *_trials(),
    ]


def _undisturbed(device: Device) -> None:
    device.start()
    device.settles(2)


def killed(order: str) -> Act:
    """It dies where that is ordered, and is started again."""

    def act(device: Device) -> None:
        device.start(order)
        device.dies()
        device.start()
        device.settles(2)

    return act


def failing(order: str) -> Act:
    """It meets an error once, and gets over it without a restart."""

    def act(device: Device) -> None:
        device.start(order, POLL_SECONDS="1")
        device.settles(2)

    return act


def hanging(point: str, serves: str) -> Act:
    """It hangs; while it does, it serves; someone kills it."""

    def act(device: Device) -> None:
        device.start(f"{point}=hang")
        device.waits(lambda: any(p == "!" for _, p, _ in device.trace()), f"a hang at {point}")
        device.expects("serves while it hangs", serves, device.predicts())
        device.kill()
        device.start()
        device.settles(2)

    return act


def after_cut(on_disk: str) -> str:
    """What a restart does with the state it finds: nothing, take the attempt back, or stay committed."""
    if on_disk == "":
        return FULL
    return "" if on_disk == "idle" else way("idle", FULL)


def _before(phase: str) -> str:
    at = PHASES.index(phase)
    return PHASES[at - 1] if at else ""


def _saves() -> list[Row]:
    found = []
    for phase in PHASES:
        point, before = f"entering `{phase}`", _before(phase)
        cut_before = cut(until(phase), after_cut(before))
        cut_after = cut(until(phase, inclusive=True), after_cut(phase))
        at_save = f"before-save-{phase}>"
        full, refused = f"{at_save}file-begun(update.json)=enospc", f"{at_save}file-begun(update.json)=erofs"
        retried = way(until(phase), "idle", FULL) if before else FULL
        lost = 0 if phase == "idle" else 1
        found += [
            Row("SIGKILL", point, "before it is written", cut_before, "v2", killed(f"before-save-{phase}")),
            Row("SIGKILL", point, "half written", cut_before, "v2", killed(f"{at_save}file-begun(update.json)")),
            Row("SIGKILL", point, "before its rename", cut_before, "v2", killed(f"{at_save}file-written(update.json)")),
            Row("SIGKILL", point, "after its rename", cut_after, "v2",
                killed(f"{at_save}file-renamed(update.json)"), committed=lost),
            Row("SIGKILL", point, "once it is durable", cut_after, "v2", killed(f"after-save-{phase}"), committed=lost),
            Row("hang", point, "before it is written", cut_before, "v2",
                hanging(f"before-save-{phase}", MEANWHILE[before or "fetching"])),
            Row("hang", point, "once it is durable", cut_after, "v2",
                hanging(f"after-save-{phase}", MEANWHILE[before or "fetching"]), committed=lost),
            Row("disk full", point, "update.json can't be written", retried, "v2", failing(full)),
            Row("read-only", point, "update.json can't be written", retried, "v2", failing(refused)),
        ]  # fmt: skip
    return found


def _steps() -> list[Row]:
    found = []
    for point, (phase, code) in STEPS.items():
        upto = until(phase, inclusive=True)
        after = cut(upto, after_cut(phase))
        found += [
            Row("SIGKILL", f"step `{point}`", "", after, "v2", killed(point)),
            Row("error", f"step `{point}`", code, way(upto, "idle", FULL), "v2", failing(f"{point}=error:{code}")),
            Row("hang", f"step `{point}`", "", after, "v2",
                hanging(point, "v2" if point in {"soaking", "reaching"} else MEANWHILE[_before(phase) or "fetching"])),
        ]  # fmt: skip
    return found


def _two_generations(device: Device) -> None:
    device.commit(1, previous=3)


def _killed_while_it_tidies(device: Device) -> None:
    killed("collecting(*.tar)")(device)
    device.waits(lambda: not device.bundle(3).exists(), "what it was about to remove removed")


def _killed_at_restore(device: Device) -> None:
    device.start("before-save-swapped")
    device.dies()
    device.start("restoring")
    device.dies()
    device.start()
    device.settles(2)


def _restore_fails(device: Device) -> None:
    device.start("soaking=error:update.soak", POLL_SECONDS="1")
    device.settles(2)


def _store() -> list[Row]:
    fetched = cut("fetching", way("idle", FULL))
    retried = way("fetching", "idle", FULL)
    gone = "once the previous one is not needed"
    return [
        Row("SIGKILL", "bundle into the store", "half written", fetched, "v2", killed("file-begun(*.tar)")),
        Row("SIGKILL", "bundle into the store", "before its rename", fetched, "v2", killed("file-written(*.tar)")),
        Row("SIGKILL", "bundle into the store", "after its rename", fetched, "v2", killed("file-renamed(*.tar)")),
        Row("disk full", "bundle into the store", "", retried, "v2", failing("file-begun(*.tar)=enospc")),
        Row("disk full", "bundle into the store", "at its end", retried, "v2", failing("file-written(*.tar)=enospc")),
        Row("read-only", "bundle into the store", "", retried, "v2", failing("file-begun(*.tar)=erofs")),
        Row("SIGKILL", "garbage collection", gone, cut(FULL, ""), "v2", _killed_while_it_tidies,
            begin=_two_generations),
        Row("read-only", "garbage collection", gone, FULL, "v2", failing("collecting(*.tar)=erofs"),
            begin=_two_generations, debris=("bundle v3",)),
        Row("SIGKILL", "restoring at the start", "", cut("", FULL), "v2", killed("restoring")),
        Row("SIGKILL", "restoring after a cut", "cut twice",
            cut("fetching → trying", "idle", FULL), "v2", _killed_at_restore),
    ]  # fmt: skip


# Downloads ------------------------------------------------------------------------------------------------------------

BIG: Final = 4
SMALL_PIECE: Final = 65_536


def _cut_download(at: int) -> Act:
    def act(device: Device) -> None:
        fault = device.plane.order(device.name, r"/targets/", "stall", at=at)
        device.start()
        part = device.state / "staging"
        device.waits(lambda: sum(p.stat().st_size for p in part.glob("*.part")) >= at and fault.met, f"{at} bytes")
        device.kill()
        have = sum(p.stat().st_size for p in part.glob("*.part"))
        fault.lifted.set()
        device.start()
        device.settles(BIG)
        spans = [span for _, span in device.plane.asked(device.name, "/targets/")]
        device.expects("the second request asks for the rest", f"bytes={have}-" if have else "", spans[1])

    return act


def _bad_download(kind: str, at: int = 0, times: int = 1, code: str = "") -> Act:
    def act(device: Device) -> None:
        device.plane.order(device.name, r"/targets/", kind, at=at, times=times)
        device.start(POLL_SECONDS="2")
        device.settles(BIG)
        if code:
            codes = [c for _, _, c in device.plane.steps(device.name)]
            device.expects(f"{code} is reported", True, code in codes)

    return act


def _downloads() -> list[Row]:
    resumed = cut("fetching", way("idle", FULL))
    again = way("fetching", "idle", FULL)
    big = {"assigned": BIG, "serves": f"v{BIG}"}
    offsets = {"before the first byte": 0, "after 64 KiB": SMALL_PIECE, "after 1 MB": 1_000_000}
    return [
        *(Row("SIGKILL", "download", words, resumed, act=_cut_download(at), **big) for words, at in offsets.items()),  # type: ignore[arg-type]
        Row("network", "download", "breaks off after 500 kB", FULL, f"v{BIG}", _bad_download("cut", 500_000),
            assigned=BIG),
        Row("network", "download", "503 twice", FULL, f"v{BIG}", _bad_download("status", 503, 2), assigned=BIG),
        Row("network", "download", "404", again, f"v{BIG}", _bad_download("status", 404, 1, "link.status"),
            assigned=BIG),
        Row("network", "download", "a redirect", again, f"v{BIG}", _bad_download("status", 302, 1, "link.status"),
            assigned=BIG),
        Row("corrupt", "download", "its last byte is wrong", again, f"v{BIG}",
            _bad_download("wrong", 0, 1, "trust.digest"), assigned=BIG),
    ]  # fmt: skip


# Trials ---------------------------------------------------------------------------------------------------------------

LYING, SLOW, HUNGRY, FOREIGN, BRITTLE, HASTY = 5, 6, 7, 8, 9, 10


def _refused(code: str) -> Act:
    """It tries once, fails with that code, and goes on serving."""

    def act(device: Device) -> None:
        device.start()
        device.says(code)

    return act


def _boxed(device: Device) -> None:
    device.start(POLL_SECONDS="1")
    digest = device.plane.versions[LYING].digest
    device.waits(
        lambda: (
            device.status().get("update", {}).get("penalties", {}).get(digest, 0) > 4
            and len([1 for _, p, _ in device.trace() if p == "after-save-trying"]) == 3
            and device.status()["update"]["phase"] == "idle"
        ),
        "three tries",
    )


def _boxed_then_restarted(device: Device) -> None:
    _boxed(device)
    device.kill()
    device.start(POLL_SECONDS="1")
    device.answers()
    device.waits(lambda: len(device.plane.asked(device.name, "assignment")) > 8, "a few looks after the restart")


def _boxed_then_another(device: Device) -> None:
    _boxed(device)
    device.plane.assign(device.name, 2)
    device.settles(2)


def _probe_child(device: Device, send: signal.Signals) -> None:
    """Send the signal to the probe once it has limited itself."""

    def begun() -> list[int]:
        return [p for p in children("probe_child", device.state) if _is_limited(p)]

    device.waits(begun, "a probe")
    for pid in begun():
        os.kill(pid, send)


def _is_limited(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return resource.prlimit(pid, resource.RLIMIT_CPU)[0] != resource.RLIM_INFINITY
    return False


def _probe_dies(device: Device) -> None:
    device.start(POLL_SECONDS="1")
    _probe_child(device, signal.SIGKILL)
    device.settles(2)


def _probe_stops(device: Device) -> None:
    device.start(POLL_SECONDS="1")
    _probe_child(device, signal.SIGSTOP)
    device.settles(HASTY)


def _killed_while_the_probe_hangs(device: Device) -> None:
    device.start()
    _probe_child(device, signal.SIGSTOP)
    device.kill()
    device.start()
    device.settles(2)


def _request_fails_in_soak(device: Device) -> None:
    device.start(SOAK_SECONDS="20")
    device.comes_to("soaking")
    device.waits(lambda: device.ask(BRITTLE_AT).startswith(("serving.runtime", "5")), "a failing request")
    device.says("update.soak")


def _nothing(_device: Device) -> None:
    """It begins with no model."""


def _first_fails(device: Device) -> None:
    device.start()
    device.says("update.golden")
    device.waits(lambda: device.is_degraded("serving.no-model"), "serving.no-model")


def _first_fails_then_works(device: Device) -> None:
    _first_fails(device)
    device.expects("serves after the first failed", "serving.no-model", device.predicts())
    device.plane.assign(device.name, 2)
    device.kill()
    device.start()
    device.settles(2, PATIENCE)


def _trials() -> list[Row]:
    tried = "fetching → trying → idle"
    three = way(tried, tried, tried)
    back = way("fetching", "trying", "idle", FULL)
    kept = {v: (f"bundle v{v}",) for v in (LYING, SLOW, HUNGRY, FOREIGN, BRITTLE)}
    return [
        Row("bad bundle", "probe", "golden rows disagree", tried, "v1", _refused("update.golden"), assigned=LYING,
            debris=kept[LYING]),
        Row("bad bundle", "probe", "slower than its budget", tried, "v1", _refused("update.budget"), assigned=SLOW,
            debris=kept[SLOW]),
        Row("bad bundle", "probe", "needs more memory than its budget", tried, "v1", _refused("update.budget"),
            assigned=HUNGRY, debris=kept[HUNGRY]),
        Row("bad bundle", "probe", "for another class of device", tried, "v1", _refused("bundle.incompatible"),
            assigned=FOREIGN, debris=kept[FOREIGN]),
        Row("bad bundle", "soak", "a real request fails", "fetching → trying → swapped → idle", "v1",
            _request_fails_in_soak, assigned=BRITTLE, debris=kept[BRITTLE]),
        Row("bad bundle", "penalty box", "three failures, then no more tries", three, "v1", _boxed, assigned=LYING,
            debris=kept[LYING]),
        Row("SIGKILL", "penalty box", "it stays closed", cut(three, ""), "v1", _boxed_then_restarted, assigned=LYING,
            debris=kept[LYING]),
        Row("bad bundle", "penalty box", "another bundle is assigned", way(three, FULL), "v2", _boxed_then_another,
            assigned=LYING, committed=None),
        Row("bad bundle", "first bundle of a device", "golden rows disagree", tried, "serving.no-model", _first_fails,
            begin=_nothing, assigned=LYING, debris=kept[LYING]),
        Row("SIGKILL", "first bundle of a device", "the next one is good", cut(tried, FULL), "v2",
            _first_fails_then_works, begin=_nothing, assigned=LYING, committed=None),
        Row("SIGKILL", "first bundle of a device", "in its soak", cut("fetching → trying → swapped", way("idle", FULL)),
            "v2", killed("soaking"), begin=_nothing),
        Row("SIGKILL", "probe process", "as the kernel does where memory ends", back, "v2", _probe_dies),
        Row("hang", "probe process", "it stops for ever", back, f"v{HASTY}", _probe_stops, assigned=HASTY),
        Row("SIGKILL", "agent while the probe hangs", "no orphan", cut("fetching → trying", way("idle", FULL)), "v2",
            _killed_while_the_probe_hangs),
    ]  # fmt: skip
