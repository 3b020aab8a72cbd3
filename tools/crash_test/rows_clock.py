"""Crash test: rows in which the device's clock is wrong, or its certificate runs out."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from .device import PACKAGES, Device
from .row import FULL, PHASES, Row, cut, needing, until, way

Act = Callable[[Device], None]
#: Where distributions put it. It changes what a process takes for the time of day, while it runs.
FAKETIME: Final = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


def rows() -> list[Row]:
    """The rows of this file."""
    return [*_clock(), *_certificates()]


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


def _jumps_while_it_is_down(phase: str, offset: str) -> Act:
    """It is killed on entering a state; when it comes back its clock is another, which is set right later."""

    def act(device: Device) -> None:
        serves = "v2" if phase == "idle" else "v1"
        _sets(device, "+0")
        device.start(f"after-save-{phase}", environment=_clocked(device), POLL_SECONDS="1")
        device.dies()
        _sets(device, offset)
        device.start(environment=_clocked(device), POLL_SECONDS="1")
        device.answers()
        device.expects("serves meanwhile", serves, device.predicts())
        if offset.startswith("+"):
            device.waits(lambda: device.is_degraded("trust.expired"), "trust.expired")
            device.expects("serves when all metadata has expired", serves, device.predicts())
            _sets(device, "+0")
        device.settles(2)
        _sets(device, "+0")

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
    """It is boxed while the clock is three days ahead; a day and an hour after it was set right, it tries again."""
    _boxed(device, "+3d")
    _sets(device, "+0")
    device.start(environment=_clocked(device), POLL_SECONDS="1")
    device.comes_to("after-save-idle")
    device.waits(lambda: len(device.plane.asked(device.name, "assignment")) > 6, "a few looks")
    device.kill()
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
        *(Row(kind, f"entering `{phase}`", f"killed there, and back with a clock that is {words}",
              cut(until(phase, inclusive=True), "" if phase == "idle" else way("idle", FULL)), "v2",
              _jumps_while_it_is_down(phase, offset), committed=None)
          for phase in PHASES for offset, words in {"-365d": "a year behind", "+365d": "a year ahead"}.items()),
        Row(kind, "a failed try", "a year ahead, then right: it is no reason to wait a year", failed, "v2",
            _jumps_and_fails),
        Row(kind, "penalty box", "23 hours later it is closed", cut(three, ""), "v1", _box_stays,
            debris=("bundle v2",)),
        Row(kind, "penalty box", "25 hours later it is open", cut(three, FULL), "v2", _box_ends),
        Row(kind, "penalty box", "closed three days ahead, then right: it opens a day later",
            cut(three, "idle", FULL), "v2", _box_of_another_time),
    ]  # fmt: skip
    return [needing(row, "" if FAKETIME else NEEDS_CLOCK) for row in found]


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
    return [*(needing(row, "" if FAKETIME else NEEDS_CLOCK) for row in found), expired]
