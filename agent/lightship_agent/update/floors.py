"""Update: the versions below which signed metadata is refused, whatever became of the metadata cache.

    <state>/tuf/floors    the highest versions that verified, and in whose names

The TUF client compares what it gets with what lies in its cache, and a power cut may leave that cache empty: then an
old list, still unexpired, would be taken for news. So what was once seen is kept here too, durably.

Rules:
* a floor belongs to the key set (key ids and threshold) of the role that states the version: timestamp states its own
  and the snapshot's, snapshot states those of targets and of every delegated role;
* new keys start new floors, and only new keys do: an attacker who drove versions to the sky with a stolen key is
  recovered from by rotating it, as the specification says (5.3.11);
* the root's version never goes down, for its chain can't be driven anywhere without the root keys; another pinned root
  starts everything anew;
* a file that can't be read counts as absent: the cache still guards, and an unreachable device must not need a visitor.

Source: The Update Framework specification 1.0, 5.3 to 5.6.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import msgspec

from lightship_agent.contract.codes import TrustError
from lightship_agent.files import write_durably

log = logging.getLogger(__name__)

#: No suffix: every `.json` in the folder is signed metadata.
FILE: Final = "floors"
_MAX_FILE: Final = 1 << 20  # bytes


class Stated(msgspec.Struct, frozen=True, kw_only=True):
    """Versions that one role stated, by role name, and the key set it was bound to then."""

    keys: str = ""
    versions: dict[str, int] = {}


class Floors(msgspec.Struct, frozen=True, kw_only=True):
    """What one refresh saw, or the highest of all that was seen."""

    anchor: str = ""  # sha256 of the pinned root
    root: int = 0
    by_timestamp: Stated = Stated()  # of timestamp and snapshot
    by_snapshot: Stated = Stated()  # of targets and every delegated role


def key_set(keyids: list[str], threshold: int) -> str:
    """The name of a role's key set: the same keys and threshold in any order are the same set."""
    return f"{threshold}:{','.join(sorted(keyids))}"


def check(floors: Floors, seen: Floors) -> None:
    """Refuse what is below a floor that still holds.

    Raises:
        TrustError: trust.rollback.
    """
    if floors.anchor != seen.anchor:
        return
    if seen.root < floors.root:
        raise _below("root", floors.root, seen.root)
    for floor, found in ((floors.by_timestamp, seen.by_timestamp), (floors.by_snapshot, seen.by_snapshot)):
        if floor.keys != found.keys:
            continue
        for role, version in sorted(floor.versions.items()):
            if found.versions.get(role, 0) < version:
                raise _below(role, version, found.versions.get(role))


def raised(floors: Floors, seen: Floors) -> Floors:
    """The floors after `seen` was accepted."""
    if floors.anchor != seen.anchor:
        return seen
    return Floors(
        anchor=seen.anchor,
        root=max(floors.root, seen.root),
        by_timestamp=_raised(floors.by_timestamp, seen.by_timestamp),
        by_snapshot=_raised(floors.by_snapshot, seen.by_snapshot),
    )


def _raised(floor: Stated, found: Stated) -> Stated:
    if floor.keys != found.keys:
        return found
    roles = sorted(floor.versions.keys() | found.versions.keys())
    highest = {role: max(floor.versions.get(role, 0), found.versions.get(role, 0)) for role in roles}
    return Stated(keys=found.keys, versions=highest)


def _below(role: str, floor: int, found: int | None) -> TrustError:
    what = "it is no longer listed" if found is None else f"version {found} was shown"
    message = f"{role[:120]}: version {floor} was accepted before, now {what}."
    return TrustError("trust.rollback", message, remedy="An old list is being replayed, or the server was set back.")


class FloorFile:
    """The floors on disk."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self.path = folder / FILE

    def load(self) -> Floors:
        """The stored floors; none, where there is nothing that can be read."""
        try:
            with self.path.open("rb") as f:
                return msgspec.json.decode(f.read(_MAX_FILE), type=Floors)
        except FileNotFoundError:
            return Floors()
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            log.warning("update: the version floors in %s can't be read and start anew: %s", self.path, e)
            return Floors()

    def accept(self, seen: Floors) -> None:
        """Refuse `seen` where it is below a floor; otherwise it is the floor, durably, from now on.

        Raises:
            TrustError: trust.rollback; nothing is written.
            StorageError: storage.full, storage.unwritable.
        """
        floors = self.load()
        check(floors, seen)
        after = raised(floors, seen)
        if after != floors:
            write_durably(self.path, msgspec.json.encode(after))
