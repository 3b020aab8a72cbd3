"""Crash test: rows that cut, fail and starve the control plane while it releases, revokes, re-signs and rolls out.

Rules: the state path is what devices would accept and what the database says, after the fault and after the same thing
was asked again; what serves is what devices would accept, or are told, in the end.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from . import bundles, desk
from .desk import ROLLOUT, Desk
from .device import RowError
from .row import Ending, Row, Stage
from .rows_clock import FAKETIME, NEEDS_CLOCK, under_another_clock
from .rows_world import CAN_MOUNT, NEEDS_MOUNT

Play = Callable[[Desk], tuple[str, str]]
Alone = Callable[[Stage], Ending]
V1, V2 = f"{bundles.NAME}@1", f"{bundles.NAME}@2"
RELEASE: Final = ("release", V2)
REVOKE: Final = ("release", "revoke", V2, "--reason", "it lies")
START: Final = ("rollout", "start", V2, "--no-labels", "--offline-after", "100000000")
#: The moments of a durable write.
MOMENTS: Final = {"begun": "half written", "written": "before its rename", "renamed": "after its rename"}


def rows() -> list[Row]:
    """The rows of this file."""
    return [*_releases(), *_revocations(), *_renewals(), *_starts(), *_advances(), *_interventions(), *_disks()]


def on(make: Callable[[Path], None], clean: Callable[[Desk], object] | None, play: Play) -> Alone:
    """Play on a copy of a home; what is there afterwards that `clean` alone would not have left is debris."""

    def alone(stage: Stage) -> Ending:
        name = make.__name__.replace("_", "-")
        begin = desk.template(stage.folder.parent, name, make)
        d = Desk(stage.folder, begin)
        try:
            path, serves = play(d)
            d.down()
            wanted = _names(begin) if clean is None else _clean(stage.folder.parent, name, begin, clean)
            debris = tuple(sorted(d.names() - wanted)) + tuple(f"no {n}" for n in sorted(wanted - d.names()))
            return Ending(path, serves, debris)
        finally:
            d.close()

    return alone


def _names(home: Path) -> set[str]:
    return {p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()} - {
        "lightship.db-wal", "lightship.db-shm", "lightship.db-journal",
    }  # fmt: skip


def _clean(folder: Path, name: str, begin: Path, act: Callable[[Desk], object]) -> set[str]:
    """The names of a home where `act` was done and nothing disturbed it."""

    def make(path: Path) -> None:
        undisturbed = Desk(path.with_suffix(".work"), begin)
        act(undisturbed)
        undisturbed.down()
        undisturbed.path.rename(path)

    return _names(desk.template(folder, f"{name}-after-{act.__name__.strip('_')}", make))


# Releases and revocations ---------------------------------------------------------------------------------------------


def _release(d: Desk) -> None:
    d.does(*RELEASE)


def _revoke(d: Desk) -> None:
    d.does(*REVOKE)


def _twice(words: tuple[str, ...], verb: str, upset: Callable[[Desk], None]) -> Play:
    """The command meets a fault; it is given again."""

    def play(d: Desk) -> tuple[str, str]:
        upset(d)
        first = f"{d.listed()}, {d.state(2)}"
        if words == REVOKE and d.state(2) == "revoked":
            d.is_refused(*words, code="registry.state")
        else:
            d.does(*words)
        if (events := d.events(verb)) != (1 if verb == "model.revoke" else 2):
            message = f"{verb} is audited {events} times"
            raise RowError(message)
        return f"{first} ⚡ {d.listed()}, {d.state(2)}", d.listed()

    return play


def _killed(words: tuple[str, ...], fail: str) -> Callable[[Desk], None]:
    return lambda d: d.dies(*words, fail=fail)


def _refused(words: tuple[str, ...], code: str, fail: str) -> Callable[[Desk], None]:
    return lambda d: d.is_refused(*words, code=code, fail=fail)


def _releases() -> list[Row]:
    old, new, done = "v1, registered", "v1 v2, registered", "v1 v2, released"
    files = {"*.zst": "bundle file", "*.releases.json": "release list", "*.snapshot.json": "snapshot",
             "timestamp.json": "timestamp"}  # fmt: skip

    def row(fault: str, point: str, words: str, after: str, upset: Callable[[Desk], None]) -> Row:
        play = on(desk.two_versions, _release, _twice(RELEASE, "model.release", upset))
        return Row(fault, f"release: {point}", words, f"{after} ⚡ {done}", "v1 v2", alone=play)

    found = [
        row("SIGKILL", what, words, new if (glob, moment) == ("timestamp.json", "renamed") else old,
            _killed(RELEASE, f"file-{moment}({glob})"))
        for glob, what in files.items() for moment, words in MOMENTS.items()
    ]  # fmt: skip
    found += [
        row("SIGKILL", "database", "before its commit", new, _killed(RELEASE, "before-commit")),
        row("SIGKILL", "database", "after its commit", done, _killed(RELEASE, "after-commit")),
    ]
    for glob, what in files.items():
        for fault, action, code in (
            ("disk full", "enospc", "storage.full"),
            ("read-only", "erofs", "storage.unwritable"),
        ):
            found.append(row(fault, what, "", old, _refused(RELEASE, code, f"file-begun({glob})={action}")))
    return found


def _revocations() -> list[Row]:
    old, new, done = "v1 v2, released", "v1, released", "v1, revoked"
    files = {"*.releases.json": "release list", "*.snapshot.json": "snapshot", "timestamp.json": "timestamp"}

    def row(fault: str, point: str, words: str, after: str, upset: Callable[[Desk], None]) -> Row:
        play = on(desk.two_releases, _revoke, _twice(REVOKE, "model.revoke", upset))
        return Row(fault, f"revoke: {point}", words, f"{after} ⚡ {done}", "v1", alone=play)

    found = [
        row("SIGKILL", what, words, new if (glob, moment) == ("timestamp.json", "renamed") else old,
            _killed(REVOKE, f"file-{moment}({glob})"))
        for glob, what in files.items() for moment, words in MOMENTS.items()
    ]  # fmt: skip
    return [
        *found,
        row("SIGKILL", "database", "before its commit", new, _killed(REVOKE, "before-commit")),
        row("SIGKILL", "database", "after its commit", done, _killed(REVOKE, "after-commit")),
        row("disk full", "snapshot", "", old, _refused(REVOKE, "storage.full", "file-begun(*.snapshot.json)=enospc")),
    ]


# Re-signing -----------------------------------------------------------------------------------------------------------


def _later() -> dict[str, str]:
    """Four days from now: past half of the life of snapshot and timestamp."""
    return {**under_another_clock(desk.PACKAGES), "FAKETIME": "+4d"}


def _renew(d: Desk) -> None:
    before = d.signed("timestamp")
    d.up(more=_later())
    d.waits(lambda: d.signed("timestamp") == before + 1 and d.is_up(), "new metadata")


def _renewed(fail: str) -> Play:
    def play(d: Desk) -> tuple[str, str]:
        before = d.signed("snapshot"), d.signed("timestamp")

        def ahead() -> str:
            return f"snapshot +{d.signed('snapshot') - before[0]} timestamp +{d.signed('timestamp') - before[1]}"

        d.up(fail, more=_later())
        if "=" in fail:
            d.waits(d.warns, "a warning")
            first = ahead()
            d.down()
        else:
            d.up_dies()
            first = ahead()
        d.listed()
        d.up(more=_later())
        d.waits(lambda: d.signed("timestamp") == before[1] + 1 and d.is_up(), "new metadata")
        return f"{first} ⚡ {ahead()}", d.listed()

    return play


def _renewals() -> list[Row]:
    old, done = "snapshot +0 timestamp +0", "snapshot +1 timestamp +1"

    def row(fault: str, what: str, words: str, after: str, fail: str) -> Row:
        play = on(desk.two_versions, _renew, _renewed(fail))
        missing = "" if FAKETIME else NEEDS_CLOCK
        return Row(fault, f"re-sign: {what}", words, f"{after} ⚡ {done}", "v1", alone=play, missing=missing)

    return [
        row("SIGKILL", "snapshot", "before its rename", old, "file-written(*.snapshot.json)"),
        row("SIGKILL", "snapshot", "after its rename", old, "file-renamed(*.snapshot.json)"),
        row("SIGKILL", "timestamp", "half written", old, "file-begun(timestamp.json)"),
        row("SIGKILL", "timestamp", "before its rename", old, "file-written(timestamp.json)"),
        row("disk full", "snapshot", "", old, "file-begun(*.snapshot.json)=enospc/always"),
        row("read-only", "timestamp", "", old, "file-begun(timestamp.json)=erofs/always"),
    ]


# Rollouts -------------------------------------------------------------------------------------------------------------


def _started(upset: Callable[[Desk], None]) -> Play:
    def play(d: Desk) -> tuple[str, str]:
        upset(d)
        first = d.rollout()
        if first == "none":
            d.does(*START)
        else:
            d.is_refused(*START, code="fleet.group-busy")
        return f"{first} ⚡ {d.rollout()}", d.told()

    return play


def _starts() -> list[Row]:
    def row(words: str, after: str, fail: str) -> Row:
        play = on(desk.two_releases, None, _started(_killed(START, fail)))
        return Row("SIGKILL", "rollout: start", words, f"{after} ⚡ running", "– – –", alone=play)

    return [row("before its commit", "none", "before-commit"), row("after its commit", "running", "after-commit")]


def _completed(d: Desk) -> None:
    """The devices do as they are told, until the rollout is over."""

    def over() -> bool:
        d.follow()
        return d.rollout() == "completed"

    d.waits(over, "a completed rollout")


def _advanced(fail: str) -> Play:
    """`lightship up` is killed while it rolls out, and started again."""

    def play(d: Desk) -> tuple[str, str]:
        d.up(fail)
        while not d.is_dead() and ("completed" in fail or "promoting" in fail):
            d.follow()
        d.up_dies()
        first = f"{d.rollout()}, {_counted(d.told())}, {d.champion()}"
        d.up()
        _completed(d)
        return f"{first} ⚡ {d.rollout()}, {_counted(d.told())}, {d.champion()}", d.told()

    return play


def _up_once(d: Desk) -> None:
    d.up()
    d.waits(lambda: d.is_up() and d.told() != "– – –", "a tick")


def _counted(told: str) -> str:
    return f"{len([t for t in told.split() if t != '–'])} told"


def _advances() -> list[Row]:
    done = "completed, 3 told, v2"

    def row(point: str, words: str, after: str, fail: str) -> Row:
        play = on(desk.a_rollout, _up_once, _advanced(fail))
        return Row("SIGKILL", f"rollout: {point}", words, f"{after} ⚡ {done}", "v2#1 v2#1 v2#1", alone=play)

    return [
        row("first wave", "decided, nothing written", "running, 0 told, v1", "advancing"),
        row("first wave", "before the first assignment", "running, 0 told, v1", "assigning"),
        row("first wave", "between two assignments", "running, 0 told, v1", "assigning@2"),
        row("first wave", "before its commit", "running, 0 told, v1", "assigning>before-commit"),
        row("first wave", "after its commit", "running, 2 told, v1", "assigning>after-commit"),
        row("promotion", "decided, nothing written", "running, 3 told, v1", "advancing(completed)"),
        row("promotion", "before the alias moves", "running, 3 told, v1", "promoting"),
        row("promotion", "before its commit", "running, 3 told, v1", "promoting>before-commit"),
        row("promotion", "after its commit", "completed, 3 told, v2", "promoting>after-commit"),
    ]


def _first_wave_runs(d: Desk) -> None:
    """Two devices are told, and run it; then `lightship up` is stopped."""
    d.up()
    d.waits(lambda: _counted(d.told()) == "2 told", "the first wave")
    d.down()
    d.follow()


def _intervened(words: tuple[str, ...], fail: str, *, before: tuple[str, ...] = ()) -> Play:
    """An operator's command is killed, and given again; where it had worked, that is said."""

    def play(d: Desk) -> tuple[str, str]:
        if before:
            d.does(*before)
        d.dies(*words, fail=fail)
        first = d.rollout()
        if fail == "before-commit":
            d.does(*words)
        else:
            d.is_refused(*words, code="fleet.rollout-state")
        return f"{first} ⚡ {d.rollout()}", d.told()

    return play


