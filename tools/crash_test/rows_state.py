"""Crash test: rows in which the device finds its own state lost, damaged, out of date, or half way between two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .device import Device
from .row import FULL, NOBODY, Row, cut, way

Act = Callable[[Device], None]
SOCKET_OF_A_LATER_AGENT: Final = {"schema": 99, "mood": "calm"}


def rows() -> list[Row]:
    """The rows of this file."""
    return [*_update_json(), *_bundles(), *_small_files(), *_outbox(), *_trust(), *_identity()]


def finding(damage: Act, *, first: str = "") -> Act:
    """It was stopped, its files were damaged, it starts; `first` is what it serves before it has reached anybody."""

    def act(device: Device) -> None:
        damage(device)
        if first:
            shut = device.plane.order(device.name, "/", "status", at=503)
            device.start(POLL_SECONDS="1")
            device.answers()
            device.expects("serves before it has reached anybody", first, device.predicts())
            shut.lifted.set()
        else:
            device.start(POLL_SECONDS="1")
        device.settles(2)

    return act


def written(name: str, content: bytes) -> Act:
    """That file has that content."""

    def damage(device: Device) -> None:
        path = device.state / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return damage


def removed(*names: str) -> Act:
    """Those files are gone."""

    def damage(device: Device) -> None:
        for name in names:
            (device.state / name).unlink()

    return damage


def changed(**fields: Any) -> Act:
    """update.json has other fields; None removes one."""

    def damage(device: Device) -> None:
        path = device.state / "update.json"
        state = {**json.loads(path.read_bytes()), **fields}
        path.write_bytes(json.dumps({k: v for k, v in state.items() if v is not None}).encode())

    return damage


def both(*damages: Act) -> Act:
    """One after the other."""

    def damage(device: Device) -> None:
        for one in damages:
            one(device)

    return damage


# update.json ----------------------------------------------------------------------------------------------------------


def _cut_short(device: Device) -> None:
    path = device.state / "update.json"
    path.write_bytes(path.read_bytes()[:-20])


def _a_folder_instead(device: Device) -> None:
    path = device.state / "update.json"
    path.unlink()
    path.mkdir()


def _left_in(phase: str) -> Act:
    """A state as an agent that was cut in that phase leaves it, with its candidate."""

    def damage(device: Device) -> None:
        path = device.state / "update.json"
        state = json.loads(path.read_bytes())
        candidate = {**state["current"], "version": 2, "sha256": device.plane.versions[2].digest}
        candidate |= {"path": device.plane.versions[2].path, "length": device.plane.versions[2].length, "seq": 1}
        path.write_bytes(json.dumps({**state, "phase": phase, "candidate": candidate, "floor": 1}).encode())

    return damage


def _in_an_older_schema(device: Device) -> None:
    """As the first release wrote it: no schema, no penalties, no last code."""
    changed(schema=None, penalties=None, last_code=None, previous=None, candidate=None)(device)


def _update_json() -> list[Row]:
    kind, point = "stored state", "update.json"
    aside = ("update.json.broken",)
    noise = bytes(range(256))
    damaged = {
        "empty": written(point, b""),
        "its last 20 bytes are missing": _cut_short,
        "256 bytes of noise": written(point, noise),
        "a list instead of an object": written(point, b"[]"),
        "a phase that does not exist": changed(phase="dancing"),
        "a floor that is a word": changed(floor="seven"),
        "a folder in its place": _a_folder_instead,
        "nested a hundred thousand times": written(point, b"[" * 100_000),
    }
    readable = {
        "gone": removed(point),
        "of an older agent: fields are missing": _in_an_older_schema,
        "of a later agent: fields nobody knows": changed(**SOCKET_OF_A_LATER_AGENT),
    }
    lost = both(written(point, b""), written("committed.json", b""))
    return [
        *(Row(kind, point, words, FULL, "v2", finding(damage, first="v1"), debris=aside)
          for words, damage in damaged.items() if damage is not _a_folder_instead),
        Row(kind, point, "a folder in its place", FULL, "v2", finding(_a_folder_instead, first="v1")),
        *(Row(kind, point, words, FULL, "v2", finding(damage, first="v1")) for words, damage in readable.items()),
        Row(kind, "update.json and its copy", "both empty", FULL, "v2", finding(lost, first="serving.no-model"),
            debris=("committed.json.broken", "update.json.broken")),
        Row(kind, point, "`trying` without a candidate", way("idle", FULL), "v2",
            finding(changed(phase="trying", candidate=None), first="v1")),
        *(Row(kind, point, f"of an agent that was cut in `{phase}`", way("idle", FULL), "v2",
              finding(_left_in(phase), first="v1")) for phase in ("fetching", "trying", "swapped", "reaching")),
    ]  # fmt: skip


# Bundles --------------------------------------------------------------------------------------------------------------


def _altered(*versions: int) -> Act:
    def damage(device: Device) -> None:
        for version in versions:
            path = device.bundle(version)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(bytes(data))

    return damage


def _two(device: Device) -> None:
    device.commit(1, previous=3)


def _bundles() -> list[Row]:
    kind = "stored state"
    current, previous = "bundle that is current", "bundle that is previous"

    def gone(version: int) -> Act:
        def damage(device: Device) -> None:
            device.bundle(version).unlink()

        return damage

    def emptied(version: int) -> Act:
        def damage(device: Device) -> None:
            device.bundle(version).write_bytes(b"")

        return damage

    def staged(device: Device) -> None:
        (device.state / "staging").mkdir(exist_ok=True)
        (device.state / "staging" / f"{device.plane.versions[2].digest}.part").write_bytes(b"noise" * 100)
        (device.state / "staging" / f"{'0' * 64}.part").write_bytes(b"of another time")

    def half_stored(device: Device) -> None:
        (device.state / "bundles" / f".{device.plane.versions[2].digest}.tar.99999.tmp").write_bytes(b"half")
        (device.state / ".update.json.99999.tmp").write_bytes(b"half")

    return [
        Row(kind, current, "gone, and none before it", way("idle", FULL), "v2",
            finding(gone(1), first="serving.no-model")),
        Row(kind, current, "gone; the one before it serves", way("idle", FULL), "v2", finding(gone(1), first="v3"),
            begin=_two),
        Row(kind, current, "a bit has changed; the one before it serves", way("idle", FULL), "v2",
            finding(_altered(1), first="v3"), begin=_two),
        Row(kind, current, "empty; the one before it serves", way("idle", FULL), "v2", finding(emptied(1), first="v3"),
            begin=_two),
        Row(kind, previous, "gone", way("idle", FULL), "v2", finding(gone(3), first="v1"), begin=_two),
        Row(kind, "both bundles", "a bit has changed in each", way("idle", FULL), "v2",
            finding(_altered(1, 3), first="serving.no-model"), begin=_two),
        Row(kind, "staging", "a damaged download of the same bundle, and one of another", way("fetching", "idle", FULL),
            "v2", finding(staged)),
        Row(kind, "temporary files", "of writers that were killed", FULL, "v2", finding(half_stored)),
    ]  # fmt: skip


# Small files ----------------------------------------------------------------------------------------------------------


def _small_files() -> list[Row]:
    kind = "stored state"
    return [
        *(Row(kind, name, words, FULL, "v2", finding(written(name, content), first="v1"))
          for name in ("boot", "windows.json")
          for words, content in (("empty", b""), ("noise", b"\xff\xfe\x00"), ("a number beyond all", b"9" * 400))),
        Row("SIGKILL", "windows.json", "before its rename", cut("", FULL), "v2",
            _killed_when("file-written(windows.json)")),
        Row("SIGKILL", "boot", "before its rename", cut("", FULL), "v2", _killed_when("file-written(boot)")),
        Row("SIGKILL", "committed.json", "before its rename", cut(FULL, ""), "v2",
            _killed_when("file-written(committed.json)"), committed=0),
        Row("disk full", "windows.json", "at every write", FULL, "v2",
            _failing("file-begun(windows.json)=enospc/always")),
        Row("disk full", "committed.json", "at every write", FULL, "v2",
            _failing("file-begun(committed.json)=enospc/always")),
        Row("read-only", "boot", "at the start", FULL, "v2", _failing("file-begun(boot)=erofs")),
    ]  # fmt: skip


def _killed_when(order: str) -> Act:
    def act(device: Device) -> None:
        # What it does on the side must not be faster than what this row is about.
        device.start(order)
        device.dies()
        device.start()
        device.settles(2)

    return act


def _failing(order: str) -> Act:
    def act(device: Device) -> None:
        device.start(order, POLL_SECONDS="1")
        device.settles(2)

    return act


# Outbox ---------------------------------------------------------------------------------------------------------------


def _with_reports(damage: Callable[[Path], object]) -> Act:
    """It fails to report anything, is killed with a full outbox, and finds the outbox damaged."""

    def act(device: Device) -> None:
        deaf = device.plane.order(device.name, "/telemetry", "status", at=503)
        device.start()
        device.settles(2)
        device.waits(lambda: device.status()["link"]["outbox_records"] > 5, "reports that wait")
        device.kill()
        deaf.lifted.set()
        damage(sorted((device.state / "outbox").rglob("*.seg"))[-1])
        device.start()
        device.settles(2)

    return act


def _tear(segment: Path) -> None:
    # Zeros follow the last whole record: a segment is made at its full size. One more was being written.
    with segment.open("r+b") as f:
        f.seek(len(segment.read_bytes().rstrip(b"\0")))
        f.write(bytes(range(200, 230)))


def _outbox() -> list[Row]:
    done = cut(FULL, "")
    torn = "outbox, with what was not yet sent"
    return [
        Row("stored state", torn, "whole", done, "v2", _with_reports(lambda _: None)),
        Row("stored state", torn, "torn in its last record", done, "v2", _with_reports(_tear)),
        Row("stored state", torn, "empty: what was in it is lost", done, "v2",
            _with_reports(lambda s: s.write_bytes(b"")), committed=0),
        Row("stored state", torn, "noise: what was in it is lost", done, "v2",
            _with_reports(lambda s: s.write_bytes(bytes(range(256)) * 8)), committed=0),
        Row("stored state", torn, "its folder is gone", done, "v2",
            _with_reports(lambda s: shutil.rmtree(s.parent)), committed=0),
    ]  # fmt: skip


# Trust ----------------------------------------------------------------------------------------------------------------


def _after_an_update(damage: Act) -> Act:
    """It has updated once, so its metadata cache is full; the power is cut; then comes another update."""

    def act(device: Device) -> None:
        device.start()
        device.settles(2)
        device.kill()
        damage(device)
        device.plane.assign(device.name, 3)
        device.start()
        device.settles(3)

    return act


def _emptied(*names: str) -> Act:
    def damage(device: Device) -> None:
        for name in names:
            for path in (device.state).glob(name):
                if path.is_file():
                    path.resolve().write_bytes(b"")

    return damage


def _trust() -> list[Row]:
    done = cut(FULL, FULL)
    files = {
        "timestamp": ("tuf/timestamp.json",),
        "snapshot": ("tuf/snapshot.json",),
        "timestamp and snapshot": ("tuf/timestamp.json", "tuf/snapshot.json"),
        "targets": ("tuf/targets.json",),
        "release list": ("tuf/releases*.json", "tuf/bins*.json"),
        "root": ("tuf/root.json", "tuf/root_history/*.json"),
        "floors": ("tuf/floors",),
        "every file": ("tuf/*", "tuf/root_history/*"),
    }
    return [
        *(Row("power cut", f"metadata cache: {words}", "zero length", done, "v3", _after_an_update(_emptied(*names)),
              committed=None) for words, names in files.items()),
        Row("power cut", "latest authenticated time", "zero length", done, "v3",
            _after_an_update(_emptied("latest-time")), committed=None),
        Row("stored state", "metadata cache", "gone", done, "v3",
            _after_an_update(lambda d: shutil.rmtree(d.state / "tuf")), committed=None),
    ]  # fmt: skip


# Identity -------------------------------------------------------------------------------------------------------------


def _refuses_to_start(damage: Act, name: str) -> Act:
    """It says what is wrong, changes nothing, and starts when the file is put back."""

    def act(device: Device) -> None:
        path = device.state / "identity" / name
        good = path.read_bytes()
        damage(device)
        device.start()
        status = device.ends()
        device.expects("exit status", 26, status)
        device.expects("it names the code", True, "storage.corrupt" in device.last_words())
        path.write_bytes(good)
        device.start()
        device.settles(2)

    return act


def _between_two_identities(device: Device) -> None:
    folder = device.state / "identity"
    shutil.copytree(folder, device.state / "identity.new")
    folder.rename(device.state / "identity.old")


def _leftover_identity(device: Device) -> None:
    shutil.copytree(device.state / "identity", device.state / "identity.new")
    (device.state / "identity.new" / "key.pem").write_bytes(b"half")


def _no_identity(device: Device) -> None:
    away = device.folder / "away"
    (device.state / "identity").rename(away)
    device.start()
    device.expects("exit status", 21, device.ends())
    device.expects("it names the code", True, "enrol.not-enrolled" in device.last_words())


def _identity() -> list[Row]:
    kind = "stored state"
    names = ("identity.json", "key.pem", "cert.pem", "ca.pem")
    stopped = cut("", FULL, by="⏹")
    return [
        *(Row(kind, f"identity/{name}", "zero length: it says so, and starts when it is put back", stopped, "v2",
              _refuses_to_start(written(f"identity/{name}", b""), name)) for name in names),
        Row(kind, "identity", "cut between the two renames of a renewal", FULL, "v2", finding(_between_two_identities)),
        Row(kind, "identity", "half of a new one beside it", FULL, "v2", finding(_leftover_identity)),
        Row(kind, "identity", "gone: it says how to enrol", "", NOBODY, _no_identity),
    ]  # fmt: skip
