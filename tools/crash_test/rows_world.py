"""Crash test: rows in which the world around the device fails: the network, the reports, the clock, the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from .device import PACKAGES, Device
from .row import FULL, Row, cut, until, way

Act = Callable[[Device], None]
#: Where distributions put it. It changes what a process takes for the time of day, while it runs.
FAKETIME: Final = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
CAN_MOUNT: Final = os.geteuid() == 0


def rows() -> list[Row]:
    """The rows of this file."""
    return [*_reports(), *_network(), *_clock(), *_certificates(), *_disk()]


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
    soaked = cut("fetching → trying → swapped", way("idle", FULL))
    commit = "report of the commit"
    return [
        Row("lost report", commit, "killed before it is in the outbox", done, "v2", _killed("reporting(committed)"),
            committed=0),
        Row("lost report", commit, "killed while it is written", done, "v2",
            _killed("reporting(committed)>outbox-opened"), committed=0),
        Row("lost report", commit, "killed once it is in the outbox", done, "v2", _killed("reported(committed)")),
        Row("lost report", commit, "killed before it is sent", done, "v2", _killed("reported(committed)>sending")),
        Row("lost report", commit, "killed once the server has it", done, "v2", _killed("reported(committed)>sent")),
        Row("lost report", "report of the soak", "killed before it is in the outbox", soaked, "v2",
            _killed("reporting(soaking)")),
        Row("lost report", "report of the soak", "killed once it is in the outbox", soaked, "v2",
            _killed("reported(soaking)")),
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


# Clock ----------------------------------------------------------------------------------------------------------------

NEEDS_CLOCK: Final = "libfaketime (package `faketime`)"


def _sets(device: Device, offset: str) -> None:
    """What the agent takes for the time of day, from now on."""
    fresh = device.folder / "clock.new"
    fresh.write_text(f"{offset}\n")
    fresh.rename(device.folder / "clock")


def _clocked(device: Device) -> dict[str, str]:
    file = {"FAKETIME_TIMESTAMP_FILE": str(device.folder / "clock"), "FAKETIME_NO_CACHE": "1"}
    return {**under_another_clock(PACKAGES), **file}


def under_another_clock(packages: str) -> dict[str, str]:
    """The environment of a process whose time of day libfaketime decides."""
    shim = Path(__file__).with_name("clock")
    return {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": os.pathsep.join((packages, str(shim))),
    }


def _starts_at(offset: str, code: str) -> Act:
    """The clock is wrong at the start, and set right later."""

    def act(device: Device) -> None:
        _sets(device, offset)
        device.start(environment=_clocked(device), POLL_SECONDS="1")
        device.answers()
        if code:
            device.waits(lambda: device.is_degraded(code), code)
            device.expects("serves meanwhile", "v1", device.predicts())
        _sets(device, "+0")
        device.settles(2)

    return act


def _jumps_in_the_soak(offset: str) -> Act:
    def act(device: Device) -> None:
        _sets(device, "+0")
        device.start(environment=_clocked(device), SOAK_SECONDS="2", POLL_SECONDS="1")
        device.comes_to("soaking")
        _sets(device, offset)
        device.settles(2)
        _sets(device, "+0")

    return act


def _jumps_and_fails(device: Device) -> None:
    """It fails once while the clock is a year ahead; the clock is set right; nothing holds the next try back."""
    _sets(device, "+0")
    device.start("soaking=error:update.soak", environment=_clocked(device), POLL_SECONDS="1")
    device.comes_to("before-save-trying")
    _sets(device, "+365d")
    device.comes_to("soaking")
    device.says("update.soak")
    _sets(device, "+0")
    device.settles(2)


def _boxed(device: Device, offset: str) -> None:
    _sets(device, "+0")
    order = "probing=error:update.probe-failed/always"
    device.start(order, environment=_clocked(device), POLL_SECONDS="1")
    device.comes_to("before-save-trying")
    _sets(device, offset)
    device.waits(lambda: len([1 for _, p, _ in device.trace() if p == "probing"]) == 3, "three tries")
    device.says("update.probe-failed")
    device.kill()


def _box_ends(device: Device) -> None:
    _boxed(device, "+0")
    _sets(device, "+25h")
    device.start(environment=_clocked(device))
    device.settles(2)


def _box_stays(device: Device) -> None:
    _boxed(device, "+0")
    _sets(device, "+23h")
    device.start(environment=_clocked(device), POLL_SECONDS="1")
    device.answers()
    device.waits(lambda: len(device.plane.asked(device.name, "assignment")) > 6, "a few looks")


def _box_of_another_time(device: Device) -> None:
    """It is boxed while the clock is three days ahead; a day and an hour after the clock is right, it tries again."""
    _boxed(device, "+3d")
    _sets(device, "+25h")
    device.start(environment=_clocked(device))
    device.settles(2)


def _clock() -> list[Row]:
    kind = "clock"
    three = way("fetching → trying → idle", "fetching → trying → idle", "fetching → trying → idle")
    failed = way("fetching → trying → swapped → idle", FULL)
    found = [
        Row(kind, "start", "in 1971, until it is set right", FULL, "v2", _starts_at("-20000d", "")),
        Row(kind, "start", "a month behind, until it is set right", FULL, "v2", _starts_at("-30d", "")),
        Row(kind, "start", "a year ahead, until it is set right", FULL, "v2", _starts_at("+365d", "trust.expired")),
        Row(kind, "soak", "jumps a day back", FULL, "v2", _jumps_in_the_soak("-1d")),
        Row(kind, "soak", "jumps a year back", FULL, "v2", _jumps_in_the_soak("-365d"), committed=None),
        Row(kind, "soak", "jumps an hour ahead", FULL, "v2", _jumps_in_the_soak("+1h")),
        Row(kind, "soak", "jumps a year ahead", FULL, "v2", _jumps_in_the_soak("+365d"), committed=None),
        Row(kind, "a failed try", "a year ahead, then right: it is no reason to wait a year", failed, "v2",
            _jumps_and_fails),
        Row(kind, "penalty box", "23 hours later it is closed", cut(three, ""), "v1", _box_stays,
            debris=("bundle v2",)),
        Row(kind, "penalty box", "25 hours later it is open", cut(three, FULL), "v2", _box_ends),
        Row(kind, "penalty box", "closed three days ahead, then right: it opens a day later", cut(three, FULL), "v2",
            _box_of_another_time),
    ]  # fmt: skip
    return [_needing(row, "" if FAKETIME else NEEDS_CLOCK) for row in found]


# Certificates ---------------------------------------------------------------------------------------------------------


def _expired(device: Device) -> None:
    """Its certificate ended a day ago; the key is still the registered one."""
    folder, authority = device.state / "identity", device.plane.home.ca.folder
    old = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())
    key = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=8))
        .not_valid_after(now - timedelta(days=1))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    fresh = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    chain = (folder / "cert.pem").read_bytes().split(b"-----END CERTIFICATE-----\n", 1)[1]
    (folder / "cert.pem").write_bytes(fresh.public_bytes(serialization.Encoding.PEM) + chain)
    device.start(POLL_SECONDS="1")
    device.answers()
    device.expects("serves meanwhile", "v1", device.predicts())
    device.settles(2)


def _renews_and_dies(order: str) -> Act:
    """Five days on the certificate is to be renewed; it dies meanwhile; then it is given a bundle."""

    def act(device: Device) -> None:
        before = (device.state / "identity" / "cert.pem").read_bytes()
        _sets(device, "+5d")
        device.start(order, environment=_clocked(device))
        if order:
            device.dies()
            device.start(environment=_clocked(device))
        device.waits(lambda: (device.state / "identity" / "cert.pem").read_bytes() != before, "a renewal")
        device.stop()
        device.plane.assign(device.name, 2)
        device.start(environment=_clocked(device))
        device.settles(2)

    return act


def _certificates() -> list[Row]:
    point = "renewal of the certificate"
    killed = f"⚡ ⏹ {FULL}"
    found = [
        Row("clock", point, "five days on", f"⏹ {FULL}", "v2", _renews_and_dies(""), assigned=None),
        Row("SIGKILL", point, "before the key is written", killed, "v2", _renews_and_dies("file-begun(key.pem)"),
            assigned=None),
        Row("SIGKILL", point, "before the certificate is written", killed, "v2",
            _renews_and_dies("file-begun(cert.pem)"), assigned=None),
        Row("SIGKILL", point, "once the certificate is written", killed, "v2",
            _renews_and_dies("file-renamed(cert.pem)"), assigned=None),
    ]  # fmt: skip
    words = "expired a day ago: it proves its key and gets a new one"
    expired = Row("clock", "certificate", words, FULL, "v2", _expired)
    return [*(_needing(row, "" if FAKETIME else NEEDS_CLOCK) for row in found), expired]


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
    """Its state directory is a file system of 3 MB of its own."""
    device.commit(1)
    kept = device.folder / "kept"
    device.state.rename(kept)
    device.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(device.state)], check=True)
    device.at_end.append(lambda: subprocess.run(["umount", "-l", str(device.state)], check=False))
    shutil.copytree(kept, device.state, dirs_exist_ok=True)
    shutil.rmtree(kept)


def _fill(device: Device, leave: int = 0) -> Path:
    filler = device.state / "filler"
    with filler.open("wb") as f:
        try:
            while True:
                f.write(b"\0" * 4_096)
                f.flush()
        except OSError:
            pass
    if leave:
        os.truncate(filler, max(0, filler.stat().st_size - leave))
    return filler


def _really_full(leave: int, *, at_start: bool) -> Act:
    def act(device: Device) -> None:
        if at_start:
            filler = _fill(device, leave)
            device.start(POLL_SECONDS="1")
            device.answers()
        else:
            device.start(POLL_SECONDS="1")
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
        *(_needing(row, "" if CAN_MOUNT else NEEDS_MOUNT) for row in found),
    ]


def _needing(row: Row, what: str) -> Row:
    return replace(row, missing=what)