def _taken_back(fail: str) -> Play:
    """It is aborted after the first wave; `lightship up` is killed while it takes the devices back."""

    def play(d: Desk) -> tuple[str, str]:
        _first_wave_runs(d)
        d.does("rollout", "abort", ROLLOUT, "--reason", "it lies")
        d.up(fail)
        d.up_dies()
        first = f"{d.rollout()}, {sum('v1' in t for t in d.told().split())} told back"
        d.up()

        def over() -> bool:
            d.follow()
            return d.rollout() == "rolled-back"

        d.waits(over, "the way back")
        return f"{first} ⚡ {d.rollout()}, {sum('v1' in t for t in d.told().split())} told back", d.champion()

    return play


def _interventions() -> list[Row]:
    pause = ("rollout", "pause", ROLLOUT)
    resume = ("rollout", "resume", ROLLOUT)
    abort = ("rollout", "abort", ROLLOUT)

    def row(point: str, words: str, path: str, play: Play, serves: str = "– – –") -> Row:
        alone = on(desk.a_rollout, _up_once if point == "rollback" else None, play)
        return Row("SIGKILL", f"rollout: {point}", words, path, serves, alone=alone)

    early, late = "before-commit", "after-commit"
    back = "rolled-back, 2 told back"
    return [
        row("pause", "before its commit", "running ⚡ paused", _intervened(pause, early)),
        row("pause", "after its commit", "paused ⚡ paused", _intervened(pause, late)),
        row("resume", "before its commit", "paused ⚡ running", _intervened(resume, early, before=pause)),
        row("resume", "after its commit", "running ⚡ running", _intervened(resume, late, before=pause)),
        row("abort", "before its commit", "running ⚡ aborted", _intervened(abort, early)),
        row("abort", "after its commit", "aborted ⚡ aborted", _intervened(abort, late)),
        row("rollback", "before the first assignment", f"rolling-back, 0 told back ⚡ {back}",
            _taken_back("assigning"), "v1"),
        row("rollback", "between two assignments", f"rolling-back, 0 told back ⚡ {back}",
            _taken_back("assigning@2"), "v1"),
        row("rollback", "before its commit", f"rolling-back, 0 told back ⚡ {back}",
            _taken_back("assigning>before-commit"), "v1"),
        row("rollback", "after its commit", f"rolling-back, 2 told back ⚡ {back}",
            _taken_back("assigning>after-commit"), "v1"),
    ]  # fmt: skip


