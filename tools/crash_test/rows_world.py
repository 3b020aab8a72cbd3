"""Crash test: rows in which the world around the device fails: the network, the reports, the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .device import Device
from .row import FULL, Row, cut, needing, until, way

Act = Callable[[Device], None]
CAN_MOUNT: Final = os.geteuid() == 0


def rows() -> list[Row]:
    """The rows of this file."""
    return [*_reports(), *_network(), *_disk()]


def _killed(order: str) -> Act:
    def act(device: Device) -> None:
        device.start(order)
        device.dies()
        device.start()
        device.settles(2)

    return act


# Reports --------------------------------------------------------------------------------------------------------------


def _telemetry(kind: str, times: int, at: int = 0) -> Act:
    def act(device: Device) -> None:
        fault = device.plane.order(device.name, "/telemetry", kind, at=at, times=times)
        device.start()
        device.settles(2)
        device.waits(lambda: fault.met >= times, "every fault")
        device.waits(lambda: ("committed", "") in [s[1:] for s in device.plane.steps(device.name)], "the report")

    return act


def _reports() -> list[Row]:
    done = cut(FULL, "")
    commit = "report of the commit"
    return [
        Row("lost report", commit, "killed before it is in the outbox", done, "v2", _killed("reporting(committed)"),
            committed=0),
        Row("lost report", commit, "killed while it is written", done, "v2",
            _killed("reporting(committed)>outbox-opened"), committed=0),
        Row("lost report", commit, "killed once it is in the outbox", done, "v2", _killed("reported(committed)")),
        Row("lost report", commit, "killed before it is sent", done, "v2", _killed("reported(committed)>sending")),
        Row("lost report", commit, "killed once the server has it", done, "v2", _killed("reported(committed)>sent")),
        *(Row("lost report", f"report of `{step}`", words, cut(until(phase, inclusive=True), way("idle", FULL)), "v2",
              _killed(f"{point}({step})"))
          for step, phase in {"fetching": "fetching", "trying": "trying", "soaking": "swapped"}.items()
          for point, words in {"reporting": "killed before it is in the outbox",
                               "reported": "killed once it is in the outbox"}.items()),
        Row("lost report", "any report", "the server answers 503 five times", FULL, "v2", _telemetry("status", 5, 503)),
        Row("lost report", "any report", "the server answers 400 twice", FULL, "v2", _telemetry("status", 2, 400)),
        Row("lost report", "any report", "stored, but the answer is lost three times", FULL, "v2",
            _telemetry("lost", 3)),
        Row("disk full", "outbox", "once, at a write", FULL, "v2", _once("outbox-opened=enospc@2"), committed=None),
        Row("read-only", "outbox", "once, at a write", FULL, "v2", _once("outbox-opened=erofs@2"), committed=None),
    ]  # fmt: skip


def _once(order: str) -> Act:
    def act(device: Device) -> None:
        device.start(order, POLL_SECONDS="1")
        device.settles(2)

    return act


# Network --------------------------------------------------------------------------------------------------------------


def _down_at_the_start(device: Device) -> None:
    device.gate.shut()
    device.start(POLL_SECONDS="1")
    device.answers()
    time.sleep(2)
    device.expects("serves without a network", "v1", device.predicts())
    device.gate.open()
    device.settles(2)


def _down_in_the_soak(device: Device) -> None:
    device.start(SOAK_SECONDS="2", REACH_SECONDS="30", POLL_SECONDS="1")
    device.comes_to("soaking")
    device.gate.shut()
    device.comes_to("after-save-reaching")
    time.sleep(1)
    device.gate.open()
    device.settles(2)


def _down_beyond_reach(device: Device) -> None:
    device.start(SOAK_SECONDS="2", REACH_SECONDS="1", POLL_SECONDS="1")
    device.comes_to("soaking")
    device.gate.shut()
    device.says("update.server-unreachable")
    device.waits(lambda: device.predicts() == "v1", "the old model")
    device.gate.open()
    device.settles(2)


def _down_after_the_commit(device: Device) -> None:
    deaf = device.plane.order(device.name, "/telemetry", "status", at=503)
    device.start()
    device.settles(2)
    device.gate.shut()
    device.kill()
    device.start(POLL_SECONDS="1")
    device.answers()
    device.expects("serves without a network", "v2", device.predicts())
    deaf.lifted.set()
    device.gate.open()
    device.settles(2)
    device.waits(lambda: ("committed", "") in [s[1:] for s in device.plane.steps(device.name)], "the report")


def _down_while_killed(point: str) -> Act:
    def act(device: Device) -> None:
        device.start(point)
        device.dies()
        device.gate.shut()
        device.start(POLL_SECONDS="1")
        device.answers()
        device.expects("serves after the cut, without a network", "v1", device.predicts())
        device.gate.open()
        device.settles(2)

    return act


def _wrong(pattern: str, kind: str, at: int, code: str) -> Act:
    """What it is answered is wrong for a while; it says so, serves on, and updates when it is right again."""

    def act(device: Device) -> None:
        fault = device.plane.order(device.name, pattern, kind, at=at)
        device.start(POLL_SECONDS="1")
        device.waits(lambda: device.is_degraded(code), code)
        device.expects("serves meanwhile", "v1", device.predicts())
        fault.lifted.set()
        device.settles(2)

    return act


def _network() -> list[Row]:
    return [
        Row("network", "control plane", "refuses connections at the start", FULL, "v2", _down_at_the_start, door=True),
        Row("network", "control plane", "down in the soak, and back in time", FULL, "v2", _down_in_the_soak, door=True),
        Row("network", "control plane", "down beyond the time to reach it: the old model serves, then a new try",
            way(until("idle"), "idle", FULL), "v2", _down_beyond_reach, door=True),
        Row("network", "control plane", "down after the commit, and the agent killed", cut(FULL, ""), "v2",
            _down_after_the_commit, door=True),
        *(Row("network", "control plane", f"down when the agent comes back from a cut in `{phase}`",
              cut(until(phase, inclusive=True), way("idle", FULL)), "v2", _down_while_killed(f"after-save-{phase}"),
              door=True) for phase in ("fetching", "trying", "swapped", "reaching")),
        Row("network", "assignment", "503 for a while", FULL, "v2",
            _wrong("/assignment", "status", 503, "link.status")),
        Row("network", "assignment", "its last byte is wrong for a while", FULL, "v2",
            _wrong("/assignment", "wrong", 0, "trust.metadata")),
        Row("network", "timestamp", "its last byte is wrong for a while", FULL, "v2",
            _wrong("/timestamp.json", "wrong", 0, "trust.metadata")),
        Row("network", "timestamp", "breaks off after 100 bytes for a while", FULL, "v2",
            _wrong("/timestamp.json", "cut", 100, "link.unreachable")),
    ]  # fmt: skip


# Disk -----------------------------------------------------------------------------------------------------------------

NEEDS_MOUNT: Final = "root, to mount a small file system"


def _limited(size: int) -> Act:
    """No file may grow beyond `size` bytes for a while, from before the assignment on."""

    def act(device: Device) -> None:
        device.start(POLL_SECONDS="1")
        device.answers()
        device.limit_files(size)
        device.plane.assign(device.name, 2)
        device.waits(lambda: device.is_degraded("storage.full"), "storage.full")
        time.sleep(1.5)
        device.expects("serves meanwhile", "v1", device.predicts())
        device.limit_files(-1)
        device.settles(2)

    return act


def _mounted(device: Device) -> None:
    """Its state directory is a file system of its own, of 48 MB: the agent keeps 16 in reserve."""
    device.commit(1)
    kept = device.folder / "kept"
    device.state.rename(kept)
    device.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(device.state)], check=True)
    device.at_end.append(lambda: subprocess.run(["umount", "-l", str(device.state)], check=False))
    shutil.copytree(kept, device.state, dirs_exist_ok=True)
    shutil.rmtree(kept)


def _fill(device: Device, leave: int = 0) -> Path:
    filler = device.state / "filler"
    with filler.open("wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(b"\0" * 65_536)
    if leave:
        os.truncate(filler, max(0, filler.stat().st_size - leave))
    return filler


def _really_full(leave: int, *, at_start: bool) -> Act:
    def act(device: Device) -> None:
        if at_start:
            filler = _fill(device, leave)
            device.start(POLL_SECONDS="5")
            device.answers()
        else:
            device.start(POLL_SECONDS="5")
            device.answers()
            filler = _fill(device, leave)
        device.expects("serves on a full disk", "v1", device.predicts())
        device.plane.assign(device.name, 4)
        device.waits(lambda: device.is_degraded("storage.full"), "storage.full")
        time.sleep(1.5)
        device.expects("serves meanwhile", "v1", device.predicts())
        filler.unlink()
        device.settles(4)

    return act


def _remount(device: Device, how: str) -> None:
    for _ in range(50):
        done = subprocess.run(["mount", "-o", f"remount,{how}", str(device.state)], check=False, capture_output=True)
        if done.returncode == 0:
            return
        time.sleep(0.05)
    device.expects("a remount", 0, done.returncode)


def _read_only(*, at_start: bool) -> Act:
    def act(device: Device) -> None:
        if at_start:
            _remount(device, "ro")
            device.start(POLL_SECONDS="1")
            device.answers()
        else:
            device.start(POLL_SECONDS="1")
            device.answers()
            _remount(device, "ro")
        device.plane.assign(device.name, 2)
        time.sleep(2.5)
        device.expects("serves meanwhile", "v1", device.predicts())
        _remount(device, "rw")
        device.settles(2)

    return act


def _disk() -> list[Row]:
    full, point = "disk full", "state directory"
    found = [
        Row(full, point, "really full, before an update", FULL, "v4", _really_full(0, at_start=False), begin=_mounted,
            assigned=None),
        Row(full, point, "really full, at the start", FULL, "v4", _really_full(0, at_start=True), begin=_mounted,
            assigned=None),
        Row("read-only", point, "remounted so, before an update", FULL, "v2", _read_only(at_start=False),
            begin=_mounted, assigned=None),
        Row("read-only", point, "mounted so, at the start", FULL, "v2", _read_only(at_start=True), begin=_mounted,
            assigned=None),
    ]  # fmt: skip
    return [
        Row(full, "every file", "not a byte more, before an update", FULL, "v2", _limited(0), assigned=None),
        *(needing(row, "" if CAN_MOUNT else NEEDS_MOUNT) for row in found),
    ]