# Disk -----------------------------------------------------------------------------------------------------------------


def _on_a_small_disk(d: Desk) -> Path:
    """The home is a file system of its own."""
    kept = d.folder / "kept"
    d.path.rename(kept)
    d.path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(d.path)], check=True)
    d.at_end.append(lambda: subprocess.run(["umount", "-l", str(d.path)], check=False))
    subprocess.run(["cp", "-a", f"{kept}/.", str(d.path)], check=True)
    return d.path


def _remount(path: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(path)], check=True)


def _fill(path: Path) -> Path:
    filler = path / "filler"
    with filler.open("wb", buffering=0) as f:
        try:
            while True:
                f.write(b"\0" * 4_096)
        except OSError:
            return filler


def _full(words: tuple[str, ...]) -> Callable[[Desk], None]:
    def upset(d: Desk) -> None:
        filler = _fill(_on_a_small_disk(d))
        try:
            d.is_refused(*words, code="storage.full")
        finally:
            filler.unlink()

    return upset


def _unwritable(words: tuple[str, ...]) -> Callable[[Desk], None]:
    def upset(d: Desk) -> None:
        path = _on_a_small_disk(d)
        _remount(path, "ro")
        try:
            d.is_refused(*words, code="storage.unwritable")
        finally:
            _remount(path, "rw")

    return upset


def _full_while_it_rolls_out(d: Desk) -> tuple[str, str]:
    path = _on_a_small_disk(d)
    d.up()
    d.waits(lambda: _counted(d.told()) == "2 told" and d.is_up(), "the first wave")
    filler = _fill(path)
    d.waits(d.warns, "a warning")
    first = f"{d.rollout()}, {_counted(d.told())}"
    filler.unlink()
    _completed(d)
    return f"{first} ⚡ {d.rollout()}, {_counted(d.told())}", d.told()


def _disks() -> list[Row]:
    missing = "" if CAN_MOUNT else NEEDS_MOUNT
    released = on(desk.two_versions, _release, _twice(RELEASE, "model.release", _full(RELEASE)))
    refused = on(desk.two_versions, _release, _twice(RELEASE, "model.release", _unwritable(RELEASE)))
    started = on(desk.two_releases, None, _started(_full(START)))
    not_started = on(desk.two_releases, None, _started(_unwritable(START)))
    rolled = on(desk.a_rollout, _up_once, _full_while_it_rolls_out)
    done = "v1 v2, released"
    return [
        Row("disk full", "release: home", "really full", f"v1, registered ⚡ {done}", "v1 v2", alone=released,
            missing=missing),
        Row("read-only", "release: home", "remounted so", f"v1, registered ⚡ {done}", "v1 v2", alone=refused,
            missing=missing),
        Row("disk full", "rollout: start", "really full", "none ⚡ running", "– – –", alone=started, missing=missing),
        Row("read-only", "rollout: start", "remounted so", "none ⚡ running", "– – –", alone=not_started,
            missing=missing),
        Row("disk full", "rollout: under way", "really full, then freed", "running, 2 told ⚡ completed, 3 told",
            "v2#1 v2#1 v2#1", alone=rolled, missing=missing),
    ]  # fmt: skip
